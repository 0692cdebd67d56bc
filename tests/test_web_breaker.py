"""The circuit breaker: what opens it, whom it then refuses, how little that costs, and that it closes by itself."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import pytest

from gateway.launcher.memory import available_bytes
from gateway.protocol import Verb, Verdict
from gateway.web import breaker
from gateway.web.appkeys import BREAKER, RUNS
from gateway.web.breaker import Breaker, Reason, _Outcome, _Outcomes
from gateway.web.errors import RunnerFailedError

from .deployment import Client, Deployment, client_of, deployed
from .fake_launcher import FakeRun, Gateway, assert_error, gateway, ok, replying, until
from .private_docker import private_docker
from .test_admission import Gate, caller_at
from .test_faults import ENDLESS, at_work, nothing_at_work, serves_again

MB = 1 << 20


def state(web: Gateway) -> Breaker:
    return web.app[BREAKER]


async def closes(web: Gateway) -> None:
    await until(lambda: state(web).state == "closed")


@pytest.fixture
def quick(monkeypatch):
    """Looks a hundred times a second instead of once."""
    monkeypatch.setattr(breaker, "_LOOK_SECONDS", 0.01)


@asynccontextmanager
async def two_callers(folder: Path, **settings: object) -> AsyncIterator[tuple[Gateway, str]]:
    """A gateway and the token of a live instance."""
    async with gateway(folder, breaker_open_seconds=0.1, **settings) as web:
        token = await web.token()
        await until(lambda: web.app[RUNS].leases.held == 0)
        yield web, token


async def opened(web: Gateway, token: str, reason: Reason) -> None:
    """Some traffic until it has been noticed."""
    async with asyncio.timeout(20):
        while reason not in state(web).reasons:
            await web.sql("SELECT 1", token)


async def refuses_everything(web: Gateway, token: str) -> None:
    asked = list(web.launcher.verbs)
    for answer in (await web.sql(), await web.sql("SELECT 1", token), await web.sql("SELECT 1", "wkn_no")):
        await assert_error(answer, "circuit_open")
        assert answer.headers["Retry-After"] == "5", "also when that time is over and it is open still"
    assert web.launcher.verbs == asked
    assert [(await web.get(path)).status for path in ("/livez", "/readyz", "/healthz")] == [200, 503, 503]


async def refuses_creates_alone(web: Gateway, token: str) -> None:
    await assert_error(await web.sql(), "circuit_open")
    assert (await web.sql("SELECT 1", token)).status == 200
    await assert_error(await web.sql("SELECT 1", "wkn_no"), "instance_not_found")
    assert [(await web.get(path)).status for path in ("/livez", "/readyz", "/healthz")] == [200, 200, 200]


# ── what the launcher says ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("minimum", [MB, 0], ids=["on", "off"])
@pytest.mark.parametrize(
    ("told", "setting", "reason", "refuses"),
    [
        ("free_bytes", "min_free_bytes", Reason.DISK, refuses_creates_alone),
        ("available_memory_bytes", "min_free_memory_bytes", Reason.MEMORY, refuses_everything),
    ],
)
async def test_too_little_room_refuses_until_there_is_clearly_enough(tmp_path, quick, told, setting, reason, refuses, minimum):
    async with two_callers(tmp_path, **{setting: minimum}) as (web, token):
        web.launcher.health[told] = 0
        if not minimum:
            asked = web.launcher.health_asked
            while web.launcher.health_asked <= asked + 1:
                assert (await web.sql()).status == 200
            return
        await opened(web, token, reason)
        await refuses(web, token)
        web.launcher.health[told] = MB + MB // 8 - 1
        asked = web.launcher.health_asked
        await until(lambda: web.launcher.health_asked > asked + 20)
        assert state(web).state == "open", "a little more than too little is not enough"
        await refuses(web, token)
        web.launcher.health[told] += 1
        await closes(web)
        assert (await web.sql()).status == 200
        assert state(web).opened_total == {reason: 1}


@pytest.mark.parametrize("told", [{"trouble": "the image is gone"}, {"free_bytes": "many"}])
async def test_a_launcher_in_trouble_or_one_that_cannot_be_understood_refuses_everything(tmp_path, quick, told):
    async with two_callers(tmp_path) as (web, token):
        well = dict(web.launcher.health)
        web.launcher.health.update(told)
        await opened(web, token, Reason.LAUNCHER if "free_bytes" in told else Reason.ENGINE)
        await refuses_everything(web, token)
        web.launcher.health = well
        await closes(web)
        assert (await web.sql()).status == 200


async def test_a_launcher_that_is_dead_refuses_everything_until_it_is_back(tmp_path, quick):
    async with two_callers(tmp_path) as (web, token):
        await web.launcher.stop()
        await opened(web, token, Reason.LAUNCHER)
        await refuses_everything(web, token)
        await web.launcher.start()
        await closes(web)
        assert (await web.sql("SELECT 1", token)).status == 200


async def test_a_launcher_that_is_silent_refuses_everything_and_keeps_nobody_waiting(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(breaker, "_SILENT_SECONDS", 0.05)
    async with two_callers(tmp_path, start_timeout_seconds=600) as (web, token):
        web.launcher.silent = {Verb.RUN, Verb.CREATE}
        lost = asyncio.ensure_future(web.sql("SELECT 1", token))
        await until(lambda: web.launcher.count(Verb.RUN) == 2)
        waits = asyncio.ensure_future(web.sql("SELECT 1", token))
        await until(lambda: web.app[RUNS].leases.waiting == 1)
        web.launcher.silent |= {Verb.HEALTH, Verb.FIND}
        asks, creates = (asyncio.ensure_future(web.sql("SELECT 1", presented)) for presented in (web.unheard_of(), None))
        # Its run would have ten minutes for its start, and the others would wait for it, or for ten seconds.
        await assert_error(await waits, "circuit_open")
        for unanswered in (asks, creates, lost):
            await assert_error(await unanswered, "launcher_unavailable")
        await refuses_everything(web, token)
        web.launcher.silent = set()
        web.launcher.drop_connections()
        await closes(web)
        assert (await web.sql("SELECT 1", token)).status == 200


async def test_whoever_waits_when_everything_is_refused_waits_no_longer(tmp_path, quick):
    async with gateway(tmp_path, slots=1, min_free_memory_bytes=MB, deadline_seconds=60.0) as web:
        gate = Gate(web)
        runs = asyncio.ensure_future(web.sql("runs"))
        await until(lambda: gate.passed == ["runs"])
        waits = asyncio.ensure_future(web.sql("waits"))
        await until(lambda: web.app[RUNS].leases.waiting == 1)
        web.launcher.health["available_memory_bytes"] = 0
        await assert_error(await waits, "circuit_open")
        gate.let()
        assert (await runs).status == 200


async def test_a_service_that_nobody_uses_asks_nothing(tmp_path, quick):
    async with two_callers(tmp_path) as (web, token):
        await until(lambda: not state(web)._awake.is_set())
        asked = web.launcher.health_asked
        assert asked >= 1
        for _ in range(20):
            await asyncio.sleep(0.01)  # time in which it would ask twenty times
        assert web.launcher.health_asked == asked
        await web.sql("SELECT 1", token)
        await until(lambda: web.launcher.health_asked > asked)


# ── what waits ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("limit", [6, 0], ids=["on", "off"])
async def test_a_long_queue_refuses_creates_alone_until_it_is_half_as_long(tmp_path, quick, limit):
    async with (
        two_callers(tmp_path, slots=1, breaker_waiting=limit, deadline_seconds=60.0) as (web, token),
        AsyncExitStack() as callers,
    ):
        gate = Gate(web)
        flood = []
        for number in range(7):
            caller = await callers.enter_async_context(caller_at(web, f"127.0.1.{number + 1}"))
            flood.append(asyncio.ensure_future(caller.sql()))
        await until(lambda: web.app[RUNS].leases.waiting == 6)
        mine = asyncio.ensure_future(web.sql("mine", token))
        late = asyncio.ensure_future(web.sql("late"))
        if limit:
            await assert_error(await late, "circuit_open")
            assert state(web).reasons == [Reason.QUEUE]
        await until(lambda: web.app[RUNS].leases.waiting == (7 if limit else 8))
        await assert_error(await web.sql("SELECT 1", "wkn_no"), "instance_not_found")
        gate.let(4)
        await until(lambda: web.app[RUNS].leases.waiting == (3 if limit else 4))
        if limit:
            asked = web.launcher.health_asked
            await until(lambda: web.launcher.health_asked > asked + 20)
            assert state(web).state == "open", "half of it waits still"
        gate.let(100)
        assert {(await task).status for task in (*flood, mine)} == {200}
        assert (await late).status == (503 if limit else 200)
        await closes(web)
        assert (await web.sql()).status == 200


async def test_a_queue_behind_an_instance_of_ones_own_closes_the_door_to_nobody(tmp_path, quick):
    async with two_callers(tmp_path, slots=2, breaker_waiting=3, deadline_seconds=60.0) as (web, token):
        gate = Gate(web)
        queue = [asyncio.ensure_future(web.sql("slow", token)) for _ in range(9)]
        await until(lambda: web.app[RUNS].leases.waiting == 8)
        newcomer = asyncio.ensure_future(web.sql("newcomer"))
        await until(lambda: "newcomer" in gate.passed or newcomer.done())
        gate.let(10)
        assert {(await answer).status for answer in (newcomer, *queue)} == {200}
        assert not state(web).opened_total


# ── runs that fail ───────────────────────────────────────────────────────────────────────────────────────────────────


async def crashing(run: FakeRun) -> None:
    run.started()
    await run.read_request()
    run.ended(Verdict.SIGNALLED)


async def run_from(web: Gateway, addresses: int, each: int) -> None:
    for number in range(addresses):
        async with caller_at(web, f"127.0.2.{number + 1}") as caller:
            for _ in range(each):
                await caller.sql()


async def test_runs_that_fail_open_it_and_one_that_works_closes_it(tmp_path):
    async with two_callers(tmp_path) as (web, token):
        web.launcher.script = crashing
        await run_from(web, 5, 4)
        assert state(web).reasons == [Reason.RUNS]
        await refuses_everything(web, token)
        # While they go on failing one is let through at a time, and opens it anew.
        for _ in range(3):
            await until(lambda: state(web).state == "half_open")
            before = web.launcher.count(Verb.RUN)
            answers = await asyncio.gather(*(web.sql("SELECT 1", token) for _ in range(10)))
            assert sorted(answer.status for answer in answers) == [500] + [503] * 9
            assert web.launcher.count(Verb.RUN) == before + 1
            assert state(web).state == "open"
        web.launcher.script = replying(ok(["a"], [[1]]))
        await until(lambda: state(web).state == "half_open")
        await assert_error(await web.sql("SELECT 1", "wkn_no"), "instance_not_found")
        assert state(web).state == "half_open", "what never ran says nothing"
        assert (await web.sql("SELECT 1", token)).status == 200
        assert state(web).state == "closed"
        assert state(web).opened_total == {Reason.RUNS: 1}


@pytest.mark.parametrize(
    ("addresses", "each", "percent", "opens"),
    [(5, 4, 50, True), (4, 50, 50, False), (1, 100, 1, False), (19, 1, 50, False), (20, 1, 50, True), (5, 4, 0, False)],
)
async def test_it_takes_twenty_runs_and_five_addresses(tmp_path, addresses, each, percent, opens):
    async with gateway(tmp_path, breaker_failure_percent=percent) as web:
        web.launcher.script = crashing
        await run_from(web, addresses, each)
        assert (state(web).state == "open") is opens


async def test_an_address_that_makes_its_own_runs_fail_closes_the_service_to_nobody(tmp_path):
    async with gateway(tmp_path) as web:
        await run_from(web, 5, 4)
        web.launcher.script = crashing
        async with caller_at(web, "127.0.3.1") as attacker:
            for _ in range(200):
                await assert_error(await attacker.sql(), "runner_failed")
        assert state(web).state == "closed"


@pytest.mark.parametrize("verdict", [Verdict.DEADLINE, Verdict.OUT_OF_MEMORY, Verdict.LOST])
async def test_what_tenants_bring_on_themselves_opens_nothing(tmp_path, verdict):
    async with gateway(tmp_path) as web:

        async def ended(run: FakeRun) -> None:
            run.started()
            await run.read_request()
            run.ended(verdict)

        web.launcher.script = ended
        await run_from(web, 8, 5)
        assert state(web).state == "closed"


async def test_of_runs_that_fail_a_48_counts_as_one_address(tmp_path):
    async with gateway(tmp_path) as web:
        for number in range(100):
            state(web).saw(f"2001:db8:0:{number:x}::1", RunnerFailedError())
        assert state(web).state == "closed"
        for number in range(20):
            state(web).saw(f"2001:db8:{number % 5:x}:{number:x}::1", RunnerFailedError())
        assert state(web).reasons == [Reason.RUNS]


async def test_a_run_that_works_closes_it_beside_a_full_disk_and_creates_stay_refused(tmp_path, quick):
    async with two_callers(tmp_path, min_free_bytes=MB) as (web, token):
        web.launcher.script = crashing
        await run_from(web, 5, 4)
        web.launcher.health["free_bytes"] = 0
        await until(lambda: state(web).reasons == [Reason.DISK, Reason.RUNS])
        web.launcher.script = replying(ok(["a"], [[1]]))
        await until(lambda: state(web).state == "half_open")
        await assert_error(await web.sql(), "circuit_open")
        assert (await web.sql("SELECT 1", token)).status == 200
        assert state(web).reasons == [Reason.DISK]
        await refuses_creates_alone(web, token)


async def test_a_trial_that_is_hung_up_on_is_a_run_that_worked(tmp_path):
    async with two_callers(tmp_path) as (web, token):
        web.launcher.script = crashing
        await run_from(web, 5, 4)
        gate = Gate(web)
        await until(lambda: state(web).state == "half_open")
        gone = asyncio.ensure_future(web.sql("gone", token))
        await until(lambda: gate.passed == ["gone"])
        await assert_error(await web.sql("SELECT 1", token), "circuit_open")
        gone.cancel()
        await closes(web)
        gate.let(2)
        assert (await web.sql("SELECT 1", token)).status == 200


@pytest.mark.parametrize("seed", range(5))
def test_the_share_that_failed_is_that_of_a_plain_list(seed):
    chance, outcomes, now = random.Random(seed), _Outcomes(), 0.0
    runs: list[_Outcome] = []
    for _ in range(3000):
        now += chance.random()
        outcome = _Outcome(now, f"{chance.randrange(20)}", chance.random() < 0.4)
        outcomes.add(outcome)
        runs = [run for run in (*runs, outcome) if run.at > now - 60]
        last: dict[str, deque[bool]] = {}
        for run in runs:
            last.setdefault(run.address, deque(maxlen=4)).append(run.failed)
        counted = [failed for own in last.values() for failed in own]
        share = 100 * sum(counted) / len(counted) if len(counted) >= 20 else 0.0
        assert outcomes.failed_percent(now) == pytest.approx(share)
    assert outcomes.failed_percent(now + 61) == 0.0
    assert (outcomes._runs, outcomes._of) == ({}, {})


def test_a_flood_of_addresses_takes_no_more_than_some_memory():
    outcomes = _Outcomes()
    for number in range(50_000):
        outcomes.add(_Outcome(0.0, str(number), False))
    assert len(outcomes._runs) == len(outcomes._of) == breaker._MAX_RUNS


# ── the refusal ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_while_it_is_open_no_token_gets_another_answer_than_any_other(tmp_path, quick):
    async with two_callers(tmp_path, min_free_memory_bytes=MB) as (web, token):
        expired = await web.token()
        web.launcher.instances.popitem()
        web.launcher.health["available_memory_bytes"] = 0
        await opened(web, token, Reason.MEMORY)
        answers = [await web.sql("SELECT 1", presented) for presented in (token, expired, "wkn_no", "", "x" * 4000)]
        assert len({(answer.status, tuple(answer.headers)) for answer in answers}) == 1
        assert len({(await answer.json())["code"] for answer in answers}) == 1


async def test_a_refusal_waits_for_no_body_and_counts_against_no_rate(tmp_path, quick):
    async with gateway(tmp_path, min_free_memory_bytes=MB, rate_requests_per_minute=3, breaker_open_seconds=0.1) as web:
        web.launcher.health["available_memory_bytes"] = 0
        await web.sql()
        await until(lambda: state(web).state == "open")
        for _ in range(10):
            head = b"POST /sql HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
            writer.write(head)
            assert (await reader.readline()).split()[1] == b"503"
            writer.close()
        assert state(web).refused_total >= 10
        web.launcher.health["available_memory_bytes"] = MB * 2
        await closes(web)
        assert (await web.sql()).status == 200


# ── with real parts ──────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def from_(mayfly: Deployment, address: str) -> AsyncIterator[Client]:
    connector = aiohttp.TCPConnector(limit=0, local_addr=(address, 0))
    async with aiohttp.ClientSession(connector=connector) as http:
        yield Client(http, mayfly.url)


async def refused(client: Client) -> None:
    """Until it is, by the breaker."""

    async def asking() -> None:
        while (await client.sql("SELECT 1")).body.get("code") != "circuit_open":
            await asyncio.sleep(0.05)

    await asyncio.wait_for(asking(), 60)


async def served(client: Client) -> None:
    async def asking() -> None:
        while (await client.sql("SELECT 1")).status == 503:
            await asyncio.sleep(0.05)

    await asyncio.wait_for(asking(), 60)


async def status(client: Client, path: str) -> int:
    async with client.http.get(client.url + path) as response:
        return response.status


@contextmanager
def small_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mayfly-disk-") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=755", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


async def test_on_a_disk_that_fills_up_creates_are_refused_and_old_instances_are_served():
    with small_disk() as disk, deployed(disk, min_free_bytes=str(16 * MB), breaker_open_seconds="0.5") as mayfly:
        async with client_of(mayfly) as client:
            await client.rows("SELECT 1")
            assert (await client.another().sql("SELECT 1")).status == 200, "the control"
            ballast = disk / "operator" / "ballast"
            ballast.write_bytes(bytes(50 * MB))
            await refused(client.another())
            assert await client.rows("SELECT 1") == [[1]]
            assert await status(client, "/readyz") == 200
            ballast.unlink()
            await served(client.another())


@contextmanager
def control_group(pid: int) -> Iterator[Path]:
    """The file that limits the memory of a group of the process's own; there is no limit yet."""
    root = Path("/sys/fs/cgroup")
    unified = (root / "cgroup.controllers").exists()
    group = (root if unified else root / "memory") / f"mayfly-test-{pid}"
    if unified:
        (root / "cgroup.subtree_control").write_text("+memory")
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(pid))
        yield group / ("memory.max" if unified else "memory.limit_in_bytes")
    finally:
        ((root if unified else root / "memory") / "cgroup.procs").write_text(str(pid))
        group.rmdir()


