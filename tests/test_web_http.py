"""POST /sql and its neighbours over real sockets, with a launcher that plays the runner."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.protocol import Reply, Status, Verb, Verdict
from gateway.uuid7 import uuid7
from gateway.web.appkeys import ACCESS_LOG, DRAIN, ROOM, RUNS, TOKENS
from gateway.web.middleware import COMMON_HEADERS
from gateway.web.secret import Secret

from .fake_launcher import GOLDEN, FakeRun, Gateway, assert_error, ending_after, frame, gateway, ok, replying, replying_after, until


@pytest.fixture
async def web(tmp_path):
    async with gateway(tmp_path) as web:
        yield web


def held(web) -> int:
    return web.app[RUNS].leases.held


def expire(web: Gateway, instance: uuid.UUID) -> None:
    """As if its end had come."""
    del web.launcher.instances[instance]
    web.app[RUNS].extended(instance, int(time.time()) - 1)


# ── the compatible core ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_request_without_a_session_makes_an_instance_and_hands_out_its_token(web):
    response = await web.sql("SELECT 1 AS one")
    assert response.status == 200
    assert await response.json() == {"columns": ["one"], "rows": [[1]], "rows_affected": 0}
    assert [verb for verb, _ in web.launcher.verbs] == [Verb.CREATE, Verb.RUN]
    ((instance, expires_at),) = web.launcher.instances.items()
    assert response.headers["X-Walkin-TTL"] == str(expires_at)
    assert response.headers["X-Walkin-Session"].startswith("wkn_")
    assert instance.version == 7


async def test_a_request_with_the_token_reaches_the_same_instance_and_gets_no_new_token(web):
    token = await web.token()
    response = await web.sql("SELECT 1", token)
    assert response.status == 200
    assert "X-Walkin-Session" not in response.headers
    assert response.headers["X-Walkin-TTL"] == str(next(iter(web.launcher.instances.values())))
    assert len(web.launcher.instances) == 1
    assert len({instance for verb, instance in web.launcher.verbs if verb is Verb.RUN}) == 1


async def test_a_script_without_a_result_set_answers_the_count_alone(web):
    web.launcher.script = replying(ok(affected=3))
    assert await (await web.sql("INSERT …")).json() == {"rows_affected": 3}


async def test_a_cut_result_says_so_and_a_whole_one_does_not(web):
    web.launcher.script = replying(ok(["n"], [[1]], truncated=True))
    assert (await (await web.sql()).json())["truncated"] is True
    web.launcher.script = replying(ok(["n"], [[1]]))
    assert "truncated" not in await (await web.sql()).json()


async def test_every_golden_value_passes_through_to_the_caller_unchanged(web):
    golden = (GOLDEN / "reply-every-value.json").read_bytes()
    web.launcher.script = replying(frame(golden))
    assert repr((await (await web.sql()).json())["rows"]) == repr(json.loads(golden)["rows"])


async def test_the_frame_carries_sql_arguments_and_integer_form(web):
    await web.sql("SELECT :a", args={"a": {"$blob": "AA=="}}, int64="string")
    assert web.launcher.requests == [{"v": 1, "sql": "SELECT :a", "args": {"a": {"$blob": "AA=="}}, "int64": "string"}]


async def test_a_body_without_a_content_type_and_one_with_a_charset_are_read(web):
    for kind in ('application/json; charset="UTF-8"', "Application/JSON;charset=utf-8", "application/json"):
        assert (await web.post(b'{"sql":"SELECT 1"}', {"Content-Type": kind})).status == 200
    head = b"POST /sql HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 18\r\n\r\n"
    assert (await web.raw(head + b'{"sql":"SELECT 1"}')).startswith(b"HTTP/1.1 200 ")


async def test_a_script_that_fails_still_leaves_its_caller_the_new_instance(web):
    web.launcher.script = replying(frame((GOLDEN / "reply-sql-error.json").read_bytes()))
    response = await web.sql("SELEC 1")
    body = await assert_error(response, "sql_error")
    assert body["error"] == 'invalid sql: near "SELEC": syntax error'
    web.launcher.script = replying(ok(["one"], [[1]]))
    assert (await web.sql("SELECT 1", response.headers["X-Walkin-Session"])).status == 200
    assert response.headers["X-Walkin-TTL"]
    assert web.launcher.count(Verb.REMOVE) == 0


async def test_tokens_that_are_no_good_are_all_answered_at_once_while_everybody_else_waits(tmp_path):
    async with gateway(tmp_path, slots=2, deadline_seconds=60.0) as web:
        expired, busy, other = [await web.token() for _ in range(3)]
        await until(lambda: held(web) == 0)
        gone, leased, _ = web.launcher.instances
        expire(web, gone)
        finish = asyncio.Event()
        web.launcher.script = replying_after(finish)
        runs = [asyncio.ensure_future(web.sql("SELECT 1", busy))]
        await until(lambda: web.launcher.running == 1)
        ends_at = web.launcher.instances[leased]
        expire(web, leased)
        await assert_error(await web.sql("SELECT 1", busy), "instance_not_found")  # a slot is free, the lease is not
        web.launcher.instances[leased] = ends_at
        runs += [asyncio.ensure_future(web.sql("SELECT 1", token)) for token in (other, busy, other)]
        await until(lambda: web.launcher.running == 2 and web.app[RUNS].leases.waiting == 2)
        for token in (expired, "wkn_no", expired):
            await assert_error(await web.sql("SELECT 1", token), "instance_not_found")
        assert (web.launcher.running, web.app[RUNS].leases.waiting) == (2, 2)
        finish.set()
        assert {(await run).status for run in runs} == {200}


# ── errors of the body, before any container starts ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"{", "invalid_json"),
        (b'{"sql":"SELECT 1","x":1}', "invalid_json"),
        (b'{"sql":"\xff"}', "invalid_json"),
        (b'{"args":' + b"[" * 500_000, "invalid_json"),
        (b"{}", "missing_sql"),
        (b'{"sql":7}', "missing_sql"),
        (b'{"sql":"SELECT ?","args":[[1]]}', "invalid_args"),
        (b'{"sql":"SELECT ?","args":[18446744073709551616]}', "invalid_args"),
    ],
)
async def test_a_faulty_body_is_refused_before_anything_is_asked_of_the_launcher(web, raw, code):
    body = await assert_error(await web.post(raw), code)
    assert body["hint"]
    assert web.launcher.verbs == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/jsonp"},
        {"Content-Encoding": "gzip"},
        {"Content-Encoding": "identity, br"},
    ],
)
async def test_a_body_that_is_declared_as_something_else_is_refused(web, headers):
    await assert_error(await web.post(b'{"sql":"SELECT 1"}', headers), "unsupported_media_type")


async def test_identity_is_no_coding(web):
    head = b"POST /sql HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Encoding: identity\r\nContent-Length: 18\r\n\r\n"
    assert (await web.raw(head + b'{"sql":"SELECT 1"}')).startswith(b"HTTP/1.1 200 ")


async def test_a_body_over_the_limit_is_refused_by_its_declared_length(tmp_path):
    async with gateway(tmp_path, max_body_bytes=2048) as web:
        answer = await web.raw(b"POST /sql HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2049\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413 ")
        await assert_error(await web.post(b" " * 2049), "body_too_large")


async def test_a_body_over_the_limit_is_refused_while_it_streams(tmp_path):
    async with gateway(tmp_path, max_body_bytes=2048) as web:

        async def chunks():
            for _ in range(1000):
                yield b" " * 100

        async with web.client.post(web.url + "/sql", data=chunks(), headers={"Content-Type": "application/json"}) as response:
            await assert_error(response, "body_too_large")


async def test_a_body_of_exactly_the_limit_is_read(tmp_path):
    async with gateway(tmp_path, max_body_bytes=2048) as web:
        assert (await web.post(b'{"sql":"SELECT 1"}'.ljust(2048))).status == 200


async def test_a_body_that_does_not_arrive_in_time_is_a_408(tmp_path):
    async with gateway(tmp_path, body_seconds=0.1) as web:
        answer = await web.raw(b"POST /sql HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"request_timeout"' in answer


async def test_a_broken_transfer_coding_is_a_400(web):
    answer = await web.raw(b"POST /sql HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n")
    assert answer.split()[1] == b"400", answer
    assert b'"code":"bad_request"' in answer


async def test_a_caller_that_asks_before_sending_is_told_to_continue_unless_too_large(web):
    reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
    writer.write(b"POST /sql HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: 18\r\n\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
    writer.write(b'{"sql":"SELECT 1"}')
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    answer = await web.raw(
        b"POST /sql HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: 99999999\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 413 ")


# ── tokens: one failure ──────────────────────────────────────────────────────────────────────────────────────────────


def without_date(response) -> tuple[int, list[tuple[str, str]]]:
    return response.status, [(name, value) for name, value in response.raw_headers if name.lower() != b"date"]


async def test_every_token_failure_is_the_same_answer_to_the_byte_and_one_question_to_the_launcher(tmp_path):
    async with gateway(tmp_path, rate_requests_per_minute=1000) as web:
        good = await web.token()
        never_made = web.app[TOKENS].issue(uuid7()).reveal()
        expired = await web.token()
        last = list(web.launcher.instances)[-1]
        del web.launcher.instances[last]
        flipped = good[:-2] + ("A" if good[-2] != "A" else "B") + good[-1]
        genuine = [never_made, expired]
        bad = [
            *genuine,
            flipped,
            "wkn_",
            "x",
            "",
            "wkn_" + "A" * 107,
            good + "=",
            good[:-1],
            "wkn_é" + good[5:],
            good * 40,
        ]
        answers = set()
        for token in bad:
            before = len(web.launcher.verbs)
            response = await web.sql("SELECT 1", token)
            await assert_error(response, "instance_not_found")
            answers.add((await response.text(), repr(without_date(response))))
            asked = web.launcher.verbs[before:]
            assert [verb for verb, _ in asked] == [Verb.RUN if token in genuine else Verb.FIND], token
            assert asked[0][1].version == 7
            assert asked[0][1] not in web.launcher.instances
        assert len(answers) == 1


async def test_an_expired_token_is_refused_before_any_container_starts(web):
    token = await web.token()
    web.launcher.instances.clear()
    response = await web.sql("SELECT 1", token)
    await assert_error(response, "instance_not_found")
    assert "X-Walkin-TTL" not in response.headers
    assert len(web.launcher.requests) == 1
    await until(lambda: held(web) == 0)


async def test_a_token_that_is_no_good_takes_no_slot(tmp_path):
    async with gateway(tmp_path, slots=1) as web:
        finish = asyncio.Event()
        token = await web.token()
        web.launcher.script = replying_after(finish)
        first = asyncio.ensure_future(web.sql("SELECT 1", token))
        await until(lambda: len(web.launcher.requests) == 2)
        await assert_error(await web.sql("SELECT 1", token[:-1]), "instance_not_found")
        finish.set()
        assert (await first).status == 200


def asked_by(web: Gateway) -> list[Verb]:
    return [verb for verb, _ in web.launcher.verbs]


@asynccontextmanager
async def crowded(web: Gateway) -> AsyncIterator[None]:
    """Its only slot is held."""
    finish, holder = asyncio.Event(), await web.token()
    web.launcher.script = replying_after(finish)
    begun = len(web.launcher.requests)
    holds = asyncio.ensure_future(web.sql("SELECT 1", holder))
    await until(lambda: len(web.launcher.requests) == begun + 1)
    yield
    finish.set()
    assert (await holds).status == 200


async def test_who_waits_is_asked_for_unless_a_run_has_told_that_its_instance_lives(tmp_path):
    async with gateway(tmp_path, slots=1) as web:
        known = await web.token()
        async with crowded(web):
            before = len(asked_by(web))
            waits = [asyncio.ensure_future(web.sql("SELECT 1", token)) for token in (known, web.unheard_of())]
            await until(lambda: len(asked_by(web)) == before + 1 and web.app[RUNS].leases.waiting == 2)
            assert asked_by(web)[before:] == [Verb.FIND]
        for answer in await asyncio.gather(*waits):
            assert answer.status == 200
            assert int(answer.headers["X-Walkin-TTL"]) > time.time()


async def test_a_wait_that_is_too_long_tells_when_the_instance_ends(tmp_path):
    async with gateway(tmp_path, slots=1, queue_timeout_seconds=0.05) as web:
        known = await web.token()
        async with crowded(web):
            for token in (known, web.unheard_of()):
                answer = await web.sql("SELECT 1", token)
                await assert_error(answer, "overloaded")
                assert int(answer.headers["X-Walkin-TTL"]) > time.time()


@pytest.mark.parametrize("how", ["deleted", "expired", "refused"])
async def test_an_instance_that_was_known_and_is_no_more_is_a_404_before_any_wait(tmp_path, how):
    async with gateway(tmp_path, slots=1) as web:
        token = await web.token()
        instance = web.app[TOKENS].resolve(Secret(token)).instance
        if how == "deleted":
            async with web.client.delete(web.url + "/session", headers={"X-Walkin-Session": token}) as answer:
                assert answer.status == 204
        elif how == "expired":
            expire(web, instance)
        else:
            del web.launcher.instances[instance]
            await assert_error(await web.sql("SELECT 1", token), "instance_not_found")
        async with crowded(web):
            await assert_error(await web.sql("SELECT 1", token), "instance_not_found")


async def test_a_token_sent_twice_is_a_token_failure(web):
    token = (await web.token()).encode()
    head = b"POST /sql HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 18\r\nX-Walkin-Session: " + token
    answer = await web.raw(head + b"\r\nX-Walkin-Session: " + token + b'\r\n\r\n{"sql":"SELECT 1"}')
    assert answer.startswith(b"HTTP/1.1 404 ")


async def test_an_instance_that_ends_while_its_request_waits_is_the_same_404(web):
    token = await web.token()
    web.launcher.refusals[Verb.RUN] = Status.UNKNOWN
    late = await web.sql("SELECT 1", token)
    unknown = await web.sql("SELECT 1", "wkn_no")
    await assert_error(late, "instance_not_found")
    assert without_date(late) == without_date(unknown)
    assert await late.text() == await unknown.text()


# ── what a run's end means ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("golden", "code", "text"),
    [
        ("reply-forbidden.json", "forbidden", "forbidden sql keyword: PRAGMA max_page_count"),
        ("reply-args-invalid.json", "invalid_args", "invalid args"),
        ("reply-too-complex.json", "too_complex", "invalid sql: statement too complex"),
        ("reply-timeout.json", "query_timeout", "query timeout"),
        ("reply-storage-full.json", "storage_limit", "instance storage limit exceeded"),
        ("reply-host-full.json", "host_storage_low", None),
        ("reply-memory-limit.json", "memory_limit", "invalid sql: out of memory"),
        ("reply-damaged.json", "database_damaged", "invalid sql: database disk image is malformed"),
        ("reply-request-invalid.json", "internal_error", None),
        ("reply-internal.json", "internal_error", None),
        ("reply-unconfined.json", "internal_error", None),
        ("reply-invalid-unknown-key.json", "reply_invalid", None),
    ],
)
async def test_every_verdict_is_its_documented_error(web, golden, code, text):
    token = await web.token()
    web.launcher.script = replying(frame((GOLDEN / golden).read_bytes()))
    response = await web.sql("SELECT 1", token)
    body = await assert_error(response, code)
    assert text is None or body["error"] == text
    assert "X-Walkin-TTL" in response.headers
    assert "X-Walkin-Session" not in response.headers
    await until(lambda: held(web) == 0)


async def test_arguments_that_do_not_fit_are_explained(web):
    web.launcher.script = replying(frame((GOLDEN / "reply-args-invalid.json").read_bytes()))
    body = await assert_error(await web.sql(), "invalid_args")
    assert body["hint"] == "2 values given, the statements take 1"


@pytest.mark.parametrize(
    ("verdict", "code"),
    [
        (Verdict.DEADLINE, "query_timeout"),
        (Verdict.OUT_OF_MEMORY, "memory_limit"),
        (Verdict.SIGNALLED, "runner_failed"),
        (Verdict.EXITED, "runner_failed"),
        (Verdict.LOST, "engine_unavailable"),
    ],
)
async def test_a_container_that_ends_without_a_reply_is_judged_by_the_launchers_verdict(web, verdict, code):
    token = await web.token()
    web.launcher.script = replying(b"", verdict)
    await assert_error(await web.sql("SELECT 1", token), code)
    await until(lambda: held(web) == 0)


@pytest.mark.parametrize(
    "stream",
    [b"\0", frame(b"{}") * 2, frame(b"{}") + b"x", frame(b"[]"), b"\xff\xff\xff\xff", ok(["a", "b"], [[1]]), ok(["a"], [[True]])],
)
async def test_a_reply_that_is_not_exactly_one_documented_frame_is_a_500(web, stream):
    token = await web.token()
    web.launcher.script = replying(stream)
    await assert_error(await web.sql("SELECT 1", token), "reply_invalid")
    await until(lambda: held(web) == 0)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (Status.ENGINE_DOWN, "engine_unavailable"),
        (Status.IMAGE_MISSING, "image_missing"),
        (Status.BUSY, "overloaded"),
        (Status.FAILED, "internal_error"),
    ],
)
async def test_a_run_that_the_launcher_refuses_is_its_documented_error(web, status, code):
    token = await web.token()
    web.launcher.refusals[Verb.RUN] = status
    await assert_error(await web.sql("SELECT 1", token), code)
    assert held(web) == 0


async def test_a_create_below_the_low_water_mark_is_refused_with_a_time_to_retry(web):
    web.launcher.refusals[Verb.CREATE] = Status.STORAGE_LOW
    await assert_error(await web.sql(), "host_storage_low")
    assert web.launcher.count(Verb.RUN) == 0


async def test_a_new_instance_whose_first_run_fails_by_our_fault_is_removed_and_no_token_is_given(web):
    web.launcher.script = replying(b"", Verdict.SIGNALLED)
    response = await web.sql()
    await assert_error(response, "runner_failed")
    assert "X-Walkin-Session" not in response.headers
    assert "X-Walkin-TTL" not in response.headers
    await until(lambda: web.launcher.count(Verb.REMOVE) == 1)
    assert web.launcher.instances == {}


async def test_the_end_of_an_instance_is_asked_for_once(web):
    asked = []

    async def watching(run: FakeRun) -> None:
        asked.append(not run.quiet)
        await replying(ok(["a"], [[1]]))(run)

    web.launcher.script = watching
    made, token = await web.token(), web.unheard_of()
    ends = {(await web.sql("SELECT 1", token)).headers["X-Walkin-TTL"] for _ in range(2)}
    assert ends == {str(list(web.launcher.instances.values())[1])}
    assert (await web.sql("SELECT 1", made)).headers["X-Walkin-TTL"] == str(next(iter(web.launcher.instances.values())))
    assert asked == [False, True, False, False]


async def test_a_runner_that_never_answers_is_a_408_after_the_deadline(web):
    async def mute(run: FakeRun) -> None:
        run.started()
        await run.hung_up()
        run.ended(Verdict.CANCELLED)

    token = web.unheard_of()
    web.launcher.script = mute
    began = time.monotonic()
    await assert_error(await web.sql("SELECT 1", token), "query_timeout")
    assert 1.2 < time.monotonic() - began < 5
    await until(lambda: held(web) == 0)


async def test_a_runner_that_answers_and_does_not_end_keeps_nobody_waiting_and_keeps_its_lease(web):
    async def lingering(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await run.send(ok(["a"], [[1]]))
        await run.hung_up()
        await until(lambda: answered)
        run.ended(Verdict.CANCELLED)

    token = await web.token()
    await until(lambda: held(web) == 0)
    web.launcher.script, answered = lingering, []
    response = await web.sql("SELECT 1", token)
    assert response.status == 200
    assert held(web) == 1
    answered.append(response)
    await until(lambda: held(web) == 0)


async def test_a_launcher_that_says_nothing_of_a_run_is_a_503_in_time(web):
    async def never(run: FakeRun) -> None:
        await run.hung_up()
        run.refused(Status.FAILED)

    token = await web.token()
    web.launcher.script = never
    await assert_error(await web.sql("SELECT 1", token), "launcher_unavailable")
    await until(lambda: held(web) == 0)


async def test_a_launcher_that_was_silent_is_asked_before_anybody_waits_for_it(web, monkeypatch):
    monkeypatch.setattr("gateway.web.launcher._ANSWER_SECONDS", 0.05)
    token = await web.token()
    await until(lambda: held(web) == 0)
    web.launcher.silent = {Verb.RUN, Verb.FIND}
    await assert_error(await web.sql("SELECT 1", token), "launcher_unavailable")
    assert held(web) == 1
    await assert_error(await web.sql("SELECT 1", token), "launcher_unavailable")
    web.launcher.silent = set()
    other = await web.token()
    assert (await web.sql("SELECT 1", other)).status == 200
    assert [verb.name for verb, _ in web.launcher.verbs] == ["CREATE", "RUN", "RUN", "FIND", "CREATE", "RUN", "RUN"]
    web.launcher.drop_connections()
    await until(lambda: held(web) == 0)


# ── frames and hang-ups ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_frame_is_in_the_socket_before_the_container_has_started(web):
    async def late(run: FakeRun) -> None:
        await run.read_request()
        run.started()
        await run.send(ok(["a"], [[1]]))
        run.ended()

    token = await web.token()
    web.launcher.script = late
    assert (await web.sql("SELECT 'early'", token)).status == 200
    assert web.launcher.requests[-1]["sql"] == "SELECT 'early'"


async def test_a_reply_that_overtakes_the_word_of_its_start_waits_for_it(web):
    start = asyncio.Event()

    async def overtaking(run: FakeRun) -> None:
        await run.read_request()
        await run.send(ok(["a"], [[1]]))
        run.stream.close()
        await start.wait()
        run.started()
        run.ended()

    token = web.unheard_of()
    web.launcher.script = overtaking
    request = asyncio.ensure_future(web.sql("SELECT 1", token))
    await until(lambda: len(web.launcher.requests) == 1)
    for _ in range(100):
        await asyncio.sleep(0)
    assert not request.done()
    start.set()
    response = await request
    assert response.status == 200
    assert response.headers["X-Walkin-TTL"] == str(next(iter(web.launcher.instances.values())))


async def test_a_frame_that_no_socket_holds_arrives_whole(tmp_path):
    async with gateway(tmp_path, deadline_seconds=60.0) as web:
        await web.token()
        sql = "SELECT '" + "x" * 900_000 + "'"
        assert (await web.sql(sql)).status == 200
        assert web.launcher.requests[-1]["sql"] == sql


async def test_an_ordinary_run_shows_the_launcher_no_hang_up_before_it_has_ended(web):
    seen, answered = [], asyncio.Event()

    async def watching(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await run.send(frame({"v": 1, "verdict": "sql_error", "message": "x"}))
        await answered.wait()
        seen.append(run.sees_a_hang_up())
        run.launcher.broadcast(Reply(Status.ENDED, run.sequence).pack())
        await run.hung_up()

    token = await web.token()
    web.launcher.script = watching
    await assert_error(await web.sql("SELECT 1", token), "sql_error")
    answered.set()
    await until(lambda: held(web) == 0)
    assert seen == [False]
    await until(lambda: web.launcher.running == 0)


async def test_a_runner_whose_reply_is_invalid_is_hung_up_on_at_once(tmp_path):
    # A deadline beyond the test: only the reply itself can end this run.
    async with gateway(tmp_path, deadline_seconds=60.0) as web:

        async def lying(run: FakeRun) -> None:
            run.started()
            await run.read_request()
            await run.send(frame(b"{}"))
            await run.hung_up()
            run.ended(Verdict.CANCELLED)

        token = await web.token()
        web.launcher.script = lying
        await assert_error(await web.sql("SELECT 1", token), "reply_invalid")
        await until(lambda: held(web) == 0)


# ── leases, slots, hang-ups ──────────────────────────────────────────────────────────────────────────────────────────


async def test_the_answer_is_sent_before_and_the_lease_is_free_after_the_container_is_gone(web):
    gone = asyncio.Event()
    token = await web.token()
    await until(lambda: held(web) == 0)
    web.launcher.script = ending_after(gone)
    assert (await web.sql("SELECT 1", token)).status == 200
    assert held(web) == 1
    second = asyncio.ensure_future(web.sql("SELECT 2", token))
    await until(lambda: web.app[RUNS].leases.waiting == 1)
    assert web.launcher.count(Verb.RUN) == 2
    gone.set()
    assert (await second).status == 200
    await until(lambda: held(web) == 0)


async def test_requests_of_one_instance_never_overlap_and_keep_their_order(web):
    token = await web.token()
    web.launcher.most_running = 0
    requests = [asyncio.ensure_future(web.sql(f"SELECT {number}", token)) for number in range(12)]
    assert {(await request).status for request in requests} == {200}
    assert web.launcher.most_running == 1


async def test_no_more_containers_run_at_once_than_there_are_slots(tmp_path):
    async with gateway(tmp_path, slots=3) as web:
        responses = await asyncio.gather(*(web.sql() for _ in range(20)))
        assert {response.status for response in responses} == {200}
        assert web.launcher.most_running <= 3
        assert len(web.launcher.instances) == 20


async def test_a_request_that_waits_holds_room_for_its_frame_and_no_longer_for_its_body(tmp_path):
    async with gateway(tmp_path, slots=1, deadline_seconds=60.0) as web:
        token, finish = await web.token(), asyncio.Event()
        web.launcher.script = replying_after(finish)
        requests = [
            asyncio.ensure_future(web.post(b'{"sql":"SELECT 1"}'.ljust(500_000), {"X-Walkin-Session": token})) for _ in range(3)
        ]
        await until(lambda: web.app[RUNS].leases.waiting == 2)
        assert 0 < web.app[ROOM].held("127.0.0.1") < 1000
        finish.set()
        assert {(await request).status for request in requests} == {200}
        assert web.app[ROOM].held("127.0.0.1") == 0


async def test_a_full_queue_is_a_503_with_a_time_to_retry(tmp_path):
    async with gateway(tmp_path, slots=1, queue_length=0) as web:
        finish = asyncio.Event()
        web.launcher.script = replying_after(finish)
        first = asyncio.ensure_future(web.sql())
        await until(lambda: len(web.launcher.requests) == 1)
        await assert_error(await web.sql(), "overloaded")
        finish.set()
        assert (await first).status == 200


async def test_a_caller_that_hangs_up_closes_the_runners_socket_and_frees_everything(tmp_path):
    # A deadline beyond the test: only the hang-up can end this run.
    async with gateway(tmp_path, deadline_seconds=60.0) as web:
        closed = asyncio.Event()

        async def busy(run: FakeRun) -> None:
            run.started()
            await run.read_request()
            await run.hung_up()
            closed.set()
            run.ended(Verdict.CANCELLED)

        token = await web.token()
        web.launcher.script = busy
        request = asyncio.ensure_future(web.sql("SELECT 1", token))
        await until(lambda: len(web.launcher.requests) == 2)
        request.cancel()
        await asyncio.wait_for(closed.wait(), 5)
        await until(lambda: held(web) == 0)
        web.launcher.script = replying(ok(["a"], [[1]]))
        assert (await web.sql("SELECT 1", token)).status == 200


async def test_a_caller_that_hangs_up_while_it_waits_leaves_the_queue(tmp_path):
    async with gateway(tmp_path, slots=1) as web:
        finish = asyncio.Event()
        web.launcher.script = replying_after(finish)
        first = asyncio.ensure_future(web.sql())
        await until(lambda: len(web.launcher.requests) == 1)
        second = asyncio.ensure_future(web.sql())
        await until(lambda: web.app[RUNS].leases.waiting == 1)
        second.cancel()
        await until(lambda: web.app[RUNS].leases.waiting == 0)
        finish.set()
        assert (await first).status == 200
        assert [verb for verb, _ in web.launcher.verbs] == [Verb.CREATE, Verb.RUN]
        await until(lambda: held(web) == 0)


async def test_an_instance_whose_maker_hung_up_is_removed_once_its_container_is_gone(tmp_path):
    async with gateway(tmp_path, deadline_seconds=60.0) as web:

        async def busy(run: FakeRun) -> None:
            run.started()
            await run.hung_up()
            assert run.launcher.count(Verb.REMOVE) == 0
            run.ended(Verdict.CANCELLED)

        web.launcher.script = busy
        request = asyncio.ensure_future(web.sql())
        await until(lambda: web.launcher.count(Verb.RUN) == 1)
        request.cancel()
        await until(lambda: web.launcher.count(Verb.REMOVE) == 1)
        assert web.launcher.instances == {}


async def test_fifty_requests_leave_no_descriptor_and_no_task_behind(web):
    import os

    token = await web.token()
    await until(lambda: held(web) == 0)
    before, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
    for number in range(50):
        web.launcher.script = replying(ok(["a"], [[number]]) if number % 3 else b"\0")
        await web.sql("SELECT 1", token)
    await until(lambda: held(web) == 0)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert len(asyncio.all_tasks()) <= tasks


# ── rates ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_request_limit_answers_429_and_every_answer_shows_where_the_caller_stands(tmp_path):
    async with gateway(tmp_path, rate_requests_per_minute=3) as web:
        token = await web.token()
        response = await web.sql("SELECT 1", token)
        assert (response.headers["RateLimit-Limit"], response.headers["RateLimit-Remaining"]) == ("3", "1")
        assert 0 < int(response.headers["RateLimit-Reset"]) <= 60
        await web.sql("SELECT 1", token)
        refused = await web.sql("SELECT 1", token)
        await assert_error(refused, "rate_limited")
        assert refused.headers["RateLimit-Remaining"] == "0"
        assert refused.headers["Retry-After"] == refused.headers["RateLimit-Reset"]
        assert web.launcher.count(Verb.RUN) == 3


async def test_the_limit_of_creates_leaves_old_instances_alone(tmp_path):
    async with gateway(tmp_path, rate_creates_per_minute=1) as web:
        token = await web.token()
        await assert_error(await web.sql(), "rate_limited")
        assert (await web.sql("SELECT 1", token)).status == 200
        assert web.launcher.count(Verb.CREATE) == 1


async def test_a_faulty_body_does_not_count_as_a_new_instance(tmp_path):
    async with gateway(tmp_path, rate_creates_per_minute=1) as web:
        await assert_error(await web.post(b"{"), "invalid_json")
        assert (await web.sql()).status == 200


async def test_health_is_not_limited(tmp_path):
    async with gateway(tmp_path, rate_requests_per_minute=1) as web:
        assert {(await web.get("/healthz")).status for _ in range(5)} == {200}


# ── the launcher ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_without_a_launcher_every_request_is_a_503_at_once_and_heals_by_itself(web):
    token = await web.token()
    await until(lambda: held(web) == 0)
    await web.launcher.stop()
    for response in (await web.sql(), await web.sql("SELECT 1", token), await web.sql("SELECT 1", "wkn_no")):
        await assert_error(response, "launcher_unavailable")
    await web.launcher.start()
    assert (await web.sql("SELECT 1", token)).status == 200


async def test_a_connection_that_is_lost_fails_the_request_that_runs_on_it(web):
    async def busy(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        run.launcher.drop_connections()
        await run.hung_up()

    token = await web.token()
    web.launcher.script = busy
    began = time.monotonic()
    await assert_error(await web.sql("SELECT 1", token), "launcher_unavailable")
    assert time.monotonic() - began < 1
    await until(lambda: held(web) == 0)
    web.launcher.script = replying(ok(["a"], [[1]]))
    assert (await web.sql("SELECT 1", token)).status == 200


# ── health, documents, CORS, hygiene ─────────────────────────────────────────────────────────────────────────────────


async def test_health_tells_what_is_public_of_the_launchers_report_and_asks_once_a_second(web):
    response = await web.get("/healthz")
    body = await response.json()
    assert (response.status, body["status"], body["version"], body["engine"]) == (200, "ok", "0.1.0", "docker")
    assert body["separation"] is False
    assert body["instances"] == 0
    assert body["runner"]["landlock_abi"] is None
    assert "secret_path" not in body
    for _ in range(5):
        await web.get("/healthz")
    assert web.launcher.health_asked == 1


async def test_health_is_a_503_with_a_reason_when_nothing_could_run(tmp_path):
    async with gateway(tmp_path) as web:
        web.launcher.health = {"daemon": "down", "trouble": "operator: /secret"}
        response = await web.get("/healthz")
        body = await response.json()
        assert (response.status, body["status"], body["reason"]) == (503, "unavailable", "engine_unavailable")
        assert "secret" not in str(body)
    async with gateway(tmp_path) as web:
        await web.launcher.stop()
        response = await web.get("/healthz")
        assert (response.status, (await response.json())["reason"]) == (503, "launcher_unavailable")


async def test_liveness_asks_nobody_and_readiness_is_health_in_short(tmp_path):
    async with gateway(tmp_path) as web:
        for path, status in (("/livez", 200), ("/readyz", 200)):
            response = await web.get(path)
            assert (response.status, await response.json()) == (status, {"status": "ok"})
        assert web.launcher.health_asked == 1
        begun = asyncio.ensure_future(web.app[DRAIN].begin(10))
        await until(lambda: web.app[DRAIN].draining)
        assert (await web.get("/livez")).status == 200
        response = await web.get("/readyz")
        assert (response.status, await response.json()) == (503, {"status": "unavailable", "reason": "shutting_down"})
        assert await begun
    async with gateway(tmp_path) as web:
        await web.launcher.stop()
        assert (await web.get("/livez")).status == 200
        response = await web.get("/readyz")
        assert (response.status, await response.json()) == (503, {"status": "unavailable", "reason": "launcher_unavailable"})


async def test_a_launcher_that_is_away_is_asked_and_told_of_no_more_often_because_many_ask(web, caplog):
    await web.launcher.stop()
    answers = await asyncio.gather(*(web.get("/healthz") for _ in range(50)))
    assert {answer.status for answer in answers} == {503}
    assert caplog.text.count("not ready: ") == 1


async def test_unknown_paths_and_methods_have_the_same_envelope(web):
    for path in ("/", "/sql/", "/SQL", "/healthz/x", "/../etc/passwd", "/%00"):
        await assert_error(await web.get(path), "not_found")
    response = await web.get("/sql")
    await assert_error(response, "method_not_allowed")
    assert response.headers["Allow"] == "OPTIONS, POST"
    async with web.client.delete(web.url + "/healthz") as response:
        await assert_error(response, "method_not_allowed")
        assert response.headers["Allow"] == "GET, HEAD, OPTIONS"


async def test_cors_is_open_to_every_origin_without_credentials(web):
    async with web.client.options(
        web.url + "/sql",
        headers={
            "Origin": "https://example.org",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "x-walkin-session",
        },
    ) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        allowed = {name.strip().lower() for name in response.headers["Access-Control-Allow-Headers"].split(",")}
        assert {"content-type", "x-walkin-session"} <= allowed
        assert "Access-Control-Allow-Credentials" not in response.headers
    response = await web.sql()
    exposed = {name.strip() for name in response.headers["Access-Control-Expose-Headers"].split(",")}
    assert exposed == {
        "X-Walkin-Session",
        "X-Walkin-TTL",
        "RateLimit-Limit",
        "RateLimit-Remaining",
        "RateLimit-Reset",
        "Retry-After",
        "X-Request-ID",
        "ETag",
        "Accept-Ranges",
        "Content-Range",
        "Content-Disposition",
        "Idempotent-Replayed",
    }


async def test_every_answer_has_the_security_headers_and_names_no_server(web):
    answers = [await web.sql(), await web.get("/healthz"), await web.get("/openapi.json"), await web.get("/nothing")]
    for response in answers:
        assert "Server" not in response.headers
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert response.headers["X-Request-ID"]
    assert len({response.headers["X-Request-ID"] for response in answers}) == len(answers)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /sql HTTP/1.1\r\nHost: x\r\nX-Walkin-Session wkn_canary\r\n\r\n",
        b"POST /sql HTTP/1.1\r\nHost: x\r\nX-Walkin-Session: wkn_canary\x00\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: wkn_canary" + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: wkn_canary\r\n" * 200 + b"\r\n",
    ],
)
async def test_what_is_not_http_gets_the_envelope_and_is_not_quoted_in_the_log(web, caplog, sent):
    with caplog.at_level(logging.DEBUG):
        answer = await web.raw(sent)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 ")), answer
    assert json.loads(body)["code"] == "bad_request"
    assert b"\r\nserver:" not in head.lower()
    for name, value in COMMON_HEADERS.items():
        assert f"\r\n{name}: {value}".encode() in head
    assert b"canary" not in answer
    assert "canary" not in caplog.text


async def test_a_defect_of_ours_is_a_500_that_tells_only_its_id(web, caplog, monkeypatch):
    async def broken(*_: object, **__: object) -> int:
        raise KeyError("canary of the inside")

    monkeypatch.setattr("gateway.web.launcher.Launcher.create", broken)
    response = await web.sql()
    body = await assert_error(response, "internal_error")
    assert body["request_id"] in {getattr(record, "request_id", None) for record in caplog.records}
    assert "KeyError" in caplog.text
    assert "canary" not in caplog.text + str(body)


async def test_no_token_sql_argument_row_or_column_reaches_any_log(web, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        web.launcher.script = replying(ok(["canarycolumn"], [["canaryrow"]]))
        token = await web.token()
        for script in (
            replying(ok(["canarycolumn"], [["canaryrow", 2]])),
            replying(frame({"v": 1, "verdict": "sql_error", "message": "canarymessage"})),
            replying(frame({"v": 1, "verdict": "internal", "message": "canary message"})),
            replying(b"canary"),
            replying(b"", Verdict.SIGNALLED),
        ):
            web.launcher.script = script
            await web.sql("SELECT canarysql", token, args=["canaryargument"])
        await web.sql("SELECT canarysql", "wkn_canarytoken")
        await web.post(b'{"sql":"canarysql","canaryfield":1}')
        await web.app[ACCESS_LOG].flush()
    logs = caplog.text + "".join(path.read_text() for path in (tmp_path / "log").iterdir())
    assert "canary" not in logs
    assert token not in logs
    assert "reply_invalid" in logs


# ── access log and stopping ──────────────────────────────────────────────────────────────────────────────────────────


async def test_every_request_is_one_line_of_seven_fields(web, tmp_path):
    token = await web.token()
    await web.sql("SELECT 'é'", token)
    await web.sql("SELECT 1", "wkn_no")
    await web.get("/healthz")
    await web.get("/nothing")
    await web.app[ACCESS_LOG].flush()
    (path,) = (tmp_path / "log").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    with_instance = {"timestamp", "source_ip", "instance_id", "http_method", "http_status", "sql_byte_length", "user_agent"}
    assert [set(line) for line in lines] == [with_instance] * 2 + [with_instance - {"instance_id"}] * 3
    assert [line["http_status"] for line in lines] == [200, 200, 404, 200, 404]
    assert [line["sql_byte_length"] for line in lines] == [8, 11, 8, 0, 0]
    assert {line["source_ip"] for line in lines} == {"127.0.0.1"}
    assert uuid.UUID(lines[0]["instance_id"]) in web.launcher.instances


async def test_a_caller_that_hung_up_is_logged_as_499(web, tmp_path):
    async def busy(run: FakeRun) -> None:
        run.started()
        await run.hung_up()
        run.ended(Verdict.CANCELLED)

    token = await web.token()
    web.launcher.script = busy
    request = asyncio.ensure_future(web.sql("SELECT 1", token))
    await until(lambda: web.launcher.count(Verb.RUN) == 2)
    request.cancel()
    await until(lambda: held(web) == 0)
    await web.app[ACCESS_LOG].flush()
    (path,) = (tmp_path / "log").iterdir()
    assert [json.loads(line)["http_status"] for line in path.read_text().splitlines()] == [200, 499]


async def test_a_request_that_is_not_let_in_is_not_waited_for(web):
    async with web.client.post(web.url + "/fork") as answer:
        assert (answer.status, (await answer.json())["code"]) == (400, "bad_parameter")
    assert await web.app[DRAIN].begin(1.0)


async def test_stopping_finishes_what_runs_and_refuses_what_comes(web):
    finish = asyncio.Event()
    token = await web.token()
    web.launcher.script = replying_after(finish)
    running = asyncio.ensure_future(web.sql("SELECT 1", token))
    await until(lambda: len(web.launcher.requests) == 2)
    draining = asyncio.ensure_future(web.app[DRAIN].begin(10))
    await until(lambda: web.app[DRAIN].draining)
    await assert_error(await web.sql("SELECT 1", token), "shutting_down")
    health = await web.get("/healthz")
    assert (health.status, (await health.json())["reason"]) == (503, "shutting_down")
    finish.set()
    assert (await running).status == 200
    assert await draining is True
