"""What a token is good for on every route: full, read-only, or no good; and fork, share, extend and end."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from multidict import CIMultiDict

from gateway.protocol import Status, Verb
from gateway.uuid7 import uuid7
from gateway.web.appkeys import ANSWERS, DRAIN, REPLAYS, ROOM, RUNS, TOKENS
from gateway.web.routes import ROUTES

from .calling import OF_INSTANCES, call
from .fake_launcher import (
    answering,
    assert_error,
    file_reply,
    gateway,
    ok,
    replying_after,
    report,
    rows_reply,
    until,
    verdict,
)

SCHEMA = {"tables": [], "indexes": [], "views": [], "triggers": [], "page_bytes": 4096, "used_bytes": 0, "free_bytes": 1 << 20}
STEP = {"columns": ["a"], "rows": [[1]], "rows_affected": 0, "truncated": False, "skipped": False}
WELL = {
    "": ok(["a"], [[1]]),
    "rows": rows_reply(["a"], [[1]]),
    "batch": verdict("batch", results=[STEP]),
    "schema": verdict("schema", **SCHEMA),
    "export": file_reply(b"SQLite"),
    "import": verdict("imported", table="t", created=True, columns=[["a", "INTEGER"]], rows=1),
    "accept": verdict("accepted", size=4096, sha256="0" * 64, converted=[]),
    "verify": verdict("report", report=report()),
}


@pytest.fixture
async def web(tmp_path):
    async with gateway(tmp_path) as web:
        web.launcher.script = answering(WELL)
        yield web
        await until(lambda: web.app[RUNS].leases.held == 0)
        assert (web.app[ROOM].held("127.0.0.1"), web.app[ANSWERS].held("127.0.0.1")) == (0, 0)


async def shared(web, token: str) -> str:
    response = await call(web, "POST", "/share", token)
    assert response.status == 200
    body = await response.json()
    assert body["access"] == "read-only"
    return body["session"]


def without_date(response) -> tuple[int, str]:
    headers = [(name, value) for name, value in response.raw_headers if name.lower() != b"date"]
    return response.status, repr(headers)


# ── one failure


def test_every_route_that_takes_a_session_is_called_below():
    of_instances = {(route.method, route.path) for route in ROUTES if "X-Walkin-Session" in route.headers}
    called = {(request.method, request.path.partition("?")[0]) for request in OF_INSTANCES}
    assert of_instances - called == {("HEAD", "/schema")}


@pytest.mark.parametrize("request_", OF_INSTANCES, ids=lambda request: request.name)
async def test_W8_a_token_that_is_no_good_is_the_same_404_after_the_same_work_on_every_route(web, request_):
    good = await web.token()
    gone = web.app[TOKENS].issue(uuid7()).reveal()
    gone_read_only = web.app[TOKENS].issue(uuid7(), "read-only").reveal()
    reference = await web.sql("SELECT 1", "wkn_no")
    answers, bodies = {without_date(reference)}, {await reference.text()}
    for token in ("wkn_no", "", good[:-1], "wkn_" + "A" * 107, gone, gone_read_only):
        before, containers = len(web.launcher.verbs), len(web.launcher.requests)
        response = await request_(web, token)
        if request_.method != "HEAD":
            await assert_error(response, "instance_not_found")
            bodies.add(await response.text())
        answers.add(without_date(response))
        (asked,) = web.launcher.verbs[before:]
        assert asked[0] in ((Verb.FIND, Verb.RUN) if token in (gone, gone_read_only) else (Verb.FIND,))
        assert asked[1] not in web.launcher.instances
        assert len(web.launcher.requests) == containers
    assert len(answers) == 1
    assert len(bodies) == 1


@pytest.mark.parametrize("request_", OF_INSTANCES, ids=lambda request: request.name)
async def test_a_read_only_token_is_refused_what_writes_before_any_container_starts_and_reads_the_rest(web, request_):
    token = await web.token()
    read_only = await shared(web, token)
    containers = len(web.launcher.runs)
    response = await request_(web, read_only)
    if request_.writes:
        await assert_error(response, "read_only")
        assert len(web.launcher.runs) == containers
        assert "X-Walkin-Session" not in response.headers
    else:
        assert response.status in (200, 201), await response.text()
        assert all(run.read_only for run in web.launcher.runs[containers:])
    assert (await request_(web, token)).status in (200, 201, 204)


async def test_a_route_that_needs_a_session_says_so_without_one(web):
    for request in OF_INSTANCES:
        response = await request(web, None)
        if request.path.startswith(("/sql", "/batch", "/import")) or request.method == "PUT":
            assert response.headers["X-Walkin-Session"]
        elif request.method != "HEAD":
            body = await assert_error(response, "bad_parameter")
            assert "X-Walkin-Session" in body["error"]


@pytest.mark.parametrize("request_", OF_INSTANCES, ids=lambda request: request.name)
async def test_an_unknown_parameter_is_refused_on_every_new_route(web, request_):
    if request_.path == "/sql":
        return
    token = await web.token()
    verbs = len(web.launcher.verbs)
    joint = "&" if "?" in request_.path else "?"
    response = await request_._replace(path=request_.path + joint + "x=1")(web, token)
    assert response.status == 400
    assert len(web.launcher.verbs) == verbs


@pytest.mark.parametrize("request_", OF_INSTANCES, ids=lambda request: request.name)
async def test_a_token_sent_twice_is_no_good_on_any_route(web, request_):
    token = await web.token()
    headers = CIMultiDict({**request_.headers, "X-Walkin-Session": token})
    headers.add("X-Walkin-Session", token)
    containers = len(web.launcher.runs)
    response = await request_._replace(headers=headers)(web, None)
    assert response.status == 404
    assert len(web.launcher.runs) == containers


# ── share


async def test_a_shared_token_reads_sql_in_a_read_only_container_and_cannot_be_shared_on(web):
    token = await web.token()
    read_only = await shared(web, token)
    assert len(read_only) == len(token)
    assert (await web.sql("SELECT 1", read_only)).status == 200
    assert [run.read_only for run in web.launcher.runs] == [False, True]
    web.launcher.script = answering({"": verdict("sql_error", message="attempt to write a readonly database")})
    body = await assert_error(await web.sql("DELETE FROM t", read_only), "sql_error")
    assert body["error"] == "invalid sql: attempt to write a readonly database"
    await assert_error(await call(web, "POST", "/share", read_only), "read_only")


# ── fork


async def test_a_fork_is_a_new_instance_of_the_callers_that_counts_as_a_create(tmp_path):
    async with gateway(tmp_path, rate_creates_per_minute=2) as web:
        token = await web.token()
        (source,) = web.launcher.instances
        response = await call(web, "POST", "/fork", token)
        assert (response.status, await response.json()) == (201, {})
        (copy,) = set(web.launcher.instances) - {source}
        forked = response.headers["X-Walkin-Session"]
        assert response.headers["X-Walkin-TTL"] == str(web.launcher.instances[copy])
        assert web.launcher.owners[0] == web.launcher.owners[1] != bytes(16)
        assert (await web.sql("SELECT 1", forked)).status == 200
        assert web.launcher.verbs[-1] == (Verb.RUN, copy)
        await assert_error(await call(web, "POST", "/fork", token), "rate_limited")


async def test_a_fork_that_the_launcher_refuses_hands_out_nothing(web):
    token = await web.token()
    for status, code in ((Status.OWNER_FULL, "too_many_instances"), (Status.HOST_FULL, "host_full"), (Status.BUSY, "overloaded")):
        web.launcher.refusals[Verb.FORK] = status
        response = await call(web, "POST", "/fork", token)
        await assert_error(response, code)
        assert "X-Walkin-Session" not in response.headers


async def test_a_fork_waits_for_the_requests_before_it(tmp_path):
    async with gateway(tmp_path, deadline_seconds=60.0) as web:
        token, finish = await web.token(), asyncio.Event()
        web.launcher.script = replying_after(finish)
        running = asyncio.ensure_future(web.sql("SELECT 1", token))
        await until(lambda: web.launcher.running == 1)
        forking = asyncio.ensure_future(call(web, "POST", "/fork", token))
        await until(lambda: web.app[RUNS].leases.waiting == 1)
        assert web.launcher.count(Verb.FORK) == 0
        finish.set()
        assert [(await running).status, (await forking).status] == [200, 201]


# ── extend


async def test_an_instance_is_extended_as_far_as_the_launcher_lets_it_and_every_later_answer_knows(web):
    token = await web.token()
    now = int(time.time())
    (instance,) = web.launcher.instances
    web.launcher.latest_end = now + 1000
    for wished, expected in ((900, 900), (5000, 1000), (5, 1000)):
        response = await call(web, "POST", "/extend", token, json.dumps({"seconds": wished}).encode())
        end = (await response.json())["expires_at"]
        assert response.headers["X-Walkin-TTL"] == str(end)
        assert now + expected <= end <= now + expected + 5
        assert web.launcher.instances[instance] == end
        keyed = await call(web, "POST", "/sql", token, b'{"sql":"A"}', {"Idempotency-Key": "k"})
        assert keyed.headers["X-Walkin-TTL"] == str(end)
        assert web.app[REPLAYS]._instances[instance].expires_at == end


async def test_extending_without_a_body_asks_for_one_more_life(tmp_path):
    async with gateway(tmp_path, ttl_seconds=700) as web:
        token = await web.token()
        for body in (None, b"{}", b'{"seconds":null}'):
            response = await call(web, "POST", "/extend", token, body)
            assert abs((await response.json())["expires_at"] - time.time() - 700) < 5
        form = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl says of no body
        assert (await call(web, "POST", "/extend", token, b"", form)).status == 200
        await assert_error(await call(web, "POST", "/extend", token, b"{}", form), "unsupported_media_type")


@pytest.mark.parametrize(
    "raw",
    [
        b"[]",
        b'{"seconds":0}',
        b'{"seconds":-1}',
        b'{"seconds":1.5}',
        b'{"seconds":"1"}',
        b'{"x":1}',
        b"{",
        b'{"seconds":1000000001}',
        b"\xff",
    ],
)
async def test_an_extension_that_is_none_is_refused_before_the_launcher_is_asked(web, raw):
    token = await web.token()
    verbs = len(web.launcher.verbs)
    await assert_error(await call(web, "POST", "/extend", token, raw), "invalid_json")
    assert len(web.launcher.verbs) == verbs


async def test_extending_can_be_switched_off(web):
    token = await web.token()
    web.launcher.refusals[Verb.EXTEND] = Status.OFF
    await assert_error(await call(web, "POST", "/extend", token), "extend_disabled")


# ── the end


async def test_an_instance_that_its_caller_ends_is_gone_for_every_token(web):
    token = await web.token()
    read_only = await shared(web, token)
    keyed = {"Idempotency-Key": "k"}
    assert (await call(web, "POST", "/sql", token, b'{"sql":"A"}', keyed)).status == 200
    assert web.app[REPLAYS].held_bytes > 0
    response = await call(web, "DELETE", "/session", token)
    assert response.status == 204
    assert "X-Walkin-TTL" not in response.headers
    assert web.launcher.instances == {}
    assert web.app[REPLAYS].held_bytes == 0
    for one in (token, read_only):
        await assert_error(await web.sql("SELECT 1", one), "instance_not_found")
        await assert_error(await call(web, "DELETE", "/session", one), "instance_not_found")


async def test_an_instance_is_ended_when_those_that_came_before_are_done(tmp_path):
    async with gateway(tmp_path, deadline_seconds=60.0) as web:
        token, finish = await web.token(), asyncio.Event()
        web.launcher.script = replying_after(finish)
        running = asyncio.ensure_future(web.sql("SELECT 1", token))
        await until(lambda: web.launcher.running == 1)
        ending = asyncio.ensure_future(call(web, "DELETE", "/session", token))
        await until(lambda: web.app[RUNS].leases.waiting == 1)
        assert web.launcher.count(Verb.REMOVE) == 0
        finish.set()
        assert [(await running).status, (await ending).status] == [200, 204]


# ── all routes alike


@pytest.mark.parametrize("request_", OF_INSTANCES, ids=lambda request: request.name)
async def test_every_route_is_limited_drained_and_kept_off_by_the_breaker(tmp_path, request_):
    async with gateway(tmp_path, rate_requests_per_minute=2) as web:
        token = await web.token()
        assert (await request_(web, "wkn_no")).status == 404
        assert (await request_(web, token)).status == 429
        assert (await request_(web, "wkn_no")).status == 429
        begun = asyncio.ensure_future(web.app[DRAIN].begin(10))
        await until(lambda: web.app[DRAIN].draining)
        assert (await request_(web, token)).status == 503
        await begun


async def test_preflight_names_the_methods_and_headers_of_each_path(web):
    for path in {route.path for route in ROUTES}:
        response = await call(web, "OPTIONS", path)
        here = [route for route in ROUTES if route.path == path]
        allowed = {name.strip() for name in response.headers["Access-Control-Allow-Methods"].split(",")}
        assert response.status == 204
        assert allowed == {"OPTIONS", *(route.method for route in here)}
        assert {*response.headers["Access-Control-Allow-Headers"].split(", ")} - {""} == {
            name for route in here for name in route.headers
        }
        refused = await call(web, "PATCH", path)
        await assert_error(refused, "method_not_allowed")
        assert refused.headers["Allow"] == ", ".join(sorted(allowed))