async def test_a_host_without_memory_runs_nothing_until_there_is_some_again():
    with (
        deployed(min_free_memory_bytes=str(512 * MB), breaker_open_seconds="0.5") as mayfly,
        control_group(mayfly.pid("launcher")) as limit,
    ):
        async with client_of(mayfly) as client:
            assert await client.rows("SELECT 1") == [[1]], "the control"
            limit.write_text(str(256 * MB))
            await refused(client)
            await refused(client.another())
            assert [await status(client, path) for path in ("/livez", "/readyz")] == [200, 503]
            limit.write_text(str(2048 * MB))
            await served(client)
            assert await client.rows("SELECT 1") == [[1]]


def test_available_memory_is_the_hosts_or_what_the_nearest_limit_leaves(tmp_path):
    meminfo, groups = tmp_path / "meminfo", tmp_path / "groups"
    meminfo.write_text("MemTotal: 4000 kB\nMemAvailable:    2000 kB\n")
    own = tmp_path / "own"

    def limited(group: Path, most: str, used: int, cache: int, names: tuple[str, str, str]) -> None:
        group.mkdir(parents=True)
        for name, text in zip(
            names, (most, str(used), f"anon 1\n{'total_' * ('max' not in names[0])}inactive_file {cache}"), strict=True
        ):
            (group / name).write_text(text + "\n")

    second, first = (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
    )
    own.write_text("0::/\n")
    groups.mkdir()
    assert available_bytes(meminfo, own, groups) == 2000 << 10
    limited(groups / "a", "1000000", 900_000, 50_000, second)
    limited(groups / "a" / "b", "max", 10, 0, second)
    own.write_text("0::/a/b\n")
    assert available_bytes(meminfo, own, groups) == 150_000
    limited(groups / "memory" / "c", "5000", 9000, 0, first)
    own.write_text("3:cpu,memory:/c\n0::/a/b\n")
    assert available_bytes(meminfo, own, groups) == 0
    meminfo.write_text("MemTotal: 4000 kB\n")
    with pytest.raises(OSError, match="MemAvailable"):
        available_bytes(meminfo, own, groups)


