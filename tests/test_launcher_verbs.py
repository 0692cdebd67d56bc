"""FORK, REPLACE, EXTEND, and runs that must not be had twice: the real service on a real disk, with an engine that runs nothing."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.launcher import replacement, tags
from gateway.launcher.caps import Caps
from gateway.launcher.errors import EngineDownError, QuotaError, RepeatedError, UnknownInstanceError
from gateway.launcher.leases import Leases
from gateway.launcher.registry import Registry
from gateway.launcher.service import Service
from gateway.launcher.warmth import Warmth
from gateway.protocol import BULK, KEEP, NO_INSTANCE, NO_TAG, NOBODY, READ_ONLY, SALVAGE, Reply, Request, Status, Verb, Verdict
from gateway.settings import Settings

from .launcher_harness import uuid7
from .sealed import sealed_disk
from .test_launcher_registry import Clock

ONE, OTHER = b"one owner's tag.", b"another one's..."
TAG = b"must not be done"
FILES = ("db.sqlite", "db.sqlite-journal")


class Engine:
    """Runs nothing. `act` is what a run does: it is given `started`."""

    starts_ahead = False

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.act: Callable[[Callable[[], None]], Any] | None = None

    async def run(
        self, instance: uuid.UUID, volume: str, caller: socket.socket, started: Callable[[], None], command: str
    ) -> Verdict:
        self.commands.append(command)
        if self.act is None:
            started()
            return Verdict.EXITED
        return cast(Verdict, await self.act(started))

    def is_prepared(self, _: uuid.UUID) -> bool:
        return False

    def removal(self, _: uuid.UUID) -> None:
        return None

    async def discard(self, _: uuid.UUID) -> None:
        pass


class Ready:
    trouble = None

    def doubt(self, _: Exception) -> None:
        pass


class Serving:
    def __init__(self, folder: Path, disk: ThreadPoolExecutor, clock: Clock, caps: Caps, **settings: Any) -> None:
        wanted = Settings(nursery=0, successors=0, **settings)
        self.folder = folder
        self.clock = clock
        self.engine = Engine()
        self.registry = Registry(
            folder, ttl_seconds=600, min_free_bytes=0, max_life_seconds=wanted.max_life_seconds, caps=caps, clock=clock
        )
        self.leases = Leases()
        self.service = Service(
            wanted,
            self.registry,
            self.leases,
            cast(Any, self.engine),
            cast(Any, Ready()),
            Warmth(wanted, self.registry, self.leases, cast(Any, self.engine), cast(Any, Ready()), disk),
            disk,
        )

    async def ask(
        self, verb: Verb, instance: uuid.UUID = NO_INSTANCE, *, flags: int = 0, other: bytes = NOBODY, number: int = 0
    ) -> Reply:
        """The last reply."""
        replies: list[Reply] = []
        request = Request.unpack(Request(verb, 1, instance, flags, other=other, number=number).pack())
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await self.service.answer(request, theirs if verb is Verb.RUN else None, replies.append)
        return replies[-1]

    async def run(self, instance: uuid.UUID, *, flags: int = 0, tag: bytes = NO_TAG) -> Status:
        return (await self.ask(Verb.RUN, instance, flags=flags, other=tag)).status

    async def create(self, text: str = "", *, owner: bytes = NOBODY, flags: int = 0) -> uuid.UUID:
        instance = (await self.ask(Verb.CREATE, other=owner, flags=flags)).instance
        put(self.folder, instance, text)
        return instance


@asynccontextmanager
async def serving(folder: Path, clock: Clock | None = None, caps: Caps | None = None, **settings: Any) -> AsyncIterator[Serving]:
    with ThreadPoolExecutor(1) as disk:
        it = Serving(folder, disk, clock or Clock(), caps or Caps(0, 0), **settings)
        yield it
        assert len(it.leases) == 0
        it.registry.close()
    assert hidden(folder) == []


def put(folder: Path, instance: uuid.UUID, text: str) -> None:
    for name in FILES:
        (folder / str(instance) / "volume" / name).write_text(text and f"{text} {name}")


def texts(folder: Path, instance: uuid.UUID, where: str = "volume") -> set[str]:
    """What both files say, without their names: one text, unless they are not of one volume."""
    volume = folder / str(instance) / where
    assert sorted(path.name for path in volume.iterdir()) == sorted(FILES)
    return {(volume / name).read_text().removesuffix(f" {name}") for name in FILES}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do it in another process, which is killed before its step of that number, of all that it asks of the disk; whether it was."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event.startswith(("os.", "open", "shutil", "tests.")) and event != "os.kill":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


# ── FORK ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_fork_is_a_copy_with_a_life_and_an_owner_of_its_own_and_the_flags_of_its_source(tmp_path):
    async with serving(tmp_path) as it:
        source = await it.create("text", owner=ONE, flags=SALVAGE)
        assert await it.run(source, tag=TAG) is Status.ENDED
        it.clock.now += 300
        made = await it.ask(Verb.FORK, source, other=OTHER)
        assert (made.status, made.expires_at) == (Status.DONE, 1_000_901)
        assert texts(tmp_path, made.instance) == texts(tmp_path, source) == {"text"}
        for path in Path(it.registry.volume(made.instance)).iterdir():
            assert path.stat().st_mode & 0o7777 == 0o666
        assert Path(it.registry.volume(made.instance)).stat().st_mode & 0o7777 == 0o711
        put(tmp_path, made.instance, "its own")
        assert texts(tmp_path, source) == {"text"}
        record = it.registry.find(made.instance)
        assert (record.owner, record.salvage, record.queries) == (OTHER, True, 0)
        assert (await it.ask(Verb.FIND, made.instance)).flags == SALVAGE
        assert await it.run(made.instance, tag=TAG) is Status.ENDED, "what was begun there was not begun here"
        assert (it.service.created, it.service.forked) == (2, 1)
        it.clock.now += 301
        assert (await it.ask(Verb.FIND, source)).status is Status.UNKNOWN
        assert (await it.ask(Verb.FORK, source)).status is Status.UNKNOWN
        assert (await it.ask(Verb.FIND, made.instance)).status is Status.DONE


async def test_the_control_an_instance_that_was_made_without_the_flag_has_it_neither_in_its_record_nor_in_its_forks(tmp_path):
    async with serving(tmp_path) as it:
        source = await it.create("text")
        made = await it.ask(Verb.FORK, source)
        assert [(await it.ask(Verb.FIND, each)).flags for each in (source, made.instance)] == [0, 0]


async def test_a_fork_waits_for_the_run_that_writes(tmp_path):
    async with serving(tmp_path) as it:
        source, go_on = await it.create("half"), asyncio.Event()

        async def act(started: Callable[[], None]) -> Verdict:
            started()
            await go_on.wait()
            put(tmp_path, source, "whole")
            return Verdict.EXITED

        it.engine.act = act
        running = asyncio.ensure_future(it.run(source))
        forking = asyncio.ensure_future(it.ask(Verb.FORK, source))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not forking.done()
        go_on.set()
        assert texts(tmp_path, (await forking).instance) == {"whole"}
        await running


@pytest.mark.parametrize(("caps", "status"), [(Caps(0, 1), Status.OWNER_FULL), (Caps(1, 0), Status.HOST_FULL)])
async def test_a_fork_counts_as_an_instance_of_its_owner_and_of_the_host(tmp_path, caps, status):
    async with serving(tmp_path, caps=caps) as it:
        source = await it.create("text", owner=ONE)
        assert (await it.ask(Verb.FORK, source, other=ONE)).status is status
        assert [path.name for path in tmp_path.iterdir()] == [str(source)]


async def test_of_many_forks_at_once_as_many_are_made_as_there_is_room_for(tmp_path):
    async with serving(tmp_path, caps=Caps(0, 4)) as it:
        source = await it.create("text", owner=ONE)
        made = await asyncio.gather(*(it.ask(Verb.FORK, source, other=ONE) for _ in range(20)))
        assert sum(reply.status is Status.DONE for reply in made) == 3
        assert len(list(tmp_path.iterdir())) == 4


async def test_a_fork_for_which_there_is_no_room_leaves_nothing():
    with sealed_disk("size=256k") as disk:
        async with serving(disk) as it:
            source = await it.create("x" * 70_000)
            assert (await it.ask(Verb.FORK, source)).status is Status.STORAGE_LOW
            assert [path.name for path in disk.iterdir()] == [str(source)]
            put(disk, source, "less")
            made = await it.ask(Verb.FORK, source)
            assert texts(disk, made.instance) == {"less"}
            it.registry._min_free_bytes = 1 << 60
            assert (await it.ask(Verb.FORK, source)).status is Status.STORAGE_LOW


async def test_a_fork_whose_asker_has_gone_holds_its_source_no_longer_than_it_takes(tmp_path):
    async with serving(tmp_path) as it:
        source = await it.create("text")
        forking = asyncio.ensure_future(it.ask(Verb.FORK, source))
        await asyncio.sleep(0)
        forking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await forking
        assert await it.run(source) is Status.ENDED


async def test_a_fork_whose_source_was_deleted_by_hand_is_told_so(tmp_path):
    async with serving(tmp_path) as it:
        source = await it.create("text")
        (tmp_path / str(source)).rename(tmp_path / "elsewhere")
        assert (await it.ask(Verb.FORK, source)).status is Status.UNKNOWN


def test_a_launcher_killed_anywhere_in_a_fork_leaves_a_whole_one_or_none(tmp_path):
    seen, step = set(), 0
    while True:
        folder = tmp_path / str(step)
        folder.mkdir()
        registry = Registry(folder, ttl_seconds=600, min_free_bytes=0)
        source, made = uuid7(), uuid7()
        registry.create(source)
        put(folder, source, "text")

        def fork(registry: Registry = registry, source: uuid.UUID = source, made: uuid.UUID = made) -> None:
            registry.copy(source, made, ONE, 1 << 20)
            registry.adopt(made, ONE, salvage=True)

        killed = killed_at(step, fork)
        again = Registry(folder, ttl_seconds=600, min_free_bytes=0)
        again.sweep_leftovers()
        whole = again.lives(made)
        if whole:
            assert (texts(folder, made), again.find(made).owner) == ({"text"}, ONE)
        assert {path.name for path in folder.iterdir()} == {str(source), *([str(made)] if whole else [])}
        assert texts(folder, source) == {"text"}
        seen.add(whole)
        registry.close()
        again.close()
        if not killed:
            break
        step += 1
    assert seen == {False, True}
    assert step > 10, "there are so many steps"


# ── REPLACE ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("flags", [0, KEEP])
async def test_an_instance_gets_the_volume_of_another_and_that_is_no_more(tmp_path, flags):
    async with serving(tmp_path, caps=Caps(0, 2)) as it:
        instance, other = await it.create("old", owner=ONE), await it.create("new", owner=ONE)
        assert await it.run(instance, tag=TAG) is Status.ENDED
        before = it.registry.find(instance)
        done = await it.ask(Verb.REPLACE, instance, flags=flags, other=other.bytes)
        assert (done.status, done.instance, done.expires_at) == (Status.DONE, instance, before.expires_at)
        assert texts(tmp_path, instance) == {"new"}
        assert it.registry.find(instance) == before
        assert await it.run(instance, tag=TAG) is Status.REPEATED, "what was begun before was begun before"
        assert (await it.ask(Verb.FIND, other)).status is Status.UNKNOWN
        assert [path.name for path in tmp_path.iterdir()] == [str(instance)]
        assert (tmp_path / str(instance) / "damaged").exists() is (flags == KEEP)
        if flags == KEEP:
            assert texts(tmp_path, instance, "damaged") == {"old"}
        assert it.service.replaced == 1
        third = await it.create("newest", owner=ONE)
        assert third != NO_INSTANCE, "the other counts no more"
        assert (await it.ask(Verb.REPLACE, instance, flags=flags, other=third.bytes)).status is Status.DONE
        assert texts(tmp_path, instance) == {"newest"}
        if flags == KEEP:
            assert texts(tmp_path, instance, "damaged") == {"new"}
        assert (await it.ask(Verb.REMOVE, instance)).status is Status.DONE
        assert list(tmp_path.iterdir()) == []


async def test_what_is_kept_stays_when_the_next_one_is_not(tmp_path):
    async with serving(tmp_path) as it:
        instance = await it.create("first")
        for flags, text in ((KEEP, "second"), (0, "third")):
            await it.ask(Verb.REPLACE, instance, flags=flags, other=(await it.create(text)).bytes)
        assert (texts(tmp_path, instance), texts(tmp_path, instance, "damaged")) == ({"third"}, {"first"})


async def test_neither_an_instance_that_is_not_there_nor_itself_takes_its_place(tmp_path):
    async with serving(tmp_path) as it:
        instance = await it.create("old")
        for one, other, status in (
            (instance, uuid7(), Status.UNKNOWN),
            (uuid7(), instance, Status.UNKNOWN),
            (instance, instance, Status.FAILED),
        ):
            assert (await it.ask(Verb.REPLACE, one, other=other.bytes)).status is status
        assert texts(tmp_path, instance) == {"old"}


async def test_two_that_would_take_each_others_place_do_not_wait_for_each_other(tmp_path):
    async with serving(tmp_path, queue_timeout_seconds=0.5) as it:
        one, other = await it.create("one"), await it.create("other")
        leases = [it.leases.try_acquire(each) for each in (one, other)]
        both = [asyncio.ensure_future(it.ask(Verb.REPLACE, a, other=b.bytes)) for a, b in ((one, other), (other, one))]
        for _ in range(5):
            await asyncio.sleep(0)  # now each waits for the first lease that it wants
        for lease in leases:
            assert lease is not None
            lease.release()
        assert {reply.status for reply in await asyncio.gather(*both)} == {Status.DONE, Status.UNKNOWN}


async def test_runs_of_both_are_over_before_a_volume_takes_anothers_place(tmp_path):
    async with serving(tmp_path, queue_timeout_seconds=0.1) as it:
        instance, other, go_on = await it.create("old"), await it.create("new"), asyncio.Event()

        async def act(started: Callable[[], None]) -> Verdict:
            started()
            await go_on.wait()
            return Verdict.EXITED

        it.engine.act = act
        for busy in (instance, other):
            running = asyncio.ensure_future(it.run(busy))
            await asyncio.sleep(0)
            assert (await it.ask(Verb.REPLACE, instance, other=other.bytes)).status is Status.BUSY
            go_on.set()
            assert await running is Status.ENDED
            go_on.clear()
        assert texts(tmp_path, instance) == {"old"}
        assert (await it.ask(Verb.REPLACE, instance, other=other.bytes)).status is Status.DONE


@pytest.mark.parametrize("fails", ["the exchange", "putting aside"])
async def test_what_the_disk_refuses_in_the_middle_is_undone(tmp_path, monkeypatch, fails):
    async with serving(tmp_path) as it:
        instance, other = await it.create("old"), await it.create("new")

        def refuse(*_: object, **__: object) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            if fails == "the exchange":
                patch.setattr(replacement, "exchange", refuse)
            else:
                patch.setattr(replacement.os, "rename", refuse)
            assert (await it.ask(Verb.REPLACE, instance, flags=KEEP, other=other.bytes)).status is Status.FAILED
        assert (texts(tmp_path, instance), texts(tmp_path, other)) == ({"old"}, {"new"})
        assert hidden(tmp_path) == []
        assert (await it.ask(Verb.REPLACE, instance, flags=KEEP, other=other.bytes)).status is Status.DONE


async def test_a_replaced_volume_that_cannot_be_deleted_is_the_next_starts_to_delete(tmp_path, monkeypatch):
    async with serving(tmp_path, Clock(time.time())) as it:
        instance, other = await it.create("old"), await it.create("new")

        def refuse(*_: object) -> bool:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(it.registry, "remove", refuse)
            assert (await it.ask(Verb.REPLACE, instance, flags=KEEP, other=other.bytes)).status is Status.DONE
        assert texts(tmp_path, instance) == {"new"}
        assert len(hidden(tmp_path)) == 1, "the note"
        assert check_replaced(tmp_path, instance, other, keep=True, older=False) == "new"


def test_what_looks_like_a_note_and_is_none_keeps_no_launcher_from_starting(tmp_path):
    ids = f"{uuid7()}-{uuid7()}"
    for name in (f".replace-{ids}-1", f".replace-{ids}-x-1", ".replace-" + "-" * 72 + "-1-1", f".replace-{ids}-1-2-keep"):
        (tmp_path / name).touch()
    registry = Registry(tmp_path, ttl_seconds=600, min_free_bytes=0)
    assert registry.sweep_leftovers() == 1, "the last is one, of instances that are gone"
    assert len(hidden(tmp_path)) == 3
    registry.close()


def interrupted(folder: Path, keep: bool, older: bool) -> tuple[uuid.UUID, uuid.UUID, Callable[[], None]]:
    """Two instances in a new folder, and what gives one the other's volume."""
    folder.mkdir()
    registry = Registry(folder, ttl_seconds=600, min_free_bytes=0)
    instance, other = uuid7(), uuid7()
    for each, text in ((instance, "old"), (other, "new")):
        registry.create(each)
        put(folder, each, text)
    if older:
        volume = folder / str(instance) / "volume"
        damaged = volume.with_name("damaged")
        damaged.mkdir()
        for name in FILES:
            (damaged / name).write_text(f"older {name}")
    return instance, other, lambda: registry.replace(instance, other, keep=keep)


