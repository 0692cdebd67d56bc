"""Containers started before anybody asks: used once, by their own instance, while they live, never in the way, never left over."""

import asyncio
import json
import random
import subprocess
import time
import uuid
from datetime import datetime

from gateway.launcher.specification import LABEL_INSTANCE
from gateway.protocol import READ_ONLY, Status, Verb, Verdict

from .conftest import eventually as until_seen
from .deployment import client_of, deployed
from .launcher_harness import (
    Client,
    containers_of,
    eventually,
    frame,
    inspect,
    launched,
    read_all,
    unframe,
    wire,
)


async def warm(client, nursery=0, successors=0):
    """Until so many wait."""
    async with asyncio.timeout(60):
        while (health := await client.health())["nursery"] != nursery or health["successors"] != successors:
            await asyncio.sleep(0.02)


def of_instance(launcher, instance):
    return [item["Id"] for item in containers_of(launcher.deployment) if item["Labels"][LABEL_INSTANCE] == str(instance)]


def kill(container):
    subprocess.run(["docker", "kill", container], check=True, stdout=subprocess.DEVNULL)


async def ask(client, instance, **request):
    """The reply to a run that went well."""
    replies, output = await client.do(instance, **request)
    assert [reply.status for reply in replies] == [Status.STARTED, Status.ENDED], replies
    assert replies[-1].verdict is Verdict.EXITED
    return unframe(output)


async def test_a_first_request_and_the_next_one_find_containers_that_were_started_before_they_came(state):
    async with launched(state, nursery=1, successors=1, deadline_seconds=50) as (launcher, client):
        await warm(client, nursery=1)
        instance = await client.create()
        for _ in range(2):
            await eventually(lambda: of_instance(launcher, instance))
            await eventually(lambda: [inspect(name)["State"]["Running"] for name in of_instance(launcher, instance)] == [True])
            await warm(client, nursery=1, successors=1)
            (waiting,) = of_instance(launcher, instance)
            asked_at = time.time()
            async with client.run(instance) as (ours, replies):
                await asyncio.get_running_loop().sock_sendall(ours, frame(do="hang"))
                assert (await replies.get()).status is Status.STARTED
                assert of_instance(launcher, instance) == [waiting]
                started_at = inspect(waiting)["State"]["StartedAt"]
                assert datetime.fromisoformat(started_at[:26] + "+00:00").timestamp() < asked_at
                ours.close()
                assert (await replies.get()).verdict is Verdict.CANCELLED


async def test_fifty_requests_are_fifty_containers_each_with_its_own_volume_and_nothing_is_left(state):
    async with launched(state, nursery=2, successors=3, log_level="DEBUG") as (launcher, client):
        await warm(client, nursery=2)
        instances = [await client.create() for _ in range(5)]
        seen = []
        descriptors = launcher.descriptors()
        for _ in range(10):
            for instance, who in zip(
                instances, await asyncio.gather(*(ask(client, instance, do="who") for instance in instances)), strict=True
            ):
                assert [path.split("/")[-2] for path in who["volumes"]] == [str(instance)]
                seen.append(who["root"])
        assert len(set(seen)) == 50
        await warm(client, nursery=2, successors=3)
        assert len(containers_of(launcher.deployment)) == 5
        assert launcher.descriptors() <= descriptors + 5 + 4, "a stream each, and the pool's connections to the daemon"
        assert await launcher.stop() == 0
        assert containers_of(launcher.deployment) == []
        assert {path.name for path in (state / "instances").iterdir()} == {str(instance) for instance in instances}
        log = launcher.log.read_text()
        assert "start=warm" in log
        await launcher.start()


async def test_whenever_a_request_comes_no_container_is_started_in_vain(state):
    random_ = random.Random(20260402)
    async with launched(state, nursery=0, successors=1, log_level="DEBUG") as (launcher, client):
        instance = await client.create()
        for _ in range(12):
            await ask(client, instance, do="echo")
            await asyncio.sleep(random_.uniform(0, 0.3))  # at any moment of the successor's start
        await warm(client, successors=1)
        log = launcher.log.read_text()
        assert log.count("start=warm") + log.count("start=cold") == 12
        assert log.count("successor waits") == log.count("start=warm") + 1


