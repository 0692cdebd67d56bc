"""GET, HEAD and PUT /db over real sockets, with a launcher that plays the runner."""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid

import pytest

from gateway.protocol import Status, Verb, Verdict
from gateway.web.appkeys import ACCESS_LOG, ANSWERS, ROOM, RUNS
from gateway.web.transfer import PIECE_BYTES

from .calling import call, content
from .fake_launcher import (
    FINDING,
    FakeRun,
    answering,
    assert_error,
    file_reply,
    gateway,
    ok,
    replying,
    report,
    until,
    verdict,
)

CONTENT = b"SQLite format 3\0" + bytes(range(256)) * 64
SHA256 = hashlib.sha256(CONTENT).hexdigest()
TAG = f'"{SHA256}"'
DAMAGED = report(ok=False, findings=[FINDING])
SALVAGED = report(kind="salvage", findings=[FINDING], tables=[{"name": "t", "kept": 3, "lost": 1, "lost_is_exact": True}])
WELL = {
    "": ok(["a"], [[1]]),
    "export": file_reply(CONTENT),
    "accept": verdict("accepted", size=len(CONTENT), sha256=SHA256, converted=["journal_mode"]),
}


@pytest.fixture
async def web(tmp_path):
    async with gateway(tmp_path) as web:
        web.launcher.script = answering(WELL)
        yield web
        await until(lambda: web.app[RUNS].leases.held == 0)
        assert (web.app[ROOM].held("127.0.0.1"), web.app[ANSWERS].held("127.0.0.1")) == (0, 0)


# ── taking it away


async def test_a_database_is_sent_as_a_file_from_a_read_only_container(web):
    response = await call(web, "GET", "/db", await web.token())
    assert (response.status, content(response)) == (200, CONTENT)
    assert response.headers["Content-Type"] == "application/vnd.sqlite3"
    assert response.headers["Content-Length"] == str(len(CONTENT))
    assert response.headers["ETag"] == TAG
    assert response.headers["Accept-Ranges"] == "bytes"
    assert response.headers["Content-Disposition"] == 'attachment; filename="mayfly.sqlite"'
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Walkin-TTL"] == str(next(iter(web.launcher.instances.values())))
    assert web.launcher.requests[-1] == {"v": 1, "op": "export"}
    assert web.launcher.runs[-1].read_only


async def test_head_tells_all_of_it_but_the_bytes(web):
    token = await web.token()
    response = await call(web, "HEAD", "/db", token, headers={"Range": "bytes=0-1"})
    assert (response.status, content(response)) == (200, b"")
    whole = await call(web, "GET", "/db", token)
    for name in ("Content-Type", "Content-Length", "ETag", "Accept-Ranges", "Content-Disposition"):
        assert response.headers[name] == whole.headers[name]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_file_that_the_caller_has_is_not_sent_again(web, method):
    token = await web.token()
    response = await call(web, method, "/db", token, headers={"If-None-Match": f'"x", W/{TAG}', "Range": "bytes=0-1"})
    assert response.status == 304
    assert response.headers["ETag"] == TAG
    assert (await call(web, method, "/db", token, headers={"If-None-Match": '"x"'})).status == 200


@pytest.mark.parametrize(
    ("headers", "status", "first", "last"),
    [
        ({"Range": "bytes=0-0"}, 206, 0, 0),
        ({"Range": "bytes=16-"}, 206, 16, len(CONTENT) - 1),
        ({"Range": "bytes=-5"}, 206, len(CONTENT) - 5, len(CONTENT) - 1),
        ({"Range": "bytes=0-99999999"}, 206, 0, len(CONTENT) - 1),
        ({"Range": "bytes=3-4", "If-Range": TAG}, 206, 3, 4),
        ({"Range": "bytes=3-4", "If-Range": '"x"'}, 200, 0, len(CONTENT) - 1),
        ({"Range": "bytes=3-4,6-7"}, 200, 0, len(CONTENT) - 1),
        ({"Range": "lines=1-2"}, 200, 0, len(CONTENT) - 1),
    ],
)
async def test_a_range_is_sent_alone(web, headers, status, first, last):
    response = await call(web, "GET", "/db", await web.token(), headers=headers)
    assert (response.status, content(response)) == (status, CONTENT[first : last + 1])
    assert response.headers.get("Content-Range") == (f"bytes {first}-{last}/{len(CONTENT)}" if status == 206 else None)
    assert response.headers["ETag"] == TAG


