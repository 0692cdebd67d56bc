"""One user of a volume at a time, in the order of asking."""

import asyncio

from gateway.launcher.leases import Leases

from .launcher_harness import uuid7


async def turns():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_M13_the_lease_goes_round_in_the_order_of_asking():
    leases, instance, order = Leases(), uuid7(), []
    first = await leases.acquire(instance)

    async def wait(name):
        lease = await leases.acquire(instance)
        order.append(name)
        await turns()
        lease.release()

    tasks = [asyncio.create_task(wait(name)) for name in range(10)]
    await turns()
    assert order == []
    first.release()
    await asyncio.gather(*tasks)
    assert order == list(range(10))
    assert len(leases) == 0


async def test_a_lease_in_use_or_asked_for_is_not_to_be_had_in_passing():
    leases, instance = Leases(), uuid7()
    lease = leases.try_acquire(instance)
    assert lease is not None
    assert leases.try_acquire(instance) is None
    waiter = asyncio.create_task(leases.acquire(instance))
    await turns()
    lease.release()
    assert leases.try_acquire(instance) is None, "it passed to the waiter, who has not even run yet"
    (await waiter).release()
    assert leases.try_acquire(uuid7()) is not None


async def test_releasing_twice_does_not_take_the_next_ones_lease():
    leases, instance = Leases(), uuid7()
    first = await leases.acquire(instance)
    waiter = asyncio.create_task(leases.acquire(instance))
    await turns()
    first.release()
    first.release()
    second = await waiter
    assert leases.try_acquire(instance) is None
    second.release()
    assert len(leases) == 0


async def test_a_waiter_that_gives_up_is_passed_over_whenever_it_does():
    for give_up_after_release in (False, True):
        leases, instance = Leases(), uuid7()
        first = await leases.acquire(instance)
        quitter = asyncio.create_task(leases.acquire(instance))
        stayer = asyncio.create_task(leases.acquire(instance))
        await turns()
        if give_up_after_release:
            first.release()
            quitter.cancel()
        else:
            quitter.cancel()
            first.release()
        (await stayer).release()
        assert quitter.cancelled()
        assert len(leases) == 0
