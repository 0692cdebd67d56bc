"""Requests and new instances per address and minute, counted in memory.

The counting is `limits`' fixed window; the storage is ours because the library's keeps every address it ever saw and starts a
timer thread to forget them. A window begins with an address's first request.

An IPv6 caller is its /64, which is what one subscriber gets. Many get more, so the /56 and the /48 around it have limits too, some
times that of a /64. What is refused counts nowhere: a /64 that keeps knocking takes nothing from its neighbours, and a /48 that
is full makes no new windows, however many addresses it sends from.

A flood of fresh addresses washes windows out. It takes MAX_WINDOWS others to do that to an address, and each of those may have as
much itself. So it pays from MAX_WINDOWS times the limit on, in requests a minute: by default that is 20,000 a second, or 3,300 new
instances a second, more than one process answers.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from limits import RateLimitItemPerMinute
from limits.storage.base import Storage
from limits.strategies import FixedWindowRateLimiter

# Some 200 bytes each.
MAX_WINDOWS = 20_000

UNKNOWN = "unknown"
"""Stands for every caller without an address."""

_IPV4_MAPPED = bytes(10) + b"\xff\xff"
_NO_WINDOW = (0, -math.inf)


class BoundedWindows(Storage):
    """At most `capacity` light windows, of less than `heavy_from` hits, and as many heavy ones; times are of the monotonic clock.

    Where there is no room the oldest of its kind goes: what washes a heavy window out is `capacity` others that each got heavy,
    never fresh ones. A window that is added takes two ended ones of each kind away, so no hit costs more than another.
    """

    STORAGE_SCHEME: ClassVar[None] = None  # type: ignore[misc]  # never made from a URI

    def __init__(self, heavy_from: int, capacity: int = MAX_WINDOWS, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._heavy_from = heavy_from
        self._capacity = capacity
        self._clock = clock
        # Hits and end. All windows have the same length: light ones are in the order of their ends, heavy ones nearly.
        self._light: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._heavy: OrderedDict[str, tuple[int, float]] = OrderedDict()

    @property
    def base_exceptions(self) -> type[Exception]:
        return KeyError

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        now = self._clock()
        windows = self._heavy if key in self._heavy else self._light
        count, end = windows.get(key, _NO_WINDOW)
        if end <= now:
            count, end = 0, now + expiry
        count += amount
        kind = self._heavy if count >= self._heavy_from else self._light
        if count == amount or kind is not windows:
            windows.pop(key, None)
            self._make_room(kind, now)
        kind[key] = (count, end)
        return count

    def get(self, key: str) -> int:
        count, end = self._window(key)
        return count if end > self._clock() else 0

    def get_expiry(self, key: str) -> float:
        return max(self._window(key)[1], self._clock())

    def check(self) -> bool:
        return True

    def reset(self) -> int | None:
        count = len(self._light) + len(self._heavy)
        self._light.clear()
        self._heavy.clear()
        return count

    def clear(self, key: str) -> None:
        self._light.pop(key, None)
        self._heavy.pop(key, None)

    def _window(self, key: str) -> tuple[int, float]:
        return self._light.get(key) or self._heavy.get(key, _NO_WINDOW)

    def _make_room(self, kind: OrderedDict[str, tuple[int, float]], now: float) -> None:
        for windows in (self._light, self._heavy, self._light, self._heavy):
            oldest = next(iter(windows), None)
            if oldest is not None and windows[oldest][1] <= now:
                del windows[oldest]
        if len(kind) >= self._capacity:
            kind.popitem(last=False)


class Standing(NamedTuple):
    """Where an address stands after this request."""

    allowed: bool
    limit: int
    remaining: int
    reset_seconds: int

    def headers(self) -> dict[str, str]:
        return {
            "RateLimit-Limit": str(self.limit),
            "RateLimit-Remaining": str(self.remaining),
            "RateLimit-Reset": str(self.reset_seconds),
        }


class _PerMinute(RateLimitItemPerMinute):
    def key_for(self, *identifiers: bytes | str | int | float) -> str:
        """The network alone: nothing else is counted in a bucket's storage. A third of a hit was spent on longer keys."""
        return str(identifiers[0])


