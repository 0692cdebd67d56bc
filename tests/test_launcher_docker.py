"""Runs through the launcher as a process, against real Docker: how they end, and that nothing is left of them."""

import asyncio
import json
import os
import socket
import struct
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from gateway.launcher.__main__ import read_seccomp_profile
from gateway.launcher.specification import container_specification
from gateway.protocol import BULK, READ_ONLY, Status, Verb, Verdict
from gateway.settings import Settings

from .launcher_harness import (
    IMAGE,
    Client,
    Launcher,
    containers_of,
    eventually,
    frame,
    inspect,
    launched,
    read_all,
    unframe,
    uuid7,
    wire,
)


def ended(replies):
    assert [reply.status for reply in replies] == [Status.STARTED, Status.ENDED], replies
    return replies[-1].verdict


async def test_a_request_reaches_its_container_and_the_reply_comes_back_before_the_end(state):
    async with launched(state) as (_, client):
        instance = await client.create()
        replies, output = await client.do(instance, do="echo", word="héllo")
        assert ended(replies) is Verdict.EXITED
        assert unframe(output) == {"do": "echo", "word": "héllo"}
        assert abs(replies[-1].expires_at - time.time() - 600) < 10


async def test_what_one_container_writes_the_next_of_its_instance_reads_and_no_other(state):
    async with launched(state) as (_, client):
        one, other = await client.create(), await client.create()
        for instance, text, content in ((one, "a", "a"), (one, "b", "ab"), (other, "c", "c")):
            _, output = await client.do(instance, do="append", text=text)
            assert unframe(output) == {"content": content}


@pytest.mark.parametrize(
    ("request_", "verdict"),
    [
        ({"do": "exit", "code": 0}, Verdict.EXITED),
        ({"do": "exit", "code": 7}, Verdict.EXITED),
        ({"do": "abort"}, Verdict.SIGNALLED),
        ({"do": "eat"}, Verdict.OUT_OF_MEMORY),
        ({"do": "hang"}, Verdict.DEADLINE),
    ],
)
async def test_a_run_that_goes_wrong_is_named_and_leaves_nothing(state, request_, verdict):
    async with launched(state, deadline_seconds=1.5) as (launcher, client):
        replies, output = await client.do(await client.create(), **request_)
        assert ended(replies) is verdict
        assert output == b""
        assert containers_of(launcher.deployment) == []


async def test_a_flood_ends_one_byte_past_the_cap(state):
    small = {"max_result_bytes": 65536, "max_stream_bytes": 65536, "instance_bytes": 1 << 20}
    async with launched(state, **small) as (_, client):
        replies, output = await client.do(await client.create(), do="flood")
        assert ended(replies) is Verdict.SIGNALLED
        assert len(output) == 4 + 2 * 65536 + (64 << 10) + (1 << 20) + 1


async def test_the_largest_allowed_reply_comes_whole(state):
    async with launched(state) as (_, client):
        size = Settings().max_reply_frame_bytes - len('{"x": ""}')
        replies, output = await client.do(await client.create(), do="large", bytes=size)
        assert ended(replies) is Verdict.EXITED
        assert len(unframe(output)["x"]) == size


KINDS = {0: "serve", READ_ONLY: "serve-read", BULK: "serve-bulk", READ_ONLY | BULK: "serve-bulk-read"}


@pytest.mark.parametrize("flags", KINDS)
async def test_a_run_is_of_the_kind_that_was_asked_for_and_writes_only_if_it_may(state, flags):
    async with launched(state) as (launcher, client):
        instance = await client.create()
        replies, output = await client.do(instance, flags=flags, do="who")
        found = unframe(output)
        assert ended(replies) is Verdict.EXITED
        assert (found["command"], found["writable"], found["sealed"]) == (KINDS[flags], not flags & READ_ONLY, True)
        replies, output = await client.do(instance, flags=flags, do="append", text="x")
        assert bool(output) is not flags & READ_ONLY
        assert (state / "instances" / str(instance) / "volume" / "db.sqlite").read_text() == ("" if flags & READ_ONLY else "x")
        assert containers_of(launcher.deployment) == []


