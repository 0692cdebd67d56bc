"""Counting per address: exact, bounded, by the monotonic clock."""

from __future__ import annotations

import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.web.rates import BoundedWindows, Rate, counted_as


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_W7_the_request_after_the_last_one_allowed_is_refused(clock):
    rate = Rate(3, clock=clock)
    standings = [rate.hit("192.0.2.1") for _ in range(4)]
    assert [standing.allowed for standing in standings] == [True, True, True, False]
    assert [standing.remaining for standing in standings] == [2, 1, 0, 0]
    assert {standing.reset_seconds for standing in standings} == {60}


def test_a_window_ends_after_a_minute_and_not_before(clock):
    rate = Rate(1, clock=clock)
    rate.hit("192.0.2.1")
    clock.now += 59.5
    assert not rate.hit("192.0.2.1").allowed
    clock.now += 0.6
    assert rate.hit("192.0.2.1").allowed


def test_one_address_does_not_use_up_another(clock):
    rate = Rate(1, clock=clock)
    rate.hit("192.0.2.1")
    assert rate.hit("192.0.2.2").allowed


def test_a_limit_of_zero_is_off(clock):
    assert Rate(0, clock=clock).hit("192.0.2.1") is None


def test_a_refused_request_says_when_its_window_ends_and_does_not_lengthen_it(clock):
    rate = Rate(1, clock=clock)
    rate.hit("192.0.2.1")
    clock.now += 59
    assert rate.hit("192.0.2.1") == (False, 1, 0, 1)
    clock.now += 1
    assert rate.hit("192.0.2.1") == (True, 1, 0, 60)


# ── IPv6 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def allowed(rate: Rate, addresses: list[str]) -> int:
    return sum(rate.hit(address).allowed for address in addresses)


def test_W7_a_wider_ipv6_network_has_some_times_the_limit_of_a_64(clock):
    rate = Rate(10, {56: 4, 48: 16}, clock=clock)
    assert allowed(rate, [f"2001:db8::{host:x}" for host in range(100)]) == 10
    assert allowed(rate, [f"2001:db8:0:{low:x}::1" for low in range(256)] * 10) == 30  # the rest of its /56
    assert allowed(rate, [f"2001:db8:0:{high:x}00::1" for high in range(1, 256)] * 10) == 120  # the rest of its /48
    assert allowed(rate, ["2001:db8:1::1"] * 100) == 10
    clock.now += 60
    assert allowed(rate, [f"2001:db8:0:{number:x}::1" for number in range(65536)]) == 160


def test_a_factor_of_zero_is_off(clock):
    assert allowed(Rate(1, {56: 0, 48: 2}, clock=clock), [f"2001:db8:0:{low:x}::1" for low in range(256)]) == 2
    assert allowed(Rate(1, {56: 2, 48: 0}, clock=clock), [f"2001:db8:0:{high:x}00::1" for high in range(256)]) == 256
    assert allowed(Rate(1, {}, clock=clock), [f"2001:db8:0:{low:x}::1" for low in range(256)]) == 256
    assert Rate(0, clock=clock).hit("2001:db8::1") is None


def test_what_is_refused_takes_nothing_from_the_neighbours(clock):
    rate = Rate(10, {56: 2, 48: 4}, clock=clock)
    assert allowed(rate, ["2001:db8::1"] * 1000) == 10
    assert allowed(rate, ["2001:db8:0:1::1"] * 10) == 10
    # The /56 is full, so its next /64 is refused, and takes nothing from the /48.
    assert allowed(rate, ["2001:db8:0:2::1"] * 1000) == 0
    assert allowed(rate, ["2001:db8:0:100::1"] * 10) == 10


def test_the_bucket_with_the_fewest_left_is_the_one_shown(clock):
    rate = Rate(10, {56: 2}, clock=clock)
    allowed(rate, ["2001:db8::1"] * 9)
    clock.now += 20
    assert rate.hit("2001:db8:0:1::1") == (True, 10, 9, 60)
    assert allowed(rate, ["2001:db8:0:2::1"] * 8) == 8
    assert rate.hit("2001:db8:0:3::1") == (True, 20, 1, 40)
    assert rate.hit("2001:db8::1") == (True, 10, 0, 40)
    assert rate.hit("2001:db8:0:4::1") == (False, 20, 0, 40)


def test_of_two_full_buckets_the_later_end_is_shown(clock):
    rate = Rate(2, {56: 2}, clock=clock)
    rate.hit("2001:db8:0:1::1")
    clock.now += 20
    allowed(rate, ["2001:db8::1"] * 2)
    assert rate.hit("2001:db8::1") == (False, 2, 0, 60)
    rate.hit("2001:db8:0:1::1")
    assert rate.hit("2001:db8::1") == (False, 2, 0, 60)
    clock.now += 40  # the /56 begins anew
    assert allowed(rate, [f"2001:db8:0:{low:x}::1" for low in range(2, 6)]) == 4
    assert rate.hit("2001:db8::1") == (False, 4, 0, 60)


# ── floods ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def ipv4(number: int) -> str:
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


def windows(rate: Rate) -> dict[int, tuple[int, int]]:
    """Light and heavy ones of each prefix."""
    return {bucket.prefix: (len(bucket.windows._light), len(bucket.windows._heavy)) for bucket in (rate._ipv4, *rate._ipv6)}


