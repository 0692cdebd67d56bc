"""POST /import, POST /batch, GET /schema and answers in lines, over real sockets with a launcher that plays the runner."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import hdrs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.protocol import Verb, Verdict
from gateway.web.appkeys import ACCESS_LOG, ANSWERS, BULK_GATE, ROOM, RUNS, TRAFFIC

from .calling import call, content
from .fake_launcher import (
    EVERY_TEST_SECONDS,
    FakeRun,
    answering,
    assert_error,
    frame,
    gateway,
    ok,
    replying,
    rows_reply,
    until,
    verdict,
)

IMPORTED = {"table": "t", "created": True, "columns": [["a", "INTEGER"]], "rows": 2}
SCHEMA = {
    "tables": [{"name": "t", "kind": "table", "strict": False, "without_rowid": False, "rows": 1, "columns": [
        {"name": "a", "type": "INT", "not_null": False, "default": None, "primary_key": 0, "hidden": False}]}],
    "indexes": [{"name": "i", "table": "t", "unique": True, "origin": "c", "partial": False, "columns": ["a", None]}],
    "views": [{"name": "v"}],
    "triggers": [{"name": "x", "table": "t"}],
    "page_bytes": 4096,
    "used_bytes": 8192,
    "free_bytes": 1 << 20,
}  # fmt: skip
NOTHING = {"columns": None, "rows": [], "rows_affected": 1, "truncated": False, "skipped": False}
SOME = {"columns": ["n"], "rows": [[1]], "rows_affected": 0, "truncated": False, "skipped": False}
LINES = {"Accept": "application/x-ndjson"}
SQL = b'{"sql":"SELECT n FROM t"}'


@pytest.fixture
async def web(tmp_path):
    async with gateway(tmp_path) as web:
        yield web
        await until(lambda: web.app[RUNS].leases.held == 0)
        assert (web.app[ROOM].held("127.0.0.1"), web.app[ANSWERS].held("127.0.0.1")) == (0, 0)


# ── import


@pytest.mark.parametrize(
    ("query", "kind", "expected"),
    [
        ("table=t", "text/csv", {"format": "csv"}),
        ("table=t&format=csv&header=no&delimiter=%3B&null=NULL", None, {"header": False, "delimiter": ";", "null": "NULL"}),
        (
            "table=t&column=a:integer&column=b",
            "application/x-ndjson",
            {"format": "ndjson", "columns": [["a", "INTEGER"], ["b", None]]},
        ),
        ("table=t%20%C3%A4", "application/json; charset=utf-8", {"format": "json", "table": "t ä"}),
    ],
)
async def test_an_import_is_one_bulk_run_that_gets_the_upload_and_how_to_read_it(web, query, kind, expected):
    token = await web.token()
    web.launcher.script = answering({"import": verdict("imported", **IMPORTED)})
    response = await call(web, "POST", f"/import?{query}", token, b"a\n1\n2\n", {"Content-Type": kind} if kind else {})
    assert (response.status, await response.json()) == (200, IMPORTED)
    plain = {"table": "t", "format": "csv", "columns": None, "header": True, "delimiter": ",", "null": None}
    assert web.launcher.requests[-1] == {"v": 1, "op": "import", "upload": 6, **plain, **expected}
    assert web.launcher.uploads[-1] == b"a\n1\n2\n"
    assert (web.launcher.runs[-1].bulk, web.launcher.runs[-1].read_only) == (True, False)


async def test_an_import_without_a_session_makes_an_instance_and_keeps_it_if_the_data_was_at_fault(web):
    web.launcher.script = answering({"import": verdict("import_invalid", line=3, message="2 fields, the header has 3")})
    response = await call(web, "POST", "/import?table=t&format=csv", data=b"a,b,c\n1,2,3\n1,2\n")
    body = await assert_error(response, "import_invalid")
    assert (body["error"], body["line"]) == ("invalid import: 2 fields, the header has 3", 3)
    assert response.headers["X-Walkin-Session"]
    assert len(web.launcher.instances) == 1
    web.launcher.script = answering({"import": verdict("import_invalid", line=None, message="no such column")})
    response = await call(web, "POST", "/import?table=t&format=csv", data=b"")
    assert (await assert_error(response, "import_invalid"))["line"] is None


async def test_an_upload_larger_than_the_limit_of_sql_is_imported_up_to_the_size_of_an_instance(tmp_path):
    async with gateway(tmp_path, instance_bytes=2 << 20, bulk_deadline_seconds=60.0) as web:
        web.launcher.script = answering({"import": verdict("imported", **IMPORTED)})
        assert (await call(web, "POST", "/import?table=t&format=csv", data=io.BytesIO(bytes(2 << 20)))).status == 200
        assert len(web.launcher.uploads[-1]) == 2 << 20
        response = await call(web, "POST", "/import?table=t&format=csv", data=io.BytesIO(bytes((2 << 20) + 1)))
        await assert_error(response, "body_too_large")


@pytest.mark.parametrize(
    ("path", "kind", "code"),
    [
        ("/import", "text/csv", "bad_parameter"),
        ("/import?table=t", None, "bad_parameter"),
        ("/import?table=t", "text/plain", "unsupported_media_type"),
        ("/import?table=t", "text/csv; charset=latin-1", "unsupported_media_type"),
        ("/import?table=t&format=json", "text/csv", "bad_parameter"),
    ],
)
async def test_an_import_that_is_not_described_as_one_is_refused_before_anything_is_asked_of_the_launcher(web, path, kind, code):
    await assert_error(await call(web, "POST", path, None, b"a\n", {"Content-Type": kind} if kind else {}), code)
    assert web.launcher.verbs == []


async def test_imports_of_one_address_run_one_after_the_other_and_leave_slots_to_others(tmp_path):
    async with gateway(tmp_path, slots=4, bulk_deadline_seconds=60.0) as web:
        token, finish = await web.token(), asyncio.Event()

        async def slow(run: FakeRun) -> None:
            run.started()
            request = await run.read_request()
            if "op" in request:
                await finish.wait()
                await run.send(verdict("imported", **IMPORTED))
            else:
                await run.send(ok(["a"], [[1]]))
            run.ended()

        web.launcher.script = slow
        imports = [asyncio.ensure_future(call(web, "POST", "/import?table=t&format=csv", data=b"a\n")) for _ in range(3)]
        await until(lambda: web.app[BULK_GATE].waiting == 2)
        assert (await web.sql("SELECT 1", token)).status == 200
        assert web.launcher.running <= 1
        finish.set()
        assert [(await one).status for one in imports] == [200] * 3


async def test_a_gate_that_is_full_is_a_503_with_a_time_to_retry(tmp_path):
    async with gateway(tmp_path, bulk_deadline_seconds=60.0) as web:
        finish = asyncio.Event()

        async def slow(run: FakeRun) -> None:
            run.started()
            await run.read_request()
            await finish.wait()
            await run.send(verdict("imported", **IMPORTED))
            run.ended()

        web.launcher.script = slow
        imports = [asyncio.ensure_future(call(web, "POST", "/import?table=t&format=csv", data=b"a\n")) for _ in range(20)]
        await until(lambda: sum(one.done() for one in imports) >= 11)
        finish.set()
        statuses = sorted([(await one).status for one in imports])
        assert set(statuses) == {200, 503}
        for one in imports:
            if one.result().status == 503:
                await assert_error(one.result(), "overloaded")


# ── batch


async def test_a_batch_answers_each_statement_and_names_those_that_were_skipped(web):
    token = await web.token()
    web.launcher.script = answering(
        {"batch": verdict("batch", results=[NOTHING, SOME | {"truncated": True}, {**NOTHING, "rows_affected": 0, "skipped": True}])}
    )
    raw = json.dumps(
        {"statements": [{"sql": "A", "args": [1]}, {"sql": "B", "if": "changed"}, {"sql": "C", "if": "no_rows"}], "int64": "string"}
    )
    web.launcher.script = answering(
        {
            "batch": verdict(
                "batch",
                results=[NOTHING, {**SOME, "rows": [["1"]], "truncated": True}, {**NOTHING, "rows_affected": 0, "skipped": True}],
            )
        }
    )
    response = await call(web, "POST", "/batch", token, raw.encode())
    assert response.status == 200
    assert await response.json() == {
        "results": [
            {"rows_affected": 1},
            {"columns": ["n"], "rows": [["1"]], "rows_affected": 0, "truncated": True},
            {"skipped": True},
        ]
    }
    assert web.launcher.requests[-1] == {
        "v": 1,
        "op": "batch",
        "steps": [
            {"sql": "A", "args": [1], "if": None},
            {"sql": "B", "args": None, "if": "changed"},
            {"sql": "C", "args": None, "if": "no_rows"},
        ],
        "int64": "string",
    }


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        ({"verdict": "sql_error", "message": "no such table: t"}, "sql_error"),
        ({"verdict": "forbidden", "message": "ATTACH"}, "forbidden"),
        ({"verdict": "args_invalid", "message": "x"}, "invalid_args"),
        ({"verdict": "timeout"}, "query_timeout"),
        ({"verdict": "storage_full"}, "storage_limit"),
        ({"verdict": "too_complex", "message": ""}, "too_complex"),
    ],
)
async def test_a_step_that_fails_is_its_sql_error_with_its_place(web, failure, code):
    web.launcher.script = answering({"batch": verdict("step_failed", step=1, failure=failure)})
    response = await call(web, "POST", "/batch", data=b'{"statements":[{"sql":"A"},{"sql":"B"}]}')
    body = await assert_error(response, code)
    assert body["statement"] == 1
    assert response.headers["X-Walkin-Session"]


async def test_a_faulty_batch_is_refused_before_anything_is_asked_of_the_launcher(web):
    for raw, code in ((b"{", "invalid_json"), (b'{"statements":[{"sql":"A"},{}]}', "missing_sql")):
        await assert_error(await call(web, "POST", "/batch", data=raw), code)
    assert web.launcher.verbs == []


async def test_the_access_log_counts_the_bytes_of_all_statements(web, tmp_path):
    web.launcher.script = answering({"batch": verdict("batch", results=[NOTHING, NOTHING]), "rows": rows_reply(["n"])})
    await call(web, "POST", "/batch", data='{"statements":[{"sql":"é"},{"sql":"SELECT 1"}]}'.encode())
    await call(web, "POST", "/sql", data=SQL, headers=LINES)
    await web.app[ACCESS_LOG].flush()
    (path,) = (tmp_path / "log").iterdir()
    assert [json.loads(line)["sql_byte_length"] for line in path.read_text().splitlines()] == [10, 15]


# ── schema


async def test_a_schema_is_answered_as_the_runner_tells_it_from_a_read_only_container(web):
    token = await web.token()
    web.launcher.script = answering({"schema": verdict("schema", **SCHEMA)})
    response = await call(web, "GET", "/schema", token)
    assert (response.status, await response.json()) == (200, SCHEMA)
    assert web.launcher.runs[-1].read_only


# ── answers in lines


def asking_for_lines(token: str, more: str = "", version: str = "1.1") -> bytes:
    head = f"POST /sql HTTP/{version}\r\nHost: x\r\n{more}Accept: application/x-ndjson\r\nX-Walkin-Session: {token}\r\n"
    return f"{head}Content-Length: {len(SQL)}\r\n\r\n".encode() + SQL


def lines(response) -> list[object]:
    assert content(response).endswith(b"\n")
    return [json.loads(line) for line in content(response).splitlines()]


async def test_rows_are_sent_as_lines_between_columns_and_a_trailer(web):
    web.launcher.script = answering(
        {"rows": rows_reply(["n", "t"], [[1, "a\nb"], [2, None]], [[3, {"$blob": "AA=="}]], affected=2)}
    )
    response = await call(web, "POST", "/sql", data=SQL, headers=LINES)
    assert response.status == 200
    assert response.headers["Content-Type"] == "application/x-ndjson"
    assert lines(response) == [
        {"columns": ["n", "t"]},
        [1, "a\nb"],
        [2, None],
        [3, {"$blob": "AA=="}],
        {"complete": True, "rows": 3, "rows_affected": 2},
    ]
    assert response.headers["X-Walkin-TTL"] == str(next(iter(web.launcher.instances.values())))
    web.launcher.script = answering({"": ok(["a"], [[1]])})
    assert (await web.sql("SELECT 1", response.headers["X-Walkin-Session"])).status == 200


async def test_statements_without_rows_have_no_columns(web):
    web.launcher.script = answering({"rows": rows_reply(None, affected=3)})
    response = await call(web, "POST", "/sql", data=SQL, headers=LINES)
    assert lines(response) == [{"columns": None}, {"complete": True, "rows": 0, "rows_affected": 3}]


@pytest.mark.parametrize(("stopped", "message"), [("timeout", None), ("bytes", None), ("error", "integer overflow")])
async def test_the_trailer_says_why_not_all_rows_came(web, stopped, message):
    token = await web.token()
    web.launcher.script = answering({"rows": rows_reply(["n"], [[1]], stopped=stopped, message=message)})
    response = await call(web, "POST", "/sql", token, SQL, LINES)
    trailer = {"complete": False, "rows": 1, "rows_affected": 0, "reason": stopped}
    assert lines(response)[-1] == trailer | ({"message": message} if message else {})


@pytest.mark.parametrize(
    ("end", "died", "reason"),
    [
        (b"", Verdict.SIGNALLED, "failed"),
        (b"", Verdict.DEADLINE, "timeout"),
        (b"", Verdict.OUT_OF_MEMORY, "failed"),
        (frame(b"[[1,2]]"), Verdict.EXITED, "failed"),
        (frame({"rows": 7, "rows_affected": 0, "stopped": None, "message": None}), Verdict.EXITED, "failed"),
        (b"\0\0", Verdict.EXITED, "failed"),
    ],
)
async def test_a_run_that_dies_in_the_middle_ends_with_a_trailer_and_closes_the_connection_cleanly(
    web, tmp_path, end, died, reason
):
    token = await web.token()
    web.launcher.script = replying(verdict("rows", columns=["n"]) + frame(b"[[1],[2]]") + end, died)
    # An idle connection would be closed ten seconds later.
    answer = await asyncio.wait_for(web.raw(asking_for_lines(token)), EVERY_TEST_SECONDS)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n0\r\n\r\n")
    trailer = json.loads(answer.split(b"\r\n")[-4])
    assert (trailer["complete"], trailer["rows"], trailer["reason"]) == (False, 2, reason)
    assert "operator" not in trailer["message"]
    ((_, _, status, code),) = [key for key in web.app[TRAFFIC].requests if key[3]]
    assert status == 200
    assert code in ("runner_failed", "query_timeout", "memory_limit", "reply_invalid")


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (verdict("sql_error", message="x"), "sql_error"),
        (verdict("timeout"), "query_timeout"),
        (b"\0", "reply_invalid"),
        (verdict("rows", columns=[]), "reply_invalid"),
    ],
)
async def test_what_fails_before_the_first_row_is_an_ordinary_error(web, reply, code):
    token = await web.token()
    web.launcher.script = replying(reply)
    await assert_error(await call(web, "POST", "/sql", token, SQL, LINES), code)


async def test_a_new_instance_whose_lines_never_began_by_our_fault_is_removed(web):
    web.launcher.script = replying(b"", Verdict.SIGNALLED)
    response = await call(web, "POST", "/sql", data=SQL, headers=LINES)
    await assert_error(response, "runner_failed")
    assert "X-Walkin-Session" not in response.headers
    await until(lambda: web.launcher.count(Verb.REMOVE) == 1)


async def test_integers_in_lines_are_strings_where_that_is_asked_for_and_numbers_there_are_a_lie(web):
    token = await web.token()
    raw = b'{"sql":"SELECT n FROM t","int64":"string"}'
    web.launcher.script = answering({"rows": rows_reply(["n"], [["9223372036854775807"]])})
    response = await call(web, "POST", "/sql", token, raw, LINES)
    assert lines(response)[1] == ["9223372036854775807"]
    assert web.launcher.requests[-1] == {"v": 1, "op": "rows", "sql": "SELECT n FROM t", "args": None, "int64": "string"}
    web.launcher.script = answering({"rows": rows_reply(["n"], [[1]])})
    assert lines(await call(web, "POST", "/sql", token, raw, LINES))[-1]["reason"] == "failed"


async def test_lines_come_while_the_statement_still_runs_and_a_caller_that_leaves_is_a_499(tmp_path):
    async with gateway(tmp_path, deadline_seconds=60.0) as web:
        token, closed = await web.token(), asyncio.Event()

        async def endless(run: FakeRun) -> None:
            run.started()
            await run.read_request()
            await run.send(verdict("rows", columns=["n"]) + frame(b"[[1]]"))
            await run.hung_up()
            closed.set()
            run.ended(Verdict.CANCELLED)

        web.launcher.script = endless
        reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
        writer.write(asking_for_lines(token))
        assert await reader.readuntil(b"[1]\n")
        writer.close()
        await asyncio.wait_for(closed.wait(), 5)
        await until(lambda: web.app[RUNS].leases.held == 0 and web.app[ANSWERS].held("127.0.0.1") == 0)
        await web.app[ACCESS_LOG].flush()
        (path,) = (tmp_path / "log").iterdir()
        assert [json.loads(line)["http_status"] for line in path.read_text().splitlines()] == [200, 499]


async def test_a_caller_that_leaves_while_a_line_waits_to_be_sent_ends_the_run(tmp_path):
    async with gateway(tmp_path, deadline_seconds=60.0) as web:
        token = await web.token()
        rows = frame(json.dumps([["x" * 1000]] * 200).encode())

        async def endless(run: FakeRun) -> None:
            run.started()
            await run.read_request()
            await run.send(verdict("rows", columns=["n"]) + rows * 30)
            await run.hung_up()
            run.ended(Verdict.CANCELLED)

        web.launcher.script = endless
        reader, writer = await asyncio.open_connection("127.0.0.1", web.port, limit=1024)
        writer.write(asking_for_lines(token))
        await reader.readuntil(b"\r\n\r\n")
        await until(lambda: any(connection.unsent_bytes for connection in web.server.door._open))
        writer.transport.abort()
        await until(lambda: web.app[RUNS].leases.held == 0 and web.app[ANSWERS].held("127.0.0.1") == 0)


async def test_a_write_that_finds_the_caller_gone_is_a_499_and_no_error_of_ours(web, tmp_path, monkeypatch, caplog):
    async def gone(*_: object) -> None:
        raise ConnectionResetError

    token = await web.token()
    web.launcher.script = answering({"rows": rows_reply(["n"], [[1]])})
    monkeypatch.setattr("aiohttp.web.StreamResponse.write", gone)
    with contextlib.suppress(aiohttp.ClientError):
        await call(web, "POST", "/sql", token, SQL, LINES)
    await web.app[ACCESS_LOG].flush()
    (path,) = (tmp_path / "log").iterdir()
    assert [json.loads(line)["http_status"] for line in path.read_text().splitlines()] == [200, 499]
    assert "internal_error" not in caplog.text


async def test_a_slow_reader_holds_no_slot(tmp_path):
    async with gateway(tmp_path, deadline_seconds=60.0, slots=1) as web:
        token = await web.token()
        rows = [[["x" * 1000]] * 100] * 40
        web.launcher.script = answering({"rows": rows_reply(["n"], *rows), "": ok(["a"], [[1]])})
        reader, writer = await asyncio.open_connection("127.0.0.1", web.port, limit=1024)
        writer.write(asking_for_lines(token, "Connection: close\r\n"))
        await until(lambda: len(web.launcher.requests) == 2)
        assert (await web.sql("SELECT 1", token)).status == 200
        answer = await reader.read()
        assert answer.count(b'xxx"]\n') == 4000
        assert b'{"complete":true,"rows":4000,"rows_affected":0}\n' in answer
        writer.close()


async def test_http_1_0_gets_its_lines_until_the_connection_closes(web):
    token = await web.token()
    web.launcher.script = answering({"rows": rows_reply(["n"], [[1]])})
    answer = await web.raw(asking_for_lines(token, version="1.0"))
    assert b"chunked" not in answer.lower()
    assert answer.endswith(b'[1]\n{"complete":true,"rows":1,"rows_affected":0}\n')


# ── never a 500


tokens = st.sampled_from(["good", "wkn_no", ""])
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)
requests = st.tuples(
    st.sampled_from(
        ["/sql", "/batch", "/import", "/db", "/schema", "/fork", "/share", "/extend", "/session", "/salvage", "/nothing"]
    ),
    st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH"]),
    st.lists(
        st.tuples(
            st.sampled_from(["table", "format", "column", "on_damage", "null", "delimiter", "x"]),
            texts | st.sampled_from(["csv", "json", "t", "a:TEXT", "salvage"]),
        ),
        max_size=4,
    ),
    st.dictionaries(
        st.sampled_from(
            [
                "Range",
                "If-Range",
                "If-None-Match",
                "Accept",
                "Content-Type",
                "Idempotency-Key",
                "X-Mayfly-On-Damage",
                "Content-Encoding",
            ]
        ),
        st.sampled_from(
            ["bytes=0-1", "bytes=-0", "*", "application/x-ndjson", "application/json", "text/csv", "salvage", "k", '"x"', "", "a b"]
        )
        | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30),
        max_size=4,
    ),
    st.binary(max_size=60)
    | st.sampled_from([b'{"sql":"SELECT 1"}', b'{"statements":[{"sql":"A"}]}', b'{"seconds":1}', b"a\n1\n", b""]),
    tokens,
)


async def test_no_request_whatever_it_says_is_a_500(tmp_path):
    async with gateway(tmp_path) as web:
        web.launcher.script = answering(
            {
                "": ok(["a"], [[1]]),
                "rows": rows_reply(["a"], [[1]]),
                "batch": verdict("batch", results=[SOME]),
                "schema": verdict("schema", **SCHEMA),
                "export": verdict("file", size=0, sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
                "import": verdict("imported", **IMPORTED),
                "accept": verdict("accepted", size=0, sha256="0" * 64, converted=[]),
                "verify": verdict(
                    "report",
                    report={
                        "kind": "verify",
                        "ok": True,
                        "size": 0,
                        "sha256": "0" * 64,
                        "page_size": None,
                        "pages": None,
                        "findings": [],
                        "more_findings": False,
                        "tables": [],
                        "unassigned": 0,
                        "objects_lost": [],
                    },
                ),
            }
        )
        loop, good = asyncio.get_running_loop(), [await web.token()]

        async def send(path, method, query, headers, data, kind) -> None:
            token = {"good": good[0], "": None}.get(kind, kind)
            target = path + ("?" + "&".join(f"{quote(name)}={quote(value)}" for name, value in query) if query else "")
            response = await call(
                web, method, target, token, data if method not in (hdrs.METH_GET, hdrs.METH_HEAD) else None, headers
            )
            assert response.status < 500, (response.status, content(response))
            if response.status >= 400 and method != "HEAD":
                await assert_error(response, (await response.json())["code"])
            if method == "DELETE" and response.status == 204:
                good[0] = await web.token()

        @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(requests)
        def fuzz(request) -> None:
            asyncio.run_coroutine_threadsafe(send(*request), loop).result(10)

        await asyncio.to_thread(fuzz)
