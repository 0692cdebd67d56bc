"""Reply frames: what is believed and, mostly, what is not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import BULK, READ_ONLY, Verdict
from gateway.web import errors
from gateway.web.body import Statement, Step
from gateway.web.errors import ReplyInvalidError
from gateway.web.runner import (
    Failing,
    Ok,
    Order,
    accept_order,
    batch_order,
    decode_reply,
    export_order,
    import_order,
    read_reply,
    request_frame,
    rows_order,
    salvage_order,
    schema_order,
    verify_order,
)
from gateway.web.verdicts import error_of, error_without_reply, rows_or_raise

from .fake_launcher import FINDING, GOLDEN, exchange, frame, report

CAP = 1 << 20
GOOD = sorted(
    path.name
    for path in GOLDEN.glob("reply-*.json")
    if "invalid" not in path.name or path.name in ("reply-args-invalid.json", "reply-request-invalid.json")
)
BAD = sorted(path.name for path in GOLDEN.glob("reply-invalid-*.json"))

# The error that each golden reply without rows stands for.
ERRORS = {
    "reply-args-invalid.json": errors.InvalidArgsError,
    "reply-damaged.json": errors.DatabaseDamagedError,
    "reply-forbidden.json": errors.ForbiddenSqlError,
    "reply-host-full.json": errors.HostStorageLowError,
    "reply-internal.json": errors.InternalError,
    "reply-memory-limit.json": errors.MemoryLimitError,
    "reply-request-invalid.json": errors.InternalError,
    "reply-sql-error.json": errors.InvalidSqlError,
    "reply-storage-full.json": errors.StorageLimitError,
    "reply-timeout.json": errors.QueryTimeoutError,
    "reply-too-complex.json": errors.TooComplexError,
    "reply-unconfined.json": errors.InternalError,
}


def mode_of(name: str) -> str:
    return "string" if name == "reply-int64-string.json" else "number"


@pytest.mark.parametrize("name", [name for name in GOOD if name not in ERRORS])
def test_every_golden_reply_with_rows_is_read_unchanged(name):
    raw = (GOLDEN / name).read_bytes()
    reply = rows_or_raise(decode_reply(raw, mode_of(name)))
    golden = json.loads(raw)
    assert repr((reply.columns, reply.rows)) == repr((golden["columns"], golden["rows"]))
    assert (reply.rows_affected, reply.truncated) == (golden["rows_affected"], golden["truncated"])


@pytest.mark.parametrize("name", [name for name in GOOD if name in ERRORS])
def test_every_golden_reply_without_rows_is_its_error(name):
    with pytest.raises(ERRORS[name]):
        rows_or_raise(decode_reply((GOLDEN / name).read_bytes(), "number"))


def test_every_verdict_of_the_golden_replies_is_covered():
    assert set(ERRORS) < set(GOOD)
    assert len(BAD) >= 12


@pytest.mark.parametrize("name", BAD)
def test_every_golden_reply_of_a_runner_taken_over_is_invalid(name):
    with pytest.raises(ReplyInvalidError):
        decode_reply((GOLDEN / name).read_bytes(), "number")


BASE = {"v": 1, "verdict": "ok", "columns": ["a"], "rows": [[1]], "rows_affected": 0, "truncated": False}


@pytest.mark.parametrize(
    "change",
    [
        {"v": True},
        {"v": "1"},
        {"verdict": "OK"},
        {"verdict": None},
        {"columns": []},
        {"columns": [1]},
        {"columns": "a"},
        {"rows": [[1, 2]]},
        {"rows": [[]]},
        {"rows": [1]},
        {"rows": {"0": [1]}},
        {"rows": None},
        {"rows": [[[1]]]},
        {"rows": [[{}]]},
        {"rows": [[{"$int": "1"}]]},
        {"rows": [[{"$real": "NaN"}]]},
        {"rows": [[{"$blob": "AA"}]]},
        {"rows": [[{"$blob": 1}]]},
        {"rows": [[{"$blob": "", "$text": ""}]]},
        {"rows_affected": -1},
        {"rows_affected": 1.0},
        {"rows_affected": True},
        {"rows_affected": 2**63},
        {"truncated": 0},
        {"message": "x"},
        {"columns": None},
        {"columns": None, "rows": [], "truncated": True},
    ],
)
def test_a_reply_that_differs_in_one_place_is_invalid(change):
    with pytest.raises(ReplyInvalidError):
        decode_reply(json.dumps({**BASE, **change}).encode(), "number")


def test_an_integer_as_a_number_is_invalid_where_strings_were_asked_for():
    with pytest.raises(ReplyInvalidError):
        decode_reply(json.dumps(BASE).encode(), "string")


def test_a_reply_nested_without_end_is_invalid_and_not_a_crash():
    with pytest.raises(ReplyInvalidError):
        decode_reply(b'{"v":1,"verdict":"ok","rows":' + b"[" * 500_000, "number")


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_reply_invalid(raw):
    with pytest.raises(ReplyInvalidError):
        decode_reply(raw, "number")


def test_the_largest_reply_is_checked_within_a_fraction_of_a_second():
    rows = [[0] * 5] * 100_000
    raw = json.dumps({**BASE, "columns": list("abcde"), "rows": rows}).encode()
    began = time.perf_counter()
    assert isinstance(decode_reply(raw, "number"), Ok)
    assert time.perf_counter() - began < 0.5


# ── operations

STEPS = [
    Step("UPDATE t SET a = ? WHERE a = ?", [2, {"$int": "9007199254740993"}]),
    Step("INSERT INTO t VALUES (1)", None, "unchanged"),
    Step("SELECT a FROM t WHERE a = :a", {"a": 1}, "changed"),
    Step("DELETE FROM t", None, "rows"),
    Step("SELECT 1", None, "no_rows"),
]
UPLOAD = (GOLDEN / "op-frame-request-import.bin").read_bytes()[-17:]
PEOPLE = {"table": "people", "format": "csv", "columns": [("name", "TEXT"), ("age", None)], "header": True, "delimiter": ","}
PLAIN = {"table": "t", "format": "ndjson", "columns": None, "header": False, "delimiter": "\t"}
ORDERS = {
    "accept": accept_order(bytes(8192)),
    "batch": batch_order(STEPS, "number", CAP),
    "export": export_order(),
    "import": import_order(UPLOAD, **PEOPLE, null="", cap=CAP),
    "import-plain": import_order(b"", **PLAIN, null=None, cap=CAP),
    "rows": rows_order(Statement("SELECT a FROM t WHERE a > :least", {"least": 1}, "string"), CAP),
    "salvage": salvage_order(),
    "schema": schema_order(),
    "verify": verify_order(),
}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("op-request-*.json")), ids=lambda path: path.stem)
def test_every_golden_operation_is_written_by_its_order_and_no_other_is(path):
    name = path.stem.removeprefix("op-request-")
    if name.startswith("invalid"):
        assert repr(json.loads(path.read_bytes())) not in [repr(json.loads(order.frame[4:])) for order in ORDERS.values()]
        return
    order = ORDERS[name]
    assert int.from_bytes(order.frame[:4], "big") == len(order.frame) - 4
    assert repr(json.loads(order.frame[4:])) == repr(json.loads(path.read_bytes()))


def test_a_golden_upload_stands_right_behind_its_frame():
    stream = (GOLDEN / "op-frame-request-import.bin").read_bytes()
    order = ORDERS["import"]
    frame, behind = stream[4 : -len(UPLOAD)], stream[4 + int.from_bytes(stream[:4], "big") :]
    assert json.loads(frame) == json.loads(order.frame[4:])
    assert behind == order.upload


def test_every_operation_runs_as_the_page_says():
    flags = {name: order.flags for name, order in ORDERS.items()}
    assert flags == {
        **dict.fromkeys(("accept", "import", "import-plain", "salvage"), BULK),
        "verify": BULK | READ_ONLY,
        **dict.fromkeys(("export", "schema"), READ_ONLY),
        **dict.fromkeys(("batch", "rows"), 0),
    }
    assert [order.flags for order in (schema_order(read_only=False), export_order(read_only=False))] == [0, 0]
    assert batch_order(STEPS, "number", CAP, read_only=True).flags == READ_ONLY


def test_what_grows_past_the_frame_is_refused_in_every_order_that_takes_a_callers_words():
    statement = Statement("SELECT ?", [1e15] * 100, "number")
    for make in (
        lambda: request_frame(statement, 1000),
        lambda: rows_order(statement, 1000),
        lambda: batch_order([Step(statement.sql, statement.args)], "number", 1000),
        lambda: import_order(b"", **{**PLAIN, "table": "t" * 1000}, null=None, cap=1000),
    ):
        with pytest.raises(errors.BodyTooLargeError):
            make()


# Which operation each golden reply is to, and what error it stands for.
REPLIES = {
    "op-reply-accepted": ("accept", None),
    "op-reply-batch": ("batch", None),
    "op-reply-file-refused": ("accept", errors.FileRefusedError),
    "op-reply-import-invalid": ("import", errors.ImportInvalidError),
    "op-reply-import-invalid-no-line": ("import", errors.ImportInvalidError),
    "op-reply-imported": ("import", None),
    "op-reply-report-salvage": ("salvage", None),
    "op-reply-report-verify": ("verify", None),
    "op-reply-schema": ("schema", None),
    "op-reply-step-failed": ("batch", errors.InvalidSqlError),
    "op-reply-step-failed-timeout": ("batch", errors.QueryTimeoutError),
    "op-reply-unsettled": ("schema", errors.InternalError),
}
FOUR_STEPS = batch_order(STEPS[:4], "number", CAP)


def order_for(op: str) -> Order:
    return FOUR_STEPS if op == "batch" else ORDERS[op]


def test_every_golden_reply_to_an_operation_is_covered():
    assert {path.stem for path in GOLDEN.glob("op-reply-*.json") if "reply-invalid" not in path.stem} == set(REPLIES)


@pytest.mark.parametrize("name", REPLIES)
def test_every_golden_reply_to_an_operation_is_read_unchanged_or_is_its_error(name):
    op, error = REPLIES[name]
    raw = (GOLDEN / f"{name}.json").read_bytes()
    reply = read_reply(raw, order_for(op))
    if error is None:
        written = msgspec.json.decode(msgspec.json.encode(reply))
        assert repr(sorted(written.items())) == repr(sorted(json.loads(raw).items()))
    else:
        assert isinstance(reply, Failing)
        assert type(error_of(reply)) is error


@pytest.mark.parametrize("name", REPLIES)
def test_a_golden_reply_is_invalid_to_every_operation_that_it_is_not_of(name):
    raw = (GOLDEN / f"{name}.json").read_bytes()
    own = {REPLIES[name][0]}
    if "unsettled" in name:
        own = set(ORDERS)
    if "report-verify" in name:  # which finds something: a file that is not accepted is told the same way
        own.add("accept")
    for op in {*ORDERS} - own - {"import-plain"}:
        with pytest.raises(ReplyInvalidError):
            read_reply(raw, order_for(op))


def changes(value: object) -> Iterator[object]:
    """The value with one thing in it changed: a key gone, one more, a value of another type."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {other: each for other, each in value.items() if other != key}
            yield from ({**value, key: changed} for changed in changes(inner))
        yield {**value, "further": 1}
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from ([*value[:place], changed, *value[place + 1 :]] for changed in changes(inner))
        yield {"0": value}
    else:
        yield [value]
        yield -1
        yield 1.5
        yield "\ud800"