def check_replaced(folder: Path, instance: uuid.UUID, other: uuid.UUID, keep: bool, older: bool) -> str:
    """Start again, and hold what is there against what may be; the instance's text."""
    again = Registry(folder, ttl_seconds=600, min_free_bytes=0)
    again.sweep_leftovers()
    assert hidden(folder) == []
    (text,) = texts(folder, instance)
    damaged = texts(folder, instance, "damaged") if (folder / str(instance) / "damaged").exists() else None
    kept = {"older"} if older else None
    if text == "old":
        assert texts(folder, other) == {"new"}, "nothing has happened"
        assert again.lives(other)
        assert damaged == kept
    else:
        assert text == "new"
        assert not (folder / str(other)).exists()
        assert not again.lives(other)
        assert damaged == ({"old"} if keep else kept)
    assert again.lives(instance)
    again.close()
    return text


def exchange_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = replacement.exchange

    def told(*arguments: Any) -> None:
        sys.audit("tests.exchange")
        exchange(*arguments)

    monkeypatch.setattr(replacement, "exchange", told)


@pytest.mark.parametrize("older", [False, True], ids=["first", "not the first"])
@pytest.mark.parametrize("keep", [False, True], ids=["deleted", "kept"])
def test_D6_a_launcher_killed_anywhere_in_a_replacement_leaves_the_old_volume_or_the_new_one(tmp_path, monkeypatch, keep, older):
    exchange_is_a_step(monkeypatch)
    seen, step, killed = [], 0, True
    while killed:
        folder = tmp_path / str(step)
        instance, other, work = interrupted(folder, keep, older)
        killed = killed_at(step, work)
        seen.append(check_replaced(folder, instance, other, keep, older))
        step += 1
    assert seen == sorted(seen, reverse=True), "old up to one step, and new from there on"
    assert set(seen) == {"old", "new"}