def test_a_flood_of_fresh_addresses_does_not_free_whoever_is_over_half_the_limit(clock):
    def left_after_a_flood(hits: int) -> int:
        rate = Rate(10, capacity=100, clock=clock)
        allowed(rate, ["192.0.2.1"] * hits)
        allowed(rate, [ipv4(number) for number in range(1000)])
        return rate.hit("192.0.2.1").remaining

    assert left_after_a_flood(10) == 0
    assert left_after_a_flood(6) == 3
    assert left_after_a_flood(5) == 9  # the control: it was washed out


def test_a_heavy_window_goes_for_as_many_heavy_ones_alone(clock):
    rate = Rate(10, capacity=100, clock=clock)
    allowed(rate, ["192.0.2.1"] * 10)
    for number in range(99):
        allowed(rate, [ipv4(number)] * 6)
    assert not rate.hit("192.0.2.1").allowed
    allowed(rate, [ipv4(99)] * 6)
    assert rate.hit("192.0.2.1").allowed


def test_a_flood_over_ipv6_washes_out_neither_ipv4_nor_wider_networks(clock):
    rate = Rate(10, capacity=100, clock=clock)
    allowed(rate, ["192.0.2.1"] * 5)
    allowed(rate, [f"2001:db8:0:{low:x}::1" for low in range(40)])
    allowed(rate, [f"2001:db8:1:{number:x}::1" for number in range(10_000)])
    assert rate.hit("192.0.2.1").remaining == 4
    assert not rate.hit("2001:db8:0:99::1").allowed


def test_a_network_that_is_full_makes_no_new_windows(clock):
    rate = Rate(10, clock=clock)
    allowed(rate, [f"2001:db8:0:{number:x}::1" for number in range(65536)])
    assert windows(rate) == {32: (0, 0), 64: (160, 0), 56: (0, 4), 48: (0, 1)}


def test_memory_is_bounded_whatever_the_number_of_addresses(clock):
    """A million of them, all within one minute. The control shows that windows which are kept are seen."""

    def flood(rate: Rate, numbers: range) -> int:
        before = sys.getallocatedblocks()
        for number in numbers:
            rate.hit(ipv4(number))
            if number % 10 == 0:
                rate.hit(f"2001:{number >> 16:x}:{number & 65535:x}::1")
        return sys.getallocatedblocks() - before

    rate = Rate(60, clock=clock)
    flood(rate, range(250_000))
    full = {32: (20_000, 0), 64: (20_000, 0), 56: (5_000, 0), 48: (1_250, 0)}
    assert windows(rate) == full
    assert flood(rate, range(250_000, 1_000_000)) < 2_000
    assert windows(rate) == full
    assert flood(Rate(60, capacity=1_000_000, clock=clock), range(20_000)) > 40_000


def test_a_new_window_takes_two_ended_ones_of_each_kind_away(clock):
    rate = Rate(2, clock=clock)
    for number in range(50):
        allowed(rate, [ipv4(number)] * (1 + number % 2))
    assert windows(rate)[32] == (25, 25)
    clock.now += 61
    rate.hit("198.51.100.1")
    assert windows(rate)[32] == (24, 23)
    allowed(rate, [f"198.51.100.{number}" for number in range(2, 27)])
    assert windows(rate)[32] == (26, 0)


def test_a_window_that_is_not_there_has_no_hits_and_ends_now(clock):
    windows = BoundedWindows(2, clock=clock)
    assert (windows.get("192.0.2.1"), windows.get_expiry("192.0.2.1")) == (0, clock.now)


def test_counting_takes_no_thread(clock):
    before = threading.active_count()
    allowed(Rate(5, clock=clock), [ipv4(number) for number in range(100)])
    assert threading.active_count() == before


@given(
    limit=st.integers(1, 6),
    hits=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.sampled_from([0, 0, 0, 1, 20, 59, 60])), max_size=80),
)
def test_counting_is_that_of_three_dictionaries(limit, hits):
    """The rule in its plainest form, over a few networks within one /48 and over time."""
    clock, ends, counts = Clock(), {}, {}
    rate = Rate(limit, {56: 2, 48: 3}, clock=clock)
    for high, low, seconds in hits:
        clock.now += seconds
        buckets = {(64, high, low): limit, (56, high): 2 * limit, (48,): 3 * limit}
        for bucket in buckets:
            if ends.get(bucket, 0) <= clock.now:
                counts[bucket] = 0
        expected = all(counts[bucket] < buckets[bucket] for bucket in buckets)
        for bucket in buckets if expected else ():
            if counts[bucket] == 0:
                ends[bucket] = clock.now + 60
            counts[bucket] += 1
        standing = rate.hit(f"2001:db8:0:{high:x}{low:02x}::1")
        assert standing.allowed == expected
        assert standing.remaining == min(buckets[bucket] - counts[bucket] for bucket in buckets)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 4), st.sampled_from([0, 0, 0, 30, 61])), max_size=200))
def test_windows_are_never_more_than_there_is_room_for(hits):
    clock = Clock()
    rate = Rate(4, capacity=5, clock=clock)
    for number, times, seconds in hits:
        clock.now += seconds
        for _ in range(times):
            for address in (ipv4(number), f"2001:db8:{number:x}::1"):
                standing = rate.hit(address)
                assert 0 <= standing.remaining < standing.limit
                assert 1 <= standing.reset_seconds <= 60
    assert all(max(pair) <= (5 if prefix in (32, 64) else 1) for prefix, pair in windows(rate).items())


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", "unknown"),
        ("nonsense", "unknown"),
    ],
)
def test_an_ipv6_caller_is_counted_by_its_network(address, counted):
    assert counted_as(address) == counted