@pytest.mark.parametrize("name", REPLIES)
def test_a_golden_reply_that_differs_in_one_place_is_invalid_or_still_of_the_form(name):
    op, _ = REPLIES[name]
    golden = json.loads((GOLDEN / f"{name}.json").read_bytes())
    invalid = 0
    for changed in changes(golden):
        try:
            reply = read_reply(json.dumps(changed).encode(), order_for(op))
        except ReplyInvalidError:
            invalid += 1
            continue
        # The values of rows and arrays of nothing take what they are given; nothing else does.
        assert msgspec.json.decode(msgspec.json.encode(reply)) == changed
        assert op == "batch"
    assert invalid > len(golden)


RESULT = {"columns": ["a"], "rows": [[1]], "rows_affected": 0, "truncated": False, "skipped": False}
NOTHING = {"columns": None, "rows": [], "rows_affected": 0, "truncated": False, "skipped": True}
ONE_STEP = batch_order(STEPS[:1], "number", CAP)


@pytest.mark.parametrize(
    ("op", "reply"),
    [
        ("batch", {"verdict": "batch", "results": []}),
        ("batch", {"verdict": "batch", "results": [RESULT, RESULT]}),
        ("batch", {"verdict": "batch", "results": [{**RESULT, "rows": [[1, 2]]}]}),
        ("batch", {"verdict": "batch", "results": [{**RESULT, "skipped": True}]}),
        ("batch", {"verdict": "batch", "results": [{**NOTHING, "rows_affected": 1}]}),
        ("batch", {"verdict": "batch", "results": [{**NOTHING, "rows": [[]]}]}),
        ("batch", {"verdict": "step_failed", "step": 1, "failure": {"verdict": "timeout"}}),
        ("batch", {"verdict": "step_failed", "step": 0, "failure": {"v": 1, "verdict": "timeout"}}),
        ("batch", {"verdict": "step_failed", "step": 0, "failure": {"verdict": "batch", "results": []}}),
        ("import", {"verdict": "import_invalid", "line": 0, "message": ""}),
        ("import", {"verdict": "imported", "table": "t", "created": False, "columns": [["a"]], "rows": 1}),
        ("accept", {"verdict": "accepted", "size": 1, "sha256": "0" * 64, "converted": ["page_size", "page_size"]}),
        ("accept", {"verdict": "accepted", "size": 1, "sha256": "0" * 63, "converted": []}),
        ("accept", {"verdict": "report", "report": report()}),
        ("accept", {"verdict": "report", "report": report("salvage")}),
        ("verify", {"verdict": "report", "report": report("salvage")}),
        ("verify", {"verdict": "report", "report": report(ok=False)}),
        ("verify", {"verdict": "report", "report": report(findings=[FINDING])}),
        ("verify", {"verdict": "report", "report": report(unassigned=1)}),
        ("verify", {"verdict": "report", "report": report(ok=False, findings=[{**FINDING, "code": "unknown"}])}),
        ("verify", {"verdict": "report", "report": report(ok=False, findings=[FINDING] * 101)}),
        ("salvage", {"verdict": "report", "report": report()}),
        ("rows", {"verdict": "rows", "columns": []}),
    ],
)
def test_a_reply_that_contradicts_itself_or_its_order_is_invalid(op, reply):
    with pytest.raises(ReplyInvalidError):
        read_reply(json.dumps({"v": 1, **reply}).encode(), ONE_STEP if op == "batch" else ORDERS[op])


