"""How many instances live, and how many runs one has: counted exactly, whatever ends, expires, crashes or comes at once."""

from __future__ import annotations

import asyncio
import random
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.launcher.caps import Caps
from gateway.launcher.errors import HostFullError, OwnerFullError
from gateway.launcher.leases import Lease, Leases
from gateway.launcher.reaper import Reaper
from gateway.launcher.registry import Record, Registry
from gateway.launcher.warmth import Warmth
from gateway.protocol import NOBODY, Status, Verb
from gateway.settings import Settings

from .launcher_harness import Client, Launcher, eventually, launched, uuid7
from .test_launcher_registry import Clock

ONE, OTHER = b"one owner's tag.", b"another one's..."


def registry(folder: Path, clock: Clock, most: int = 0, per_owner: int = 0) -> Registry:
    return Registry(folder, ttl_seconds=600, min_free_bytes=0, caps=Caps(most, per_owner), clock=clock)


def fill(registry: Registry, owner: bytes, wanted: int = 1000) -> int:
    made = 0
    while made < wanted:
        try:
            registry.create(uuid7(), owner)
        except (OwnerFullError, HostFullError):
            break
        made += 1
    return made


# ── instances ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_owner_has_so_many_live_instances_and_others_have_their_own(tmp_path):
    clock = Clock()
    caps = registry(tmp_path, clock, per_owner=3)
    assert (fill(caps, ONE), fill(caps, OTHER)) == (3, 3)
    assert fill(caps, NOBODY, 10) == 10, "nobody's are not counted"
    caps.close()


def test_the_host_has_so_many_and_those_that_wait_unclaimed_are_none_of_them(tmp_path):
    clock = Clock()
    caps = registry(tmp_path, clock, most=5)
    waiting = [uuid7() for _ in range(4)]
    for instance in waiting:
        caps.prepare(instance)
    assert fill(caps, ONE, 2) + fill(caps, OTHER) == 5
    before = sorted(tmp_path.iterdir())
    with pytest.raises(HostFullError):
        caps.claim(waiting[0], ONE)
    with pytest.raises(HostFullError):
        caps.create(uuid7(), ONE)
    assert sorted(tmp_path.iterdir()) == before
    assert (caps.count, caps.live) == (5, 5)
    clock.now += 601
    assert caps.claim(waiting[0], ONE), "what was refused can be claimed later"
    caps.close()


def test_the_control_0_is_off(tmp_path):
    caps = registry(tmp_path, Clock())
    assert fill(caps, ONE, 100) == 100
    caps.close()


def test_an_instance_counts_until_the_very_second_at_which_it_expires_reaped_or_not(tmp_path):
    clock = Clock(1000.0)
    caps = registry(tmp_path, clock, per_owner=2)
    caps.create(uuid7(), ONE)
    clock.now = 1100.0
    caps.create(uuid7(), ONE)
    for clock.now in (1100.0, 1599.999):
        with pytest.raises(OwnerFullError) as full:
            caps.create(uuid7(), ONE)
        assert full.value.until == 1600
    clock.now = 1600.0
    caps.create(uuid7(), ONE)
    with pytest.raises(OwnerFullError) as full:
        caps.create(uuid7(), ONE)
    assert full.value.until == 1700
    assert (caps.count, caps.live) == (3, 2)
    caps.close()


@pytest.mark.parametrize("how", ["removed", "deleted by hand"])
def test_an_instance_that_is_gone_before_its_time_counts_no_more(tmp_path, how):
    caps = registry(tmp_path, Clock(), most=3, per_owner=2)
    gone = uuid7()
    caps.create(gone, ONE)
    assert (fill(caps, ONE), fill(caps, OTHER)) == (1, 1)
    if how == "removed":
        caps.remove(gone)
    else:
        (tmp_path / str(gone)).rename(tmp_path / ".gone-by-hand")
        caps.expired()
    assert (fill(caps, ONE), fill(caps, OTHER)) == (1, 0)
    caps.close()


def test_what_is_on_the_disk_at_a_start_counts_for_its_owner(tmp_path):
    clock = Clock()
    first = registry(tmp_path, clock)
    assert (fill(first, ONE, 2), fill(first, OTHER, 1)) == (2, 1)
    first.prepare(uuid7())
    again = registry(tmp_path, clock, most=5, per_owner=3)
    assert (fill(again, ONE), fill(again, OTHER)) == (1, 1)
    for caps in (first, again):
        caps.close()


def test_a_record_from_before_there_were_owners_is_nobodys_instance(tmp_path):
    clock = Clock()
    first = registry(tmp_path, clock)
    instance = uuid7()
    record = first.create(instance, ONE)
    (tmp_path / str(instance) / "instance.json").write_text(
        f'{{"v": 1, "created_at": {record.created_at}, "expires_at": {record.expires_at}}}'
    )
    again = registry(tmp_path, clock)
    found = again.find(instance)
    assert (found.expires_at, found.owner, found.queries) == (record.expires_at, NOBODY, 0)
    for caps in (first, again):
        caps.close()


