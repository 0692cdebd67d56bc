"""Damage met by a request: strict and salvage, and that nothing is left behind whatever fails on the way."""

from __future__ import annotations

import asyncio

import pytest

from gateway.protocol import NOBODY, Status, Verb, Verdict
from gateway.web.appkeys import BULK_GATE, RUNS
from gateway.web.bulk import MAX_WAITING
from gateway.web.room import SHARE

from .calling import Request, call
from .fake_launcher import FINDING, FakeRun, answering, assert_error, gateway, ok, report, until, verdict

DAMAGED = verdict("damaged", message="database disk image is malformed")
VERIFIED = report(ok=False, findings=[FINDING])
SALVAGED = report(kind="salvage", findings=[FINDING], tables=[{"name": "t", "kept": 3, "lost": 1, "lost_is_exact": True}])
FAILED = report(kind="salvage", ok=False, findings=[FINDING])
STREAMS = {
    **dict.fromkeys(("", "rows", "batch", "schema", "export", "import"), DAMAGED),
    "verify": verdict("report", report=VERIFIED),
    "salvage": verdict("report", report=SALVAGED),
}
MEETING_IT = (
    Request("POST", "/sql", b'{"sql":"SELECT 1"}'),
    Request("POST", "/sql", b'{"sql":"SELECT 1"}', {"Accept": "application/x-ndjson"}),
    Request("POST", "/batch", b'{"statements":[{"sql":"SELECT 1"}]}'),
    Request("POST", "/import?table=t&format=csv", b"a\n1\n"),
    Request("GET", "/schema"),
    Request("GET", "/db"),
)


@pytest.fixture
async def web(tmp_path):
    async with gateway(tmp_path) as web:
        yield web
        await until(lambda: web.app[RUNS].leases.held == 0)


async def damaged(web, *, salvages: bool = False) -> str:
    """The token of an instance that is found damaged by whatever runs in it next."""
    token = await web.token()
    if salvages:
        web.launcher.salvaging |= set(web.launcher.instances)
    web.launcher.script = answering(STREAMS)
    return token


def operations(web) -> list[str]:
    return [request.get("op", "") for request in web.launcher.requests[1:]]


# ── strict


@pytest.mark.parametrize("request_", MEETING_IT, ids=lambda request: f"{request.name} {request.headers.get('Accept', '')}")
async def test_strict_damage_is_one_error_with_a_report_from_a_second_read_only_run(web, request_):
    token = await damaged(web)
    own = set(web.launcher.instances)
    response = await request_(web, token)
    body = await assert_error(response, "database_damaged")
    assert body["report"] == VERIFIED
    assert len(web.launcher.runs) == 3
    assert (web.launcher.runs[-1].read_only, web.launcher.runs[-1].bulk) == (True, True)
    assert operations(web)[-1] == "verify"
    assert set(web.launcher.instances) == own
    assert not {verb for verb, _ in web.launcher.verbs} & {Verb.FORK, Verb.REPLACE, Verb.REMOVE}
    assert response.headers["X-Walkin-TTL"]


async def test_a_report_that_cannot_be_had_leaves_the_error_without_it(web):
    for reply in (verdict("timeout"), b"\0"):
        token = await web.token()
        web.launcher.script = answering(STREAMS | {"verify": reply})
        body = await assert_error(await web.sql("SELECT 1", token), "database_damaged")
        assert "report" not in body
        web.launcher.script = answering({"": ok(["a"], [[1]])})


async def test_a_step_that_meets_damage_says_which_one_it_was(web):
    token = await damaged(web)
    failure = {"verdict": "damaged", "message": "x"}
    web.launcher.script = answering(STREAMS | {"batch": verdict("step_failed", step=1, failure=failure)})
    raw = b'{"statements":[{"sql":"A"},{"sql":"B"}]}'
    body = await assert_error(await call(web, "POST", "/batch", token, raw), "database_damaged")
    assert (body["statement"], body["report"]) == (1, VERIFIED)