async def test_a_range_behind_the_end_is_a_416_with_the_size(web):
    response = await call(web, "GET", "/db", await web.token(), headers={"Range": f"bytes={len(CONTENT)}-"})
    await assert_error(response, "range_not_satisfiable")
    assert response.headers["Content-Range"] == f"bytes */{len(CONTENT)}"


async def test_an_empty_database_is_an_empty_file(web):
    web.launcher.script = answering(WELL | {"export": file_reply(b"")})
    response = await call(web, "GET", "/db", await web.token(), headers={"Range": "bytes=-5"})
    assert (response.status, response.headers["Content-Length"]) == (200, "0")


@pytest.mark.parametrize(
    ("lie", "code"),
    [
        ({"sha256": "0" * 64}, "reply_invalid"),
        ({"size": 11 << 20}, "reply_invalid"),
        ({"size": len(CONTENT) + 1}, "runner_failed"),
        ({"size": len(CONTENT) - 1}, "reply_invalid"),
    ],
)
async def test_a_runner_that_lies_about_its_file_is_a_500_before_a_byte_is_sent(web, lie, code):
    token = await web.token()
    web.launcher.script = replying(file_reply(CONTENT, **lie))
    await assert_error(await call(web, "GET", "/db", token), code)


async def test_a_caller_that_leaves_while_a_file_is_sent_is_logged_as_499_and_gives_back_what_it_held(tmp_path):
    async with gateway(tmp_path) as web:
        big = bytes(9 * PIECE_BYTES)
        token = await web.token()
        web.launcher.script = replying(file_reply(big))
        reader, writer = await asyncio.open_connection("127.0.0.1", web.port, limit=1024)
        writer.write(f"GET /db HTTP/1.1\r\nHost: x\r\nX-Walkin-Session: {token}\r\n\r\n".encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert web.app[ANSWERS].held("127.0.0.1") == len(big)
        await until(lambda: web.app[RUNS].leases.held == 0)
        writer.transport.abort()
        await until(lambda: web.app[ANSWERS].held("127.0.0.1") == 0)
        await web.app[ACCESS_LOG].flush()
        (path,) = (tmp_path / "log").iterdir()
        assert [json.loads(line)["http_status"] for line in path.read_text().splitlines()] == [200, 499]


# ── bringing it


@pytest.mark.parametrize("kind", ["application/vnd.sqlite3", "application/x-sqlite3", "Application/Octet-Stream", None])
async def test_a_file_becomes_a_new_instance(web, kind):
    response = await call(web, "PUT", "/db", data=CONTENT, headers={"Content-Type": kind} if kind else {})
    assert (response.status, await response.json()) == (
        201,
        {"size": len(CONTENT), "sha256": SHA256, "converted": ["journal_mode"]},
    )
    ((instance, expires_at),) = web.launcher.instances.items()
    assert [verb for verb, _ in web.launcher.verbs] == [Verb.CREATE, Verb.RUN]
    assert web.launcher.requests == [{"v": 1, "op": "accept", "upload": len(CONTENT)}]
    assert web.launcher.uploads == [CONTENT]
    assert web.launcher.runs[0].bulk
    assert web.launcher.owners[0] != bytes(16)
    assert response.headers["X-Walkin-TTL"] == str(expires_at)
    assert (await web.sql("SELECT 1", response.headers["X-Walkin-Session"])).status == 200
    assert web.launcher.verbs[-1] == (Verb.RUN, instance)


async def test_a_file_replaces_the_callers_own_in_one_step_once_it_is_accepted(web):
    token = await web.token()
    (own,) = web.launcher.instances
    response = await call(web, "PUT", "/db", token, CONTENT)
    assert (response.status, (await response.json())["sha256"]) == (200, SHA256)
    ((instance, staging, kept),) = web.launcher.replaced
    assert (instance, kept) == (own, False)
    assert [verb for verb, _ in web.launcher.verbs[2:]] == [Verb.FIND, Verb.CREATE, Verb.RUN, Verb.REPLACE]
    assert web.launcher.verbs[-2] == (Verb.RUN, staging)
    assert web.launcher.owners[-1] == bytes(16)
    assert set(web.launcher.instances) == {own}
    assert "X-Walkin-Session" not in response.headers
    assert response.headers["X-Walkin-TTL"] == str(web.launcher.instances[own])


FAILURES = {
    "file_refused": (verdict("file_refused", message="too many pages"), "file_refused"),
    "damaged": (verdict("report", report=DAMAGED), "database_damaged"),
    "storage_full": (verdict("storage_full"), "storage_limit"),
    "timeout": (verdict("timeout"), "query_timeout"),
    "nonsense": (b"\0", "reply_invalid"),
    "internal": (verdict("internal", message="KeyError"), "internal_error"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("with_session", [False, True])
async def test_a_file_that_is_not_accepted_leaves_nothing_behind(web, failure, with_session):
    reply, code = FAILURES[failure]
    token = await web.token() if with_session else None
    own = set(web.launcher.instances)
    web.launcher.script = answering(WELL | {"accept": reply})
    response = await call(web, "PUT", "/db", token, CONTENT)
    body = await assert_error(response, code)
    assert body.get("report") == (DAMAGED if failure == "damaged" else None)
    assert "X-Walkin-Session" not in response.headers
    await until(lambda: set(web.launcher.instances) == own)
    assert web.launcher.replaced == []
    web.launcher.script = answering(WELL)
    if token:
        assert (await web.sql("SELECT 1", token)).status == 200


async def test_a_container_that_dies_on_a_file_leaves_nothing_behind(web):
    token = await web.token()
    own = set(web.launcher.instances)
    web.launcher.script = replying(b"", Verdict.SIGNALLED)
    await assert_error(await call(web, "PUT", "/db", token, CONTENT), "runner_failed")
    await until(lambda: set(web.launcher.instances) == own)


async def test_a_replacement_that_the_launcher_refuses_leaves_the_old_database(web):
    token = await web.token()
    own = set(web.launcher.instances)
    web.launcher.refusals[Verb.REPLACE] = Status.BUSY
    await assert_error(await call(web, "PUT", "/db", token, CONTENT), "overloaded")
    await until(lambda: set(web.launcher.instances) == own)


@pytest.mark.parametrize("with_session", [False, True])
async def test_a_caller_that_hangs_up_while_its_file_is_checked_leaves_nothing_behind(tmp_path, with_session):
    async with gateway(tmp_path, bulk_deadline_seconds=60.0) as web:

        async def busy(run: FakeRun) -> None:
            run.started()
            await run.read_request()
            await run.hung_up()
            run.ended(Verdict.CANCELLED)

        token = await web.token() if with_session else None
        own = set(web.launcher.instances)
        web.launcher.script = busy
        request = asyncio.ensure_future(call(web, "PUT", "/db", token, CONTENT))
        await until(lambda: len(web.launcher.uploads) == 1 + with_session)
        request.cancel()
        await until(lambda: set(web.launcher.instances) == own)
        await until(lambda: web.app[RUNS].leases.held == 0)


@pytest.mark.parametrize("how", ["parameter", "header", "operator", "instance"])
async def test_a_damaged_file_is_salvaged_on_the_way_in_where_that_is_the_mode(tmp_path, how):
    async with gateway(tmp_path, on_damage="salvage" if how == "operator" else "strict") as web:
        token = None
        if how == "instance":
            token = await web.token()
            web.launcher.salvaging = set(web.launcher.instances)
        web.launcher.script = answering(
            {
                "accept": verdict("report", report=DAMAGED),
                "salvage": verdict("report", report=SALVAGED),
                "export": file_reply(CONTENT),
            }
        )
        path = "/db?on_damage=salvage" if how == "parameter" else "/db"
        headers = {"X-Mayfly-On-Damage": "salvage"} if how == "header" else {}
        response = await call(web, "PUT", path, token, CONTENT, headers)
        assert response.status == (200 if token else 201)
        assert await response.json() == {"size": len(CONTENT), "sha256": SHA256, "converted": [], "report": SALVAGED}
        assert [request["op"] for request in web.launcher.requests[-3:]] == ["accept", "salvage", "export"]
        assert bool(web.launcher.salvaging) == (how != "parameter")


async def test_the_parameter_overrules_the_mode_and_a_failing_salvage_is_a_refusal(tmp_path):
    async with gateway(tmp_path, on_damage="salvage") as web:
        failed = report(kind="salvage", ok=False, findings=[FINDING])
        web.launcher.script = answering({"accept": verdict("report", report=DAMAGED), "salvage": verdict("report", report=failed)})
        for path, expected in (("/db?on_damage=strict", DAMAGED), ("/db", failed)):
            body = await assert_error(await call(web, "PUT", path, None, CONTENT), "database_damaged")
            assert body["report"] == expected
            await until(lambda: not web.launcher.instances)


async def test_a_file_is_at_most_as_large_as_an_instance(tmp_path):
    async with gateway(tmp_path, instance_bytes=1 << 20) as web:
        web.launcher.script = answering(WELL)
        assert (await call(web, "PUT", "/db", data=bytes(1 << 20))).status == 201
        head = b"PUT /db HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % ((1 << 20) + 1)
        assert (await web.raw(head)).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("path", "headers", "code"),
    [
        ("/db", {"Content-Type": "application/json"}, "unsupported_media_type"),
        ("/db", {"Content-Encoding": "gzip"}, "unsupported_media_type"),
        ("/db?on_damage=maybe", {}, "bad_parameter"),
        ("/db?table=t", {}, "bad_parameter"),
        ("/db", {"X-Mayfly-On-Damage": "maybe"}, "bad_parameter"),
    ],
)
async def test_an_upload_that_is_not_described_as_one_is_refused_before_anything_is_made(web, path, headers, code):
    await assert_error(await call(web, "PUT", path, None, CONTENT, headers), code)
    assert web.launcher.verbs == []


async def test_an_upload_counts_as_a_new_instance_and_a_replacement_does_not(tmp_path):
    async with gateway(tmp_path, rate_creates_per_minute=1) as web:
        web.launcher.script = answering(WELL)
        response = await call(web, "PUT", "/db", data=CONTENT)
        token = response.headers["X-Walkin-Session"]
        await assert_error(await call(web, "PUT", "/db", data=CONTENT), "rate_limited")
        assert (await call(web, "PUT", "/db", token, CONTENT)).status == 200


async def test_the_access_log_names_the_instance_of_a_file_and_no_sql(web, tmp_path):
    token = await web.token()
    await call(web, "GET", "/db", token)
    await call(web, "PUT", "/db", token, CONTENT)
    await web.app[ACCESS_LOG].flush()
    (path,) = (tmp_path / "log").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["http_method"], line["http_status"], line["sql_byte_length"]) for line in lines[1:]] == [
        ("GET", 200, 0),
        ("PUT", 200, 0),
    ]
    assert {uuid.UUID(line["instance_id"]) for line in lines} == set(web.launcher.instances)


async def test_a_condition_that_nobody_would_look_at_is_refused_and_nothing_is_replaced(web):
    token = await web.token()
    for header in ("If-Match", "If-None-Match"):
        response = await call(web, "PUT", "/db", token, CONTENT, {header: '"x"'})
        assert header in (await assert_error(response, "bad_parameter"))["error"]
    assert not web.launcher.replaced