@pytest.mark.parametrize("older", [False, True], ids=["first", "not the first"])
@pytest.mark.parametrize("keep", [False, True], ids=["deleted", "kept"])
def test_a_launcher_killed_anywhere_while_it_takes_up_a_replacement_takes_it_up_again(tmp_path, monkeypatch, keep, older):
    exchange_is_a_step(monkeypatch)
    step, killed = 0, True
    while killed:
        folder = tmp_path / str(step)
        instance, other, work = interrupted(folder, keep, older)
        begun = 0
        while not killed_at(begun, work) or texts(folder, instance) != {"new"}:  # before that, nothing has happened
            begun += 1
        registry = Registry(folder, ttl_seconds=600, min_free_bytes=0)
        killed = killed_at(step, registry.sweep_leftovers)
        registry.close()
        assert check_replaced(folder, instance, other, keep, older) == "new"
        step += 1
    assert step > 5


# ── EXTEND ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_life_gets_longer_up_to_the_most_and_never_shorter(tmp_path):
    async with serving(tmp_path, max_life_seconds=1000) as it:
        instance = await it.create()
        for wished, until in ((0, 1_000_601), (1_000_700, 1_000_700), (1_000_650, 1_000_700), (2**64 - 1, 1_001_000)):
            told = await it.ask(Verb.EXTEND, instance, number=wished)
            assert (told.status, told.instance, told.expires_at) == (Status.DONE, instance, until)
            assert (await it.ask(Verb.FIND, instance)).expires_at == until
        it.clock.now = 1_000_999.9
        assert it.registry.expired() == []
        assert (await it.ask(Verb.RUN, instance)).expires_at == 1_001_000
        it.registry.save()
        again = Registry(tmp_path, ttl_seconds=600, min_free_bytes=0, clock=it.clock)
        assert again.find(instance) == it.registry.find(instance), "on the disk as in memory"
        again.close()
        it.clock.now = 1_001_000.0
        assert (await it.ask(Verb.EXTEND, instance, number=1_002_000)).status is Status.UNKNOWN
        assert it.registry.expired() == [instance]


