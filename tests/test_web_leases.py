"""Leases and slots: first come first served, fair between addresses, bounded, given back exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import uuid

import pytest

from gateway.web.errors import CircuitOpenError, OverloadedError
from gateway.web.leases import Hold, Leases

A, B, C = (uuid.UUID(int=number) for number in (1, 2, 3))
NEAR, FAR = "192.0.2.1", "192.0.2.2"


async def take(leases: Leases, instance: uuid.UUID, address: str = NEAR, *, creates: bool = False) -> Hold:
    with leases.ticket(address, creates=creates) as ticket:
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
    return (leases.held, leases.waiting, leases.lacking_slots) == (0, 0, 0)


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


async def served(slots: int, arrivals: list[tuple[str, uuid.UUID, bool]]) -> list[tuple[str, uuid.UUID, bool]]:
    """In which order those are served who come, in this order, while every slot is taken: address, instance, whether it creates."""
    leases, order = Leases(slots, 10_000, 5.0), []
    busy = [await take(leases, uuid.uuid4(), "the first") for _ in range(slots)]

    async def one(address: str, instance: uuid.UUID, creates: bool) -> None:
        hold = await take(leases, instance, address, creates=creates)
        order.append((address, instance, creates))
        hold.release()

    tasks = []
    for arrival in arrivals:
        tasks.append(asyncio.ensure_future(one(*arrival)))
        await asyncio.sleep(0)
    assert leases.lacking_slots == len({instance for _, instance, _ in arrivals})
    for hold in busy:
        hold.release()
    await asyncio.gather(*tasks)
    assert at_rest(leases)
    return order


async def order_of_service(slots: int, arrivals: list[tuple[str, uuid.UUID]]) -> list[tuple[str, uuid.UUID]]:
    return [(address, instance) for address, instance, _ in await served(slots, [(*arrival, False) for arrival in arrivals])]


async def order_with_creates(slots: int, arrivals: list[tuple[str, bool]]) -> list[bool]:
    order = await served(slots, [(address, uuid.uuid4(), creates) for address, creates in arrivals])
    return [creates for _, _, creates in order]


async def test_slots_go_round_the_addresses_that_wait_so_a_newcomer_is_served_next_but_one():
    flood = [(NEAR, uuid.uuid4()) for _ in range(100)]
    order = await order_of_service(1, [*flood, (FAR, A), (FAR, B)])
    assert [address for address, _ in order[:5]] == [NEAR, FAR, NEAR, FAR, NEAR]


async def test_one_address_is_served_in_the_order_it_asked():
    arrivals = [(NEAR, uuid.UUID(int=number)) for number in range(30)]
    assert await order_of_service(1, arrivals) == arrivals


async def test_a_queue_on_one_instance_does_not_hold_up_its_address():
    arrivals = [(NEAR, A)] * 5 + [(NEAR, B)]
    assert (await order_of_service(1, arrivals)).index((NEAR, B)) == 1


async def test_every_one_of_many_addresses_is_served_once_before_any_is_served_again():
    addresses = [f"198.51.100.{number}" for number in range(10)]
    arrivals = [(address, uuid.uuid4()) for address in addresses for _ in range(3)]
    assert [address for address, _ in await order_of_service(1, arrivals)] == addresses * 3


async def test_who_has_a_token_goes_first_and_every_fourth_slot_is_a_creates():
    arrivals = [(f"flood {number}", True) for number in range(100)] + [(NEAR, False)] * 30
    order = await order_with_creates(1, arrivals)
    assert order[:40] == [False, False, False, True] * 10
    assert all(order[40:])


@pytest.mark.parametrize("creates", [True, False])
async def test_creates_alone_and_tokens_alone_are_served_as_they_come(creates):
    assert await order_with_creates(2, [(NEAR, creates)] * 20) == [creates] * 20


async def test_beside_a_flood_of_creates_from_thousands_of_addresses_a_client_waits_for_one_slot_at_most():
    """Simulated: at every step one run ends and one more create comes; the client asks again once it was answered."""
    slots, rounds = 4, 500
    leases = Leases(slots, 512, 5.0)
    numbers, handed = iter(range(1_000_000)), 0
    running: list[Hold] = []
    waiting: set[asyncio.Task[Hold]] = set()

    def create() -> None:
        async def one(address: str) -> Hold:
            with leases.ticket(address, creates=True) as ticket:
                return await ticket.hold(uuid.uuid4())

        waiting.add(asyncio.ensure_future(one(f"flood {next(numbers) % 5000}")))

    async def turn() -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        for task in [task for task in waiting if task.done()]:
            waiting.discard(task)
            if task.exception() is None:
                running.append(task.result())

    for _ in range(1000):
        create()
    await turn()
    waited = []
    for _ in range(rounds):
        mine = await waiting_for(leases, A)
        before = handed
        while not mine.done():
            running.pop(0).release()
            handed += 1
            create()
            await turn()
        waited.append(handed - before)
        running.append(mine.result())
        while mine.result() in running:
            running.pop(0).release()
            handed += 1
            create()
            await turn()
    assert max(waited) == 1, "the first slot that got free was its own"
    assert handed - sum(waited) >= rounds, "creates were served all along"
    while running or waiting:
        running.pop().release()
        await turn()
    assert at_rest(leases)


async def test_the_control_a_flood_that_counts_as_a_clients_own_kind_keeps_it_waiting_or_out():
    flood = [(f"flood {number}", uuid.uuid4()) for number in range(100)]
    assert (await order_of_service(1, [*flood, (NEAR, A)])).index((NEAR, A)) == 100
    leases = Leases(1, 512, 5.0)
    hold = await take(leases, A)
    tickets = [leases.ticket(f"flood {number}") for number in range(512)]
    assert refused(leases)
    for ticket in tickets:
        ticket.close()
    hold.release()


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


async def test_creates_get_half_of_the_places_and_leave_the_others_to_who_has_a_token():
    leases = Leases(1, 120, 5.0)
    hold = await take(leases, A)
    tickets, refusals = [], 0
    for number in range(5000):
        try:
            tickets.append(leases.ticket(f"flood {number}", creates=True))
        except OverloadedError:
            refusals += 1
    assert (len(tickets), refusals) == (60, 4940)
    followers = [leases.ticket(NEAR) for _ in range(30)]
    assert refused(leases), "and an address no more of them than it leaves free"
    assert not refused(leases, FAR)
    for ticket in (*tickets, *followers):
        ticket.close()
    hold.release()
    assert at_rest(leases)


@pytest.mark.parametrize("floods", [1, 2, 7])
async def test_however_many_flood_with_creates_each_leaves_a_place_for_a_newcomers(floods):
    leases = Leases(1, 240, 5.0)
    hold = await take(leases, A)
    tickets = []
    for _ in range(200):
        for number in range(floods):
            with contextlib.suppress(OverloadedError):
                tickets.append(leases.ticket(f"flood {number}", creates=True))
    assert len(tickets) == 120 * floods // (floods + 1)
    leases.ticket("a newcomer", creates=True).close()
    for ticket in tickets:
        ticket.close()
    hold.release()
    assert at_rest(leases)


async def test_those_that_wait_can_be_refused_at_once_and_leave_nothing_behind():
    leases = Leases(1, 100, 5.0)
    hold = await take(leases, A)
    waiting = [await waiting_for(leases, A) for _ in range(3)] + [await waiting_for(leases, B)]
    alone = asyncio.ensure_future(leases.lease(A))
    await asyncio.sleep(0)
    leases.refuse_waiting(CircuitOpenError)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {CircuitOpenError}
    assert len({id(outcome) for outcome in outcomes}) == 4
    assert leases.waiting == 0
    hold.release()
    (await alone).release()
    (await take(leases, B)).release()
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


async def test_creates_hold_a_quarter_of_the_slots_while_others_come_and_all_of_them_otherwise():
    now = 0.0
    leases = Leases(8, 1000, 60.0, clock=lambda: now)
    (await take(leases, uuid.uuid4(), "caller")).release()
    creates = [asyncio.ensure_future(take(leases, uuid.uuid4(), f"stranger {number}", creates=True)) for number in range(12)]
    await asyncio.sleep(0)
    assert sum(create.done() for create in creates) == 2
    follower = await take(leases, uuid.uuid4(), "caller")
    now += 1.1
    follower.release()
    await asyncio.sleep(0)
    assert sum(create.done() for create in creates) == 8
    for create in creates:
        (await create).release()
    assert at_rest(leases)


# ── all of it at once ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(20))
async def test_in_any_order_of_coming_giving_up_and_ending_nothing_is_lost_and_no_slot_idles(seed):
    chance = random.Random(seed)
    slots = chance.randint(1, 4)
    # So long lies between two looks at the clock that no slot is kept free of creates.
    leases = Leases(slots, 1000, 60.0, clock=itertools.count(step=10.0).__next__)
    instances = [uuid.UUID(int=number) for number in range(chance.randint(1, 8))]
    tasks: list[tuple[uuid.UUID, asyncio.Task[Hold]]] = []
    running: list[tuple[uuid.UUID, Hold]] = []
    for _ in range(400):
        step = chance.random()
        if step < 0.5:
            instance = chance.choice(instances)
            creates = chance.random() < 0.5
            tasks.append((instance, asyncio.ensure_future(take(leases, instance, f"{chance.randrange(4)}", creates=creates))))
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
        assert leases.lacking_slots == len({instance for instance, _ in tasks}.difference(busy))
        assert all(leases.crowded(instance) == (len(busy) == slots or instance in busy) for instance in instances)
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
