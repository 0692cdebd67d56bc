"""Who is calling: what a connection and its X-Forwarded-For are believed, and what they never are."""

from __future__ import annotations

import hashlib
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.settings import SettingsError
from gateway.web.callers import Callers, owner_tag
from gateway.web.rates import counted_as, read_address

PROXY = "10.0.0.1"
CALLERS = Callers("10.0.0.0/8, ::1/128,2001:db8:ffff::/48")
KEY = bytes(range(32))

TRUSTED = st.ip_addresses(network="10.0.0.0/8") | st.ip_addresses(network="2001:db8:ffff::/48")
STRANGERS = st.ip_addresses().filter(lambda address: not CALLERS.is_proxy(str(address)))
LINES = st.lists(st.text() | st.text("0123456789abcdef:.,[]% \t", max_size=60) | TRUSTED.map(str) | STRANGERS.map(str), max_size=8)


def written(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return Callers("").of(str(address), [])


@pytest.mark.parametrize(
    ("peer", "caller"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:DB8:0:0:0::7", "2001:db8::7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::FFFF:C000:207", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::1"),
        ("::ffff:192.0.2.7%eth0", "192.0.2.7"),
        ("", "unknown"),
        ("/run/mayfly.sock", "unknown"),
        ("192.0.2.07", "unknown"),
        ("192.0.2", "unknown"),
        ("192.0.2.7:80", "unknown"),
        ("192.0.2.7\0", "unknown"),
        ("\udcff::1", "unknown"),
    ],
)
def test_a_peer_is_written_in_one_way(peer, caller):
    assert CALLERS.of(peer, []) == caller


