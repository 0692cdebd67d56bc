"""Counting per address: exact, bounded, by the monotonic clock."""

from __future__ import annotations

import pytest

from gateway.web.rates import Rate, counted_as


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


def test_memory_is_bounded_whatever_the_number_of_addresses(clock):
    rate = Rate(5, capacity=10, clock=clock)
    for number in range(100):
        rate.hit(f"192.0.2.{number}")
    assert len(rate._limiter.storage._windows) == 10


def test_ended_windows_are_forgotten_without_being_asked_for(clock):
    rate = Rate(5, clock=clock)
    for number in range(50):
        rate.hit(f"192.0.2.{number}")
    clock.now += 61
    rate.hit("198.51.100.1")
    assert len(rate._limiter.storage._windows) == 1


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
