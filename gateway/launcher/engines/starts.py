"""Who may start a container now: as many at a time as there are cores, and those first that somebody waits for.

A start is 70 to 110 ms of which nearly all is processor time, so more of them at once than there are cores only makes each one
later (measured: 12 to 16 a second on two cores, however many at once). A spare start is one that nobody waits for. It begins only
when nobody will miss what it takes: a turn is free, no request waits for one, and a slot is free too, since behind the last slot
there may be a queue that the launcher cannot see. All that must have held for a moment, because between a run's end and the next
one out of such a queue there is a gap.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

_SETTLED_SECONDS = 0.03


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


class Starts:
    def __init__(self, turns: int, slots: int) -> None:
        self._turns = asyncio.Semaphore(turns)
        self._slots = slots
        self._serving = 0
        self._waiting = 0
        self._calm = asyncio.Event()
        self._calm.set()
        self._disturbances = 0

    @contextmanager
    def serving(self) -> Iterator[None]:
        """For as long as a request holds a slot."""
        self._serving += 1
        self._look()
        try:
            yield
        finally:
            self._serving -= 1
            self._look()

    @asynccontextmanager
    async def urgent(self) -> AsyncIterator[None]:
        """A turn for a start that somebody waits for; first come, first served."""
        self._waiting += 1
        self._look()
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
            self._look()
        try:
            yield
        finally:
            self._give_back()

    @asynccontextmanager
    async def spare(self) -> AsyncIterator[None]:
        """A turn for a start that nobody waits for, once nobody would miss it."""
        while True:
            await self._calm.wait()
            before = self._disturbances
            await asyncio.sleep(_SETTLED_SECONDS)
            if self._calm.is_set() and before == self._disturbances:
                break
        await self._turns.acquire()  # free, or it would not be calm: this does not wait
        self._look()
        try:
            yield
        finally:
            self._give_back()

    def _give_back(self) -> None:
        self._turns.release()
        self._look()

    def _look(self) -> None:
        if self._turns.locked() or self._waiting or self._serving >= self._slots:
            self._disturbances += 1
            self._calm.clear()
        else:
            self._calm.set()