async def test_a_life_that_was_longer_from_the_beginning_stays_so(tmp_path):
    async with serving(tmp_path, max_life_seconds=10) as it:
        assert (await it.ask(Verb.EXTEND, await it.create(), number=2_000_000)).expires_at == 1_000_601


async def test_with_0_no_life_is_extended(tmp_path):
    async with serving(tmp_path, max_life_seconds=0) as it:
        instance = await it.create()
        assert (await it.ask(Verb.EXTEND, instance, number=1_000_700)).status is Status.OFF
        assert (await it.ask(Verb.FIND, instance)).expires_at == 1_000_601


async def test_nobodys_nursling_is_not_extended(tmp_path):
    async with serving(tmp_path) as it:
        waiting = uuid7()
        it.registry.prepare(waiting)
        assert (await it.ask(Verb.EXTEND, waiting, number=1_000_700)).status is Status.UNKNOWN


async def test_a_longer_life_counts_for_its_owner_to_its_new_end(tmp_path):
    async with serving(tmp_path, caps=Caps(0, 1)) as it:
        instance = await it.create(owner=ONE)
        await it.ask(Verb.EXTEND, instance, number=1_000_900)
        it.clock.now = 1_000_700.0
        full = await it.ask(Verb.CREATE, other=ONE)
        assert (full.status, full.expires_at) == (Status.OWNER_FULL, 1_000_900)
        it.clock.now = 1_000_900.0
        assert (await it.ask(Verb.CREATE, other=ONE)).status is Status.DONE