class _Bucket:
    """The windows of all IPv4 addresses, or of all IPv6 networks of one size: a flood of one kind washes out no other."""

    __slots__ = ("_item", "_limiter", "limit", "prefix", "windows")

    def __init__(self, prefix: int, limit: int, capacity: int, clock: Callable[[], float]) -> None:
        self.prefix = prefix
        self.limit = limit
        self.windows = BoundedWindows(limit // 2 + 1, capacity, clock)
        self._item = _PerMinute(limit)
        self._limiter = FixedWindowRateLimiter(self.windows)

    def has_room(self, network: str) -> bool:
        return self._limiter.test(self._item, network)

    def hit(self, network: str) -> bool:
        return self._limiter.hit(self._item, network)

    def stats(self, network: str) -> tuple[int, float, int]:
        """How many are left in the window, when it ends, and the limit."""
        end, remaining = self._limiter.get_window_stats(self._item, network)
        return remaining, end, self.limit


class Rate:
    """One limit. `per_minute` 0 is off. `factors`: how often the limit of a /64 a wider IPv6 network may have; 0 is off."""

    def __init__(
        self,
        per_minute: int,
        factors: Mapping[int, int] = MappingProxyType({56: 4, 48: 16}),
        *,
        capacity: int = MAX_WINDOWS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refused = 0
        """Hits so far that were."""
        self._off = per_minute == 0
        self._clock = clock
        self._ipv4 = _Bucket(32, per_minute, capacity, clock)
        # Of networks that may have more, fewer are needed to ask for more than can be answered.
        self._ipv6 = [
            _Bucket(prefix, per_minute * factor, max(1, capacity // factor), clock)
            for prefix, factor in {64: 1, **factors}.items()
            if factor
        ]

    def hit(self, address: str) -> Standing | None:
        """Count one in every bucket of the address, or in none when one is full; None when the limit is off."""
        if self._off:
            return None
        network = counted_as(address)
        if ":" not in network:
            allowed = self._ipv4.hit(network)
            return self._standing(allowed, *self._ipv4.stats(network))
        places = [(bucket, network_of(address, bucket.prefix)) for bucket in self._ipv6]
        allowed = all(bucket.has_room(network) for bucket, network in places)
        if allowed:
            for bucket, network in places:
                bucket.hit(network)
        # The one with the fewest left tells where the address stands, and of several full ones the one that ends last.
        stats = (bucket.stats(network) for bucket, network in places)
        return self._standing(allowed, *min(stats, key=lambda each: (each[0], -each[1])))

    def _standing(self, allowed: bool, remaining: int, end: float, limit: int) -> Standing:
        self.refused += not allowed
        return Standing(allowed, limit, remaining, max(1, math.ceil(end - self._clock())))


def counted_as(address: str) -> str:
    """The address, or its /64 for IPv6; whatever is no address counts as one caller."""
    return network_of(address, 64)


def network_of(address: str, prefix: int) -> str:
    """An IPv4 address as it is, the network of an IPv6 address as `2001:db8::/48`, or `unknown`. `prefix` in steps of 8."""
    packed = read_address(address)
    if packed is None:
        return UNKNOWN
    if len(packed) == 4:
        return written(packed)
    return f"{written(packed[: prefix // 8].ljust(16, bytes(1)))}/{prefix}"


def read_address(text: str) -> bytes | None:
    """An address as 4 or 16 bytes, without its zone, IPv4 if it is IPv4-mapped; None for anything else."""
    try:
        if ":" not in text:
            return inet_pton(AF_INET, text)
        packed = inet_pton(AF_INET6, text.partition("%")[0])
    except (OSError, ValueError):
        return None
    return packed[12:] if packed.startswith(_IPV4_MAPPED) else packed


def written(packed: bytes) -> str:
    """The address of 4 or 16 bytes as text: compressed, lower case."""
    return inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)