async def test_a_nursling_is_empty_and_nobody_can_find_it_before_it_is_handed_out(state):
    async with launched(state, nursery=1, successors=1) as (_, client):
        await warm(client, nursery=1)
        (folder,) = (state / "instances").iterdir()
        assert json.loads((folder / "instance.json").read_text())["expires_at"] == 0
        assert [path.stat().st_size for path in (folder / "volume").iterdir()] == [0, 0]
        hidden = uuid.UUID(folder.name)
        assert (await client.ask(Verb.FIND, hidden)).status is Status.UNKNOWN
        assert [reply.status for reply in (await client.do(hidden, do="echo"))[0]] == [Status.UNKNOWN]
        assert (await client.health())["instances"] == 0
        made = await client.ask(Verb.CREATE)
        assert made.instance == hidden
        assert abs(made.expires_at - time.time() - 600) < 10
        assert (await client.ask(Verb.FIND, hidden)).expires_at == made.expires_at
        assert (await ask(client, hidden, do="who"))["content"] == 0
        assert (await client.health())["instances"] == 1


async def test_the_nursery_fills_again_and_an_empty_one_keeps_nobody_waiting(state):
    async with launched(state, nursery=2, successors=1) as (_, client):
        await warm(client, nursery=2)
        made = [await client.create() for _ in range(4)]
        assert len(set(made)) == 4
        assert (await ask(client, made[-1], do="who"))["content"] == 0
        async with asyncio.timeout(60):
            while (await client.health())["nursery"] != 2:
                await asyncio.sleep(0.02)


async def test_a_warm_container_that_was_killed_is_not_handed_out_and_the_nursery_fills_again(state):
    async with launched(state, nursery=1, successors=1) as (launcher, client):
        await warm(client, nursery=1)
        (dead,) = containers_of(launcher.deployment)
        kill(dead["Id"])
        await eventually(lambda: [item["Id"] for item in containers_of(launcher.deployment)] not in ([], [dead["Id"]]))
        await warm(client, nursery=1)
        assert len(list((state / "instances").iterdir())) == 1
        instance = await client.create()
        assert str(instance) != dead["Labels"][LABEL_INSTANCE]
        await ask(client, instance, do="append", text="x")
        await warm(client, nursery=1, successors=1)
        kill(of_instance(launcher, instance)[0])
        assert await ask(client, instance, do="append", text="y") == {"content": "xy"}


async def test_a_container_that_dies_before_a_byte_of_its_request_is_replaced_and_the_caller_sees_nothing(state):
    async with launched(state, nursery=0, successors=1) as (launcher, client):
        instance = await client.create()
        await ask(client, instance, do="echo")
        await warm(client, successors=1)
        (waiting,) = of_instance(launcher, instance)
        async with client.run(instance) as (ours, replies):
            assert (await replies.get()).status is Status.STARTED
            kill(waiting)
            await eventually(lambda: of_instance(launcher, instance) not in ([], [waiting]))
            await asyncio.get_running_loop().sock_sendall(ours, frame(do="echo"))
            assert unframe(await read_all(ours)) == {"do": "echo"}
            last = await replies.get()
            assert (last.status, last.verdict) == (Status.ENDED, Verdict.EXITED)


async def test_a_container_that_dies_with_its_request_is_not_replaced(state):
    async with launched(state, nursery=0, successors=1, deadline_seconds=50) as (launcher, client):
        instance = await client.create()
        await ask(client, instance, do="echo")
        await warm(client, successors=1)
        (waiting,) = of_instance(launcher, instance)
        async with client.run(instance) as (ours, replies):
            assert (await replies.get()).status is Status.STARTED
            await asyncio.get_running_loop().sock_sendall(ours, frame(do="append_and_hang", text="once"))
            content = state / "instances" / str(instance) / "volume" / "db.sqlite"
            await eventually(lambda: content.read_text() == "once")
            kill(waiting)
            assert await read_all(ours) == b""
            assert (await replies.get()).verdict is Verdict.SIGNALLED
        assert content.read_text() == "once"


