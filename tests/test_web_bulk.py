"""The gate of bulk runs: half of the slots, one for an address, in the order of coming, and nobody waits without end."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace

import pytest

from gateway.web.bulk import MAX_WAITING, BulkGate
from gateway.web.errors import OverloadedError
from gateway.web.room import SHARE

from .fake_launcher import TEST_SETTINGS

A, B, C, D = (f"192.0.2.{number}" for number in range(1, 5))


def gate(slots: int = 4, queue_timeout_seconds: float = 60.0) -> BulkGate:
    return BulkGate(replace(TEST_SETTINGS, slots=slots, queue_timeout_seconds=queue_timeout_seconds))


class Visit:
    """One passage, as a task that goes in when it can and stays until it is told to leave."""

    def __init__(self, gate: BulkGate, address: str) -> None:
        self.inside = False
        self._leave = asyncio.Event()
        self.task = asyncio.ensure_future(self._visit(gate, address))

    async def _visit(self, gate: BulkGate, address: str) -> None:
        async with gate.passage(address):
            self.inside = True
            await self._leave.wait()
            self.inside = False

    async def leave(self) -> None:
        self._leave.set()
        await self.task
        await settled()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def visits(gate: BulkGate, *addresses: str) -> list[Visit]:
    made = [Visit(gate, address) for address in addresses]
    await settled()
    return made


@pytest.mark.parametrize(("slots", "most"), [(1, 1), (2, 1), (3, 1), (4, 2), (9, 4)])
async def test_half_of_the_slots_are_the_most_and_one_at_least(slots, most):
    inside = await visits(gate(slots), *(f"192.0.2.{number}" for number in range(10)))
    assert [visit.inside for visit in inside] == [True] * most + [False] * (10 - most)
    for visit in inside:
        await visit.leave()


async def test_an_address_has_one_at_a_time_and_those_behind_it_are_not_kept_by_it():
    doors = gate(4)
    first, second, other = await visits(doors, A, A, B)
    assert [first.inside, second.inside, other.inside] == [True, False, True]
    third, fourth = await visits(doors, A, C)
    await other.leave()
    assert [second.inside, third.inside, fourth.inside] == [False, False, True]
    await first.leave()
    assert [second.inside, third.inside] == [True, False]
    for visit in (second, third, fourth):
        await visit.leave()
    assert doors.waiting == 0


async def test_who_came_first_goes_in_first():
    doors = gate(2)
    (first,) = await visits(doors, A)
    waiting = await visits(doors, B, C, D)
    for visit in waiting:
        assert not visit.inside
        await first.leave()
        assert visit.inside
        first = visit
    await first.leave()


async def test_passages_go_round_the_addresses():
    doors = gate(2)
    (first,) = await visits(doors, A)
    waiting = await visits(doors, A, A, B, B, C)
    inside, entered = first, []
    for _ in waiting:
        await inside.leave()
        (inside,) = (visit for visit in waiting if visit.inside)
        entered.append(waiting.index(inside))
    await inside.leave()
    assert entered == [2, 4, 0, 3, 1]


async def test_an_address_has_a_seventh_of_the_places_that_it_leaves_free_and_all_together_so_many():
    doors = gate(2)
    (first,) = await visits(doors, A)
    waiting = await visits(doors, *[A] * (MAX_WAITING // (SHARE + 1)))
    (refused,) = await visits(doors, A)
    with pytest.raises(OverloadedError) as told:
        await refused.task
    assert int(told.value.headers["Retry-After"]) >= 1
    while doors.waiting + SHARE < MAX_WAITING:
        waiting += await visits(doors, f"198.51.100.{doors.waiting}")
    (refused,) = await visits(doors, B)
    with pytest.raises(OverloadedError):
        await refused.task
    await asyncio.gather(*(visit.leave() for visit in (first, *waiting)))
    assert doors.waiting == 0


async def test_a_wait_that_is_too_long_ends_and_leaves_nothing_behind():
    doors = gate(2, queue_timeout_seconds=0.05)
    first, second = await visits(doors, A, B)
    with pytest.raises(OverloadedError):
        await second.task
    assert doors.waiting == 0
    await first.leave()
    (third,) = await visits(doors, B)
    assert third.inside
    await third.leave()


async def test_one_that_gives_up_in_the_instant_of_being_let_in_passes_it_on():
    doors = gate(2)
    first, second, third = await visits(doors, A, B, C)
    first._leave.set()
    await first.task  # the passage is the second's by now
    second.task.cancel()
    await asyncio.wait((second.task,))
    await settled()
    assert third.inside
    await third.leave()


@pytest.mark.parametrize("seed", range(5))
async def test_in_any_order_of_coming_giving_up_and_leaving_nothing_is_lost(seed):
    chance, doors = random.Random(seed), gate(6)
    here: list[Visit] = []
    for _ in range(300):
        match chance.randrange(3):
            case 0 if doors.waiting < MAX_WAITING // 2:
                here += await visits(doors, chance.choice([A, B, C, D]))
            case 1 if here:
                visit = here.pop(chance.randrange(len(here)))
                visit.task.cancel()
                await asyncio.wait((visit.task,))
            case 2 if inside := [visit for visit in here if visit.inside]:
                here.remove(chosen := chance.choice(inside))
                await chosen.leave()
        await settled()
        here = [visit for visit in here if not visit.task.done()]
        assert sum(visit.inside for visit in here) <= 3
        assert any(visit.inside for visit in here) == bool(here)
    for visit in here:
        visit.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*(visit.task for visit in here))
    await settled()
    assert (doors.waiting, doors._free, doors._at_work) == (0, 3, set())
