"""Stopping without breaking what runs: new work is refused, work at hand is finished, and somebody can wait for that."""

from __future__ import annotations

import asyncio

from .errors import ShuttingDownError


class Drain:
    def __init__(self) -> None:
        self._draining = False
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._hurried = False

    @property
    def draining(self) -> bool:
        return self._draining

    def enter(self) -> None:
        """One more request, until it leaves; raises ShuttingDownError once draining has begun."""
        if self._draining:
            raise ShuttingDownError
        self._active += 1
        self._idle.clear()

    def leave(self) -> None:
        self._active -= 1
        if self._active == 0:
            self._idle.set()

    def hurry(self) -> None:
        """Whoever waits for the rest waits no longer."""
        self._hurried = True
        self._idle.set()

    async def begin(self, timeout_seconds: float) -> bool:
        """Refuse new work and wait for the rest; False if some was still at hand after the timeout, or when hurried."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return not self._hurried
