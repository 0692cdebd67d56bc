"""Who is let in, over real sockets: what is refused costs nothing, no address starves another, whoever hangs up makes room."""

from __future__ import annotations

import asyncio
import copy
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise

import aiohttp
import pytest

from gateway.protocol import NOBODY, Status, Verb, Verdict
from gateway.web.appkeys import RUNS

from .fake_launcher import FakeRun, Gateway, assert_error, ending_after, gateway, ok, until
from .test_web_process import web as web_process

FAR = "127.0.0.2"
UNLIMITED = {"MAYFLY_RATE_REQUESTS_PER_MINUTE": "0", "MAYFLY_RATE_CREATES_PER_MINUTE": "0"}


class Gate:
    """A runner that answers when it is let; `passed` are the requests that it has begun, in order."""

    def __init__(self, web: Gateway) -> None:
        self._open = asyncio.Semaphore(0)
        self.passed: list[str] = []
        web.launcher.script = self._script

    def let(self, count: int = 1) -> None:
        for _ in range(count):
            self._open.release()

    async def _script(self, run: FakeRun) -> None:
        run.started()
        self.passed.append((await run.read_request())["sql"])
        await self._open.acquire()
        await run.send(ok(["a"], [[1]]))
        run.ended()


@asynccontextmanager
async def caller_at(web: Gateway, address: str) -> AsyncIterator[Gateway]:
    """The same service, called from another address of this host."""
    connector = aiohttp.TCPConnector(limit=0, local_addr=(address, 0))
    async with aiohttp.ClientSession(connector=connector) as client:
        caller = copy.copy(web)
        caller.client = client
        yield caller


def waiting(web: Gateway) -> int:
    return web.app[RUNS].leases.waiting


def held(web: Gateway) -> int:
    return web.app[RUNS].leases.held


async def saturate(web: Gateway, count: int, sql: str = "flood") -> list[asyncio.Task[aiohttp.ClientResponse]]:
    """So many new callers at once; returns when each runs or waits."""
    before = waiting(web) + web.launcher.running
    tasks = [asyncio.ensure_future(web.sql(sql)) for _ in range(count)]
    await until(lambda: waiting(web) + web.launcher.running == before + count)
    return tasks


async def test_a_refused_create_makes_no_instance_and_asks_nothing_of_the_launcher(tmp_path):
    async with gateway(tmp_path, slots=1, queue_length=0) as web:
        gate = Gate(web)
        (running,) = await saturate(web, 1)
        await until(lambda: len(gate.passed) == 1)
        asked = list(web.launcher.verbs)
        for _ in range(20):
            await assert_error(await web.sql(), "overloaded")
        assert web.launcher.verbs == asked
        gate.let()
        assert (await running).status == 200
        assert len(web.launcher.instances) == 1


async def test_a_create_that_waits_makes_its_instance_when_its_turn_comes_and_none_if_it_waits_too_long(tmp_path):
    async with gateway(tmp_path, slots=1, queue_timeout_seconds=0.1, deadline_seconds=60.0) as web:
        gate = Gate(web)
        (running,) = await saturate(web, 1)
        await until(lambda: len(gate.passed) == 1)
        await assert_error(await web.sql(), "overloaded")
        gate.let()
        assert (await running).status == 200
        assert web.launcher.count(Verb.CREATE) == 1
        assert web.launcher.count(Verb.REMOVE) == 0


async def test_a_refused_create_is_not_counted_among_the_new_instances_of_its_address(tmp_path):
    async with gateway(tmp_path, slots=1, queue_length=0, rate_creates_per_minute=2) as web:
        gate = Gate(web)
        (running,) = await saturate(web, 1)
        for _ in range(5):
            await assert_error(await web.sql(), "overloaded")
        gate.let(2)
        assert (await running).status == 200
        await until(lambda: web.app[RUNS].leases.held == 0)
        assert (await web.sql()).status == 200


