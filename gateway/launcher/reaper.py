"""Deletes what has had its time: expired instances, and containers that belong to no run of this launcher.

It takes the same lease as a run, without waiting, and drops the container that waits for the instance's next run, so it never
deletes a volume that a container has mounted.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor

from .engines import Engine
from .errors import EngineError
from .leases import Leases
from .registry import Registry
from .warmth import Warmth

log = logging.getLogger(__name__)


class Reaper:
    def __init__(
        self, registry: Registry, leases: Leases, engine: Engine, warmth: Warmth, disk: Executor, interval_seconds: float
    ) -> None:
        self._registry = registry
        self._leases = leases
        self._engine = engine
        self._warmth = warmth
        self._disk = disk
        self._interval_seconds = interval_seconds
        self._swept = False
        self.reaped = 0
        """Instances so far."""
        self.orphans = 0
        """Containers so far that belonged to nothing."""

    async def run(self) -> None:
        """Sweep at every interval of the monotonic clock, until cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            await self.sweep()
            due = max(due + self._interval_seconds, loop.time())
            await asyncio.sleep(due - loop.time())

    async def sweep(self) -> None:
        """Once. What fails is logged and met again by the next sweep."""
        loop = asyncio.get_running_loop()
        while await loop.run_in_executor(self._disk, self._registry.save):
            pass
        try:
            self.orphans += await self._engine.sweep()
            self._swept = True
        except EngineError as error:
            log.warning("orphans not swept: %s", error)
            if not self._swept:
                return  # a container of an earlier launcher may still have an expired volume mounted
        try:
            expired = await loop.run_in_executor(self._disk, self._registry.expired)
        except OSError as error:
            log.warning("instances not listed: %s", error)
            return
        reaped = 0
        for instance in expired:
            lease = self._leases.try_acquire(instance)
            if lease is None:
                continue  # in use; its lease keeps it until the next sweep
            try:
                if self._registry.lives(instance):
                    continue  # it was prepared when they were listed, and somebody has got it since
                await self._warmth.discard(instance)
                reaped += await loop.run_in_executor(self._disk, self._registry.remove, instance)
                log.debug("reaped instance=%s", instance)
            except (EngineError, OSError) as error:
                log.warning("not reaped instance=%s: %s", instance, error)
            finally:
                lease.release_after(self._engine.removal(instance))
        self.reaped += reaped
        if reaped:
            log.info("reaped %d instances", reaped)