@pytest.mark.parametrize("seed", range(10))
def test_in_any_order_of_making_ending_and_prolonging_the_count_is_that_of_a_plain_list(seed):
    chance = random.Random(seed)
    caps, ends, owner_of, now = Caps(0, 1), {}, {}, 0.0
    for _ in range(2000):
        match chance.randrange(4):
            case 0:
                instance, owner = uuid.uuid4(), chance.choice((ONE, OTHER, NOBODY))
                ends[instance] = int(now) + chance.randrange(1, 60)
                owner_of[instance] = owner
                caps.add(instance, owner, ends[instance])
            case 1 if ends:
                instance = chance.choice(list(ends))
                del ends[instance]
                caps.discard(instance, owner_of[instance], now)
            case 2 if alive := [instance for instance, end in ends.items() if now < end]:
                instance = chance.choice(alive)
                ends[instance] += chance.randrange(60)
                caps.add(instance, owner_of[instance], ends[instance])
            case _:
                now += chance.random()
        alive = [instance for instance, end in ends.items() if now < end]
        assert caps.live(now) == len(alive)
        for owner in (ONE, OTHER):
            own = [ends[instance] for instance in alive if owner_of[instance] == owner]
            if own:
                with pytest.raises(OwnerFullError) as full:
                    caps.require_room(owner, now)
                assert full.value.until == min(own)
            else:
                caps.require_room(owner, now)


def test_making_and_removing_without_end_takes_no_memory():
    caps = Caps(10, 10)
    for _ in range(10_000):
        instance = uuid.uuid4()
        caps.add(instance, ONE, 1000)
        caps.discard(instance, ONE, 0.0)
    assert caps._owners == {}
    assert len(caps._all._by_end) < 100


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_runs_are_written_by_a_sweep_and_at_the_end_and_never_bring_an_instance_back(tmp_path):
    clock = Clock()
    first = registry(tmp_path, clock)
    instances = [uuid7() for _ in range(200)]
    for instance in instances:
        first.create(instance, ONE)
        for _ in range(3):
            first.ran(instance)
    first.remove(instances[0])
    assert registry(tmp_path, clock).find(instances[1]).queries == 0, "the control: nothing is written by a run"
    assert first.save(), "not all at once"
    while first.save():
        pass
    swept = registry(tmp_path, clock)
    assert Counter(swept.find(instance).queries for instance in instances[1:]) == {3: 199}
    assert not (tmp_path / str(instances[0])).exists()
    first.ran(instances[1])
    first.close()
    again = registry(tmp_path, clock)
    assert again.find(instances[1]).queries == 4
    assert (again.find(instances[1]).owner, again.find(instances[1]).expires_at) == (ONE, swept.find(instances[1]).expires_at)
    for caps in (swept, again):
        caps.close()


# ── the launcher ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def make(client: Client, count: int, owner: bytes) -> Counter[Status]:
    replies = await asyncio.gather(*(client.ask(Verb.CREATE, other=owner) for _ in range(count)))
    return Counter(reply.status for reply in replies)


async def restarted(launcher: Launcher) -> Client:
    await launcher.start()
    return Client(launcher.socket)


@pytest.mark.parametrize("nursery", [0, 4])
async def test_fifty_creates_at_once_never_pass_a_cap_and_kill_9_keeps_it(state, nursery):
    async with launched(state, instances=12, instances_per_address=8, nursery=nursery) as (launcher, client):
        while (await client.health())["nursery"] != nursery:
            await asyncio.sleep(0.02)
        assert await make(client, 50, ONE) == {Status.DONE: 8, Status.OWNER_FULL: 42}
        assert await make(client, 50, OTHER) == {Status.DONE: 4, Status.HOST_FULL: 46}
        assert (await client.health())["instances"] == 12
        full = await client.ask(Verb.CREATE, other=ONE)
        made = (state / "instances").glob("*/instance.json")
        assert f'"expires_at": {full.expires_at}' in "".join(path.read_text() for path in made)
        launcher.kill()
        again = await restarted(launcher)
        assert await make(again, 50, ONE) == {Status.OWNER_FULL: 50}
        assert await make(again, 50, OTHER) == {Status.HOST_FULL: 50}
        assert (await again.health())["instances"] == 12
        await again.close()


async def test_an_instance_has_so_many_runs_and_what_never_ran_is_none_of_them(state):
    async with launched(state, queries_per_instance=3, reap_interval_seconds=0.2) as (launcher, client):
        instance = await client.create()
        record = state / "instances" / str(instance) / "instance.json"
        ends = [(await client.do(instance, do="echo"))[0][-1].status for _ in range(2)]
        await eventually(lambda: '"queries": 2' in record.read_text())
        launcher.kill()
        again = await restarted(launcher)
        ends += [(await again.do(instance, do="echo"))[0][-1].status for _ in range(3)]
        assert ends == [Status.ENDED] * 3 + [Status.QUOTA] * 2
        assert (await again.do(await again.create(), do="echo"))[0][-1].status is Status.ENDED
        await again.close()


