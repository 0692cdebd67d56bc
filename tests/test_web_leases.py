"""Leases and slots: first come first served, fair between addresses, bounded, given back exactly once."""

from __future__ import annotations

import asyncio
import random
import uuid

import pytest

from gateway.web.errors import OverloadedError
from gateway.web.leases import Hold, Leases

A, B, C = (uuid.UUID(int=number) for number in (1, 2, 3))
NEAR, FAR = "192.0.2.1", "192.0.2.2"


async def take(leases: Leases, instance: uuid.UUID, address: str = NEAR) -> Hold:
    with leases.ticket(address) as ticket:
        return await ticket.hold(instance)


async def waiting_for(leases: Leases, instance: uuid.UUID, address: str = NEAR) -> asyncio.Task[Hold]:
    """A task that has taken its place and waits."""
    task = asyncio.ensure_future(take(leases, instance, address))
    await asyncio.sleep(0)
    return task


def refused(leases: Leases, address: str = NEAR) -> bool:
    try:
        leases.ticket(address).close()
    except OverloadedError:
        return True
    return False


def at_rest(leases: Leases) -> bool:
    return (leases.held, leases.waiting) == (0, 0)


async def test_requests_of_one_instance_run_in_the_order_they_came():
    leases, order = Leases(4, 100, 5.0), []

    async def one(number: int) -> None:
        hold = await take(leases, A)
        order.append(number)
        await asyncio.sleep(0)
        hold.release()

    await asyncio.gather(*(one(number) for number in range(20)))
    assert order == list(range(20))
    assert at_rest(leases)


async def test_a_queue_on_one_instance_takes_no_slot_from_another_of_the_same_address():
    leases = Leases(2, 100, 5.0)
    first = await take(leases, A)
    waiting = [await waiting_for(leases, A) for _ in range(5)]
    (await asyncio.wait_for(take(leases, B), 1)).release()
    first.release()
    for task in waiting:
        (await task).release()
    assert at_rest(leases)


async def test_no_more_run_at_once_than_there_are_slots():
    leases, running, most = Leases(3, 100, 5.0), 0, 0

    async def one(number: int) -> None:
        nonlocal running, most
        hold = await take(leases, uuid.UUID(int=number))
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        hold.release()

    await asyncio.gather(*(one(number) for number in range(20)))
    assert most == 3


# ── fairness ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def order_of_service(slots: int, arrivals: list[tuple[str, uuid.UUID]]) -> list[tuple[str, uuid.UUID]]:
    """In which order those are served who come, in this order, while every slot is taken."""
    leases, served = Leases(slots, 1000, 5.0), []
    busy = [await take(leases, uuid.uuid4(), "the first") for _ in range(slots)]

    async def one(address: str, instance: uuid.UUID) -> None:
        hold = await take(leases, instance, address)
        served.append((address, instance))
        hold.release()

    tasks = []
    for arrival in arrivals:
        tasks.append(asyncio.ensure_future(one(*arrival)))
        await asyncio.sleep(0)
    for hold in busy:
        hold.release()
    await asyncio.gather(*tasks)
    assert at_rest(leases)
    return served


async def test_slots_go_round_the_addresses_that_wait_so_a_newcomer_is_served_next_but_one():
    flood = [(NEAR, uuid.uuid4()) for _ in range(100)]
    served = await order_of_service(1, [*flood, (FAR, A), (FAR, B)])
    assert [address for address, _ in served[:5]] == [NEAR, FAR, NEAR, FAR, NEAR]


async def test_one_address_is_served_in_the_order_it_asked():
    arrivals = [(NEAR, uuid.UUID(int=number)) for number in range(30)]
    assert await order_of_service(1, arrivals) == arrivals


async def test_a_queue_on_one_instance_does_not_hold_up_its_address():
    arrivals = [(NEAR, A)] * 5 + [(NEAR, B)]
    assert (await order_of_service(1, arrivals)).index((NEAR, B)) == 1


async def test_every_one_of_many_addresses_is_served_once_before_any_is_served_again():
    addresses = [f"198.51.100.{number}" for number in range(10)]
    arrivals = [(address, uuid.uuid4()) for address in addresses for _ in range(3)]
    served = [address for address, _ in await order_of_service(1, arrivals)]
    assert served == addresses * 3


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_full_queue_refuses_at_once():
    leases = Leases(1, 1, 5.0)
    hold = await take(leases, A)
    waiting = await waiting_for(leases, B)
    assert refused(leases)
    assert refused(leases, FAR)
    hold.release()
    (await waiting).release()
    assert at_rest(leases)


