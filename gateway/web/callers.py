"""Who is calling: the peer of the connection, or whom a trusted proxy names in X-Forwarded-For.

Each proxy appends whom it was called by, so the header is read from its right end over all its lines. Trusted hops are skipped;
the first address that is not trusted is the caller, and whatever stands to the left of it, the caller wrote, is never read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from typing import NamedTuple

from ..settings import SettingsError
from .rates import UNKNOWN, network_of, read_address, written

OWNER_TAG_BYTES = 16
_OWNER_IPV6_PREFIX = 56  # instances last: a /48 has 256 such owners, and would have 65,536 of a /64
_MIN_KEY_BYTES = 32

_WITH_PORT = re.compile(r"\[(.+)\](?::\d{1,5})?|([^:]+):\d{1,5}", re.ASCII)


class _Network(NamedTuple):
    address_bytes: int
    host_bits: int
    prefix: int


class Callers:
    """`trusted_proxies`: networks with commas between, or nothing. Raises SettingsError for what is no list of networks."""

    def __init__(self, trusted_proxies: str) -> None:
        self._trusted = [_network(text.strip()) for text in trusted_proxies.split(",")] if trusted_proxies.strip() else []

    def of(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """The caller's address, from the connection's peer and the lines of X-Forwarded-For in the order in which they came.

        Written in one way: IPv4 for IPv4-mapped, no zone, compressed, lower case. A peer without an address, such as that of a
        Unix socket, is `unknown`. An entry that is no address ends the reading: the caller is the hop that wrote it.
        """
        caller = read_address(peer)
        if caller is None:
            return UNKNOWN
        for entry in _from_the_right(forwarded_for):
            if not self._trusts(caller) or (named := _read_entry(entry)) is None:
                break
            caller = named
        return written(caller)

    def is_proxy(self, peer: str) -> bool:
        """Whether the peer's X-Forwarded-For is believed."""
        address = read_address(peer)
        return address is not None and self._trusts(address)

    def _trusts(self, address: bytes) -> bool:
        number = int.from_bytes(address)
        return any(
            len(address) == network.address_bytes and number >> network.host_bits == network.prefix for network in self._trusted
        )


def owner_tag(key: bytes, address: str) -> bytes:
    """Whose instance it is: 16 bytes that are the same for one address, or one IPv6 /56, and tell nothing to who lacks the key.

    The launcher and its disk hold this and never an address. All IPv4 addresses can be tried by whoever has the key, so it stays
    in the gateway: 32 to 64 secret bytes, else ValueError.
    """
    if len(key) < _MIN_KEY_BYTES:
        raise ValueError("the key is too short")
    owner = network_of(address, _OWNER_IPV6_PREFIX).encode()
    return hashlib.blake2b(owner, digest_size=OWNER_TAG_BYTES, key=key, person=b"mayfly owner tag").digest()


def _network(text: str) -> _Network:
    try:
        network = ip_network(text)
    except ValueError as error:
        raise SettingsError(f"MAYFLY_TRUSTED_PROXIES: {error}") from None
    address = read_address(str(network.network_address))
    if "%" in text or address is None or len(address) * 8 != network.max_prefixlen:
        raise SettingsError(f"MAYFLY_TRUSTED_PROXIES: {text!r} has a zone or is IPv4 written as IPv6")
    if network.prefixlen == 0:
        raise SettingsError(f"MAYFLY_TRUSTED_PROXIES: {text!r} is everybody, who could then choose any address")
    host_bits = network.max_prefixlen - network.prefixlen
    return _Network(len(address), host_bits, int.from_bytes(address) >> host_bits)


def _from_the_right(lines: Sequence[str]) -> Iterator[str]:
    for line in reversed(lines):
        comma = ","
        while comma:
            line, comma, entry = line.rpartition(",")
            yield entry


def _read_entry(text: str) -> bytes | None:
    """An address, with or without a port; IPv6 with or without brackets."""
    text = text.strip(" \t")
    if found := _WITH_PORT.fullmatch(text):
        text = found[1] or found[2]
    return read_address(text)
