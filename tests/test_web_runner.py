"""Reply frames: what is believed and, mostly, what is not."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import Verdict
from gateway.web import errors
from gateway.web.errors import ReplyInvalidError
from gateway.web.runner import Ok, decode_reply
from gateway.web.verdicts import error_without_reply, rows_or_raise

from .fake_launcher import GOLDEN, exchange, frame

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