async def test_what_a_run_that_only_reads_may_not_write_is_what_docker_lists_and_the_volume(state):
    async with launched(state, deadline_seconds=50) as (launcher, client):
        instance, listed = await client.create(), []
        for flags in (0, READ_ONLY):
            async with client.run(instance, flags=flags) as (ours, replies):
                await asyncio.get_running_loop().sock_sendall(ours, frame(do="hang"))
                assert (await replies.get()).status is Status.STARTED
                (container,) = containers_of(launcher.deployment)
                listed.append(inspect(container["Id"])["HostConfig"]["ReadonlyPaths"])
                ours.close()
                assert (await replies.get()).status is Status.ENDED
        assert listed[1] == [*listed[0], "/data"]


async def test_a_bulk_run_has_its_own_deadline_and_room_for_an_upload(state):
    async with launched(state, deadline_seconds=50, bulk_deadline_seconds=1, instance_bytes=2 << 20) as (_, client):
        instance = await client.create()
        replies, _ = await client.do(instance, flags=BULK, do="hang")
        assert ended(replies) is Verdict.DEADLINE
        for flags, size in ((BULK, (2 << 20) + (2 << 20) - 100), (BULK, 5 << 20), (0, (2 << 20) + 100)):
            async with client.run(instance, flags=flags) as (ours, replies):
                body = json.dumps({"do": "echo", "upload": "x" * (size - 30)}).encode()
                with suppress(ConnectionError):
                    await asyncio.get_running_loop().sock_sendall(ours, struct.pack("!I", len(body)) + body)
                    ours.shutdown(socket.SHUT_WR)
                output = b""
                with suppress(ConnectionError):
                    output = await read_all(ours)
                assert bool(output) is (flags == BULK and size < 4 << 20), (flags, size)


async def test_a_container_that_replies_and_lingers_is_killed_once_its_caller_has_gone(state):
    async with launched(state, deadline_seconds=50) as (launcher, client):
        instance = await client.create()
        async with client.run(instance) as (ours, replies):
            await asyncio.get_running_loop().sock_sendall(ours, frame(do="linger"))
            assert await asyncio.get_running_loop().sock_recv(ours, 4) == b"\0\0\0\x10"
            assert (await replies.get()).status is Status.STARTED
            assert replies.empty()
            ours.close()
            assert (await replies.get()).verdict is Verdict.CANCELLED
            assert containers_of(launcher.deployment) == []


async def test_a_container_that_replies_and_lingers_is_killed_at_its_deadline_while_its_caller_listens(state):
    async with launched(state, deadline_seconds=1) as (_, client):
        replies, output = await client.do(await client.create(), do="linger")
        assert (ended(replies), unframe(output)) == (Verdict.DEADLINE, {"do": "linger"})


async def test_a_caller_that_has_gone_with_its_reply_does_not_make_the_runner_a_cancelled_one(state):
    async with launched(state) as (_, client):
        instance = await client.create()
        async with client.run(instance) as (ours, replies):
            await asyncio.get_running_loop().sock_sendall(ours, frame(do="echo"))
            assert len(await asyncio.get_running_loop().sock_recv(ours, 100)) > 4
            ours.close()
            assert (await replies.get()).status is Status.STARTED
            assert (await replies.get()).verdict is Verdict.EXITED


async def test_a_caller_that_hangs_up_ends_its_container_at_once(state):
    async with launched(state, deadline_seconds=50) as (launcher, client):
        instance = await client.create()
        async with client.run(instance) as (ours, replies):
            await asyncio.get_running_loop().sock_sendall(ours, frame(do="hang"))
            assert (await replies.get()).status is Status.STARTED
            ours.close()
            last = await replies.get()
            assert (last.status, last.verdict) == (Status.ENDED, Verdict.CANCELLED)
            assert containers_of(launcher.deployment) == []


async def test_a_caller_that_only_stops_writing_still_gets_its_reply(state):
    async with launched(state) as (_, client), client.run(await client.create()) as (ours, _):
        await asyncio.get_running_loop().sock_sendall(ours, frame(do="echo"))
        ours.shutdown(1)
        assert unframe(await read_all(ours)) == {"do": "echo"}


async def test_a_caller_that_never_writes_is_not_waited_for_for_ever(state):
    async with launched(state, start_timeout_seconds=3) as (_, client), client.run(await client.create()) as (ours, replies):
        assert await read_all(ours) == b""
        assert (await replies.get()).status is Status.STARTED
        assert (await replies.get()).verdict is Verdict.DEADLINE


