"""Engine zygote from the outside, over HTTP: what stands, what each request is made of, what breaks, and where it cannot be had."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import docker
import pytest

from gateway.protocol import Status
from gateway.settings import Settings

from .conftest import eventually
from .deployment import REPO, Client, Deployment, assert_error, client_of, deployed
from .launcher_harness import Launcher, launched
from .sealed import sealed_directory
from .test_faults import ENDLESS, at_work, nothing_at_work, serves_again

SLOTS = 2


@pytest.fixture(scope="module")
def service() -> Iterator[Deployment]:
    """Two slots, and a deadline that no test waits for."""
    with deployed(engine="zygote", slots=str(SLOTS), deadline_seconds="600", queue_timeout_seconds="200") as deployment:
        yield deployment


@pytest.fixture
async def caller(service: Deployment) -> Any:
    async with client_of(service) as client:
        yield client


async def all_slots_stand(mayfly: Deployment) -> None:
    await asyncio.to_thread(eventually, lambda: len(mayfly.slots()) == SLOTS == len(mayfly.containers()))


def volumes_in_sight(pid: int) -> list[str]:
    """Instances in the mounts of a process."""
    return re.findall(r"/instances/([0-9a-f-]{36})", Path(f"/proc/{pid}/mountinfo").read_text())


async def test_W6c_a_busy_request_is_one_child_with_one_volume_in_a_slot_that_stands_and_none_is_left(service, caller):
    await caller.rows("SELECT 1")
    await nothing_at_work(service)
    before = service.slots()
    assert len(before) == SLOTS
    busy = asyncio.create_task(caller.sql(ENDLESS))
    work = await at_work(service)
    assert [item.pid for item in service.at_work()] == [work.pid]
    assert work.instance in service.instances()
    assert volumes_in_sight(work.pid) == [work.instance]
    for zygote in before.values():
        assert volumes_in_sight(zygote) == []
    busy.cancel()
    await nothing_at_work(service)
    assert not Path(f"/proc/{work.pid}").exists()
    assert service.slots() == before


def kill_container(mayfly: Deployment, container: str) -> None:
    with mayfly.docker() as daemon:
        daemon.kill(container)


def kill_zygote(mayfly: Deployment, container: str) -> None:
    os.kill(mayfly.slots()[container], signal.SIGKILL)


@pytest.mark.parametrize("kill", [kill_container, kill_zygote])
async def test_a_slot_killed_under_its_request_is_a_503_and_is_replaced(service, caller, kill):
    await caller.rows("CREATE TABLE t(x); INSERT INTO t VALUES (1); SELECT 1")
    await all_slots_stand(service)
    before = service.slots()
    busy = asyncio.create_task(caller.sql(f"INSERT INTO t VALUES (2); {ENDLESS}"))
    work = await at_work(service)
    [hit] = [container for container, zygote in before.items() if parent_of(work.pid) == zygote]
    kill(service, hit)
    assert_error(await busy, 503, "engine_unavailable")
    assert await caller.rows("SELECT min(x) FROM t") == [[1]]
    await all_slots_stand(service)
    assert service.slots().keys() & before.keys() == before.keys() - {hit}


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_killed_children_cost_no_slot(service, caller):
    await caller.rows("SELECT 1")
    await all_slots_stand(service)
    before = service.slots()
    for _ in range(5):
        await nothing_at_work(service)
        busy = asyncio.create_task(caller.sql(ENDLESS))
        os.kill((await at_work(service)).pid, signal.SIGKILL)
        assert_error(await busy, 500, "runner_failed")
    assert await caller.rows("SELECT 2") == [[2]]
    assert service.slots() == before


async def test_children_killed_for_memory_cost_no_slot_and_leave_the_neighbour_alone():
    room = {"heap_bytes": 1 << 30, "container_memory_bytes": 48 << 20, "limit_length": 10**9}
    with deployed(engine="zygote", slots="2", **{name: str(value) for name, value in room.items()}) as mayfly:
        before = mayfly.slots()
        hungry = (
            "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c LIMIT 1000)"
            " SELECT length(group_concat(hex(randomblob(200000)))) FROM c"
        )
        async with client_of(mayfly) as client:
            callers = [client.another() for _ in range(2)]
            attacks = [asyncio.create_task(caller.sql(hungry)) for caller in callers for _ in range(5)]
            served = 0
            while not all(attack.done() for attack in attacks):
                served += 1
                assert await client.rows("SELECT ?", [served]) == [[served]]
            for attack in attacks:
                assert_error(await attack, 400, "memory_limit", "invalid sql: out of memory")
        assert mayfly.slots() == before


async def test_standing_slots_need_no_image_and_a_slot_that_cannot_be_replaced_is_a_503_until_it_can():
    with contextlib.closing(docker.from_env()) as daemon:
        daemon.images.get("mayfly-runner:latest").tag("mayfly-absence:latest")
        with deployed(engine="zygote", slots="1", image="mayfly-absence:latest") as mayfly:
            async with client_of(mayfly) as client:
                await client.sql("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
                daemon.images.remove("mayfly-absence:latest")
                assert await client.rows("SELECT x FROM t") == [[1]]
                kill_container(mayfly, *mayfly.slots())
                answer = await client.sql("SELECT x FROM t")
                assert answer.status == 503, answer.body
                assert answer.body["code"] in ("engine_unavailable", "image_missing", "circuit_open")
                daemon.images.get("mayfly-runner:latest").tag("mayfly-absence:latest")
                await serves_again(client)
                assert await client.rows("SELECT x FROM t") == [[1]]
        daemon.images.remove("mayfly-absence:latest")


async def test_slots_end_with_a_launcher_that_is_killed_and_the_next_one_serves_every_instance():
    with deployed(engine="zygote", slots="2") as mayfly:
        async with client_of(mayfly) as client:
            callers = [client.another() for _ in range(10)]
            for number, caller in enumerate(callers):
                assert (await caller.sql("CREATE TABLE t(x); INSERT INTO t VALUES (?)", [number])).status == 200
            busy = asyncio.create_task(client.sql(ENDLESS))
            await at_work(mayfly)
            before = mayfly.slots()
            mayfly.kill("launcher")
            answer = await busy
            assert (answer.status, answer.body["code"]) in ((503, "launcher_unavailable"), (500, "runner_failed"))
            await asyncio.to_thread(eventually, lambda: not mayfly.slots())
            await asyncio.to_thread(mayfly.start)
            for number, caller in enumerate(callers):
                assert await caller.rows("SELECT x FROM t") == [[number]]
            assert len(mayfly.slots()) == len(mayfly.containers()) == 2
            assert not before.keys() & mayfly.slots().keys()
        mayfly.stop()
        assert mayfly.containers() == []


# --- tenants apart


async def test_three_hundred_requests_in_one_slot_never_see_anothers_rows_nor_anothers_random_bytes():
    chance = random.Random(20261122)
    patience = {
        "queue_length": "1000",
        "queue_timeout_seconds": "200",
        "queue_delay_seconds": "200",
        "connections_per_address": "0",
    }
    with deployed(engine="zygote", slots="1", **patience) as mayfly:
        async with client_of(mayfly) as client:
            callers = [client.another() for _ in range(20)]
            secrets = [f"secret-{chance.getrandbits(128):032x}" for _ in callers]
            for caller in callers:
                assert (await caller.sql("CREATE TABLE own(x, n)")).status == 200
            drawn: list[Any] = []

            async def one(number: int, step: int) -> None:
                insert, look = "INSERT INTO own VALUES (?, ?)", "SELECT x, hex(randomblob(16)) FROM z"
                sql = f"{insert}; CREATE TEMP TABLE z AS SELECT * FROM own; {look}"
                answer = await callers[number].sql(sql, [secrets[number], step])
                assert answer.status == 200, answer.body
                assert {row[0] for row in answer.body["rows"]} == {secrets[number]}
                assert not any(other.encode() in answer.raw for other in secrets if other != secrets[number])
                drawn.extend(row[1] for row in answer.body["rows"])

            order = [(number, step) for step in range(15) for number in range(20)]
            chance.shuffle(order)
            before = mayfly.slots()
            await asyncio.gather(*(one(number, step) for number, step in order))
            assert mayfly.slots() == before, "one zygote cloned them all"
            assert len(set(drawn)) == len(drawn) >= 300
            for caller in callers:
                assert await caller.rows("SELECT count(*), count(DISTINCT x) FROM own") == [[15, 1]]


# --- wear


def starts_of_replacements(mayfly: Deployment) -> list[float]:
    """How long each new slot took, from the launcher's log: from when it was wanted to when the old one went."""
    wanted: dict[str, float] = {}
    took = []
    for line in (mayfly.state / "operator" / "launcher.log").read_text().splitlines():
        if found := re.match(r"(\S+ \S+) .* slot=(\S+) (is replaced|has served its time)", line):
            at = datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
            if found[3] == "is replaced":
                wanted[found[2]] = at
            elif found[2] in wanted:
                took.append(at - wanted[found[2]])
    return took


