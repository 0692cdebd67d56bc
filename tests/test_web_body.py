"""Bodies: what is read, what is refused and in which words. Never anything but an ApiError."""

from __future__ import annotations

import asyncio
import contextlib
import json
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiohttp import streams
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from gateway.web.body import JSON_TYPES, Bodies, Step, check_headers, decoded, mebibytes_begun, parse
from gateway.web.errors import (
    ApiError,
    BodyTooLargeError,
    InvalidArgsError,
    InvalidJsonError,
    MissingSqlError,
    OverloadedError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from gateway.web.room import Loan, Room
from gateway.web.runner import request_frame

from .fake_launcher import GOLDEN

CAP = 1 << 21
ARGUMENT_FAULTS = sorted(path.name for path in GOLDEN.glob("request-args-invalid-*.json"))
GOOD = sorted(path.name for path in GOLDEN.glob("request-*.json") if "invalid" not in path.name)


def typed(value):
    """A comparison that tells 1 from 1.0 and -0.0 from 0.0."""
    return repr(value)


def as_body(name: str) -> bytes:
    """A golden request without its version is a body: the text is cut, so every byte of its values stays."""
    raw = (GOLDEN / name).read_bytes()
    assert raw.startswith(b'{"v":1,')
    return b"{" + raw[len(b'{"v":1,') :]


@pytest.mark.parametrize("name", GOOD)
def test_every_golden_request_is_written_from_its_body(name):
    frame = request_frame(parse(as_body(name)), CAP)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert typed(sorted(json.loads(frame[4:]).items())) == typed(sorted(json.loads((GOLDEN / name).read_bytes()).items()))


def test_a_whole_request_stream_is_the_golden_one():
    stream = (GOLDEN / "frame-request-select.bin").read_bytes()
    assert request_frame(parse(as_body("request-select.json")), CAP) == stream


@pytest.mark.parametrize("name", ARGUMENT_FAULTS)
def test_every_golden_fault_in_the_arguments_is_refused_before_a_container_starts(name):
    with pytest.raises((InvalidArgsError, InvalidJsonError)) as refused:
        parse(as_body(name))
    assert refused.value.hint
    if "surrogate" not in name:
        assert isinstance(refused.value, InvalidArgsError)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"SELECT 1"',
        b'{"sql":"SELECT 1"',
        b'{"sql":"SELECT 1"}x',
        b'{"sql":"SELECT 1","extra":1}',
        b"{'sql':'SELECT 1'}",
        b'{"sql":"a\x00b"}',
        b'{"sql":"\xff"}',
        b'{"sql":"\xed\xa0\x80"}',
        b'{"sql":"\\ud800"}',
        b'{"sql":"\\udc00\\ud800"}',
        b'\xef\xbb\xbf{"sql":"SELECT 1"}',
        b'{"sql":"SELECT 1","args":[NaN]}',
        b'{"sql":"SELECT 1","args":[Infinity]}',
        b'{"sql":"SELECT 1","args":["\\ud800"]}',
        b'{"sql":"SELECT 1","int64":"both"}',
        b'{"sql":"SELECT 1","int64":null}',
        b'{"sql":"SELECT 1","args":' + b"[" * 400_000 + b"]" * 400_000 + b"}",
        b'{"sql":"SELECT 1","args":' + b'{"a":' * 100_000,
        b'{"sql":' + b"[" * 400_000,
        b"[" * 400_000,
    ],
)
def test_what_is_not_one_strict_object_is_invalid_json_with_a_hint(body):
    with pytest.raises(InvalidJsonError) as refused:
        parse(body)
    assert refused.value.hint


def test_the_hint_names_the_unknown_field():
    with pytest.raises(InvalidJsonError) as refused:
        parse(b'{"sql":"SELECT 1","sqll":1}')
    assert "sqll" in refused.value.hint


@pytest.mark.parametrize(
    "body", [b"{}", b'{"sql":null}', b'{"sql":""}', b'{"sql":" \\n\\t"}', b'{"sql":1}', b'{"sql":["SELECT 1"]}', b'{"args":[1]}']
)
def test_sql_that_is_absent_empty_or_no_string_is_missing(body):
    with pytest.raises(MissingSqlError):
        parse(body)