async def test_a_live_container_has_every_property_of_the_specification(state):
    async with launched(state, deadline_seconds=50) as (launcher, client):
        instance = await client.create()
        async with client.run(instance) as (ours, replies):
            await asyncio.get_running_loop().sock_sendall(ours, frame(do="hang"))
            await replies.get()
            (listed,) = containers_of(launcher.deployment)
            live = inspect(listed["Id"])
            settings = Settings.from_environment(launcher.environment)
            volume = state / "instances" / str(instance) / "volume"
            asked = container_specification(settings, instance, volume, launcher.deployment, read_seccomp_profile())
            host = asked.pop("HostConfig")
            assert {key: live["HostConfig"].get(key) for key in host} == host
            assert asked.pop("Healthcheck") == {"Test": ["NONE"]} == live["Config"]["Healthcheck"]
            assert asked.pop("NetworkDisabled") is True
            environment = [item for item in live["Config"]["Env"] if not item.startswith("PATH=")]
            assert asked.pop("Env") == environment
            labels = {name: value for name, value in live["Config"]["Labels"].items() if name.startswith("org.mayfly.")}
            assert asked.pop("Labels") == labels
            assert {key: live["Config"].get(key) for key in asked} == asked
            assert live["HostConfig"]["CapAdd"] in (None, [])
            assert live["HostConfig"]["Binds"] is None
            assert not live["HostConfig"]["Devices"]
            assert [(mount["Source"], mount["Destination"]) for mount in live["Mounts"]] == [(str(volume), "/data")]
            assert live["NetworkSettings"]["Networks"].keys() <= {"none"}
            pid = live["State"]["Pid"]
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
            assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
            assert status["Uid"].split() == ["64700"] * 4
            mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
            (data,) = [mount for mount in mounts if mount[4] == "/data"]
            assert {"nosuid", "nodev", "noexec"} <= set(data[5].split(","))
            for name in ("mnt", "pid", "ipc", "uts", "net", "cgroup"):
                assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}"), name


async def test_two_runs_of_one_instance_follow_each_other_and_do_not_overlap(state):
    async with launched(state, deadline_seconds=3) as (launcher, client):
        instance = await client.create()
        async with client.run(instance) as (first, first_replies):
            await asyncio.get_running_loop().sock_sendall(first, frame(do="hang"))
            assert (await first_replies.get()).status is Status.STARTED
            async with client.run(instance) as (second, second_replies):
                await asyncio.get_running_loop().sock_sendall(second, frame(do="echo"))
                third = asyncio.create_task(client.do(instance, do="echo"))
                await client.health()  # both are in the launcher's queue now
                assert len(containers_of(launcher.deployment)) == 1
                assert second_replies.empty()
                first.close()
                assert (await first_replies.get()).status is Status.ENDED
                assert unframe(await read_all(second)) == {"do": "echo"}
                assert (await second_replies.get()).status is Status.STARTED
                assert not third.done()
                assert (await second_replies.get()).status is Status.ENDED
                assert ended((await third)[0]) is Verdict.EXITED


async def test_there_are_never_more_containers_than_slots(state):
    async with launched(state, slots=1, deadline_seconds=50) as (launcher, client):
        one, other = await client.create(), await client.create()
        async with client.run(one) as (first, replies), client.run(other) as (second, later):
            await asyncio.get_running_loop().sock_sendall(first, frame(do="hang"))
            await asyncio.get_running_loop().sock_sendall(second, frame(do="echo"))
            await replies.get()
            assert (await client.health())["running"] == 1
            assert len(containers_of(launcher.deployment)) == 1
            assert later.empty()
            first.close()
            assert unframe(await read_all(second)) == {"do": "echo"}


async def test_a_run_that_waits_too_long_for_its_instance_is_told_busy(state):
    async with launched(state, deadline_seconds=50, queue_timeout_seconds=0.5) as (_, client):
        instance = await client.create()
        async with client.run(instance) as (first, replies):
            await asyncio.get_running_loop().sock_sendall(first, frame(do="hang"))
            await replies.get()
            refused, output = await client.do(instance, do="echo")
            assert ([reply.status for reply in refused], output) == ([Status.BUSY], b"")


