"""Exclusive use of an instance's volume, in the order of asking."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque


class Lease:
    """Held from the moment it is returned until `release`, which may be called again and again."""

    __slots__ = ("_leases", "instance")

    def __init__(self, leases: Leases, instance: uuid.UUID) -> None:
        self._leases: Leases | None = leases
        self.instance = instance

    def release(self) -> None:
        leases, self._leases = self._leases, None
        if leases is not None:
            leases._release(self.instance)

    def release_after(self, removal: asyncio.Task[None] | None) -> None:
        """Now, or when `removal` has ended: until then something still has the volume mounted."""
        if removal is None:
            self.release()
        else:
            removal.add_done_callback(lambda _: self.release())


class Leases:
    """One queue per instance in use; an instance that nobody uses has no entry."""

    def __init__(self) -> None:
        self._queues: dict[uuid.UUID, deque[asyncio.Future[None]]] = {}

    def __len__(self) -> int:
        return len(self._queues)

    def try_acquire(self, instance: uuid.UUID) -> Lease | None:
        """The lease if it is free now."""
        if instance in self._queues:
            return None
        self._queues[instance] = deque()
        return Lease(self, instance)

    async def acquire(self, instance: uuid.UUID) -> Lease:
        """Wait for the lease; first come, first served. Cancelling gives up the place in the queue."""
        lease = self.try_acquire(instance)
        if lease is not None:
            return lease
        turn = asyncio.get_running_loop().create_future()
        self._queues[instance].append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release(instance)  # cancelled in the instant between being served and running
            else:
                with contextlib.suppress(ValueError):  # `_release` has passed over it already
                    self._queues[instance].remove(turn)
            raise
        return Lease(self, instance)

    def _release(self, instance: uuid.UUID) -> None:
        queue = self._queues[instance]
        while queue:
            turn = queue.popleft()
            if not turn.done():
                turn.set_result(None)  # the entry stays: the lease passes on without being free in between
                return
        del self._queues[instance]