async def test_under_overload_every_token_good_or_bad_gets_the_same_answer(tmp_path):
    async with gateway(tmp_path, slots=1, queue_length=0) as web:
        tokens = [await web.token(), await web.token()]
        await until(lambda: web.app[RUNS].leases.held == 0)
        web.launcher.instances.popitem()
        gate = Gate(web)
        (running,) = await saturate(web, 1)
        asked = list(web.launcher.verbs)
        answers = [await web.sql("SELECT 1", token) for token in (*tokens, "wkn_no", "")]
        for answer in answers:
            await assert_error(answer, "overloaded")
        assert len({tuple(answer.headers) for answer in answers}) == 1
        assert web.launcher.verbs == asked
        gate.let()
        await running


async def test_a_bad_token_waits_for_no_slot(tmp_path):
    async with gateway(tmp_path, slots=1, deadline_seconds=60.0) as web:
        gate = Gate(web)
        tasks = await saturate(web, 3)
        await assert_error(await web.sql("SELECT 1", "wkn_no"), "instance_not_found")
        gate.let(3)
        assert {(await task).status for task in tasks} == {200}


async def test_an_address_that_floods_cannot_starve_another(tmp_path):
    async with gateway(tmp_path, slots=1, queue_length=80, deadline_seconds=60.0) as web, caller_at(web, FAR) as other:
        gate = Gate(web)
        flood = await saturate(web, 21)
        await assert_error(await web.sql("one too many"), "overloaded")
        quiet = await saturate(other, 2, "quiet")
        gate.let(len(flood) + len(quiet))
        assert {(await task).status for task in (*flood, *quiet)} == {200}
        assert gate.passed[:5] == ["flood", "flood", "quiet", "flood", "quiet"]


async def test_parallel_calls_of_one_agent_queue_and_do_not_fail(tmp_path):
    async with gateway(tmp_path, connections_per_address=0) as web:
        token = await web.token()
        web.launcher.most_running = 0
        answers = await asyncio.gather(*(web.sql("SELECT 1", token) for _ in range(100)))
        assert {answer.status for answer in answers} == {200}
        assert web.launcher.most_running == 1
        await until(lambda: web.app[RUNS].leases.held == 0)


async def test_a_queue_on_one_instance_leaves_the_slots_to_its_addresss_other_instances(tmp_path):
    async with gateway(tmp_path, slots=2, deadline_seconds=60.0) as web:
        token = await web.token()
        gate = Gate(web)
        queued = [asyncio.ensure_future(web.sql("queued", token)) for _ in range(10)]
        await until(lambda: len(gate.passed) == 1 and waiting(web) == 9)
        other = asyncio.ensure_future(web.sql("other"))
        await until(lambda: gate.passed == ["queued", "other"])
        gate.let(11)
        assert {(await task).status for task in (*queued, other)} == {200}


async def test_callers_that_hang_up_while_they_wait_make_room_at_once(tmp_path):
    async with gateway(tmp_path, slots=1, queue_length=16, deadline_seconds=60.0) as web:
        gate = Gate(web)
        (running,) = await saturate(web, 1)
        gone = await saturate(web, 4)
        await assert_error(await web.sql(), "overloaded")
        for task in gone:
            task.cancel()
        await until(lambda: waiting(web) == 0)
        again = await saturate(web, 4)
        gate.let(5)
        assert {(await task).status for task in (running, *again)} == {200}
        assert len(gate.passed) == web.launcher.count(Verb.CREATE) == 5


async def test_the_second_call_of_a_new_instance_takes_no_slot_while_the_container_of_the_first_is_torn_down(tmp_path):
    async with gateway(tmp_path, slots=2, deadline_seconds=60.0) as web:
        gone = asyncio.Event()
        web.launcher.script = ending_after(gone)
        first = await web.sql()
        second = asyncio.ensure_future(web.sql("SELECT 2", first.headers["X-Walkin-Session"]))
        await until(lambda: waiting(web) == 1)
        assert (await web.sql("another instance")).status == 200
        gone.set()
        assert (await second).status == 200