async def test_an_instance_expires_on_the_second_and_is_reaped_but_never_while_in_use(state):
    async with launched(state, ttl_seconds=2, reap_interval_seconds=0.1, deadline_seconds=50) as (_, client):
        instance, idle = await client.create(), await client.create()
        folder, other = state / "instances" / str(instance), state / "instances" / str(idle)
        async with client.run(instance) as (ours, replies):
            await asyncio.get_running_loop().sock_sendall(ours, frame(do="hang"))
            expires_at = (await replies.get()).expires_at
            waiting = asyncio.create_task(client.do(instance, do="echo"))
            await eventually(lambda: not other.exists())
            assert time.time() >= expires_at
            assert folder.exists()
            assert (await client.ask(Verb.FIND, instance)).status is Status.UNKNOWN
            ours.close()
            refused, _ = await waiting
            assert [reply.status for reply in refused] == [Status.UNKNOWN], "looked at again once the lease is there"
        await eventually(lambda: not folder.exists())
        assert (await client.health())["instances"] == 0


async def test_verbs_on_instances_answer_as_documented(state):
    async with launched(state) as (_, client):
        instance = uuid7()
        assert (await client.ask(Verb.FIND, instance)).status is Status.UNKNOWN
        assert (await client.do(instance, do="echo"))[0][0].status is Status.UNKNOWN
        assert (await client.ask(Verb.FIND, instance)).instance == instance
        made = await client.ask(Verb.CREATE)
        assert made.status is Status.DONE
        instance = made.instance
        assert instance.version == 7
        assert (await client.ask(Verb.CREATE)).instance != instance
        found = await client.ask(Verb.FIND, instance)
        assert (found.status, found.expires_at) == (Status.DONE, made.expires_at)
        assert (await client.ask(Verb.REMOVE, instance)).status is Status.DONE
        assert (await client.ask(Verb.REMOVE, instance)).status is Status.DONE
        assert (await client.ask(Verb.FIND, instance)).status is Status.UNKNOWN


async def test_health_tells_what_the_self_test_saw(state):
    async with launched(state) as (_, client):
        await client.create()
        health = await client.health()
        assert health["selftest"] == {"test_runner": True}
        assert (health["engine"], health["daemon"], health["trouble"]) == ("docker", "up", None)
        assert health["image_id"].startswith("sha256:")
        assert (health["instances"], health["running"], health["separation"]) == (1, 0, False)


async def test_a_launcher_killed_in_the_middle_of_a_run_comes_back_with_its_instances_and_without_the_orphan(state):
    async with launched(state, deadline_seconds=50) as (launcher, client):
        instance = await client.create()
        await client.do(instance, do="append", text="kept")
        (state / "instances" / ".new-leftover" / "volume").mkdir(parents=True)
        async with client.run(instance) as (ours, replies):
            await asyncio.get_running_loop().sock_sendall(ours, frame(do="hang"))
            await replies.get()
            launcher.kill()
            assert len(containers_of(launcher.deployment)) == 1
        await launcher.start()
        assert containers_of(launcher.deployment) == []
        assert [path.name for path in (state / "instances").iterdir()] == [str(instance)]
        again = Client(launcher.socket)
        _, output = await again.do(instance, do="append", text="!")
        await again.close()
        assert unframe(output) == {"content": "kept!"}


async def test_a_second_launcher_on_the_same_state_refuses(state):
    async with launched(state) as (_, client):
        second = Launcher(state)
        second.log = state / "second.log"
        assert await asyncio.to_thread(second.spawn().wait, 30) == 1
        assert "another launcher serves" in second.log.read_text()
        assert (await client.health())["daemon"] == "up"


async def test_sigterm_lets_a_run_end_and_destroys_one_that_does_not(state):
    async with launched(state, deadline_seconds=1.5) as (launcher, client):
        instance = await client.create()
        async with client.run(instance) as (ours, replies), client.run(instance) as (waiting, _):
            await asyncio.get_running_loop().sock_sendall(ours, frame(do="hang"))
            await asyncio.get_running_loop().sock_sendall(waiting, frame(do="hang"))
            await replies.get()
            assert await launcher.stop() == 0
            assert containers_of(launcher.deployment) == []
            assert await read_all(ours) == b""


async def test_fifty_runs_leave_no_descriptor_and_no_container(state):
    async with launched(state) as (launcher, client):
        instances = [await client.create() for _ in range(5)]
        await asyncio.gather(*(client.do(instance, do="echo") for instance in instances))
        before = launcher.descriptors()
        for _ in range(10):
            for replies, output in await asyncio.gather(*(client.do(instance, do="echo") for instance in instances)):
                assert ended(replies) is Verdict.EXITED
                assert unframe(output) == {"do": "echo"}
        assert launcher.descriptors() <= before + 2, "the pool's connections to the daemon may still grow by a few"
        assert containers_of(launcher.deployment) == []