async def test_a_queue_of_length_zero_still_serves_what_need_not_wait():
    leases = Leases(2, 0, 5.0)
    holds = [await take(leases, A), await take(leases, B)]
    assert refused(leases)
    for hold in holds:
        hold.release()
    (await take(leases, A)).release()


@pytest.mark.parametrize("floods", [1, 2, 3, 7])
async def test_however_many_flood_each_gets_the_same_and_leaves_as_much(floods):
    leases = Leases(1, 120, 5.0)
    hold = await take(leases, A)
    tickets, refusals = [], 0
    while refusals < floods:
        refusals = 0
        for number in range(floods):
            try:
                tickets.append(leases.ticket(f"flood {number}"))
            except OverloadedError:
                refusals += 1
    assert len(tickets) == 120 * floods // (floods + 1)
    assert not refused(leases, "a newcomer")
    for ticket in tickets:
        ticket.close()
    hold.release()
    assert at_rest(leases)


async def test_a_burst_that_the_free_slots_take_up_needs_no_places():
    leases = Leases(4, 0, 5.0)
    tickets = [leases.ticket(NEAR) for _ in range(4)]
    assert refused(leases)
    for ticket in tickets:
        ticket.close()
    assert at_rest(leases)


async def test_a_ticket_that_is_not_used_frees_its_place():
    leases = Leases(1, 0, 5.0)
    with pytest.raises(LookupError), leases.ticket(NEAR):
        raise LookupError
    assert not refused(leases)
    assert at_rest(leases)


# ── giving up ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_wait_that_is_too_long_ends_and_leaves_nothing_behind():
    leases = Leases(1, 10, 0.02)
    hold = await take(leases, A)
    with pytest.raises(OverloadedError):
        await take(leases, A)
    with pytest.raises(OverloadedError):
        await take(leases, B)
    hold.release()
    (await take(leases, B)).release()
    assert at_rest(leases)


async def test_a_waiter_that_gives_up_frees_its_place_at_once_and_passes_its_turn_on():
    leases = Leases(1, 2, 5.0)
    hold = await take(leases, A)
    gone = await waiting_for(leases, A)
    assert refused(leases)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert leases.waiting == 0
    next_one = await waiting_for(leases, A)
    hold.release()
    (await next_one).release()
    assert at_rest(leases)


async def test_one_that_gives_up_in_the_instant_of_being_served_passes_it_on():
    leases = Leases(1, 10, 5.0)
    hold = await take(leases, A)
    gone, next_one = await waiting_for(leases, A), await waiting_for(leases, A)
    hold.release()
    gone.cancel()
    (await next_one).release()
    assert at_rest(leases)


async def test_one_that_gives_up_in_the_instant_before_being_served_is_passed_over():
    leases = Leases(1, 10, 5.0)
    hold = await take(leases, A)
    gone, next_one = await waiting_for(leases, B), await waiting_for(leases, C)
    gone.cancel()
    hold.release()
    (await next_one).release()
    assert at_rest(leases)


async def test_a_second_release_frees_nothing_that_is_not_its_own():
    leases = Leases(1, 0, 5.0)
    hold = await take(leases, A)
    hold.release()
    other = await take(leases, A)
    hold.release()
    assert refused(leases)
    other.release()


async def test_a_lease_without_a_slot_waits_for_the_instance_and_for_nothing_else():
    leases = Leases(1, 0, 5.0)
    hold = await take(leases, A)
    (await asyncio.wait_for(leases.lease(B), 1)).release()
    alone = asyncio.ensure_future(leases.lease(A))
    await asyncio.sleep(0)
    assert not alone.done()
    hold.release()
    (await alone).release()
    (await take(leases, A)).release()
    assert at_rest(leases)


async def test_a_lease_that_gets_its_name_later_keeps_its_place_and_orders_who_comes_under_that_name():
    leases = Leases(2, 0, 5.0)
    hold = await take(leases, A)
    hold.rename(B)
    (await take(leases, A)).release()
    with pytest.raises(ValueError, match="known already"):
        hold.rename(B)
    next_one = await waiting_for(leases, B)
    await asyncio.sleep(0)
    assert not next_one.done()
    hold.release()
    (await next_one).release()
    assert at_rest(leases)


