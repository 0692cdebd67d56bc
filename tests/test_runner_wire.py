"""The runner's side of docs/wire.md: golden frames, values in both directions, and what is refused."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.wire import (
    NoRequestError,
    ResultFullError,
    RowEncoder,
    Verdict,
    VerdictError,
    decode_request,
    encode_columns,
    encode_failure,
    encode_result,
    read_frame,
    write_frame,
)

from .runner_database import TenantDatabase

GOLDEN = Path(__file__).parent / "golden"

VALUES = [
    None,
    0,
    -1,
    2**63 - 1,
    -(2**63),
    9007199254740993,
    1.5,
    -0.0,
    1e308,
    5e-324,
    math.inf,
    -math.inf,
    "",
    "plain",
    "naïve – 東京 🦋",
    "a\0b",
    '\x7f\x01"\\/\u2028',
    "\udcff",
    "\udced\udca0\udc80",
    b"",
    b"\x00\x01\x02\xff",
]


def names(pattern: str) -> list[str]:
    found = sorted(path.name for path in GOLDEN.glob(pattern))
    assert found
    return found


def typed(value):
    """Tells 1 from 1.0 and 0.0 from -0.0."""
    if isinstance(value, list):
        return [typed(item) for item in value]
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    return (type(value), repr(value))


def test_every_golden_request_that_is_in_order_is_read():
    read = {name: decode_request((GOLDEN / name).read_bytes()) for name in names("request-*.json") if "invalid" not in name}
    select = read["request-select.json"]
    assert (select.sql, select.args, select.int64_as_string) == ("SELECT 1 AS one, 'two' AS two", None, False)
    assert read["request-int64-string.json"].int64_as_string
    assert typed(read["request-args-object.json"].args) == typed({"n": 1.0, "other": b"\x00\x01\x02\xff"})
    assert typed(read["request-args-every-value.json"].args) == typed([*VALUES, 1, 0, 2**63 - 1])
    assert read["request-several-statements.json"].args == [1, 2]


@pytest.mark.parametrize("name", names("request-invalid-*.json"))
def test_a_golden_request_that_breaks_the_format_is_refused(name):
    with pytest.raises(VerdictError) as refusal:
        decode_request((GOLDEN / name).read_bytes())
    assert refusal.value.verdict is Verdict.REQUEST_INVALID


@pytest.mark.parametrize("name", names("request-args-invalid-*.json"))
def test_a_golden_request_with_a_value_that_is_none_is_refused_as_such(name):
    with pytest.raises(VerdictError) as refusal:
        decode_request((GOLDEN / name).read_bytes())
    assert refusal.value.verdict is Verdict.ARGS_INVALID


def test_a_request_nested_without_end_is_refused():
    with pytest.raises(VerdictError) as refusal:
        decode_request(b'{"v":1,"sql":"","int64":"number","args":' + b"[" * 100_000)
    assert refusal.value.verdict is Verdict.REQUEST_INVALID


def same(reply: bytes, name: str) -> bool:
    return typed(json.loads(reply)) == typed(json.loads((GOLDEN / name).read_bytes()))


def result(columns, rows, affected=0, truncated=False, int64_as_string=False) -> bytes:
    encoder = RowEncoder(1 << 20, int64_as_string)
    encoded = None if columns is None else encode_columns(columns)
    return encode_result(encoded, [encoder.encode(row) for row in rows], affected, truncated)


def test_every_golden_result_is_written():
    assert same(result(["one", "two"], [(1, "two")]), "reply-select.json")
    assert same(result(["value"], [(value,) for value in VALUES]), "reply-every-value.json")
    assert same(result(["9223372036854775807", "1.0"], [(2**63 - 1, 1.0)], int64_as_string=True), "reply-int64-string.json")
    assert same(result(None, [], 2), "reply-no-row-set.json")
    assert same(result(["a"], []), "reply-empty-row-set.json")
    assert same(result(["a", "a", ""], [(1, 2, 3)]), "reply-repeated-columns.json")
    assert same(result(["n"], [(1,), (2,), (3,)], truncated=True), "reply-truncated.json")


@pytest.mark.parametrize("verdict", [verdict for verdict in Verdict if verdict is not Verdict.OK])
def test_every_golden_failure_is_written(verdict):
    name = f"reply-{verdict.replace('_', '-')}.json"
    message = json.loads((GOLDEN / name).read_bytes()).get("message", "left out")
    assert same(encode_failure(verdict, message), name)


def test_a_message_is_cut_and_holds_no_surrogates():
    reply = json.loads(encode_failure(Verdict.SQL_ERROR, "\udcff\ud800" + "é" * 2000).decode("utf-8"))
    assert reply["message"] == "\ufffd\ufffd" + "é" * 998
    assert json.loads(encode_columns(["a\udcff"]).decode("utf-8")) == ["a\ufffd"]


def test_a_row_that_cannot_fit_is_refused_before_it_is_built():
    with pytest.raises(ResultFullError):
        RowEncoder(1 << 20, False).encode(["\x01" * 300_000] * 100)
    with pytest.raises(ResultFullError):
        RowEncoder(1 << 20, False).encode([bytes(300_000)] * 100)
    assert len(RowEncoder(1 << 20, False).encode(["x" * 300_000])) == 300_004


def through_a_pipe(data: bytes, cap: int) -> bytes:
    reader, writer = os.pipe()
    try:
        sender = threading.Thread(target=lambda: (os.write(writer, data), os.close(writer)))
        sender.start()
        try:
            return read_frame(reader, cap)
        finally:
            sender.join()
    finally:
        os.close(reader)


@pytest.mark.parametrize("length", [1, 4091, 4092, 4093, 70_000])
def test_what_follows_a_frame_is_no_part_of_it(length):
    reading, writing = os.pipe()
    payload = bytes(index % 251 for index in range(length))
    writer = threading.Thread(target=lambda: (write_frame(writing, payload), os.write(writing, b"more"), os.close(writing)))
    writer.start()
    assert read_frame(reading, 100_000) == payload
    writer.join()
    os.close(reading)


def test_a_golden_stream_is_read_and_written():
    stream = (GOLDEN / "frame-request-select.bin").read_bytes()
    assert through_a_pipe(stream, 1 << 20) == (GOLDEN / "request-select.json").read_bytes()
    reader, writer = os.pipe()
    write_frame(writer, (GOLDEN / "reply-select.json").read_bytes())
    os.close(writer)
    assert os.read(reader, 1 << 16) == (GOLDEN / "frame-reply-select.bin").read_bytes()
    os.close(reader)


@pytest.mark.parametrize("name", ["frame-invalid-cut-short.bin", "frame-invalid-cut-in-length.bin"])
def test_a_stream_that_ends_early_is_no_request(name):
    with pytest.raises(NoRequestError):
        through_a_pipe((GOLDEN / name).read_bytes(), 1 << 20)


@pytest.mark.parametrize("name", ["frame-invalid-length-zero.bin", "frame-invalid-length-over-cap.bin"])
def test_a_length_outside_of_the_cap_is_refused_before_the_rest_is_read(name):
    with pytest.raises(VerdictError) as refusal:
        through_a_pipe((GOLDEN / name).read_bytes(), 1 << 20)
    assert refusal.value.verdict is Verdict.REQUEST_INVALID


def tagged(value):
    """A value as a caller writes it."""
    if isinstance(value, bytes):
        import base64

        return {"$blob": base64.b64encode(value).decode()}
    if isinstance(value, float) and math.isinf(value):
        return {"$real": "Infinity" if value > 0 else "-Infinity"}
    return value


plain_values = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=("Cs",))),
    st.binary(),
)


@pytest.fixture(scope="module")
def tenant(tmp_path_factory: pytest.TempPathFactory) -> TenantDatabase:
    database = TenantDatabase(tmp_path_factory.mktemp("values"))
    database.run("CREATE TABLE t(a)")
    return database


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(plain_values, min_size=1, max_size=8))
def test_M14_every_value_survives_the_way_through_sqlite(tenant, values):
    wanted = [tagged(value) for value in values]
    payload = json.dumps({"v": 1, "sql": f"SELECT {','.join('?' * len(values))}", "args": wanted, "int64": "number"})
    request = decode_request(payload.encode("utf-8"))
    assert typed(request.args) == typed(values)
    assert typed(tenant.rows(request.sql, request.args)) == typed([wanted])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=plain_values)
def test_every_value_survives_being_stored(tenant, value):
    assert typed(tenant.rows("DELETE FROM t; INSERT INTO t VALUES (?); SELECT a FROM t", [value])) == typed([[tagged(value)]])


@given(data=st.binary())
def test_text_of_any_bytes_has_one_form(data):
    text = data.decode("utf-8", "surrogateescape")
    ((form,),) = [json.loads(RowEncoder(1 << 20, False).encode([text]).decode("utf-8"))]
    payload = json.dumps({"v": 1, "sql": "", "args": [form], "int64": "number"}).encode()
    assert decode_request(payload).args == [text]


@given(payload=st.binary())
def test_no_payload_whatever_makes_the_decoder_fail_in_another_way(payload):
    with pytest.raises(VerdictError):
        decode_request(payload)
