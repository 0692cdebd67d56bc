"""Leases and slots: first come first served, bounded, given back exactly once."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from gateway.web.errors import OverloadedError
from gateway.web.leases import Leases

A, B, C = (uuid.UUID(int=number) for number in (1, 2, 3))


async def test_requests_of_one_instance_run_in_the_order_they_came():
    leases, order = Leases(4, 100, 5.0), []

    async def one(number: int) -> None:
        hold = await leases.acquire(A)
        order.append(number)
        await asyncio.sleep(0)
        hold.release()

    await asyncio.gather(*(one(number) for number in range(20)))
    assert order == list(range(20))
    assert (leases.held, leases.waiting) == (0, 0)


async def test_a_queue_on_one_instance_takes_no_slot_from_another():
    leases = Leases(2, 100, 5.0)
    first = await leases.acquire(A)
    waiting = [asyncio.ensure_future(leases.acquire(A)) for _ in range(5)]
    await asyncio.sleep(0)
    (await asyncio.wait_for(leases.acquire(B), 1)).release()
    first.release()
    for task in waiting:
        (await task).release()
    assert leases.held == 0


async def test_no_more_run_at_once_than_there_are_slots():
    leases, running, most = Leases(3, 100, 5.0), 0, 0

    async def one(number: int) -> None:
        nonlocal running, most
        hold = await leases.acquire(uuid.UUID(int=number))
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        hold.release()

    await asyncio.gather(*(one(number) for number in range(20)))
    assert most == 3


async def test_a_full_queue_refuses_at_once():
    leases = Leases(1, 1, 5.0)
    hold = await leases.acquire(A)
    waiting = asyncio.ensure_future(leases.acquire(B))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await leases.acquire(C)
    hold.release()
    (await waiting).release()
    assert leases.held == 0


async def test_a_queue_of_length_zero_still_serves_what_need_not_wait():
    leases = Leases(1, 0, 5.0)
    hold = await leases.acquire(A)
    with pytest.raises(OverloadedError):
        await leases.acquire(A)
    hold.release()
    (await leases.acquire(A)).release()


async def test_a_wait_that_is_too_long_ends_and_leaves_nothing_behind():
    leases = Leases(1, 10, 0.02)
    hold = await leases.acquire(A)
    with pytest.raises(OverloadedError):
        await leases.acquire(A)
    with pytest.raises(OverloadedError):
        await leases.acquire(B)
    hold.release()
    (await leases.acquire(B)).release()
    assert (leases.held, leases.waiting) == (0, 0)


async def test_a_waiter_that_gives_up_passes_its_turn_on():
    leases = Leases(1, 10, 5.0)
    hold = await leases.acquire(A)
    gone = asyncio.ensure_future(leases.acquire(A))
    next_one = asyncio.ensure_future(leases.acquire(A))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    hold.release()
    (await next_one).release()
    assert (leases.held, leases.waiting) == (0, 0)


async def test_a_second_release_frees_nothing_that_is_not_its_own():
    leases = Leases(1, 0, 5.0)
    hold = await leases.acquire(A)
    hold.release()
    other = await leases.acquire(A)
    hold.release()
    with pytest.raises(OverloadedError):
        await leases.acquire(A)
    other.release()