async def test_a_run_that_is_refused_counts_for_nothing_and_one_that_is_killed_counts(state):
    async with launched(state, queries_per_instance=2, deadline_seconds=50, queue_timeout_seconds=0.1) as (_, client):
        instance = await client.create()
        async with client.run(instance) as (ours, replies):
            assert (await replies.get()).status is Status.STARTED
            for _ in range(5):
                assert (await client.do(instance, do="echo"))[0][-1].status is Status.BUSY
            ours.close()
            assert (await replies.get()).status is Status.ENDED
        ends = [(await client.do(instance, do="echo"))[0][-1].status for _ in range(2)]
        assert ends == [Status.ENDED, Status.QUOTA]


# ── instances that are handed out ────────────────────────────────────────────────────────────────────────────────────


class Engine:
    """One that starts ahead, without containers."""

    starts_ahead = True
    prepared: set[uuid.UUID]

    def __init__(self) -> None:
        self.prepared = set()

    def is_prepared(self, instance: uuid.UUID) -> bool:
        return instance in self.prepared

    def removal(self, _: uuid.UUID) -> None:
        return None

    async def discard(self, instance: uuid.UUID) -> None:
        self.prepared.discard(instance)

    async def sweep(self) -> int:
        return 0


@contextmanager
def nursery(folder: Path, size: int) -> Iterator[tuple[Registry, Leases, Warmth, Reaper, list[uuid.UUID]]]:
    """So many nurslings, a cap of one instance for each owner."""
    with ThreadPoolExecutor(1) as disk:
        made, leases, engine = registry(folder, Clock(), per_owner=1), Leases(), cast(Any, Engine())
        warmth = Warmth(Settings(nursery=size, successors=1), made, leases, engine, cast(Any, None), disk)
        instances = [uuid7() for _ in range(size)]
        for instance in instances:
            made.prepare(instance)
            engine.prepared.add(instance)
            lease = leases.try_acquire(instance)
            assert lease is not None
            warmth._nursery[instance] = lease
        yield made, leases, warmth, Reaper(made, leases, engine, warmth, disk, 1.0), instances
        made.close()


@pytest.mark.parametrize("claimed", [True, False], ids=["claimed", "not claimed"])
async def test_an_instance_whose_create_is_cancelled_is_given_to_nobody_else(tmp_path, claimed):
    with nursery(tmp_path, 1) as (made, leases, warmth, reaper, (instance,)):
        go_on, begun = threading.Event(), threading.Event()

        def claim(instance: uuid.UUID, owner: bytes, *, salvage: bool) -> Record:
            begun.set()
            go_on.wait()
            return Registry.claim(made, instance, owner, salvage=salvage)

        made.claim = claim  # type: ignore[method-assign]
        if not claimed:
            warmth._disk.submit(go_on.wait)  # the claim is behind it
        create = asyncio.ensure_future(warmth.claim(ONE))
        await asyncio.to_thread(begun.wait) if claimed else await asyncio.sleep(0)
        create.cancel()
        await asyncio.gather(create, return_exceptions=True)
        go_on.set()
        assert await warmth.claim(OTHER) is None
        assert (warmth.nursery, warmth.successors, len(leases)) == (0, 1, 0), "its container goes as any that has idled"
        await reaper.sweep()
        assert made.lives(instance) is claimed
        assert (tmp_path / str(instance)).exists() is claimed


async def test_an_instance_whose_create_is_refused_is_the_next_ones(tmp_path):
    with nursery(tmp_path, 1) as (made, _, warmth, _, (instance,)):
        made.create(uuid7(), ONE)
        with pytest.raises(OwnerFullError):
            await warmth.claim(ONE)
        found = await warmth.claim(OTHER)
        assert found is not None
        assert found[0] == instance


async def test_an_instance_that_is_handed_out_during_a_sweep_is_not_reaped_by_it(tmp_path):
    with nursery(tmp_path, 1) as (made, leases, warmth, reaper, (instance,)):
        acquire = leases.try_acquire
        found = []

        def late(wanted: uuid.UUID) -> Lease | None:
            if wanted == instance and not found:
                found.append(made.claim(instance, ONE))
                warmth._nursery.pop(instance).release()
            return acquire(wanted)

        leases.try_acquire = late  # type: ignore[method-assign]
        await reaper.sweep()
        assert found
        assert made.lives(instance)


def test_a_run_is_counted_for_no_other_instance(tmp_path):
    made = registry(tmp_path, Clock())
    one, other = uuid7(), uuid7()
    for instance in (one, other):
        made.prepare(instance)
    made.ran(one)
    assert [made._records[instance].queries for instance in (one, other)] == [1, 0]
    made.close()