async def test_a_run_that_is_not_plain_gets_no_container_that_was_made_for_a_plain_one_and_another_one_waits_after_it(state):
    async with launched(state, nursery=0, successors=1) as (launcher, client):
        instance = await client.create()
        await ask(client, instance, do="append", text="x")
        await warm(client, successors=1)
        (waiting,) = of_instance(launcher, instance)
        replies, output = await client.do(instance, flags=READ_ONLY, do="who")
        assert replies[-1].verdict is Verdict.EXITED
        who = unframe(output)
        assert (who["command"], who["writable"], who["content"]) == ("serve-read", False, 1)
        await warm(client, successors=1)
        (successor,) = of_instance(launcher, instance)
        assert successor != waiting
        assert await ask(client, instance, do="append", text="y") == {"content": "xy"}


async def test_a_volume_that_takes_anothers_place_is_mounted_in_no_container_that_waits(state):
    async with launched(state, nursery=0, successors=2) as (_, client):
        instance, other = await client.create(), await client.create()
        await ask(client, instance, do="append", text="old")
        await ask(client, other, do="append", text="new")
        await warm(client, successors=2)
        assert (await client.ask(Verb.REPLACE, instance, other=other.bytes)).status is Status.DONE
        assert await ask(client, instance, do="append", text="er") == {"content": "newer"}
        assert (await client.do(other, do="echo"))[0][-1].status is Status.UNKNOWN


async def test_removing_an_instance_takes_its_warm_container_first(state):
    async with launched(state, nursery=0, successors=1) as (launcher, client):
        instance = await client.create()
        await ask(client, instance, do="echo")
        await warm(client, successors=1)
        assert (await client.ask(Verb.REMOVE, instance)).status is Status.DONE
        assert containers_of(launcher.deployment) == []
        assert list((state / "instances").iterdir()) == []
        await warm(client)


async def test_an_expired_instance_takes_its_warm_container_along_and_never_loses_its_volume_before(state):
    async with launched(state, nursery=0, successors=1, ttl_seconds=3, reap_interval_seconds=0.1) as (launcher, client):
        instance = await client.create()
        await ask(client, instance, do="echo")
        await warm(client, successors=1)
        await eventually(lambda: not (state / "instances" / str(instance)).exists())
        assert containers_of(launcher.deployment) == []
        assert [reply.status for reply in (await client.do(instance, do="echo"))[0]] == [Status.UNKNOWN]
        await warm(client)


async def test_the_least_recently_used_gives_way_and_the_idle_are_dropped(state):
    async with launched(state, nursery=0, successors=2, warm_idle_seconds=4) as (launcher, client):
        one, two, three = [await client.create() for _ in range(3)]
        await ask(client, one, do="echo")
        await warm(client, successors=1)
        await ask(client, two, do="echo")
        await warm(client, successors=2)
        await ask(client, one, do="echo")
        await warm(client, successors=2)
        await ask(client, three, do="echo")
        await eventually(lambda: of_instance(launcher, three) and not of_instance(launcher, two))
        await warm(client, successors=2)
        assert of_instance(launcher, one)
        await eventually(lambda: containers_of(launcher.deployment) == [])
        await ask(client, two, do="echo")


async def test_no_start_that_nobody_waits_for_begins_while_every_slot_is_taken(state):
    async with launched(state, nursery=1, successors=1, slots=1, deadline_seconds=50) as (launcher, client):
        await warm(client, nursery=1)
        one, other = await client.create(), await client.create()
        async with client.run(one) as (first, first_replies), client.run(other) as (second, second_replies):
            for ours in (first, second):
                await asyncio.get_running_loop().sock_sendall(ours, frame(do="hang"))
            assert (await first_replies.get()).status is Status.STARTED
            assert [item["Labels"][LABEL_INSTANCE] for item in containers_of(launcher.deployment)] == [str(one)]
            first.close()
            assert (await first_replies.get()).status is Status.ENDED
            assert (await second_replies.get()).status is Status.STARTED
            assert [item["Labels"][LABEL_INSTANCE] for item in containers_of(launcher.deployment)] == [str(other)]
            assert (await client.health())["nursery"] == 0
            second.close()
            assert (await second_replies.get()).status is Status.ENDED
        await warm(client, nursery=1, successors=1)
        # The last instance used comes before the nursery.
        created = {item["Labels"][LABEL_INSTANCE]: item["Created"] for item in containers_of(launcher.deployment)}
        successor = created.pop(str(other))
        assert [successor <= nursling for nursling in created.values()] == [True]


