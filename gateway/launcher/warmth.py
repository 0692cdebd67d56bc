"""Containers started before anybody asks, so that nobody waits for a start (70 to 110 ms). Which ones, when, and for how long.

The nursery is fresh instances, each with its container waiting and its lease held here: CREATE hands one out. A successor is the
container of an instance's next request, started once its last one is over. Either waits for one plain run of one instance, with
that instance's volume mounted, and is never another's. Here is only the choice; starting and destroying is the engine's.

Whoever holds an instance's lease has the say over what waits for it. A successor is started under the lease, so a run that comes
meanwhile waits for that start and then finds it done; one that is not begun when a run comes is called off. Whoever deletes a
volume, puts another in its place or runs something that is not plain takes the lease and `discard`s first. With an engine that
does not start ahead, nothing ever waits here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from ..settings import Settings
from ..uuid7 import uuid7
from .engines import Engine
from .engines.starts import cores
from .errors import EngineDownError, EngineError, LauncherError, UnknownInstanceError
from .leases import Lease, Leases
from .readiness import Readiness
from .registry import Record, Registry

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_PAUSE_SECONDS = (1.0, 30.0)  # after a nursling failed: the first, and, doubled each time, the longest
_LOOK_AGAIN_SECONDS = 1.0


class Warmth:
    def __init__(
        self, settings: Settings, registry: Registry, leases: Leases, engine: Engine, readiness: Readiness, disk: Executor
    ) -> None:
        self._registry = registry
        self._leases = leases
        self._engine = engine
        self._readiness = readiness
        self._disk = disk
        self._nursery_size = settings.nursery
        self._successors = settings.successors
        # What CREATE has handed out waits among the successors, even where there are none.
        self._most_waiting = max(settings.successors, settings.nursery)
        self._idle_seconds = settings.warm_idle_seconds
        self._nursery: dict[uuid.UUID, Lease] = {}
        self._coming = 0
        self._pause_seconds = 0.0
        self._resume_at = 0.0
        self._wanted: OrderedDict[uuid.UUID, float] = OrderedDict()  # the loop's time of the last use; the last is the latest
        self._waiting: dict[uuid.UUID, float] = {}  # likewise
        self._something_to_start = asyncio.Event()
        self._something_to_drop = asyncio.Event()
        self._losses: set[asyncio.Task[None]] = set()

    @property
    def nursery(self) -> int:
        """Fresh instances whose container waits."""
        return len(self._nursery)

    @property
    def successors(self) -> int:
        """Containers that wait for a request of an instance that somebody has."""
        return len(self._waiting)

    async def claim(self, owner: bytes, *, salvage: bool = False) -> tuple[uuid.UUID, Record] | None:
        """A fresh instance from the nursery, its life beginning now; None when the nursery is empty. Raises as `Registry.claim`."""
        if not self._nursery:
            return None
        instance = next(iter(self._nursery))
        lease = self._nursery.pop(instance)
        try:
            record = await self._on_disk(partial(self._registry.claim, owner=owner, salvage=salvage), instance)
        except (LauncherError, OSError):
            self._nursery[instance] = lease
            raise
        except asyncio.CancelledError:
            # The disk may claim it yet. It is given to nobody: its container goes when it has idled, the instance by the reaper.
            self._release(instance, lease)
            raise
        if self._engine.is_prepared(instance):
            self._pause_seconds = 0.0
        self._release(instance, lease)
        return instance, record

    def _release(self, instance: uuid.UUID, lease: Lease) -> None:
        """It is no nursling any more."""
        self._waiting[instance] = asyncio.get_running_loop().time()
        lease.release()
        self._something_to_start.set()
        self._something_to_drop.set()

    def taken(self, instance: uuid.UUID) -> bool:
        """A run begins, and takes what waits for it; whether something does. The caller holds the lease."""
        self._wanted.pop(instance, None)
        self._waiting.pop(instance, None)
        return self._engine.is_prepared(instance)

    def want(self, instance: uuid.UUID) -> None:
        """A run has ended; another one may follow."""
        if not self._successors or not self._engine.starts_ahead:
            return
        self._wanted[instance] = asyncio.get_running_loop().time()
        self._wanted.move_to_end(instance)
        if len(self._wanted) > self._successors:
            self._wanted.popitem(last=False)
        self._something_to_start.set()

    async def discard(self, instance: uuid.UUID) -> None:
        """On return nothing has the volume mounted; raises EngineDownError if something may have. The caller holds the lease."""
        self._wanted.pop(instance, None)
        self._waiting.pop(instance, None)
        await self._engine.discard(instance)
        if self._engine.removal(instance) is not None:
            error = EngineDownError("a container that had waited cannot be removed yet")
            self._readiness.doubt(error)  # or whoever comes next would wait for the lease until the engine is back
            raise error

    async def run(self) -> None:
        """Until cancelled: start what is missing, drop what has waited too long."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._drop_idle())
            for _ in range(max(1, cores() - 1)):  # one core is always left to those that wait
                tasks.create_task(self._start())

    async def close(self) -> None:
        """Destroy whatever waits, and every instance that nobody has claimed. To be called when `run` is over."""
        await asyncio.gather(*self._losses, return_exceptions=True)
        nursery, self._nursery = self._nursery, {}
        leases = {instance: self._leases.try_acquire(instance) for instance in self._waiting}
        await asyncio.gather(
            *(self._dispose(instance, lease) for instance, lease in nursery.items()),
            *(self._drop(instance, lease) for instance, lease in leases.items() if lease is not None),
        )

    # --- starting

    async def _start(self) -> None:
        while True:
            if not self._may_start():
                self._something_to_start.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._pause()):
                        await self._something_to_start.wait()
                continue
            async with self._engine.spare_turn():
                if self._readiness.trouble is not None:
                    continue
                if self._wanted:
                    await self._start_successor(*self._wanted.popitem())
                elif self._may_start():
                    await self._start_nursling()

    def _may_start(self) -> bool:
        return self._readiness.trouble is None and (bool(self._wanted) or (self._has_room() and self._left_of_pause() <= 0))

    def _has_room(self) -> bool:
        return self._engine.starts_ahead and len(self._nursery) + self._coming < self._nursery_size

    def _left_of_pause(self) -> float:
        return self._resume_at - asyncio.get_running_loop().time()

    def _pause(self) -> float | None:
        """How long until there may be something to start without anybody saying so; None: never."""
        if not self._has_room() and not self._wanted:
            return None
        return max(self._left_of_pause(), _LOOK_AGAIN_SECONDS)

    async def _start_successor(self, instance: uuid.UUID, used_at: float) -> None:
        if not await self._make_place(used_at) or (lease := self._leases.try_acquire(instance)) is None:
            return  # whoever has the lease is a run, which will want a successor itself, or deletes the volume
        try:
            self._registry.find(instance)
            await self._engine.prepare(instance, self._registry.volume(instance), partial(self._lost, instance))
            self._waiting[instance] = used_at
            self._something_to_drop.set()
            log.debug("successor waits instance=%s", instance)
        except UnknownInstanceError:
            return  # it has ended
        except EngineError as error:
            self._readiness.doubt(error)
            log.warning("no successor instance=%s: %s", instance, error)
            return
        except asyncio.CancelledError:
            self._waiting[instance] = used_at  # for `close` to look after
            raise
        finally:
            lease.release_after(self._engine.removal(instance))
        if not self._engine.is_prepared(instance):  # it ended under our own lease
            self._lost(instance)

    async def _start_nursling(self) -> None:
        self._coming += 1
        instance = uuid7()
        lease = self._leases.try_acquire(instance)
        if lease is None:
            raise LauncherError("a fresh id is in use")
        try:
            await self._on_disk(self._registry.prepare, instance)
            await self._engine.prepare(instance, self._registry.volume(instance), partial(self._lost, instance))
            self._nursery[instance] = lease
            log.debug("nursling waits instance=%s", instance)
            if not self._engine.is_prepared(instance):  # it ended before anybody could be told
                self._lost(instance)
        except (LauncherError, OSError) as error:
            if isinstance(error, EngineError):
                self._readiness.doubt(error)
            self._take_a_break(f"not filled: {error}")
            await self._dispose(instance, lease)
        except asyncio.CancelledError:
            self._nursery[instance] = lease  # for `close` to look after
            raise
        finally:
            self._coming -= 1

    # --- dropping

    async def _make_place(self, used_at: float) -> bool:
        """Room for one more successor, if need be by dropping the least recently used; no room if that was used later still."""
        if used_at + self._idle_seconds <= asyncio.get_running_loop().time():
            return False
        while len(self._waiting) >= self._successors:
            for instance, last_used_at in self._least_recent_first():
                if last_used_at >= used_at:
                    return False
                if (lease := self._leases.try_acquire(instance)) is not None:
                    break
            else:
                return False
            await self._drop(instance, lease)
        return True

    async def _drop_idle(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._something_to_drop.clear()
            for instance, used_at in self._least_recent_first():
                if used_at + self._idle_seconds > loop.time() and len(self._waiting) <= self._most_waiting:
                    break
                if (lease := self._leases.try_acquire(instance)) is not None:
                    await self._drop(instance, lease)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._until_idle()):
                    await self._something_to_drop.wait()

    def _least_recent_first(self) -> list[tuple[uuid.UUID, float]]:
        return sorted(self._waiting.items(), key=lambda item: item[1])

    def _until_idle(self) -> float | None:
        """How long until something may have waited too long, longer for what is in use; None: never."""
        if not self._waiting:
            return None
        left = min(self._waiting.values()) + self._idle_seconds - asyncio.get_running_loop().time()
        return left if left > 0 else _LOOK_AGAIN_SECONDS

    async def _drop(self, instance: uuid.UUID, lease: Lease) -> None:
        try:
            with contextlib.suppress(EngineDownError):  # the lease is kept for as long as that lasts
                await self.discard(instance)
        finally:
            lease.release_after(self._engine.removal(instance))

    async def _dispose(self, instance: uuid.UUID, lease: Lease) -> None:
        """End an instance that nobody has claimed. Whatever cannot be done now is left to the reaper."""
        try:
            await self.discard(instance)
            await self._on_disk(self._registry.remove, instance)
        except (EngineDownError, OSError) as error:
            log.warning("nursling left to the reaper instance=%s: %s", instance, error)
        finally:
            lease.release_after(self._engine.removal(instance))

    # --- losing

    def _lost(self, instance: uuid.UUID) -> None:
        """A container that waited has ended. If its instance is in use, its run will find out by itself."""
        lease = self._nursery.pop(instance, None)
        if lease is not None:
            self._take_a_break(f"lost instance={instance}")
            work = self._dispose(instance, lease)
        elif (lease := self._leases.try_acquire(instance)) is not None:
            log.warning("successor lost instance=%s", instance)
            work = self._drop(instance, lease)
        else:
            return
        task = asyncio.create_task(work)
        self._losses.add(task)
        task.add_done_callback(self._losses.discard)

    def _take_a_break(self, why: str) -> None:
        """An image whose containers die at once must not cost a start after the other; what fails in the break is its like."""
        now = asyncio.get_running_loop().time()
        if now >= self._resume_at:
            first, longest = _PAUSE_SECONDS
            self._pause_seconds = min(max(first, 2 * self._pause_seconds), longest)
            self._resume_at = now + self._pause_seconds
        log.warning("nursery %s", why)
        self._something_to_start.set()

    async def _on_disk(self, work: Callable[[uuid.UUID], Result], instance: uuid.UUID) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, instance)
