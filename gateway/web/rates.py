"""Requests and new instances per address and minute, counted in memory.

The counting is `limits`' fixed window; the storage is ours because the library's keeps every address it ever saw and starts a
timer thread to forget them. A window begins with an address's first request. IPv6 callers are counted by their /64, which is
what one subscriber gets.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from limits import RateLimitItemPerMinute
from limits.storage.base import Storage
from limits.strategies import FixedWindowRateLimiter

MAX_ADDRESSES = 100_000


class BoundedWindows(Storage):
    """At most `capacity` windows, ordered by their end; times are of the monotonic clock."""

    STORAGE_SCHEME: ClassVar[None] = None  # type: ignore[misc]  # never made from a URI

    def __init__(self, capacity: int = MAX_ADDRESSES, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._capacity = capacity
        self._clock = clock
        # Every window has the same length, so insertion order is the order of ends.
        self._windows: OrderedDict[str, tuple[int, float]] = OrderedDict()

    @property
    def base_exceptions(self) -> type[Exception]:
        return KeyError

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        now = self._clock()
        self._forget_ended(now)
        count, end = self._windows.get(key, (0, now + expiry))
        if count == 0 and len(self._windows) >= self._capacity:
            self._windows.popitem(last=False)
        self._windows[key] = (count + amount, end)
        return count + amount

    def get(self, key: str) -> int:
        self._forget_ended(self._clock())
        return self._windows.get(key, (0, 0.0))[0]

    def get_expiry(self, key: str) -> float:
        return self._windows.get(key, (0, self._clock()))[1]

    def check(self) -> bool:
        return True

    def reset(self) -> int | None:
        count = len(self._windows)
        self._windows.clear()
        return count

    def clear(self, key: str) -> None:
        self._windows.pop(key, None)

    def _forget_ended(self, now: float) -> None:
        while self._windows:
            key = next(iter(self._windows))
            if self._windows[key][1] > now:
                return
            del self._windows[key]


@dataclass(frozen=True, slots=True)
class Standing:
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


class Rate:
    """One limit. `per_minute` 0 is off."""

    def __init__(self, per_minute: int, *, capacity: int = MAX_ADDRESSES, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._item = RateLimitItemPerMinute(per_minute) if per_minute else None
        self._limiter = FixedWindowRateLimiter(BoundedWindows(capacity, clock))

    def hit(self, address: str) -> Standing | None:
        """Count one; None when the limit is off."""
        if self._item is None:
            return None
        key = counted_as(address)
        allowed = self._limiter.hit(self._item, key)
        end, remaining = self._limiter.get_window_stats(self._item, key)
        return Standing(allowed, self._item.amount, remaining, max(1, math.ceil(end - self._clock())))


@lru_cache(maxsize=4096)
def counted_as(address: str) -> str:
    """The address, or its /64 for IPv6; whatever is no address counts as one caller."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))
    return str(parsed)