async def test_an_instance_that_ends_while_its_damage_is_looked_at_is_the_same_404(web):
    token = await web.token()

    async def ending(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        web.launcher.instances.clear()
        await run.send(DAMAGED)
        run.ended()

    web.launcher.script = ending
    await assert_error(await web.sql("SELECT 1", token), "instance_not_found")


# ── salvage


@pytest.mark.parametrize("request_", MEETING_IT, ids=lambda request: f"{request.name} {request.headers.get('Accept', '')}")
async def test_salvage_recovers_into_a_copy_of_nobodys_that_takes_the_place_and_keeps_the_old_volume(web, request_):
    token = await damaged(web, salvages=True)
    (own,) = web.launcher.instances
    response = await request_(web, token)
    body = await assert_error(response, "database_salvaged")
    assert body["report"] == SALVAGED
    ((instance, copy, kept),) = web.launcher.replaced
    assert (instance, kept) == (own, True)
    assert web.launcher.owners[-1] == NOBODY
    assert operations(web)[-1] == "salvage"
    assert web.launcher.runs[-1].instance == copy
    assert (web.launcher.runs[-1].bulk, web.launcher.runs[-1].read_only) == (True, False)
    assert set(web.launcher.instances) == {own}


@pytest.mark.parametrize(
    ("reply", "code", "expected"),
    [
        (verdict("report", report=FAILED), "database_damaged", FAILED),
        (verdict("timeout"), "database_damaged", VERIFIED),
        (verdict("memory_limit"), "database_damaged", VERIFIED),
        (verdict("internal", message="KeyError"), "internal_error", None),
        (b"\0", "reply_invalid", None),
        (verdict("report", report=VERIFIED), "reply_invalid", None),
    ],
)
async def test_a_salvage_that_fails_changes_nothing_and_removes_its_copy(web, reply, code, expected):
    token = await damaged(web, salvages=True)
    own = set(web.launcher.instances)
    web.launcher.script = answering(STREAMS | {"salvage": reply})
    body = await assert_error(await web.sql("SELECT 1", token), code)
    assert body.get("report") == expected
    await until(lambda: set(web.launcher.instances) == own)
    assert web.launcher.replaced == []


@pytest.mark.parametrize(
    ("verb", "status", "code"),
    [
        (Verb.FORK, Status.HOST_FULL, "host_full"),
        (Verb.FORK, Status.STORAGE_LOW, "host_storage_low"),
        (Verb.REPLACE, Status.FAILED, "internal_error"),
    ],
)
async def test_a_salvage_that_the_launcher_refuses_changes_nothing_and_removes_its_copy(web, verb, status, code):
    token = await damaged(web, salvages=True)
    own = set(web.launcher.instances)
    web.launcher.refusals[verb] = status
    await assert_error(await web.sql("SELECT 1", token), code)
    await until(lambda: set(web.launcher.instances) == own)


async def test_a_caller_that_hangs_up_during_the_salvage_leaves_no_copy(tmp_path):
    async with gateway(tmp_path, bulk_deadline_seconds=60.0) as web:
        token = await damaged(web, salvages=True)
        own = set(web.launcher.instances)

        async def busy(run: FakeRun) -> None:
            run.started()
            if (await run.read_request()).get("op") != "salvage":
                await run.send(DAMAGED)
                run.ended()
                return
            await run.hung_up()
            run.ended(Verdict.CANCELLED)

        web.launcher.script = busy
        request = asyncio.ensure_future(web.sql("SELECT 1", token))
        await until(lambda: "salvage" in operations(web))
        assert len(web.launcher.instances) == 2
        request.cancel()
        await until(lambda: set(web.launcher.instances) == own)
        await until(lambda: web.app[RUNS].leases.held == 0)


async def test_nothing_else_runs_in_an_instance_while_it_is_salvaged(tmp_path):
    async with gateway(tmp_path, bulk_deadline_seconds=60.0) as web:
        token, finish = await damaged(web, salvages=True), asyncio.Event()

        async def slow(run: FakeRun) -> None:
            run.started()
            op = (await run.read_request()).get("op", "")
            if op == "salvage":
                await finish.wait()
            await run.send(STREAMS[op] if not web.launcher.replaced else ok(["a"], [[1]]))
            run.ended()

        web.launcher.script = slow
        first = asyncio.ensure_future(web.sql("SELECT 1", token))
        await until(lambda: "salvage" in operations(web))
        second = asyncio.ensure_future(web.sql("SELECT 2", token))
        await until(lambda: web.app[RUNS].leases.waiting == 1)
        runs = len(web.launcher.runs)
        finish.set()
        assert [(await first).status, (await second).status] == [409, 200]
        assert len(web.launcher.runs) == runs + 1


async def test_many_that_meet_damage_at_once_never_wait_for_one_another_for_good(tmp_path):
    async with gateway(tmp_path, slots=2) as web:
        tokens = [await web.token() for _ in range(4)]
        web.launcher.script = answering(STREAMS)
        answers = await asyncio.gather(*(web.sql("SELECT 1", token) for token in tokens * 2))
        assert {answer.status for answer in answers} == {400}
        assert all([(await answer.json()).get("report") == VERIFIED for answer in answers])


async def test_a_salvage_that_failed_by_our_fault_is_tried_again_by_the_same_key_without_a_second_write(web):
    token, keyed = await damaged(web, salvages=True), {"Idempotency-Key": "k"}
    web.launcher.refusals[Verb.FORK] = Status.HOST_FULL
    raw = b'{"sql":"INSERT"}'
    await assert_error(await call(web, "POST", "/sql", token, raw, keyed), "host_full")
    del web.launcher.refusals[Verb.FORK]
    bodies = [await assert_error(await call(web, "POST", "/sql", token, raw, keyed), "database_salvaged") for _ in range(2)]
    assert bodies[0]["report"] == bodies[1]["report"] == SALVAGED
    assert operations(web) == ["", "salvage"]


async def test_reports_wait_at_the_gate_of_bulk_runs_and_leave_slots_to_others(tmp_path):
    async with gateway(tmp_path, slots=4, bulk_deadline_seconds=60.0) as web:
        tokens, other, finish = [await web.token() for _ in range(3)], await web.token(), asyncio.Event()
        more = iter([await web.token() for _ in range(MAX_WAITING // SHARE)])

        async def slow(run: FakeRun) -> None:
            run.started()
            request = await run.read_request()
            if request.get("op") == "verify":
                await finish.wait()
            await run.send(ok(["a"], [[1]]) if request.get("sql") == "SELECT 'well'" else STREAMS[request.get("op", "")])
            run.ended()

        web.launcher.script = slow
        answers = [asyncio.ensure_future(web.sql("SELECT 1", token)) for token in tokens]
        await until(lambda: web.app[BULK_GATE].waiting == 2 and web.launcher.running == 1)
        assert (await web.sql("SELECT 'well'", other)).status == 200
        while web.app[BULK_GATE].waiting < MAX_WAITING // (SHARE + 1):
            waiting = web.app[BULK_GATE].waiting
            answers.append(asyncio.ensure_future(web.sql("SELECT 1", next(more))))
            await until(lambda waiting=waiting: web.app[BULK_GATE].waiting > waiting)
        beyond = await assert_error(await web.sql("SELECT 1", next(more)), "database_damaged")
        assert "report" not in beyond
        finish.set()
        assert {(await answer).status for answer in answers} == {400}


# ── when told to


async def test_a_salvage_that_is_asked_for_happens_in_strict_mode_too(web):
    token = await damaged(web)
    response = await call(web, "POST", "/salvage", token)
    assert (response.status, await response.json()) == (200, {"report": SALVAGED})
    assert len(web.launcher.replaced) == 1
    assert operations(web) == ["verify", "salvage"]


async def test_a_salvage_of_a_healthy_database_changes_nothing(web):
    token = await damaged(web)
    web.launcher.script = answering({"verify": verdict("report", report=report())})
    response = await call(web, "POST", "/salvage", token)
    assert (response.status, await response.json()) == (200, {"report": report()})
    assert web.launcher.replaced == []
    assert web.launcher.count(Verb.FORK) == 0


async def test_a_salvage_that_fails_when_asked_for_is_an_error_with_its_report(web):
    token = await damaged(web)
    own = set(web.launcher.instances)
    web.launcher.script = answering(STREAMS | {"salvage": verdict("report", report=FAILED)})
    body = await assert_error(await call(web, "POST", "/salvage", token), "database_damaged")
    assert body["report"] == FAILED
    await until(lambda: set(web.launcher.instances) == own)


# ── the mode of an instance


@pytest.mark.parametrize(
    ("default", "header", "salvages"),
    [("strict", None, False), ("salvage", None, True), ("strict", "salvage", True), ("salvage", "strict", False)],
)
async def test_the_mode_is_the_instances_own_from_its_beginning_or_the_operators(tmp_path, default, header, salvages):
    async with gateway(tmp_path, on_damage=default) as web:
        headers = {"X-Mayfly-On-Damage": header} if header else {}
        assert (await call(web, "POST", "/sql", None, b'{"sql":"SELECT 1"}', headers)).status == 200
        assert (web.launcher.salvaging == set(web.launcher.instances)) is salvages


async def test_the_mode_cannot_be_changed_later(web):
    token = await web.token()
    response = await call(web, "POST", "/sql", token, b'{"sql":"SELECT 1"}', {"X-Mayfly-On-Damage": "salvage"})
    await assert_error(response, "bad_parameter")
