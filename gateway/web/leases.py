"""Who may run now: one request at a time per instance, first come first served, and no more at once than there are slots.

A request first takes a ticket, a place among those that wait; only then is anything asked of the launcher. A ticket becomes a hold
when its instance's lease and a slot are had together. Until the lease is its own, a request stands in its instance's queue and in
nobody's way; from then on it stands in its address's queue. Slots go round the addresses that have somebody there, one each.

An address may take no more places than it leaves free. One flood alone fills half of them, n floods leave one in n + 1, so
whoever comes next still finds a place, and finds it without a setting that knows how many will ever flood.

A burst may fill the queue and is served to its end. A queue that stands, because more comes than can be served, takes no newcomers
until it has shrunk: it would only make everybody wait, and go on doing so when the load is over.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections import deque
from collections.abc import Callable
from functools import partial

from .errors import OverloadedError

# Weight of the newest run in the mean time for which a slot is held: what was true some twenty runs ago has faded.
_NEWEST_WEIGHT = 0.1
_MAX_RETRY_SECONDS = 60
# An address with fewer waiting for each slot has no standing queue, only slow requests.
_STANDING_PER_SLOT = 4


class _Waiter:
    """One request on its way to lease and slot. `address` is None for one that wants the lease alone."""

    __slots__ = ("address", "granted", "instance")

    def __init__(self, instance: uuid.UUID, address: str | None) -> None:
        self.instance = instance
        self.address = address
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Hold:
    """A lease and, unless it was not wanted, a slot, until the container is gone. Releasing twice is harmless."""

    __slots__ = ("_release", "_rename")

    def __init__(self, release: Callable[[], None], rename: Callable[[uuid.UUID], None]) -> None:
        self._release: Callable[[], None] | None = release
        self._rename = rename

    def rename(self, instance: uuid.UUID) -> None:
        """Make it the lease of an instance that has just got its name, before anybody else can know that name."""
        self._rename(instance)

    def release(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()


class Ticket:
    """A place among those that wait, until it has become a hold or its `with` block ends."""

    __slots__ = ("_address", "_leases", "_open")

    def __init__(self, leases: Leases, address: str) -> None:
        self._leases = leases
        self._address = address
        self._open = True

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._open:
            self._open = False
            self._leases._leave(self._address, self)

    async def hold(self, instance: uuid.UUID) -> Hold:
        """Wait for the lease and a slot; raises OverloadedError when the wait is too long. A ticket is good for one hold."""
        hold = await self._leases._acquire(instance, self._address)
        self.close()
        return hold


class Leases:
    def __init__(
        self,
        slots: int,
        queue_length: int,
        queue_timeout_seconds: float,
        queue_delay_seconds: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = slots
        self._free_slots = slots
        self._queue_length = queue_length
        self._queue_timeout_seconds = queue_timeout_seconds
        self._queue_delay_seconds = queue_delay_seconds
        self._clock = clock
        self._mean_held_seconds: float | None = None
        # When each began to wait, by address; the first is the oldest.
        self._tickets: dict[str, dict[Ticket, float]] = {}
        self._waiting = 0
        # The first of an instance's queue has its lease: it waits for a slot or holds one.
        self._instances: dict[uuid.UUID, deque[_Waiter]] = {}
        # Whoever lacks nothing but a slot, by address; the first address is the next to be served.
        self._ready: dict[str, deque[_Waiter]] = {}

    @property
    def waiting(self) -> int:
        """Tickets that have not become holds."""
        return self._waiting

    @property
    def held(self) -> int:
        """Instances with a holder or a waiter."""
        return len(self._instances)

    def ticket(self, address: str) -> Ticket:
        """A place, at once or never: raises OverloadedError when those that wait, or those of this address, are too many.

        It knows no instance, so that no token, good or bad, changes its answer.
        """
        tickets = self._tickets.get(address, {})
        waiting, own, now = self._waiting, len(tickets), self._clock()
        beyond_slots = max(0, waiting - self._free_slots)
        own_beyond_slots = max(0, own - self._free_slots)
        if waiting >= self._free_slots and own_beyond_slots >= self._queue_length - beyond_slots:
            raise self._overloaded(f"{waiting} requests wait already, {own} of this address")
        longest = now - next(iter(tickets.values()), now)
        if own >= _STANDING_PER_SLOT * self._slots and longest > self._queue_delay_seconds:
            raise self._overloaded(f"{own} requests of this address have waited for up to {longest:.1f} s")
        ticket = Ticket(self, address)
        self._tickets.setdefault(address, {})[ticket] = now
        self._waiting += 1
        return ticket

    async def lease(self, instance: uuid.UUID) -> Hold:
        """Wait for the lease alone; raises OverloadedError when the wait is too long."""
        return await self._acquire(instance, None)

    @property
    def retry_after_seconds(self) -> int:
        """How long those that wait now will take, as far as recent runs tell."""
        return max(1, min(_MAX_RETRY_SECONDS, math.ceil(self.waiting * (self._mean_held_seconds or 0.0) / self._slots)))

    async def _acquire(self, instance: uuid.UUID, address: str | None) -> Hold:
        waiter = _Waiter(instance, address)
        queue = self._instances.setdefault(instance, deque())
        queue.append(waiter)
        if len(queue) == 1:
            self._leased(waiter)
        if not waiter.granted.done():
            await self._granted(waiter)
        return Hold(partial(self._give_back, waiter, self._clock()), partial(self._rename, waiter))

    async def _granted(self, waiter: _Waiter) -> None:
        try:
            async with asyncio.timeout(self._queue_timeout_seconds):
                await waiter.granted
        except TimeoutError:
            self._give_up(waiter)
            raise self._overloaded(f"waited {self._queue_timeout_seconds} s for an instance or a slot") from None
        except BaseException:
            self._give_up(waiter)
            raise

    def _rename(self, waiter: _Waiter, instance: uuid.UUID) -> None:
        if instance in self._instances:
            raise ValueError("the instance is known already")
        self._instances[instance] = self._instances.pop(waiter.instance)
        waiter.instance = instance

    def _leased(self, waiter: _Waiter) -> None:
        """The waiter has become the first of its instance's queue."""
        if waiter.address is not None:
            self._ready.setdefault(waiter.address, deque()).append(waiter)
            self._hand_out()
        elif not waiter.granted.done():
            waiter.granted.set_result(None)

    def _hand_out(self) -> None:
        while self._free_slots and self._ready:
            address = next(iter(self._ready))
            ready = self._ready.pop(address)
            waiter = ready.popleft()
            if ready:
                self._ready[address] = ready
            # A cancelled waiter is on its way to give up.
            if not waiter.granted.done():
                self._free_slots -= 1
                waiter.granted.set_result(None)

    def _give_back(self, waiter: _Waiter, since: float) -> None:
        if waiter.address is not None:
            took, mean = self._clock() - since, self._mean_held_seconds
            self._mean_held_seconds = took if mean is None else mean + _NEWEST_WEIGHT * (took - mean)
        self._pass_on(waiter)

    def _give_up(self, waiter: _Waiter) -> None:
        if waiter.granted.done() and not waiter.granted.cancelled():
            self._pass_on(waiter)  # ended in the instant between being served and running
            return
        if waiter.address is not None and waiter in (ready := self._ready.get(waiter.address, deque())):
            ready.remove(waiter)
            if not ready:
                del self._ready[waiter.address]
        self._leave_queue(waiter)

    def _pass_on(self, waiter: _Waiter) -> None:
        # The lease first: the next of this instance lines up behind the addresses that waited for the slot all along.
        self._leave_queue(waiter)
        if waiter.address is not None:
            self._free_slots += 1
            self._hand_out()

    def _leave_queue(self, waiter: _Waiter) -> None:
        queue = self._instances[waiter.instance]
        was_first = queue[0] is waiter
        queue.remove(waiter)
        if not queue:
            del self._instances[waiter.instance]
        elif was_first:
            self._leased(queue[0])

    def _leave(self, address: str, ticket: Ticket) -> None:
        self._waiting -= 1
        del self._tickets[address][ticket]
        if not self._tickets[address]:
            del self._tickets[address]

    def _overloaded(self, reason: str) -> OverloadedError:
        return OverloadedError(reason=reason, headers={"Retry-After": str(self.retry_after_seconds)})
