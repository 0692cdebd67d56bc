"""The client of the launcher's socket: many calls on one connection, and what a broken peer can do to them."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time

import pytest

from gateway.protocol import BULK, NO_REQUEST, NO_TAG, READ_ONLY, Reply, Status, Verb, Verdict
from gateway.uuid7 import uuid7
from gateway.web.errors import (
    ApiError,
    ExtendDisabledError,
    HostFullError,
    InstanceNotFoundError,
    LauncherUnavailableError,
    OverloadedError,
    QueryQuotaError,
    TooManyInstancesError,
)
from gateway.web.launcher import Found, Launcher, RepeatedError

from .fake_launcher import FakeLauncher, FakeRun, until

OWNER, REQUEST = b"the owner's tag.", b"the request's id"


@pytest.fixture
async def peer(tmp_path):
    peer = FakeLauncher(tmp_path / "run" / "launcher.sock")
    await peer.start()
    yield peer
    await peer.stop()


@pytest.fixture
async def launcher(peer):
    launcher = Launcher(peer.path)
    yield launcher
    launcher.close()


class Call:
    """One RUN, and what is heard of it."""

    def __init__(self, launcher: Launcher, peer: FakeLauncher, passed: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[int] = loop.create_future()
        self.over: asyncio.Future[Verdict | ApiError] = loop.create_future()
        instance = uuid7()
        peer.instances[instance] = 0
        launcher.run(instance, passed, self.started.set_result, self.over.set_result)


async def test_many_calls_share_one_connection_and_each_gets_its_own_answer(launcher, peer):
    made = await asyncio.gather(*(launcher.create(OWNER, REQUEST) for _ in range(200)))
    assert len(peer._connections) == 1
    assert dict(made) == peer.instances
    assert len(peer.instances) == 200
    found = await asyncio.gather(*(launcher.find(instance) for instance in [*(instance for instance, _ in made), uuid7()]))
    assert found == [*(end for _, end in made), None]


async def test_the_launcher_is_told_whose_instance_it_makes_and_of_which_request_every_call_is_part(launcher, peer):
    instance, _ = await launcher.create(OWNER, REQUEST)
    await launcher.find(instance, REQUEST)
    await launcher.remove(instance, REQUEST)
    await launcher.find(instance)
    assert peer.owners == [OWNER]
    assert peer.request_ids == [REQUEST, REQUEST, REQUEST, NO_REQUEST]


async def test_a_cap_of_the_launchers_is_told_as_it_is_and_when_there_is_room_again(launcher, peer):
    peer.refusals[Verb.CREATE] = Status.HOST_FULL
    with pytest.raises(HostFullError):
        await launcher.create(OWNER, REQUEST)
    peer.refusals[Verb.CREATE] = Status.OWNER_FULL
    for end, told in ((int(time.time()) + 3600, range(3590, 3601)), (1, range(1, 2))):
        peer.earliest_end = end
        with pytest.raises(TooManyInstancesError) as caught:
            await launcher.create(OWNER, REQUEST)
        assert int(caught.value.headers["Retry-After"]) in told
    peer.refusals[Verb.FIND] = Status.QUOTA
    with pytest.raises(QueryQuotaError) as refused:
        await launcher.find(uuid7())
    assert refused.value.hint == "start a new instance"


async def test_what_an_instance_is_made_with_is_found_and_forked(launcher, peer):
    plain, _ = await launcher.create(OWNER, REQUEST)
    salvaging, end = await launcher.create(OWNER, REQUEST, salvage=True)
    assert await launcher.look(salvaging, REQUEST) == Found(end, True)
    assert await launcher.look(plain, REQUEST) == Found(end, False)
    assert await launcher.look(uuid7(), REQUEST) is None
    copy, copys_end = await launcher.fork(salvaging, b"another's  tag..", REQUEST)
    assert copy not in (plain, salvaging)
    assert await launcher.look(copy, REQUEST) == Found(copys_end, True)
    assert peer.owners == [OWNER, OWNER, b"another's  tag.."]


@pytest.mark.parametrize("keep", [False, True])
async def test_an_instance_gets_anothers_volume_and_the_other_is_no_more(launcher, peer, keep):
    (instance, _), (other, _) = [await launcher.create(OWNER, REQUEST) for _ in range(2)]
    await launcher.replace(instance, other, REQUEST, keep=keep)
    assert peer.replaced == [(instance, other, keep)]
    assert await launcher.look(other) is None
    with pytest.raises(InstanceNotFoundError):
        await launcher.replace(instance, other, REQUEST)


async def test_a_life_is_extended_as_far_as_the_launcher_likes(launcher, peer):
    instance, end = await launcher.create(OWNER, REQUEST)
    peer.latest_end = end + 100
    assert [await launcher.extend(instance, end + more, REQUEST) for more in (50, -50, 500)] == [end + 50, end + 50, end + 100]
    peer.refusals[Verb.EXTEND] = Status.OFF
    with pytest.raises(ExtendDisabledError):
        await launcher.extend(instance, end, REQUEST)


async def test_an_instance_that_is_gone_is_not_found_by_any_verb_but_the_one_that_looks_and_the_one_that_removes(launcher):
    for work in (
        launcher.fork(uuid7(), OWNER, REQUEST),
        launcher.replace(uuid7(), uuid7(), REQUEST),
        launcher.extend(uuid7(), 5, REQUEST),
    ):
        with pytest.raises(InstanceNotFoundError):
            await work
    assert await launcher.find(uuid7()) is None
    await launcher.remove(uuid7())


async def test_a_lease_that_is_not_free_in_time_is_an_overload(launcher, peer):
    instance, _ = await launcher.create(OWNER, REQUEST)
    for verb, work in ((Verb.FORK, launcher.fork(instance, OWNER, REQUEST)), (Verb.REMOVE, launcher.remove(instance, REQUEST))):
        peer.refusals[verb] = Status.BUSY
        with pytest.raises(OverloadedError):
            await work


async def test_a_run_is_told_by_its_flags_and_its_tag_and_one_that_was_begun_before_is_repeated(launcher, peer):
    instance, _ = await launcher.create(OWNER, REQUEST)
    for flags, tag, ended in ((0, NO_TAG, Verdict), (READ_ONLY, b"a" * 16, Verdict), (BULK, b"a" * 16, RepeatedError)):
        ours, theirs = socket.socketpair()
        over = asyncio.get_running_loop().create_future()
        with ours:
            launcher.run(instance, theirs, None, over.set_result, REQUEST, flags, tag)
            ours.sendall(b"\0\0\0\2{}")
            assert isinstance(await over, ended)
    assert [(run.quiet, run.read_only, run.bulk, run.tag) for run in peer.runs] == [
        (True, False, False, NO_TAG),
        (True, True, False, b"a" * 16),
    ]


async def test_without_a_descriptor_left_the_launcher_is_unavailable_and_later_it_is_not(launcher):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(LauncherUnavailableError):
            await launcher.health()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert await launcher.health()


async def test_metrics_are_the_launchers_own_words(launcher, peer):
    peer.metrics = "mayfly_up 1\n"
    assert await launcher.metrics() == "mayfly_up 1\n"


@pytest.mark.parametrize("verb", [Verb.CREATE, Verb.FORK])
async def test_an_instance_that_is_made_after_its_caller_left_is_removed(launcher, peer, verb):
    peer.silent = {verb}
    making = launcher.create(OWNER, REQUEST) if verb is Verb.CREATE else launcher.fork(uuid7(), OWNER, REQUEST)
    waiting = asyncio.ensure_future(making)
    await until(lambda: peer.count(verb) == 1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    unwanted = uuid7()
    peer.broadcast(Reply(Status.DONE, 1, instance=unwanted).pack())
    await until(lambda: (Verb.REMOVE, unwanted) in peer.verbs)


async def test_an_instance_that_is_made_in_the_instant_its_caller_leaves_is_removed(launcher, peer):
    peer.silent = {Verb.CREATE}
    waiting = asyncio.ensure_future(launcher.create(OWNER, REQUEST))
    await until(lambda: peer.count(Verb.CREATE) == 1)
    unwanted = uuid7()
    launcher._dispatch(Reply(Status.DONE, 1, instance=unwanted))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await until(lambda: (Verb.REMOVE, unwanted) in peer.verbs)


async def test_removal_of_what_is_gone_is_a_success(launcher, peer):
    await launcher.remove(uuid7())
    peer.refusals[Verb.REMOVE] = Status.UNKNOWN
    await launcher.remove(uuid7())


async def test_a_run_passes_its_socket_and_closes_our_copy(launcher, peer):
    ours, theirs = socket.socketpair()
    with ours:
        call = Call(launcher, peer, theirs)
        assert theirs.fileno() == -1
        ours.setblocking(False)
        await call.started
        await asyncio.get_running_loop().sock_sendall(ours, b"\0\0\0\2{}")
        assert await call.over is Verdict.EXITED
        assert peer.requests == [{}]


async def test_a_run_that_ends_before_it_started_is_over_and_nothing_else(launcher, peer):
    async def script(run: FakeRun) -> None:
        run.ended(Verdict.SIGNALLED)

    peer.script = script
    ours, theirs = socket.socketpair()
    with ours:
        call = Call(launcher, peer, theirs)
        assert await call.over is Verdict.SIGNALLED
        assert not call.started.done()


async def test_a_start_that_was_not_asked_for_ends_the_connection(launcher, peer):
    async def script(run: FakeRun) -> None:
        run.launcher.broadcast(Reply(Status.STARTED, run.sequence).pack())

    peer.script = script
    instance, over = uuid7(), asyncio.get_running_loop().create_future()
    peer.instances[instance] = 0
    ours, theirs = socket.socketpair()
    with ours:
        launcher.run(instance, theirs, None, over.set_result)
        assert isinstance(await over, LauncherUnavailableError)


async def test_a_run_that_is_refused_is_over(launcher, peer):
    peer.refusals[Verb.RUN] = Status.UNKNOWN
    ours, theirs = socket.socketpair()
    with ours:
        call = Call(launcher, peer, theirs)
        assert isinstance(await call.over, InstanceNotFoundError)
        assert not call.started.done()


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        b"\0" * 20,
        b"\x01\xff" + b"\0" * 18,
        Reply(Status.DONE, 999_999).pack(),
        Reply(Status.DONE, 1).pack() + b"\xff" * 40_000,
    ],
)
async def test_a_packet_that_breaks_the_page_ends_the_connection_and_every_call_on_it(launcher, peer, packet):
    await launcher.find(uuid7())
    peer.silent = {Verb.FIND}
    waiting = [asyncio.ensure_future(launcher.find(uuid7())) for _ in range(3)]
    await until(lambda: peer.count(Verb.FIND) == 4)
    peer.broadcast(packet)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {LauncherUnavailableError}
    peer.silent = set()
    assert await launcher.find(uuid7()) is None


async def test_an_answer_that_does_not_come_is_waited_for_only_so_long(launcher, peer, monkeypatch):
    monkeypatch.setattr("gateway.web.launcher._ANSWER_SECONDS", 0.05)
    peer.silent = {Verb.FIND}
    with pytest.raises(LauncherUnavailableError):
        await launcher.find(uuid7())


async def test_an_answer_after_its_caller_left_disturbs_nobody(launcher, peer):
    peer.silent = {Verb.FIND}
    waiting = asyncio.ensure_future(launcher.find(uuid7()))
    await until(lambda: peer.count(Verb.FIND) == 1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    peer.broadcast(Reply(Status.DONE, 1).pack())
    peer.silent = set()
    assert await launcher.find(uuid7()) is None


async def test_more_than_the_socket_holds_waits_its_turn_and_leaks_no_descriptor(launcher, peer):
    await launcher.health()
    before = len(os.listdir("/proc/self/fd"))
    pairs = [socket.socketpair() for _ in range(50)]
    calls = [Call(launcher, peer, theirs) for _, theirs in pairs]
    finds = [asyncio.ensure_future(launcher.find(uuid7())) for _ in range(1000)]
    assert await asyncio.gather(*finds) == [None] * 1000
    for ours, _ in pairs:
        ours.close()
    await asyncio.gather(*(call.over for call in calls))
    assert len(os.listdir("/proc/self/fd")) == before


async def test_closing_fails_what_is_outstanding_and_closes_what_was_not_sent(launcher, peer):
    before = len(os.listdir("/proc/self/fd"))
    peer.silent = {Verb.RUN}
    ours, theirs = socket.socketpair()
    with ours:
        call = Call(launcher, peer, theirs)
        launcher.close()
        assert isinstance(await call.over, LauncherUnavailableError)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_a_launcher_of_the_same_user_is_not_called_separated(launcher):
    assert launcher.separated is False
    await launcher.health()
    assert launcher.separated is False