@pytest.mark.parametrize(
    "args",
    [
        b'"x"',
        b"5",
        b"true",
        b"[[1]]",
        b'{"a":[1]}',
        b'[{"a":1}]',
        b'[{"$blob":null}]',
        b'{"a":{"b":{"c":1}}}',
        b"[9223372036854775808]",
        b"[-9223372036854775809]",
        b"[1e400]",
        b'[{"$int":"9223372036854775808"}]',
        b'[{"$int":"1.0"}]',
        b'[{"$int":"+1"}]',
        b'[{"$int":"\\u0661"}]',
        b'[{"$int":""}]',
        b'[{"$real":"NaN"}]',
        b'[{"$real":"1.5"}]',
        b'[{"$text":"AAE"}]',
        b'[{"$text":"AAF="}]',
        b'[{"$blob":"-_-_"}]',
        b'[{"$blob":"A A="}]',
    ],
)
def test_an_argument_without_a_documented_form_is_invalid_args(args):
    with pytest.raises(InvalidArgsError) as refused:
        parse(b'{"sql":"SELECT ?","args":' + args + b"}")
    assert refused.value.hint


def test_numbers_that_grow_past_the_frame_when_written_out_are_refused_as_too_large():
    statement = parse(b'{"sql":"SELECT 1","args":[' + b",".join([b"1e15"] * 200) + b"]}")
    with pytest.raises(BodyTooLargeError):
        request_frame(statement, 2048)


def test_an_argument_that_looks_like_the_envelope_stays_a_value():
    statement = parse(b'{"sql":"SELECT ?","args":["\\"int64\\":\\"string\\""]}')
    assert json.loads(request_frame(statement, CAP)[4:]) == {
        "v": 1,
        "sql": "SELECT ?",
        "args": ['"int64":"string"'],
        "int64": "number",
    }


def test_a_hint_about_arguments_does_not_take_their_text_along():
    with pytest.raises(InvalidArgsError) as refused:
        parse(b'{"sql":"SELECT 1","args":[{"private words":"x"}]}')
    assert "private" not in refused.value.hint


@given(st.binary(max_size=300))
def test_M9_no_bytes_raise_anything_but_an_api_error(raw):
    with contextlib.suppress(ApiError):
        parse(raw)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=20,
)


@given(sql=_json, args=_json, int64=st.sampled_from(["number", "string", None, 3]))
def test_no_json_raises_anything_but_an_api_error_and_what_passes_arrives_unchanged(sql, args, int64):
    try:
        statement = parse(json.dumps({"sql": sql, "args": args, "int64": int64}).encode())
        frame = request_frame(statement, CAP)
    except ApiError:
        return
    assert typed(json.loads(frame[4:])) == typed({"v": 1, "sql": sql, "args": args, "int64": int64})


def test_more_arguments_than_any_script_takes_are_refused():
    with pytest.raises(InvalidArgsError):
        parse(b'{"sql": "SELECT 1", "args": [' + b",".join([b"7"] * 10_001) + b"]}")
    parse(b'{"sql": "SELECT 1", "args": [' + b",".join([b"7"] * 10_000) + b"]}")


# ── headers, size and time

MIB = 1 << 20
TABLES = ("", "text/csv", "application/json")


@pytest.mark.parametrize(
    ("headers", "types", "found"),
    [
        ({}, JSON_TYPES, ""),
        ({"Content-Type": "application/json"}, JSON_TYPES, "application/json"),
        ({"Content-Type": 'Application/JSON ; charset="UTF-8"'}, JSON_TYPES, "application/json"),
        ({"Content-Type": "application/json", "Content-Encoding": "identity"}, JSON_TYPES, "application/json"),
        ({"Content-Type": "text/csv;charset=utf-8"}, TABLES, "text/csv"),
        ({"Content-Type": "application/vnd.sqlite3"}, ("application/vnd.sqlite3",), "application/vnd.sqlite3"),
        ({}, ("text/csv",), None),
        ({"Content-Type": "text/csv"}, JSON_TYPES, None),
        ({"Content-Type": ""}, JSON_TYPES, None),
        ({"Content-Type": "application/json; charset=latin-1"}, JSON_TYPES, None),
        ({"Content-Type": "application/json; profile=x"}, JSON_TYPES, None),
        ({"Content-Type": "application/json, text/csv"}, TABLES, None),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, JSON_TYPES, None),
        ({"Content-Encoding": "br"}, TABLES, None),
    ],
)
def test_a_body_is_what_its_route_takes_or_is_refused_by_its_headers(headers, types, found):
    request = make_mocked_request("POST", "/", headers=headers)
    if found is None:
        with pytest.raises(UnsupportedMediaTypeError) as refused:
            check_headers(request, 10, types)
        assert refused.value.hint
    else:
        assert check_headers(request, 10, types) == found