def test_no_verdict_goes_without_its_version_but_a_steps():
    for op, order in ORDERS.items():
        with pytest.raises(ReplyInvalidError):
            read_reply(b'{"verdict":"timeout"}', order)
        assert read_reply(b'{"v":1,"verdict":"timeout"}', order), op
    with pytest.raises(ReplyInvalidError):
        decode_reply(b'{"verdict":"timeout"}', "number")


def test_a_failing_steps_error_says_which_it_was():
    reply = read_reply(b'{"v":1,"verdict":"step_failed","step":0,"failure":{"verdict":"damaged","message":"x"}}', ONE_STEP)
    error = error_of(reply)
    assert isinstance(error, errors.DatabaseDamagedError)
    assert error.extra == {"statement": 0}


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["v", "verdict", "rows", "columns"]), inner),
    max_leaves=8,
)


@given(op=st.sampled_from(sorted(ORDERS)), name=st.sampled_from(sorted(REPLIES)), put=_json, seed=st.randoms())
def test_no_reply_to_an_operation_raises_anything_but_reply_invalid(op, name, put, seed):
    golden = json.loads((GOLDEN / f"{name}.json").read_bytes())
    golden[seed.choice(sorted(golden))] = put
    for raw in (json.dumps(golden).encode(), json.dumps(put).encode()):
        with contextlib.suppress(ReplyInvalidError):
            read_reply(raw, order_for(op))