async def test_without_docker_nothing_is_let_in_and_with_it_everything_again():
    with private_docker() as daemon, deployed(engine="docker", docker_socket=daemon.url) as mayfly:
        async with client_of(mayfly) as client:
            assert await client.rows("SELECT 1") == [[1]], "the control"
            daemon.kill()
            await refused(client)
            assert await status(client, "/readyz") == 503
            daemon.start()
            await serves_again(client)
            assert await status(client, "/readyz") == 200


async def test_a_launcher_that_hangs_is_noticed_and_one_that_goes_on_is_used_again():
    with deployed() as mayfly:
        async with client_of(mayfly) as client:
            assert await client.rows("SELECT 1") == [[1]], "the control"
            mayfly.signal("launcher", signal.SIGSTOP)
            try:
                lost = asyncio.ensure_future(client.sql("SELECT 1"))
                await refused(client.another())
                answer = await asyncio.wait_for(lost, 15)
                assert (answer.status, answer.body["code"]) in ((503, "launcher_unavailable"), (503, "circuit_open"))
            finally:
                mayfly.signal("launcher", signal.SIGCONT)
            await serves_again(client)


async def test_runners_that_die_close_the_service_and_one_that_lives_opens_it():
    with deployed(breaker_open_seconds="0.5", deadline_seconds="60") as mayfly:
        async with client_of(mayfly) as client, AsyncExitStack() as callers:
            assert await client.rows("SELECT 1") == [[1]], "the control"
            for number in range(1, 11):
                caller = await callers.enter_async_context(from_(mayfly, f"127.0.4.{number}"))
                for _ in range(3):
                    busy = asyncio.create_task(caller.sql(ENDLESS))
                    work = asyncio.create_task(at_work(mayfly))
                    await asyncio.wait((busy, work), return_when=asyncio.FIRST_COMPLETED)
                    if busy.done():
                        work.cancel()
                        break
                    os.kill(work.result().pid, signal.SIGKILL)
                    assert (await busy).body["code"] == "runner_failed"
                    await nothing_at_work(mayfly)
                if busy.result().body["code"] == "circuit_open":
                    break
            assert busy.result().body["code"] == "circuit_open"
            await served(client)
            assert await client.rows("SELECT 1") == [[1]]
            log = (mayfly.state / "operator" / "web.log").read_text()
            assert "circuit breaker open reason=runs" in log
            assert "circuit breaker no longer open reason=runs" in log


async def test_slow_queries_from_many_addresses_close_the_door_to_creates_alone():
    with deployed(slots="1", breaker_waiting="6", breaker_open_seconds="0.5") as mayfly:
        async with client_of(mayfly) as client, AsyncExitStack() as callers:
            assert await client.rows("SELECT 1") == [[1]], "the control"
            flood = []
            for number in range(1, 17):
                caller = await callers.enter_async_context(from_(mayfly, f"127.0.5.{number}"))
                flood.append(asyncio.create_task(caller.sql(ENDLESS)))
            await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
            assert await client.rows("SELECT 1") == [[1]]
            assert {(await task).body["code"] for task in flood} == {"query_timeout", "circuit_open"}
            await served(client.another())
