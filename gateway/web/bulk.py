"""Imports, uploads' checks and salvages take seconds where other requests take milliseconds: a gate of their own before the queue.

At most half of the slots are theirs at a time, and one of them an address's. Passages go round the addresses that have somebody
here, one each. Those that wait here have no ticket: they take no place of anybody else's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..settings import Settings
from .errors import OverloadedError
from .rates import counted_as
from .room import SHARE

MAX_WAITING = 64
# Of who is told to come again: about what one of those before it takes.
_RETRY_SECONDS = 5


class BulkGate:
    def __init__(self, settings: Settings) -> None:
        self._free = max(1, settings.slots // 2)
        self._queue_timeout_seconds = settings.queue_timeout_seconds
        self._at_work: set[str] = set()
        # By address, of which the first is the next to be served; a passage is given by a result.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def passage(self, address: str) -> AsyncIterator[None]:
        """Around ticket and turn; raises OverloadedError when too many wait, or this one too long."""
        network = counted_as(address)
        if not self._lets(network):
            await self._wait(network)
        else:
            self._enter(network)
        try:
            yield
        finally:
            self._leave(network)

    def _lets(self, network: str) -> bool:
        return bool(self._free) and network not in self._at_work

    def _enter(self, network: str) -> None:
        self._free -= 1
        self._at_work.add(network)

    def _leave(self, network: str) -> None:
        self._free += 1
        self._at_work.discard(network)
        if network in self._waiting:
            self._waiting[network] = self._waiting.pop(network)  # behind all others
        for waiter in [*self._waiting]:
            passed = next((passed for passed in self._waiting[waiter] if not passed.done()), None)
            if passed is not None and self._lets(waiter):
                self._enter(waiter)
                passed.set_result(None)

    async def _wait(self, network: str) -> None:
        own = len(self._waiting.get(network, ()))
        if (own + 1) * SHARE > MAX_WAITING - self.waiting - 1:  # as in the room
            raise _overloaded(f"{self.waiting} bulk requests wait already, {own} of this address")
        passed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(network, deque()).append(passed)
        try:
            async with asyncio.timeout(self._queue_timeout_seconds):
                await passed
        except BaseException as error:
            if passed.done() and not passed.cancelled():
                self._leave(network)  # ended in the instant between being let in and going in
            if isinstance(error, TimeoutError):
                raise _overloaded(f"waited {self._queue_timeout_seconds} s for a bulk run") from None
            raise
        finally:
            self._waiting[network].remove(passed)
            if not self._waiting[network]:
                del self._waiting[network]


def _overloaded(reason: str) -> OverloadedError:
    return OverloadedError(reason=reason, headers={"Retry-After": str(_RETRY_SECONDS)})