async def test_a_run_during_which_its_instance_is_extended_tells_the_new_end(tmp_path):
    async with serving(tmp_path) as it:
        instance = await it.create()

        async def act(started: Callable[[], None]) -> Verdict:
            started()
            await it.ask(Verb.EXTEND, instance, number=1_000_800)
            return Verdict.EXITED

        it.engine.act = act
        assert (await it.ask(Verb.RUN, instance)).expires_at == 1_000_800


def test_extending_without_end_takes_no_memory():
    caps = Caps(10, 10)
    instance = uuid.uuid4()
    for end in range(1000, 11_000):
        caps.add(instance, ONE, end)
    assert len(caps._all._by_end) < 100
    assert (caps.live(10_998.0), caps.live(10_999.0)) == (1, 0)


# ── runs of every kind, and runs that must not be had twice ──────────────────────────────────────────────────────────


async def test_each_kind_of_run_has_its_command_and_counts(tmp_path):
    async with serving(tmp_path, queries_per_instance=4) as it:
        instance = await it.create()
        for flags in (0, READ_ONLY, BULK, READ_ONLY | BULK):
            assert await it.run(instance, flags=flags) is Status.ENDED
        assert it.engine.commands == ["serve", "serve-read", "serve-bulk", "serve-bulk-read"]
        assert await it.run(instance, flags=READ_ONLY) is Status.QUOTA


