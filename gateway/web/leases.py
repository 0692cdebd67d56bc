"""Who may run now: one request at a time per instance, first come first served, and no more at once than there are slots.

A request first takes a ticket, a place among those that wait; only then is anything asked of the launcher. A ticket becomes a hold
when its instance's lease and a slot are had together. Until the lease is its own, a request stands in its instance's queue and in
nobody's way; from then on it stands in its address's queue. Slots go round the addresses that have somebody there, one each.

An address may take no more places than it leaves free. One flood alone fills half of them, n floods leave one in n + 1, so
whoever comes next still finds a place, and finds it without a setting that knows how many will ever flood.

Who presents a token, whatever it is worth, goes before who wants a new instance: creates get half of the places, by the same rule
among themselves, and a slot only when nobody with a token waits for one, or when three of those went before. So a flood of creates,
from however many addresses, costs the callers that are here already the wait for one slot, and they cannot keep it out for good.
While such callers come, creates hold no more than a quarter of the slots at once: runs slow one another down.

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

from .errors import ApiError, OverloadedError

# Weight of the newest run in the mean time for which a slot is held: what was true some twenty runs ago has faded.
_NEWEST_WEIGHT = 0.1
_MAX_RETRY_SECONDS = 60
# An address with fewer waiting for each slot has no standing queue, only slow requests.
_STANDING_PER_SLOT = 4
# Slots handed to others while a create waits; the next one is a create's.
_BEFORE_A_CREATE = 3
# While others came within this time, creates hold no more than a quarter of the slots.
_QUIET_SECONDS = 1.0


class _Waiter:
    """One request on its way to lease and slot. `address` is None for one that wants the lease alone."""

    __slots__ = ("address", "creates", "granted", "instance")

    def __init__(self, instance: uuid.UUID, address: str | None, creates: bool) -> None:
        self.instance = instance
        self.address = address
        self.creates = creates
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def overdue(self) -> None:
        if not self.granted.done():
            self.granted.set_exception(TimeoutError())


class _Round:
    """Those who lack nothing but a slot, by address; the first address is the next to be served."""

    __slots__ = ("_addresses", "_length")

    def __init__(self) -> None:
        self._addresses: dict[str, deque[_Waiter]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, address: str, waiter: _Waiter) -> None:
        self._addresses.setdefault(address, deque()).append(waiter)
        self._length += 1

    def pop(self) -> _Waiter:
        address = next(iter(self._addresses))
        waiters = self._addresses.pop(address)
        waiter = waiters.popleft()
        if waiters:
            self._addresses[address] = waiters
        self._length -= 1
        return waiter

    def discard(self, address: str, waiter: _Waiter) -> None:
        waiters = self._addresses.get(address, ())
        if waiter in waiters:
            self._addresses[address].remove(waiter)
            self._length -= 1
            if not waiters:
                del self._addresses[address]


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

    __slots__ = ("_address", "_creates", "_leases", "_open")

    def __init__(self, leases: Leases, address: str, creates: bool) -> None:
        self._leases = leases
        self._address = address
        self._creates = creates
        self._open = True

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._open:
            self._open = False
            self._leases._leave(self._address, self._creates, self)

    async def hold(self, instance: uuid.UUID) -> Hold:
        """Wait for the lease and a slot; raises OverloadedError when the wait is too long. A ticket is good for one hold."""
        hold = await self._leases._acquire(instance, self._address, self._creates)
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
        # When each began to wait, by address and whether it creates; the first is the oldest.
        self._tickets: dict[tuple[str, bool], dict[Ticket, float]] = {}
        self._waiting = 0
        self._creates_waiting = 0
        # The first of an instance's queue has its lease: it waits for a slot or holds one.
        self._instances: dict[uuid.UUID, deque[_Waiter]] = {}
        self._ready = _Round()
        self._ready_creates = _Round()
        self._before_a_create = 0
        # Slots that creates hold, and since when nobody else has taken one.
        self._creating = 0
        self._followed_at = -math.inf

    @property
    def waiting(self) -> int:
        """Tickets that have not become holds."""
        return self._waiting

    @property
    def lacking_slots(self) -> int:
        """Those of them that lack nothing but a slot."""
        return len(self._ready) + len(self._ready_creates)

    @property
    def held(self) -> int:
        """Instances with a holder or a waiter."""
        return len(self._instances)

    def crowded(self, instance: uuid.UUID) -> bool:
        """Whether a request for it would wait."""
        return not self._free_slots or instance in self._instances

    def ticket(self, address: str, *, creates: bool = False) -> Ticket:
        """A place, at once or never: raises OverloadedError when those that wait, or those of this address, are too many.

        It knows no instance, so that no token, good or bad, changes its answer. `creates` is for a request without any.
        """
        alike, others = self._tickets.get((address, creates), {}), self._tickets.get((address, not creates), {})
        own, now = len(alike) + len(others), self._clock()
        if self._leaves_too_few(own, self._waiting, self._queue_length):
            raise self._overloaded(f"{self._waiting} requests wait already, {own} of this address")
        if creates and self._leaves_too_few(len(alike), self._creates_waiting, self._queue_length // 2):
            raise self._overloaded(f"{self._creates_waiting} creates wait already, {len(alike)} of this address")
        longest = now - min(next(iter(alike.values()), now), next(iter(others.values()), now))
        if own >= _STANDING_PER_SLOT * self._slots and longest > self._queue_delay_seconds:
            raise self._overloaded(f"{own} requests of this address have waited for up to {longest:.1f} s")
        ticket = Ticket(self, address, creates)
        self._tickets.setdefault((address, creates), {})[ticket] = now
        self._waiting += 1
        self._creates_waiting += creates
        return ticket

    def _leaves_too_few(self, own: int, waiting: int, places: int) -> bool:
        """Whether an address with so many of those that wait has at least as many places as are free."""
        if self._waiting < self._free_slots:
            return False
        return max(0, own - self._free_slots) >= places - max(0, waiting - self._free_slots)

    async def lease(self, instance: uuid.UUID) -> Hold:
        """Wait for the lease alone; raises OverloadedError when the wait is too long."""
        return await self._acquire(instance, None, False)

    def refuse_waiting(self, error: Callable[[], ApiError]) -> None:
        """Whoever waits for a lease and a slot gets such an error instead."""
        for queue in self._instances.values():
            for waiter in queue:
                if waiter.address is not None and not waiter.granted.done():
                    waiter.granted.set_exception(error())

    @property
    def retry_after_seconds(self) -> int:
        """How long those that wait now will take, as far as recent runs tell."""
        return max(1, min(_MAX_RETRY_SECONDS, math.ceil(self.waiting * (self._mean_held_seconds or 0.0) / self._slots)))

    async def _acquire(self, instance: uuid.UUID, address: str | None, creates: bool) -> Hold:
        waiter = _Waiter(instance, address, creates)
        queue = self._instances.setdefault(instance, deque())
        queue.append(waiter)
        if len(queue) == 1:
            self._leased(waiter)
        if not waiter.granted.done():
            await self._granted(waiter)
        return Hold(partial(self._give_back, waiter, self._clock()), partial(self._rename, waiter))

    async def _granted(self, waiter: _Waiter) -> None:
        # Of all that wait, nearly none waits so long: a timer that cancels nothing but the future costs half of asyncio.timeout.
        timer = asyncio.get_running_loop().call_later(self._queue_timeout_seconds, waiter.overdue)
        try:
            await waiter.granted
        except TimeoutError:
            self._give_up(waiter)
            raise self._overloaded(f"waited {self._queue_timeout_seconds} s for an instance or a slot") from None
        except BaseException:
            self._give_up(waiter)
            raise
        finally:
            timer.cancel()

    def _rename(self, waiter: _Waiter, instance: uuid.UUID) -> None:
        if instance in self._instances:
            raise ValueError("the instance is known already")
        self._instances[instance] = self._instances.pop(waiter.instance)
        waiter.instance = instance

    def _leased(self, waiter: _Waiter) -> None:
        """The waiter has become the first of its instance's queue."""
        if waiter.address is not None:
            self._round(waiter).add(waiter.address, waiter)
            self._hand_out()
        elif not waiter.granted.done():
            waiter.granted.set_result(None)

    def _round(self, waiter: _Waiter) -> _Round:
        return self._ready_creates if waiter.creates else self._ready

    def _hand_out(self) -> None:
        while self._free_slots and (waiter := self._next()) is not None:
            # A cancelled waiter is on its way to give up.
            if waiter.granted.done():
                continue
            self._before_a_create = self._before_a_create + 1 if self._ready_creates and not waiter.creates else 0
            self._free_slots -= 1
            if waiter.creates:
                self._creating += 1
            else:
                self._followed_at = self._clock()
            waiter.granted.set_result(None)

    def _next(self) -> _Waiter | None:
        if self._ready_creates and self._may_create() and (not self._ready or self._before_a_create >= _BEFORE_A_CREATE):
            return self._ready_creates.pop()
        return self._ready.pop() if self._ready else None

    def _may_create(self) -> bool:
        """Creates may hold every slot only while nobody comes who has an instance: a slot that runs slows the others down."""
        return self._creating < max(1, self._slots // 4) or self._clock() - self._followed_at > _QUIET_SECONDS

    def _give_back(self, waiter: _Waiter, since: float) -> None:
        if waiter.address is not None:
            took, mean = self._clock() - since, self._mean_held_seconds
            self._mean_held_seconds = took if mean is None else mean + _NEWEST_WEIGHT * (took - mean)
        self._pass_on(waiter)

    def _give_up(self, waiter: _Waiter) -> None:
        if waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
            self._pass_on(waiter)  # ended in the instant between being served and running
            return
        if waiter.address is not None:
            self._round(waiter).discard(waiter.address, waiter)
        self._leave_queue(waiter)

    def _pass_on(self, waiter: _Waiter) -> None:
        # The lease first: the next of this instance lines up behind the addresses that waited for the slot all along.
        self._leave_queue(waiter)
        if waiter.address is not None:
            self._free_slots += 1
            self._creating -= waiter.creates
            self._hand_out()

    def _leave_queue(self, waiter: _Waiter) -> None:
        queue = self._instances[waiter.instance]
        was_first = queue[0] is waiter
        queue.remove(waiter)
        if not queue:
            del self._instances[waiter.instance]
        elif was_first:
            self._leased(queue[0])

    def _leave(self, address: str, creates: bool, ticket: Ticket) -> None:
        self._waiting -= 1
        self._creates_waiting -= creates
        tickets = self._tickets[address, creates]
        del tickets[ticket]
        if not tickets:
            del self._tickets[address, creates]

    def _overloaded(self, reason: str) -> OverloadedError:
        return OverloadedError(reason=reason, headers={"Retry-After": str(self.retry_after_seconds)})
