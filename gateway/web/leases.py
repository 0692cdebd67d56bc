"""Who may run now: one request at a time per instance, first come first served, and no more at once than there are slots.

A request takes its instance's lease first and a slot second, so a queue on one instance never holds a slot. Waiting is bounded in
number and in time. A Hold is given back exactly once, when the container is gone.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from .errors import OverloadedError


@dataclass(slots=True)
class _Lease:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Hold:
    """One lease and, unless it was not wanted, one slot. Releasing twice is harmless."""

    __slots__ = ("_release",)

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()


class Leases:
    def __init__(self, slots: int, queue_length: int, queue_timeout_seconds: float) -> None:
        self._slots = asyncio.Semaphore(slots)
        self._queue_length = queue_length
        self._queue_timeout_seconds = queue_timeout_seconds
        self._leases: dict[uuid.UUID, _Lease] = {}
        self._waiting = 0

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def held(self) -> int:
        """Instances with a holder or a waiter."""
        return len(self._leases)

    async def acquire(self, instance: uuid.UUID, *, with_slot: bool = True) -> Hold:
        """Wait for the lease and then a slot; raises OverloadedError when the queue is full or the wait too long."""
        lease = self._leases.get(instance) or self._leases.setdefault(instance, _Lease())
        must_wait = lease.lock.locked() or (with_slot and self._slots.locked())
        if must_wait and self._waiting >= self._queue_length:
            self._forget(instance, lease)
            raise OverloadedError(reason=f"{self._waiting} requests wait already")
        lease.users += 1
        self._waiting += 1
        try:
            async with asyncio.timeout(self._queue_timeout_seconds):
                await lease.lock.acquire()
                if with_slot:
                    try:
                        await self._slots.acquire()
                    except BaseException:
                        lease.lock.release()
                        raise
        except TimeoutError:
            self._leave(instance, lease)
            raise OverloadedError(reason=f"waited {self._queue_timeout_seconds} s for an instance or a slot") from None
        except BaseException:
            self._leave(instance, lease)
            raise
        finally:
            self._waiting -= 1
        return Hold(partial(self._give_back, instance, lease, with_slot))

    def _give_back(self, instance: uuid.UUID, lease: _Lease, with_slot: bool) -> None:
        if with_slot:
            self._slots.release()
        lease.lock.release()
        self._leave(instance, lease)

    def _leave(self, instance: uuid.UUID, lease: _Lease) -> None:
        lease.users -= 1
        self._forget(instance, lease)

    def _forget(self, instance: uuid.UUID, lease: _Lease) -> None:
        if lease.users == 0:
            self._leases.pop(instance, None)