async def test_slots_are_replaced_under_load_without_an_error_and_nobody_waits_for_it():
    with deployed(engine="zygote", slots="1", slot_requests="50", queue_timeout_seconds="200") as mayfly:
        first = mayfly.slots()
        pauses: list[float] = []
        async with client_of(mayfly) as client:

            async def load(caller: Client) -> None:
                while len(pauses) < 500 or len(starts_of_replacements(mayfly)) < 4:
                    began = time.monotonic()
                    assert await caller.rows("SELECT 1") == [[1]]
                    pauses.append(time.monotonic() - began)

            await asyncio.gather(*(load(client.another()) for _ in range(4)))
        assert not first.keys() & mayfly.slots().keys()
        # There is one slot: whoever waited for the next would have waited for its start, on the same machine under the same load.
        assert max(pauses) < statistics.median(starts_of_replacements(mayfly)), sorted(pauses)[-10:]


# --- hosts that cannot

WITHOUT_CAPABILITY = "capabilities() { :; }"


async def test_auto_without_the_capability_serves_by_docker_and_says_why():
    with deployed(engine="auto", slots="1") as mayfly:
        async with client_of(mayfly) as client:
            await engine_is(client, "zygote")  # the control: the host can
            await client.sql("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
            mayfly.kill("launcher")
            mayfly.start_one("launcher", but=WITHOUT_CAPABILITY)
            await serves_again(client)
            assert await client.rows("SELECT x FROM t") == [[1]]
            await engine_is(client, "docker")
            assert mayfly.slots() == {}
            said = (mayfly.state / "operator" / "launcher.log").read_text()
            assert "engine zygote is refused, docker takes its place" in said
            assert "CAP_SYS_ADMIN" in said
            assert "infra/up" in said


async def engine_is(client: Client, engine: str) -> None:
    """By /healthz, which asks the launcher at most once a second: an answer may be of the one before."""
    async with asyncio.timeout(30):
        while True:
            async with client.http.get(f"{client.url}/healthz") as response:
                if (await response.json()).get("engine") == engine:
                    return
            await asyncio.sleep(0.05)


async def test_zygote_without_the_capability_is_a_refusal_to_start_with_its_remedy():
    with deployed(engine="zygote", slots="1") as mayfly:
        mayfly.kill("launcher")
        mayfly.start_one("launcher", but=WITHOUT_CAPABILITY)
        mayfly.wait_until_dead("launcher")
        last = (mayfly.state / "operator" / "launcher.log").read_text().splitlines()[-1]
        assert last.startswith("mayfly launcher: refused to serve: engine zygote: the launcher has no CAP_SYS_ADMIN")
        assert "infra/up" in last
        assert "MAYFLY_ENGINE=docker" in last
        assert mayfly.slots() == {}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The launcher's program with profiles of its own; the working directory comes first where Python looks."""
    for folder in ("gateway", "infra"):
        shutil.copytree(REPO / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def forbid(checkout: Path, call: str) -> None:
    """To a slot, by its seccomp profile."""
    profile = checkout / "infra" / "seccomp-slot.json"
    rules = json.loads(profile.read_text())
    for rule in rules["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name != call]
    rules["syscalls"] = [rule for rule in rules["syscalls"] if rule["names"]]
    profile.write_text(json.dumps(rules))


@pytest.mark.parametrize(
    ("call", "step"),
    [("unshare", "namespaces"), ("clone3", "clone"), ("mount", "database"), ("pivot_root", "root")],
)
async def test_a_host_that_forbids_a_call_is_served_by_docker_or_not_at_all(checkout, call, step):
    forbid(checkout, call)
    image = Settings.from_environment().image
    with sealed_directory() as state:
        strict = Launcher(state, checkout, image=image, engine="zygote", slots=1)
        assert await asyncio.to_thread(strict.spawn().wait, 60) == 1
        last = strict.log.read_text().splitlines()[-1]
        assert last.startswith("mayfly launcher: refused to serve: ")
        assert step in last
        assert call in last
        assert "MAYFLY_ENGINE=docker" in last
    with sealed_directory() as state:
        async with launched(state, checkout=checkout, image=image, engine="auto", slots=1) as (_, client):
            health = await client.health()
            assert health["engine"] == "docker"
            assert call in health["engine_choice"]
            instance = await client.create()
            sql = {"v": 1, "sql": "SELECT 1", "args": None, "int64": "number"}
            replies, _ = await client.do(instance, **sql)
            assert [reply.status for reply in replies] == [Status.STARTED, Status.ENDED]


async def test_a_host_that_forbids_the_volumes_mount_is_found_out_by_the_self_test(checkout):
    """The zygote has all that it needs itself; only a child with a volume notices."""
    forbid(checkout, "move_mount")
    image = Settings.from_environment().image
    with sealed_directory() as state:
        launcher = Launcher(state, checkout, image=image, engine="zygote", slots=1)
        assert await asyncio.to_thread(launcher.spawn().wait, 60) == 1
        last = launcher.log.read_text().splitlines()[-1]
        assert last.startswith("mayfly launcher: refused to serve: the runner cannot confine itself on this host: ")
        assert "Operation not permitted" in last