async def test_a_daemon_that_is_down_at_start_is_taken_up_by_itself_and_swept_before_the_first_run(state):
    async with wire(state) as line, launched(state, docker_socket=line.url) as (launcher, client):
        instance = await client.create()
        refused, _ = await client.do(instance, do="echo")
        assert [reply.status for reply in refused] == [Status.ENGINE_DOWN]
        assert (await client.health())["daemon"] == "down"
        await line.mend()
        while (await client.health())["daemon"] == "down":
            await asyncio.sleep(0.05)
        assert ended((await client.do(instance, do="echo"))[0]) is Verdict.EXITED
        assert "runs are refused until it answers" in launcher.log.read_text()


async def test_a_daemon_lost_in_a_run_loses_the_run_at_once_and_keeps_the_lease_until_the_container_is_gone(state):
    async with (
        wire(state, mended=True) as line,
        launched(state, docker_socket=line.url, deadline_seconds=50, queue_timeout_seconds=0.5) as (launcher, client),
    ):
        instance, other = await client.create(), await client.create()
        async with client.run(instance) as (ours, replies):
            await asyncio.get_running_loop().sock_sendall(ours, frame(do="hang"))
            assert (await replies.get()).status is Status.STARTED
            await line.cut()
            last = await replies.get()
            assert (last.status, last.verdict) == (Status.ENDED, Verdict.LOST)
            assert len(containers_of(launcher.deployment)) == 1
        assert (await client.ask(Verb.REMOVE, instance)).status is Status.BUSY
        await line.mend()
        await eventually(lambda: containers_of(launcher.deployment) == [])
        while (await client.do(instance, do="echo"))[0][-1].status is not Status.ENDED:
            await asyncio.sleep(0.05)
        assert ended((await client.do(other, do="echo"))[0]) is Verdict.EXITED


async def test_a_missing_image_is_refused_at_start_and_named_later(state):
    launcher = Launcher(state, image="mayfly-nowhere:latest")
    assert await asyncio.to_thread(launcher.spawn().wait, 30) == 1
    assert "mayfly-nowhere" in launcher.log.read_text()
    alias = f"{IMAGE}-alias"
    subprocess.run(["docker", "tag", IMAGE, alias], check=True)
    try:
        async with launched(state, image=alias) as (_, client):
            instance = await client.create()
            subprocess.run(["docker", "rmi", alias], check=True, stdout=subprocess.DEVNULL)
            refused, _ = await client.do(instance, do="echo")
            assert [reply.status for reply in refused] == [Status.IMAGE_MISSING]
            subprocess.run(["docker", "tag", IMAGE, alias], check=True)
            while (await client.do(instance, do="echo"))[0][-1].status is Status.IMAGE_MISSING:
                await asyncio.sleep(0.05)
            assert ended((await client.do(instance, do="echo"))[0]) is Verdict.EXITED
    finally:
        subprocess.run(["docker", "rmi", alias], check=True, stdout=subprocess.DEVNULL)


async def test_a_runner_that_cannot_confine_itself_keeps_the_launcher_from_serving(state):
    launcher = Launcher(state, min_landlock_abi=99)
    assert await asyncio.to_thread(launcher.spawn().wait, 30) == 1
    assert "cannot confine itself on this host: Landlock ABI" in launcher.log.read_text()
    assert not launcher.socket.exists()
    assert containers_of(launcher.deployment) == []
    assert list((state / "instances").iterdir()) == []


async def test_the_reaper_removes_this_deployments_orphans_and_nobody_elses(state):
    async with launched(state, reap_interval_seconds=0.1) as (launcher, _):

        def orphan(deployment):
            label = f"org.mayfly.deployment={deployment}"
            done = subprocess.run(
                ["docker", "create", "--label", label, IMAGE, "serve"], check=True, capture_output=True, text=True
            )
            return done.stdout.strip()

        stranger = orphan("another")
        try:
            orphan(launcher.deployment)
            await eventually(lambda: containers_of(launcher.deployment) == [])
            assert [item["Id"] for item in containers_of("another")] == [stranger]
        finally:
            subprocess.run(["docker", "rm", "-f", stranger], check=True, stdout=subprocess.DEVNULL)