async def test_D8_a_run_with_a_tag_is_had_once_and_after_a_restart_too(tmp_path):
    clock = Clock()
    async with serving(tmp_path, clock) as it:
        instance, other = await it.create(), await it.create()
        ends = [await it.run(instance, tag=tag) for tag in (TAG, TAG, TAG[::-1], NO_TAG, NO_TAG)]
        assert ends == [Status.ENDED, Status.REPEATED, Status.ENDED, Status.ENDED, Status.ENDED]
        assert await it.run(other, tag=TAG) is Status.ENDED, "another instance's tags are its own"
    async with serving(tmp_path, clock) as it:
        assert await it.run(instance, tag=TAG) is Status.REPEATED
        assert it.engine.commands == []
        assert it.service.refusals == {Status.REPEATED: 1}


async def test_the_tag_is_on_the_disk_before_the_run_begins(tmp_path):
    async with serving(tmp_path) as it:
        instance = await it.create()
        found = []

        async def act(started: Callable[[], None]) -> Verdict:
            found.append((tmp_path / str(instance) / "tags").read_bytes())
            started()
            return Verdict.EXITED

        it.engine.act = act
        await it.run(instance, tag=TAG)
        assert found == [TAG]


async def refused(_: Callable[[], None]) -> Verdict:
    raise EngineDownError("away")