# ── errors


def test_what_a_runner_says_about_itself_reaches_the_log_only_as_a_class_name():
    with pytest.raises(errors.InternalError) as failed:
        rows_or_raise(decode_reply(b'{"v":1,"verdict":"internal","message":"SELECT secret"}', "number"))
    assert "secret" not in failed.value.reason
    with pytest.raises(errors.InternalError) as failed:
        rows_or_raise(decode_reply(b'{"v":1,"verdict":"internal","message":"KeyError"}', "number"))
    assert "KeyError" in failed.value.reason


def test_the_reason_of_an_unconfined_runner_is_one_short_escaped_line():
    message = "Landlock\n2026 forged line\x1b[2J" + "x" * 1000
    with pytest.raises(errors.InternalError) as failed:
        rows_or_raise(decode_reply(json.dumps({"v": 1, "verdict": "unconfined", "message": message}).encode(), "number"))
    assert failed.value.reason.isprintable()
    assert len(failed.value.reason) < 300


def test_every_end_without_a_reply_is_an_error_of_its_own_side():
    expected = {
        Verdict.EXITED: "runner_failed",
        Verdict.DEADLINE: "query_timeout",
        Verdict.OUT_OF_MEMORY: "memory_limit",
        Verdict.SIGNALLED: "runner_failed",
        Verdict.CANCELLED: "runner_failed",
        Verdict.LOST: "engine_unavailable",
    }
    assert {verdict: error_without_reply(verdict).code for verdict in Verdict} == expected


