"""Imports, uploads' checks and salvages take seconds where other requests take milliseconds: a gate of their own before the queue.

At most half of the slots are theirs at a time, and one of them an address's. First come, first served, but for those whose address
is at work. Those that wait here have no ticket: they take no place of anybody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..settings import Settings
from .errors import OverloadedError
from .rates import counted_as

MAX_WAITING = 16
# Of who is told to come again: about what one of those before it takes.
_RETRY_SECONDS = 5


class BulkGate:
    def __init__(self, settings: Settings) -> None:
        self._free = max(1, settings.slots // 2)
        self._queue_timeout_seconds = settings.queue_timeout_seconds
        self._at_work: set[str] = set()
        # In the order in which they came; a passage is given by a result.
        self._waiting: dict[asyncio.Future[None], str] = {}

    @property
    def waiting(self) -> int:
        return len(self._waiting)

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
        for passed, waiter in [*self._waiting.items()]:
            if not passed.done() and self._lets(waiter):
                self._enter(waiter)
                passed.set_result(None)

    async def _wait(self, network: str) -> None:
        own = sum(waiter == network for waiter in self._waiting.values())
        # As in the queue: an address has no more places than it leaves free.
        if own >= MAX_WAITING - len(self._waiting):
            raise _overloaded(f"{len(self._waiting)} bulk requests wait already, {own} of this address")
        passed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[passed] = network
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
            del self._waiting[passed]


def _overloaded(reason: str) -> OverloadedError:
    return OverloadedError(reason=reason, headers={"Retry-After": str(_RETRY_SECONDS)})