async def gone_before(_: Callable[[], None]) -> Verdict:
    return Verdict.CANCELLED


async def lost(started: Callable[[], None]) -> Verdict:
    started()
    return Verdict.LOST


async def broken_off(started: Callable[[], None]) -> Verdict:
    started()
    raise EngineDownError("away")


@pytest.mark.parametrize(
    ("act", "then"),
    [(refused, Status.ENDED), (gone_before, Status.ENDED), (lost, Status.REPEATED), (broken_off, Status.REPEATED)],
)
async def test_a_run_that_never_began_can_be_had_again_and_one_that_may_have_written_cannot(tmp_path, act, then):
    async with serving(tmp_path) as it:
        instance = await it.create()
        it.engine.act = act
        await it.run(instance, tag=TAG)
        it.engine.act = None
        assert await it.run(instance, tag=TAG) is then


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
async def test_a_run_whose_gateway_dies_before_it_began_can_be_had_again_and_no_other_one(tmp_path, known):
    async with serving(tmp_path) as it:
        instance = await it.create()
        if known:
            assert await it.run(instance, tag=TAG) is Status.ENDED

        async def never(_: Callable[[], None]) -> Verdict:
            return await asyncio.get_running_loop().create_future()

        it.engine.act = never
        for steps in range(8):
            running = asyncio.ensure_future(it.run(instance, tag=TAG))
            for _ in range(steps):
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        it.engine.act = None
        assert await it.run(instance, tag=TAG) is (Status.REPEATED if known else Status.ENDED)