# ── when to come back ────────────────────────────────────────────────────────────────────────────────────────────────


async def told(leases: Leases) -> int:
    with pytest.raises(OverloadedError) as caught:
        leases.ticket(NEAR)
    return int(caught.value.headers["Retry-After"])


@pytest.mark.parametrize(("seconds", "answer"), [(0.01, 1), (0.5, 5), (2.0, 20), (30.0, 60)])
async def test_the_time_to_retry_is_what_those_that_wait_will_take(seconds, answer):
    now = 0.0
    leases = Leases(2, 40, 5.0, clock=lambda: now)
    for _ in range(3):
        holds = [await take(leases, A), await take(leases, B)]
        now += seconds
        for hold in holds:
            hold.release()
    holds = [await take(leases, A), await take(leases, B)]
    tickets = [leases.ticket(NEAR) for _ in range(20)]
    assert await told(leases) == answer
    for held in (*tickets, *holds):
        held.close() if hasattr(held, "close") else held.release()


async def test_the_time_to_retry_follows_what_runs_take_now():
    now = 0.0
    leases = Leases(1, 40, 5.0, clock=lambda: now)
    for seconds in [0.1] * 20 + [1.0] * 40:
        hold = await take(leases, A)
        now += seconds
        hold.release()
    hold = await take(leases, A)
    tickets = [leases.ticket(NEAR) for _ in range(20)]
    assert 18 <= await told(leases) <= 20
    for ticket in tickets:
        ticket.close()
    hold.release()


# ── all of it at once ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(20))
async def test_in_any_order_of_coming_giving_up_and_ending_nothing_is_lost_and_no_slot_idles(seed):
    chance = random.Random(seed)
    slots = chance.randint(1, 4)
    leases = Leases(slots, 1000, 60.0)
    instances = [uuid.UUID(int=number) for number in range(chance.randint(1, 8))]
    tasks: list[tuple[uuid.UUID, asyncio.Task[Hold]]] = []
    running: list[tuple[uuid.UUID, Hold]] = []
    for _ in range(400):
        step = chance.random()
        if step < 0.5:
            instance = chance.choice(instances)
            tasks.append((instance, asyncio.ensure_future(take(leases, instance, f"{chance.randrange(4)}"))))
        elif step < 0.65 and tasks:
            chance.choice(tasks)[1].cancel()
        elif running:
            running.pop(chance.randrange(len(running)))[1].release()
        if chance.random() < 0.5:
            continue  # let more than one thing happen in one turn of the loop
        for _ in range(3):
            await asyncio.sleep(0)
        done = [(instance, task) for instance, task in tasks if task.done()]
        tasks = [(instance, task) for instance, task in tasks if not task.done()]
        running += [(instance, task.result()) for instance, task in done if not task.cancelled()]
        busy = [instance for instance, _ in running]
        assert len(busy) == len(set(busy)) <= slots
        assert leases.waiting == len(tasks)
        assert len(busy) == slots or all(instance in busy for instance, _ in tasks), "a slot idles while somebody could run"
    for _, task in tasks:
        task.cancel()
    for hold in [hold for _, hold in running] + [
        result for result in await asyncio.gather(*(task for _, task in tasks), return_exceptions=True) if isinstance(result, Hold)
    ]:
        hold.release()
    assert at_rest(leases)
    (await asyncio.wait_for(take(leases, A), 1)).release()


async def test_a_queue_that_stands_takes_no_newcomers_of_its_address_and_a_burst_is_served_to_its_end():
    now = 0.0
    leases = Leases(1, 1000, 5.0, queue_delay_seconds=3.0, clock=lambda: now)
    burst = [leases.ticket("192.0.2.1") for _ in range(200)]
    now = 3.5
    with pytest.raises(OverloadedError):
        leases.ticket("192.0.2.1")
    leases.ticket("198.51.100.7").close()
    for ticket in burst[:197]:
        ticket.close()
    leases.ticket("192.0.2.1").close()
    for ticket in burst:
        ticket.close()
    assert leases.waiting == 0