def test_a_declared_length_beyond_the_limit_is_refused_by_the_header_and_one_up_to_it_is_not():
    check_headers(make_mocked_request("POST", "/", headers={"Content-Length": "10"}), 10)
    with pytest.raises(BodyTooLargeError):
        check_headers(make_mocked_request("POST", "/", headers={"Content-Length": "11"}), 10)


@pytest.mark.parametrize(("size", "begun"), [(0, 1), (1, 1), (MIB, 1), (MIB + 1, 2), (10 * MIB, 10)])
def test_a_mebibyte_counts_as_soon_as_it_is_begun(size, begun):
    assert mebibytes_begun(size) == begun


class Upload:
    """A body that arrives as the test likes, and where its loan is."""

    def __init__(self, declared: int | None = None, room: Room | None = None) -> None:
        self.content = streams.StreamReader(_Unpaused(), limit=1 << 30, loop=asyncio.get_running_loop())  # type: ignore[arg-type]
        self.loan = Loan(room or Room(), "192.0.2.1")
        self.request: Any = SimpleNamespace(content=self.content, content_length=declared)

    def read(self, seconds: float, max_bytes: int = 10 * MIB) -> asyncio.Task[bytes]:
        return asyncio.ensure_future(Bodies(seconds).read(self.request, self.loan, max_bytes))


class _Unpaused:
    connected = True
    _reading_paused = False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self, resume_parser: bool = True) -> None:
        pass


async def test_a_body_is_held_by_its_loan_byte_for_byte_whether_it_came_with_its_head_or_later():
    for late in (False, True):
        upload = Upload()
        if late:
            reading = upload.read(60.0)
            await asyncio.sleep(0)
        upload.content.feed_data(b"abc")
        upload.content.feed_data(b"def")
        upload.content.feed_eof()
        assert await (reading if late else upload.read(60.0)) == b"abcdef"
        assert upload.loan.size == 6


async def test_a_body_beyond_its_limit_or_its_room_is_refused_while_it_arrives():
    for room, max_bytes, error in ((Room(), 5, BodyTooLargeError), (Room(9, share=1), 10, OverloadedError)):
        upload = Upload(room=room)
        reading = upload.read(60.0, max_bytes)
        upload.content.feed_data(b"abc")
        await asyncio.sleep(0)
        upload.content.feed_data(b"def")
        with pytest.raises(error):
            await reading


async def test_a_body_has_its_time_for_each_mebibyte_and_none_saves_any_up():
    loop, seconds = asyncio.get_running_loop(), 0.4
    upload = Upload(9 * MIB)
    upload.content.feed_data(bytes(8 * MIB))
    began = loop.time()
    reading = upload.read(seconds)
    await asyncio.sleep(seconds / 2)
    upload.content.feed_data(bytes(10))  # the ninth is begun
    resumed = loop.time()
    with pytest.raises(RequestTimeoutError):
        await reading
    assert loop.time() - resumed >= seconds - 0.01
    assert loop.time() - began < 8 * seconds


async def test_a_trickle_gets_no_more_time_than_one_piece():
    upload = Upload(100)
    reading = upload.read(0.2)
    while not reading.done():
        upload.content.feed_data(b"x" if upload.content.total_bytes < 50 else b"")
        await asyncio.sleep(0.02)
    with pytest.raises(RequestTimeoutError):
        await reading


# ── what other bodies of JSON share


def test_other_bodies_of_json_are_refused_in_the_same_words():
    decoder = msgspec.json.Decoder(list[int])
    assert decoded(b"[1,2]", decoder, "a list") == [1, 2]
    for raw, hint in ((b"[1", "truncated"), (b'["\xff"]', "UTF-8"), (b"{}", "the body is a list"), (b"[" * 500_000, "")):
        with pytest.raises(InvalidJsonError) as refused:
            decoded(raw, decoder, "a list")
        assert hint in str(refused.value.hint)


def test_a_step_is_written_with_its_condition_as_if():
    assert json.loads(msgspec.json.encode(Step("SELECT 1", [1], "changed"))) == {"sql": "SELECT 1", "args": [1], "if": "changed"}
    assert json.loads(msgspec.json.encode(Step("SELECT 1", None)))["if"] is None