async def test_an_instance_has_so_many_tags_and_goes_on_without(tmp_path, monkeypatch):
    monkeypatch.setattr(tags, "MOST", 3)
    async with serving(tmp_path) as it:
        instance = await it.create()
        ends = [await it.run(instance, tag=bytes([number]) * 16) for number in (1, 2, 3, 4, 2)]
        assert ends == [Status.ENDED] * 3 + [Status.QUOTA, Status.REPEATED]
        assert await it.run(instance) is Status.ENDED


@contextmanager
def one_folder(path: Path) -> Iterator[tuple[int, uuid.UUID]]:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    instance = uuid7()
    (path / str(instance)).mkdir()
    yield folder, instance
    os.close(folder)


@pytest.mark.parametrize("seed", range(5))
def test_in_any_order_the_tags_are_those_of_a_plain_list(tmp_path, seed):
    chance = random.Random(seed)
    # Of few letters, so that most of them stand across two others somewhere.
    tags_ = [bytes(chance.choices(b"ab", k=16)) for _ in range(60)] + [b"a" * 16, b"b" * 16, b"ab" * 8, b"ba" * 8]
    with one_folder(tmp_path) as (folder, instance):
        plain: list[bytes] = []
        for _ in range(500):
            tag = chance.choice(tags_)
            if chance.random() < 0.2:
                tags.take_back(folder, instance, tag)
                if plain[-1:] == [tag]:
                    plain.pop()
            elif tag in plain:
                with pytest.raises(RepeatedError):
                    tags.begin(folder, instance, tag)
            else:
                tags.begin(folder, instance, tag)
                plain.append(tag)
        assert (tmp_path / str(instance) / "tags").read_bytes() == b"".join(plain)


def test_a_tag_that_is_cut_short_is_none_and_the_next_one_takes_its_place(tmp_path):
    with one_folder(tmp_path) as (folder, instance):
        tags.begin(folder, instance, ONE)
        with (tmp_path / str(instance) / "tags").open("ab") as file:
            file.write(OTHER[:5])
        tags.begin(folder, instance, OTHER)
        for tag in (ONE, OTHER):
            with pytest.raises(RepeatedError):
                tags.begin(folder, instance, tag)


def test_a_tag_for_which_there_is_no_room_is_not_begun():
    with sealed_disk("size=4k") as disk, one_folder(disk) as (folder, instance):
        (disk / "ballast").write_bytes(b"x" * 4096)
        with pytest.raises(OSError, match="No space left"):
            tags.begin(folder, instance, TAG)
        (disk / "ballast").unlink()
        tags.begin(folder, instance, TAG)


def test_ten_thousand_tags_are_the_most(tmp_path):
    with one_folder(tmp_path) as (folder, instance):
        all_ = [number.to_bytes(16, "big") for number in range(1, tags.MOST + 1)]
        (tmp_path / str(instance) / "tags").write_bytes(b"".join(all_[:-1]))
        tags.begin(folder, instance, all_[-1])
        with pytest.raises(QuotaError):
            tags.begin(folder, instance, TAG)
        with pytest.raises(RepeatedError):
            tags.begin(folder, instance, all_[-1])


async def test_a_run_with_a_tag_whose_instance_was_deleted_by_hand_is_told_so(tmp_path):
    async with serving(tmp_path) as it:
        instance = await it.create()
        (tmp_path / str(instance)).rename(tmp_path / "elsewhere")
        assert await it.run(instance, tag=TAG) is Status.UNKNOWN
        with pytest.raises(UnknownInstanceError):
            it.registry.look_again(instance)