@pytest.mark.parametrize(
    ("lines", "caller"),
    [
        ([], PROXY),
        (["192.0.2.7"], "192.0.2.7"),
        (["198.51.100.1, 192.0.2.7"], "192.0.2.7"),
        (["198.51.100.1", "192.0.2.7"], "192.0.2.7"),
        (["198.51.100.1,192.0.2.7 ,\t10.0.0.3", "10.0.0.2"], "192.0.2.7"),
        (["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        (["192.0.2.7:4711"], "192.0.2.7"),
        (["[2001:db8::7]:4711"], "2001:db8::7"),
        (["[2001:db8::7]"], "2001:db8::7"),
        (["2001:DB8::7"], "2001:db8::7"),
        (["::ffff:192.0.2.7"], "192.0.2.7"),
        (["[::ffff:192.0.2.7]:80"], "192.0.2.7"),
        (["198.51.100.1, ::ffff:10.0.0.2"], "198.51.100.1"),
        (["fe80::7%eth0"], "fe80::7"),
        # No address: the caller is whoever wrote it.
        (["198.51.100.1, unknown"], PROXY),
        (["198.51.100.1, unknown, 10.0.0.2"], "10.0.0.2"),
        (["198.51.100.1, , 10.0.0.2"], "10.0.0.2"),
        (["198.51.100.1,"], PROXY),
        (["198.51.100.1", ""], PROXY),
        (["192.0.2.7:"], PROXY),
        (["192.0.2.7:http"], PROXY),
        (["192.0.2.7:123456"], PROXY),
        (["[2001:db8::7"], PROXY),
        (["[2001:db8::7]80"], PROXY),
        (["[]:80"], PROXY),
        (['for="192.0.2.7"'], PROXY),
    ],
)
def test_a_trusted_proxy_names_the_caller(lines, caller):
    assert CALLERS.of(PROXY, lines) == caller


def test_a_unix_socket_names_nobody():
    assert CALLERS.of("", ["192.0.2.7"]) == "unknown"


def test_without_trusted_proxies_the_header_says_nothing():
    assert Callers("").of("127.0.0.1", ["192.0.2.7"]) == "127.0.0.1"
    assert not Callers(" ").is_proxy("127.0.0.1")


def test_proxies_are_told_by_their_networks():
    proxies = [PROXY, "::ffff:10.255.255.255", "10.0.0.0", "::1", "2001:db8:ffff:1::1", "2001:db8:ffff::1%eth0"]
    others = ["11.0.0.0", "9.255.255.255", "::2", "2001:db8:fffe::1", "::a00:1", "::", "", "unknown", "10.0.0.1:80"]
    assert [CALLERS.is_proxy(peer) for peer in proxies] == [True] * len(proxies)
    assert [CALLERS.is_proxy(peer) for peer in others] == [False] * len(others)
    assert Callers("192.0.2.1").is_proxy("192.0.2.1")
    assert not Callers("192.0.2.1").is_proxy("192.0.2.2")


@pytest.mark.parametrize(
    "text",
    [
        "localhost",
        "10.0.0.1/8",
        "10.0.0.0/33",
        "10.0.0.0/8,",
        ",",
        "10.0.0.0/8 ::1",
        "fe80::1%eth0/128",
        "::ffff:10.0.0.0/104",
        "::ffff:0:0/96",
        "0.0.0.0/0",
        "::/0",
    ],
)
def test_what_is_no_list_of_networks_is_refused_at_start(text):
    with pytest.raises(SettingsError, match="MAYFLY_TRUSTED_PROXIES"):
        Callers(text)


# ── whatever the header says ─────────────────────────────────────────────────────────────────────────────────────────


@given(peer=st.text() | STRANGERS.map(str), lines=LINES)
def test_a_peer_that_is_not_trusted_is_the_caller_whatever_it_says(peer, lines):
    if not CALLERS.is_proxy(peer):
        assert CALLERS.of(peer, lines) == Callers("").of(peer, [])


@given(peer=TRUSTED, lines=LINES)
def test_every_header_has_an_answer_that_somebody_wrote_behind_trusted_hops_alone(peer, lines):
    entries = ",".join(lines).split(",") if lines else []
    believed = [written(peer)]
    while entries and CALLERS.is_proxy(believed[-1]):
        # One entry alone: what it is read as.
        believed.append(CALLERS.of(PROXY, [entries.pop()]))
    assert CALLERS.of(str(peer), lines) in believed


@given(forged=LINES, stranger=STRANGERS, hops=st.lists(TRUSTED, max_size=4), peer=TRUSTED, same_line=st.booleans())
def test_what_a_caller_forges_changes_nothing(forged, stranger, hops, peer, same_line):
    appended = ", ".join(map(str, [stranger, *hops]))
    lines = [",".join([*forged, appended])] if same_line else [*forged, appended]
    assert CALLERS.of(str(peer), lines) == written(stranger)


@given(forged=LINES, hops=st.lists(TRUSTED, max_size=4), peer=TRUSTED)
def test_a_proxy_that_names_nobody_is_itself_the_caller(forged, hops, peer):
    assert CALLERS.of(str(peer), [*forged, ", ".join(["unknown", *map(str, hops)])]) == written([*hops, peer][0])


# ── one caller, however it is written ────────────────────────────────────────────────────────────────────────────────


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_and_its_ipv6_form_are_one(address):
    mapped = f"::ffff:{address}"
    assert CALLERS.of(mapped, []) == str(address) == counted_as(mapped) == counted_as(str(address))
    assert CALLERS.of(PROXY, [mapped]) == CALLERS.of(PROXY, [str(address)])
    assert CALLERS.is_proxy(mapped) == CALLERS.is_proxy(str(address))
    assert owner_tag(KEY, mapped) == owner_tag(KEY, str(address))


@given(st.ip_addresses(v=6).filter(lambda address: address.ipv4_mapped is None), st.integers(0, 2**64 - 1))
def test_every_address_of_a_64_is_one_and_the_next_64_is_another(address, host):
    network = ipaddress.IPv6Network((int(address) >> 64 << 64, 64))
    sibling = str(network[host])
    if read_address(sibling) == ipaddress.ip_address(sibling).packed:  # ::/64 holds the IPv4-mapped ones, which are IPv4
        assert counted_as(sibling) == counted_as(str(address))
        assert ipaddress.ip_network(counted_as(sibling)) == network
    assert counted_as(str(ipaddress.IPv6Address(int(address) ^ 1 << 64))) != counted_as(str(address))


@given(st.integers(0, 2**72 - 1))
def test_every_address_of_a_56_is_one_owner_and_the_next_56_is_another(host):
    network = ipaddress.IPv6Network("2001:db8:0:ff00::/56")
    assert owner_tag(KEY, str(network[host])) == owner_tag(KEY, str(network[0]))
    assert owner_tag(KEY, str(network[host] + (1 << 72))) != owner_tag(KEY, str(network[0]))


@given(st.text("0123456789abcdfABF:.", max_size=45) | st.ip_addresses().map(lambda address: address.exploded))
def test_an_address_is_what_pythons_library_takes_for_one(text):
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        assert read_address(text) is None
    else:
        assert read_address(text) == (getattr(address, "ipv4_mapped", None) or address).packed


# ── owners ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_owner_tag_is_16_bytes_that_depend_on_key_and_caller():
    tags = {owner_tag(key, address) for key in (KEY, bytes(32)) for address in ("192.0.2.1", "192.0.2.2", "2001:db8::1", "")}
    assert len(tags) == 8
    assert {len(tag) for tag in tags} == {16}
    assert bytes(16) not in tags
    assert owner_tag(KEY, "192.0.2.1") == owner_tag(KEY, "192.0.2.1")


def test_an_owner_tag_is_no_other_hash_of_the_same_key():
    assert owner_tag(KEY, "192.0.2.1") != hashlib.blake2b(b"192.0.2.1", digest_size=16, key=KEY).digest()


@pytest.mark.parametrize("size", [0, 31, 65])
def test_an_owner_tag_takes_a_whole_key(size):
    with pytest.raises(ValueError, match="key"):
        owner_tag(bytes(size), "192.0.2.1")