async def test_below_the_low_water_mark_the_nursery_stays_empty(state):
    async with launched(state, nursery=2, min_free_bytes=1 << 60) as (launcher, client):
        assert (await client.ask(Verb.CREATE)).status is Status.STORAGE_LOW
        await eventually(lambda: "nursery not filled" in launcher.log.read_text())
        assert containers_of(launcher.deployment) == []
        assert list((state / "instances").iterdir()) == []


async def test_a_launcher_killed_with_warm_containers_comes_back_without_them_and_with_its_instances(state):
    async with launched(state, nursery=2, successors=2) as (launcher, client):
        await warm(client, nursery=2)
        instance = await client.create()
        await ask(client, instance, do="append", text="kept")
        await warm(client, nursery=2, successors=1)
        before = {item["Id"] for item in containers_of(launcher.deployment)}
        launcher.kill()
        assert {item["Id"] for item in containers_of(launcher.deployment)} == before
        launcher.environment |= {"MAYFLY_NURSERY": "0"}
        await launcher.start()
        assert containers_of(launcher.deployment) == []
        await eventually(lambda: [path.name for path in (state / "instances").iterdir()] == [str(instance)])
        again = Client(launcher.socket)
        assert await ask(again, instance, do="append", text="!") == {"content": "kept!"}
        await again.close()


async def test_a_daemon_that_goes_takes_the_warm_containers_and_they_are_made_anew_when_it_is_back(state):
    async with (
        wire(state, mended=True) as line,
        launched(state, docker_socket=line.url, nursery=1, successors=1) as (launcher, client),
    ):
        await warm(client, nursery=1)
        instance = await client.create()
        await ask(client, instance, do="append", text="a")
        await warm(client, nursery=1, successors=1)
        before = {item["Id"] for item in containers_of(launcher.deployment)}
        await line.cut()
        await eventually(lambda: "engine cannot take runs" in launcher.log.read_text())
        assert [reply.status for reply in (await client.do(instance, do="echo"))[0]] == [Status.ENGINE_DOWN]
        assert {item["Id"] for item in containers_of(launcher.deployment)} == before
        await line.mend()
        await warm(client, nursery=1)
        await eventually(lambda: not before & {item["Id"] for item in containers_of(launcher.deployment)})
        async with asyncio.timeout(60):
            while (await client.ask(Verb.FIND, instance)).status is not Status.DONE:
                await asyncio.sleep(0.02)
        assert await ask(client, instance, do="append", text="b") == {"content": "ab"}


async def test_a_runtime_is_named_to_docker_and_looked_at_before_anything_is_served(state):
    async with launched(state, nursery=1, docker_runtime="io.containerd.runc.v2") as (launcher, client):
        await warm(client, nursery=1)
        (waiting,) = containers_of(launcher.deployment)
        assert inspect(waiting["Id"])["HostConfig"]["Runtime"] == "io.containerd.runc.v2"
        assert (await client.health())["runtime"] == "io.containerd.runc.v2"


async def counts(client):
    async with client.http.get(f"{client.url}/healthz") as response:
        health = await response.json()
    return health["nursery"], health["successors"]


async def test_callers_over_http_find_warm_containers_and_an_idle_deployment_holds_exactly_those():
    with deployed(engine="docker", nursery="2", successors="3", log_level="DEBUG") as mayfly:

        def idle(successors):
            return lambda: len(mayfly.containers()) == 2 + successors

        async with client_of(mayfly) as client:
            async with asyncio.timeout(60):
                while (await counts(client)) != (2, 0):  # a container is there before it waits
                    await asyncio.sleep(0.1)
            assert idle(0)()
            callers = [client.another() for _ in range(2)]
            for number, caller in enumerate(callers):
                assert (await caller.sql("CREATE TABLE t(x); INSERT INTO t VALUES (?)", [number])).status == 200
            until_seen(idle(2))
            for number, caller in enumerate(callers):
                assert await caller.rows("SELECT x FROM t") == [[number]]
            until_seen(idle(2))
            async with asyncio.timeout(20):
                while (await counts(client)) != (2, 2):
                    await asyncio.sleep(0.1)
            assert idle(2)()
        assert len(mayfly.instances()) == 2 + 2
        lines = [line for line in (mayfly.state / "operator" / "launcher.log").read_text().splitlines() if "run ended" in line]
        assert ["start=warm" in line for line in lines] == [True] * 4
    assert len(lines) == 4
