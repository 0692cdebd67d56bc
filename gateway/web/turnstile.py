"""Who goes first when the loop has more to do than it can: callers that lately showed a genuine token, then strangers in turn.

All requests share one loop, so bytes that nobody vouches for are taken up a few at a time, in turn by address, and what is ready
of others is served between. How few follows from how long the loop took since: that counts what handling them costs too. A token
vouches for so many pieces of bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .connection import Connection

MAX_KNOWN_ADDRESSES = 16_384
KNOWN_SECONDS = 600.0
# A token shown costs one request of a rate; what an address sends beyond these waits like a stranger's until it shows one again.
PIECES_PER_TOKEN = 128
# A turn of the loop in which strangers are served is kept about this long; what comes on top is the work of one more of them.
TURN_SECONDS = 0.0003
MAX_WIDTH = 64
_FIRST_WIDTH = 8


class Turnstile:
    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waiting: OrderedDict[str, deque[Connection]] = OrderedDict()
        self._turning = False
        self._turned_at = 0.0
        self._passed = 0
        self.width = _FIRST_WIDTH
        """How many strangers one turn of the loop takes up."""

    def passes(self) -> bool:
        """Whether one more may be served in this turn; if not, it is to wait."""
        if self._waiting or self._passed >= self.width:
            return False
        self._passed += 1
        self.turn()
        return True

    def wait(self, guest: Connection) -> None:
        """Its `proceed` is called once, when its turn has come."""
        self._waiting.setdefault(guest.address, deque()).append(guest)
        self.turn()

    def turn(self) -> None:
        """Strangers are being served: watch how long the loop takes."""
        if not self._turning:
            self._turning = True
            self._turned_at = self._clock()
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        now = self._clock()
        took, self._turned_at = now - self._turned_at, now
        if took > TURN_SECONDS:
            self.width = max(1, self.width // 2)
        elif took < TURN_SECONDS / 2 and self.width < MAX_WIDTH:
            self.width += 1
        self._passed = 0
        while self._waiting and self._passed < self.width:
            address, guests = self._waiting.popitem(last=False)
            guest = guests.popleft()
            if guests:
                self._waiting[address] = guests
            self._passed += 1
            guest.proceed()
            if self._clock() - now > TURN_SECONDS / 2:
                break
        self._turning = bool(self._passed)
        if self._turning:
            asyncio.get_running_loop().call_soon(self._turn)


class Acquaintances:
    """Addresses that lately showed a genuine token; those that did so last are kept."""

    def __init__(self, capacity: int = MAX_KNOWN_ADDRESSES, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._clock = clock
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def __contains__(self, address: str) -> bool:
        return address in self._seen and self._clock() - self._seen[address][0] < KNOWN_SECONDS

    def spend(self, address: str) -> bool:
        """Take one of the address's pieces; False if it has none."""
        since, pieces = self._seen.get(address, (0.0, 0))
        if not pieces or address not in self:
            return False
        self._seen[address] = since, pieces - 1
        return True

    def add(self, address: str) -> None:
        self._seen[address] = self._clock(), PIECES_PER_TOKEN
        self._seen.move_to_end(address)
        if len(self._seen) > self._capacity:
            self._seen.popitem(last=False)

    def forget(self, address: str) -> None:
        self._seen.pop(address, None)