async def test_a_flood_of_creates_keeps_nobody_out_who_has_a_token_and_is_not_kept_out_itself(tmp_path):
    async with gateway(tmp_path, slots=1, queue_length=80, deadline_seconds=60.0, connections_per_address=0) as web:
        token = await web.token()
        await until(lambda: held(web) == 0)
        gate = Gate(web)
        async with AsyncExitStack() as stack:
            callers = [await stack.enter_async_context(caller_at(web, f"127.0.1.{number}")) for number in range(1, 31)]
            flood = [asyncio.ensure_future(caller.sql("create")) for caller in callers for _ in range(2)]
            await until(lambda: waiting(web) + sum(task.done() for task in flood) == len(flood) - 1)
            assert waiting(web) == 40, "half of the places"
            mine = [asyncio.ensure_future(web.sql(f"mine {number}", token)) for number in range(4)]
            other = asyncio.ensure_future(web.sql("bad", "wkn_no"))
            await assert_error(await other, "instance_not_found")
            await until(lambda: waiting(web) == 44)
            gate.let(1 + 40 + 4)
            assert {(await task).status for task in mine} == {200}
            answers = [await task for task in flood]
        assert sum(answer.status == 200 for answer in answers) == 41
        # The lease of an instance passes on behind whoever waits for the slot; a create is never two ahead of it.
        places = [place for place, sql in enumerate(gate.passed) if sql.startswith("mine")]
        assert places[0] == 1
        assert all(later - earlier <= 2 for earlier, later in pairwise(places))


async def test_a_refusal_takes_less_than_fifty_milliseconds_while_every_slot_and_every_place_is_taken(tmp_path):
    """Against the process as an operator starts it; the median, because the machine may be busy with other things."""
    async with web_process(
        tmp_path, MAYFLY_SLOTS="2", MAYFLY_QUEUE_LENGTH="128", MAYFLY_DEADLINE_SECONDS="60", **UNLIMITED
    ) as running:

        async def busy(run: FakeRun) -> None:
            run.started()
            await run.hung_up()
            run.ended(Verdict.CANCELLED)

        running.launcher.script = busy
        # As many beyond what there is room for as are refused at once: from then on it is full.
        full = [asyncio.ensure_future(running.sql()) for _ in range(2 + 32 + 5)]
        await until(lambda: sum(task.done() for task in full) == 5 and running.launcher.running == 2)
        took = []
        while len(took) < 200:
            began = time.perf_counter()
            answer = await asyncio.wait_for(running.sql(), 5)
            took.append(time.perf_counter() - began)
            assert answer.status == 503
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert statistics.median(took) < 0.05
        assert running.launcher.count(Verb.CREATE) == 2
        for task in full:
            task.cancel()
        await asyncio.gather(*full, return_exceptions=True)


async def test_the_launcher_is_told_whose_request_it_is_by_a_tag_that_is_an_addresss_own_and_by_its_id(tmp_path):
    async with gateway(tmp_path) as web, caller_at(web, FAR) as other:
        answers = [await web.sql(), await web.sql(), await other.sql()]
        first, second, third = web.launcher.owners
        assert first == second != third
        assert NOBODY not in (first, third)
        again = await web.sql("SELECT 1", answers[0].headers["X-Walkin-Session"])
        ids = [bytes.fromhex(answer.headers["X-Request-ID"]) for answer in (*answers, again)]
        assert list(dict.fromkeys(web.launcher.request_ids)) == ids


@pytest.mark.parametrize(
    ("verb", "status", "code"),
    [
        (Verb.CREATE, Status.OWNER_FULL, "too_many_instances"),
        (Verb.CREATE, Status.HOST_FULL, "host_full"),
        (Verb.RUN, Status.QUOTA, "query_quota"),
    ],
)
async def test_a_cap_of_the_launchers_is_told_in_the_one_envelope(tmp_path, verb, status, code):
    async with gateway(tmp_path) as web:
        token = await web.token()
        web.launcher.refusals[verb] = status
        await assert_error(await web.sql("SELECT 1", token if verb is Verb.RUN else None), code)
        web.launcher.refusals.clear()
        assert (await web.sql()).status == 200
