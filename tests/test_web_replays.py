"""Idempotency-Key: a retried write runs once, and its answer comes again; what is kept for that is bounded."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import Verb, Verdict
from gateway.uuid7 import uuid7
from gateway.web.appkeys import DRAIN, REPLAYS, RUNS
from gateway.web.errors import IdempotencyMismatchError, InvalidSqlError
from gateway.web.replays import Attempt, Replays

from .calling import Request, call, content
from .fake_launcher import FINDING, FakeRun, answering, assert_error, gateway, ok, replying, replying_after, report, until, verdict

STEP = {"columns": None, "rows": [], "rows_affected": 1, "truncated": False, "skipped": False}
WELL = {
    "": ok(affected=1),
    "batch": verdict("batch", results=[STEP]),
    "import": verdict("imported", table="t", created=True, columns=[["a", "INTEGER"]], rows=1),
}
KEYED = {"Idempotency-Key": "k-1"}
WRITES = (
    Request("POST", "/sql", b'{"sql":"INSERT"}', KEYED),
    Request("POST", "/batch", b'{"statements":[{"sql":"INSERT"}]}', KEYED),
    Request("POST", "/import?table=t&format=csv", b"a\n1\n", KEYED),
)
SQL = WRITES[0]


@pytest.fixture
async def web(tmp_path):
    async with gateway(tmp_path) as web:
        web.launcher.script = answering(WELL)
        yield web
        await until(lambda: web.app[RUNS].leases.held == 0)


@pytest.mark.parametrize("request_", WRITES, ids=lambda request: request.name)
async def test_a_write_that_comes_again_with_its_key_is_answered_the_same_and_runs_once(web, request_):
    token = await web.token()
    first = await request_(web, token)
    runs = len(web.launcher.runs)
    again = await request_(web, token)
    assert (first.status, again.status) == (200, 200)
    assert content(first) == content(again)
    assert again.headers["X-Walkin-TTL"] == first.headers["X-Walkin-TTL"]
    assert (first.headers.get("Idempotent-Replayed"), again.headers["Idempotent-Replayed"]) == (None, "true")
    assert len(web.launcher.runs) == runs
    assert web.launcher.runs[-1].tag != bytes(16)


async def test_another_key_and_another_instance_run_anew_and_no_key_has_no_tag(web):
    token, other = await web.token(), await web.token()
    for one, headers in ((token, KEYED), (token, {"Idempotency-Key": "k-2"}), (other, KEYED), (token, {}), (token, {})):
        response = await SQL._replace(headers=headers)(web, one)
        assert response.status == 200
        assert "Idempotent-Replayed" not in response.headers
    tags = [run.tag for run in web.launcher.runs[2:]]
    assert len(set(tags[:2])) == 2
    assert tags[0] == tags[2]
    assert tags[3:] == [bytes(16)] * 2


@pytest.mark.parametrize(
    "other",
    [
        SQL._replace(data=b'{"sql":"INSERT "}'),
        SQL._replace(headers=KEYED | {"Content-Type": "application/json"}),
        *WRITES[1:],
    ],
)
async def test_a_key_with_another_request_is_refused(web, other):
    token = await web.token()
    await SQL(web, token)
    runs = len(web.launcher.runs)
    await assert_error(await other(web, token), "idempotency_mismatch")
    assert len(web.launcher.runs) == runs


async def test_an_error_of_the_callers_own_is_replayed_with_an_id_of_its_own(web):
    token = await web.token()
    web.launcher.script = answering({"": verdict("sql_error", message="no such table: t")})
    bodies = [await assert_error(await SQL(web, token), "sql_error") for _ in range(2)]
    assert bodies[0]["error"] == bodies[1]["error"] == "invalid sql: no such table: t"
    assert bodies[0]["request_id"] != bodies[1]["request_id"]
    assert web.launcher.count(Verb.RUN) == 2


async def test_what_failed_by_our_fault_is_not_run_again_as_nobody_knows_what_it_did(web):
    token = await web.token()
    web.launcher.script = replying(b"", Verdict.SIGNALLED)
    await assert_error(await SQL(web, token), "runner_failed")
    web.launcher.script = answering(WELL)
    await assert_error(await SQL(web, token), "already_done")


async def test_a_key_of_which_the_answer_is_gone_is_done_already(web):
    token = await web.token()
    assert (await SQL(web, token)).status == 200
    web.app[REPLAYS].forget(next(iter(web.launcher.instances)))
    requests = len(web.launcher.requests)
    await assert_error(await SQL(web, token), "already_done")
    assert len(web.launcher.requests) == requests


async def test_a_caller_that_hangs_up_finds_its_answer_when_it_comes_again(tmp_path):
    async with gateway(tmp_path, deadline_seconds=60.0) as web:
        token, finish = await web.token(), asyncio.Event()
        web.launcher.script = replying_after(finish)
        request = asyncio.ensure_future(SQL(web, token))
        await until(lambda: len(web.launcher.requests) == 2)
        request.cancel()
        again = asyncio.ensure_future(SQL(web, token))
        await until(lambda: web.app[RUNS].leases.waiting == 1)
        finish.set()
        response = await again
        assert (response.status, response.headers["Idempotent-Replayed"]) == (200, "true")
        assert web.launcher.count(Verb.RUN) == 2


async def test_two_attempts_at_once_run_once(tmp_path):
    async with gateway(tmp_path, deadline_seconds=60.0) as web:
        token, finish = await web.token(), asyncio.Event()
        web.launcher.script = replying_after(finish)
        attempts = [asyncio.ensure_future(SQL(web, token)) for _ in range(5)]
        await until(lambda: web.app[RUNS].leases.waiting == 4)
        finish.set()
        assert {content(await attempt) for attempt in attempts} == {b'{"columns":["a"],"rows":[[1]],"rows_affected":0}'}
        assert web.launcher.count(Verb.RUN) == 2


async def test_stopping_waits_for_what_goes_on_without_its_caller(tmp_path):
    async with gateway(tmp_path, deadline_seconds=60.0) as web:
        token, finish = await web.token(), asyncio.Event()
        web.launcher.script = replying_after(finish)
        request = asyncio.ensure_future(SQL(web, token))
        await until(lambda: len(web.launcher.requests) == 2)
        request.cancel()
        draining = asyncio.ensure_future(web.app[DRAIN].begin(10))
        await until(lambda: web.app[DRAIN].draining)
        assert not draining.done()
        finish.set()
        assert await draining is True


async def test_what_goes_on_without_its_caller_does_not_keep_the_process_from_ending(tmp_path):
    async with gateway(tmp_path, deadline_seconds=60.0) as web:
        token = await web.token()

        async def endless(run: FakeRun) -> None:
            run.started()
            await run.read_request()
            await run.hung_up()
            run.ended(Verdict.CANCELLED)

        web.launcher.script = endless
        request = asyncio.ensure_future(SQL(web, token))
        await until(lambda: len(web.launcher.requests) == 2)
        request.cancel()
    assert web.app[RUNS].leases.held == 0


async def test_an_answer_dies_with_its_instance(web):
    token = await web.token()
    await SQL(web, token)
    web.launcher.instances.clear()
    await assert_error(await SQL(web, token), "instance_not_found")


async def test_a_read_only_token_changes_nothing_and_needs_no_key(web):
    token = await web.token()
    read_only = (await (await call(web, "POST", "/share", token)).json())["session"]
    runs = len(web.launcher.runs)
    for _ in range(2):
        assert (await SQL(web, read_only)).status == 200
    assert [run.tag for run in web.launcher.runs[runs:]] == [bytes(16)] * 2


async def test_a_key_without_a_session_or_with_an_answer_in_lines_is_refused(web):
    await assert_error(await SQL(web, None), "bad_parameter")
    assert web.launcher.verbs == []
    token = await web.token()
    await assert_error(await SQL._replace(headers=KEYED | {"Accept": "application/x-ndjson"})(web, token), "bad_parameter")
    await assert_error(await SQL._replace(headers={"Idempotency-Key": "a b"})(web, token), "bad_parameter")


async def test_damage_is_reported_again_and_not_looked_at_again(web):
    token = await web.token()
    damaged = verdict("damaged", message="x")
    web.launcher.script = answering({"": damaged, "verify": verdict("report", report=report(ok=False, findings=[FINDING]))})
    bodies = [await assert_error(await SQL(web, token), "database_damaged") for _ in range(2)]
    assert bodies[0]["report"] == bodies[1]["report"]
    assert [request.get("op") for request in web.launcher.requests] == [None, None, "verify"]


async def test_a_key_is_run_once_although_the_first_attempt_left_before_its_run(tmp_path):
    async with gateway(tmp_path, deadline_seconds=60.0, slots=1) as web:
        token, other, finish = await web.token(), await web.token(), asyncio.Event()
        seen: list[FakeRun] = []

        async def slow(run: FakeRun) -> None:
            seen.append(run)
            await replying_after(finish)(run)

        web.launcher.script = slow
        busy = asyncio.ensure_future(web.sql("SELECT 1", other))
        await until(lambda: len(seen) == 1)
        request = asyncio.ensure_future(SQL(web, token))
        await until(lambda: web.app[RUNS].leases.waiting == 1)
        request.cancel()
        again = asyncio.ensure_future(SQL(web, token))
        await until(lambda: web.app[RUNS].leases.waiting == 2)
        finish.set()
        assert [(await busy).status, (await again).status] == [200, 200]
        assert len(seen) == 2


# ── the store


def attempt(key: str, body: bytes = b"") -> Attempt:
    return Attempt.of(key, b"/sql", body)


def test_a_tag_is_of_the_key_alone_and_a_fingerprint_of_the_whole_request():
    assert attempt("a").tag == attempt("a", b"x").tag != attempt("b").tag
    assert len(attempt("a").tag) == 16
    assert len({Attempt.of("a", *parts).fingerprint for parts in ((b"ab", b""), (b"a", b"b"), (b"", b"ab"), (b"ab",))}) == 4


def test_what_is_kept_is_found_by_instance_and_key_until_the_instance_ends():
    now = [1000.0]
    replays, one, other = Replays(clock=lambda: now[0]), uuid7(), uuid7()
    replays.keep(one, attempt("a"), b"answer", "192.0.2.1", 1100)
    assert replays.find(one, attempt("a")) == b"answer"
    assert replays.find(other, attempt("a")) is None
    assert replays.find(one, attempt("b")) is None
    with pytest.raises(IdempotencyMismatchError):
        replays.find(one, attempt("a", b"x"))
    replays.extended(one, 1500)
    now[0] = 1200
    replays.keep(other, attempt("a"), b"", "192.0.2.1", 1300)
    assert replays.find(one, attempt("a")) == b"answer"
    now[0] = 1600
    replays.keep(uuid7(), attempt("a"), b"", "192.0.2.1", 1700)
    assert replays.find(one, attempt("a")) is None


def test_an_error_that_is_found_is_a_new_one_without_a_trace_of_where_it_was_raised():
    replays, one = Replays(), uuid7()
    try:
        raise InvalidSqlError("x", extra={"statement": 1})
    except InvalidSqlError as error:
        replays.keep(one, attempt("a"), error, "192.0.2.1", 1 << 40)
    first, second = replays.find(one, attempt("a")), replays.find(one, attempt("a"))
    assert first is not second
    assert isinstance(first, InvalidSqlError)
    assert (first.__traceback__, first.message, first.extra) == (None, "invalid sql: x", {"statement": 1})


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3000)), max_size=60))
def test_the_room_is_never_overdrawn_and_no_address_takes_more_than_it_leaves_free(steps):
    replays = Replays(room_bytes=10_000)
    instances = [uuid.UUID(int=number) for number in range(6)]
    for number, address, key, size in steps:
        if size == 0:
            replays.forget(instances[number])
        else:
            replays.keep(instances[number], attempt(str(key)), bytes(size), f"192.0.2.{address}", 1 << 40)
        assert replays.held_bytes == sum(replays._sizes.values()) <= 10_000
        assert all(held > 0 for held in replays._sizes.values())
    for instance in instances:
        replays.forget(instance)
    assert (replays.held_bytes, dict(replays._sizes), dict(replays._of), replays._instances) == (0, {}, {}, {})


def test_who_fills_the_room_loses_answers_of_its_own():
    replays, victim = Replays(room_bytes=100_000), uuid7()
    replays.keep(victim, attempt("a"), bytes(10_000), "192.0.2.1", 1 << 40)
    for _ in range(100):
        replays.keep(uuid7(), attempt("a"), bytes(10_000), "192.0.2.2", 1 << 40)
    assert replays.find(victim, attempt("a")) is not None
    replays.keep(victim, attempt("b"), bytes(10_000), "192.0.2.1", 1 << 40)
    assert replays.find(victim, attempt("b")) is not None