async def answered(stream: bytes, cap: int = CAP) -> bytes | None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(stream)
        return await exchange(ours, b"", cap)


@pytest.mark.parametrize("name", ["frame-reply-select.bin"])
async def test_a_golden_reply_stream_is_one_frame(name):
    raw = (GOLDEN / name).read_bytes()
    assert await answered(raw) == raw[4:]


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("frame-*invalid-*.bin")))
async def test_every_golden_stream_that_is_not_one_frame_is_invalid(name):
    with pytest.raises(ReplyInvalidError):
        await answered((GOLDEN / name).read_bytes())


@pytest.mark.parametrize(
    "stream",
    [
        b"\0",
        b"\0\0\0\1",
        b"\0\0\0\0",
        b"\0\0\0\2{",
        b"\0\0\0\2{}\0",
        b"\0\0\0\2{}\0\0\0\2{}",
        struct.pack("!I", CAP + 1),
        b"\xff" * 8,
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
async def test_a_stream_cut_doubled_or_oversized_is_invalid(stream):
    with pytest.raises(ReplyInvalidError):
        await answered(stream)


async def test_a_whole_frame_is_believed_up_to_the_cap_and_not_one_byte_further():
    assert await answered(frame(b"x" * 1000), cap=1000) == b"x" * 1000
    with pytest.raises(ReplyInvalidError):
        await answered(frame(b"x" * 1001), cap=1000)
    with pytest.raises(ReplyInvalidError):
        await answered(frame(b""), cap=1000)


async def test_a_stream_without_a_byte_is_no_reply():
    assert await answered(b"") is None


async def test_a_frame_arrives_whole_whatever_the_pieces():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        reading = asyncio.ensure_future(exchange(ours, b"", CAP))
        for byte in b"\0\0\0\2{}":
            await asyncio.get_running_loop().sock_sendall(theirs, bytes([byte]))
            await asyncio.sleep(0)
        theirs.close()
        assert await reading == b"{}"


async def test_a_whole_frame_is_answered_without_waiting_for_the_end_of_the_stream():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"\0\0\0\2{}")
        assert await exchange(ours, b"", CAP) == b"{}"


async def test_a_runner_that_answers_without_reading_is_heard():
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(b"\0\0\0\2{}")
        assert await exchange(ours, b"x" * (4 << 20), CAP) == b"{}"


async def test_a_frame_is_in_the_socket_at_once_and_one_that_does_not_fit_follows_as_it_is_read():
    sent = bytes(range(256)) * (16 << 10)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        reading = asyncio.ensure_future(exchange(ours, sent, CAP))
        await asyncio.sleep(0)
        received = theirs.recv(len(sent))
        assert 0 < len(received) < len(sent)
        while len(received) < len(sent):
            received += await asyncio.get_running_loop().sock_recv(theirs, len(sent))
        assert received == sent
        theirs.sendall(b"\0\0\0\2{}")
        assert await reading == b"{}"


async def test_an_endless_reply_is_cut_at_the_cap_and_not_collected():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        writing = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(theirs, struct.pack("!I", 10) + b"x" * (8 << 20)))
        with pytest.raises(ReplyInvalidError):
            await exchange(ours, b"", CAP)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
