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

from runner.frames import NoRequestError, framed, read_frame, read_upload, write_all
from runner.wire import (
    SKIPPED_STEP,
    ImportInvalidError,
    Operation,
    ResultFullError,
    RowEncoder,
    StepFailedError,
    Verdict,
    VerdictError,
    decode_request,
    encode_batch,
    encode_columns,
    encode_error,
    encode_failure,
    encode_reply,
    encode_result,
    encode_step,
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


FAILURES = [name for name in names("reply-*.json") if "reply-invalid" not in name and b'"ok"' not in (GOLDEN / name).read_bytes()]


@pytest.mark.parametrize("name", FAILURES)
def test_every_golden_failure_is_written(name):
    golden = json.loads((GOLDEN / name).read_bytes())
    assert same(encode_failure(Verdict(golden["verdict"]), golden.get("message", "left out")), name)


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
            return read_frame(reader, cap)[0]
        finally:
            sender.join()
    finally:
        os.close(reader)


@pytest.mark.parametrize("length", [1, 4091, 4092, 4093, 70_000])
def test_what_follows_a_frame_is_no_part_of_it(length):
    reading, writing = os.pipe()
    payload = bytes(index % 251 for index in range(length))
    writer = threading.Thread(target=lambda: (write_all(writing, framed(payload)), os.write(writing, b"more"), os.close(writing)))
    writer.start()
    found, behind = read_frame(reading, 100_000)
    assert found == payload
    assert read_upload(reading, 4, behind) == b"more"
    writer.join()
    os.close(reading)


def test_a_golden_stream_is_read_and_written():
    stream = (GOLDEN / "frame-request-select.bin").read_bytes()
    assert through_a_pipe(stream, 1 << 20) == (GOLDEN / "request-select.json").read_bytes()
    reader, writer = os.pipe()
    write_all(writer, framed((GOLDEN / "reply-select.json").read_bytes()))
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


# --- operations


def operation(name: str) -> Operation:
    read = decode_request((GOLDEN / name).read_bytes())
    assert isinstance(read, Operation)
    return read


def test_every_golden_operation_is_read():
    read = {name: operation(name) for name in names("op-request-*.json") if "invalid" not in name}
    assert {name: op.name for name, op in read.items()} == {
        f"op-request-{op}.json": op.partition("-")[0]
        for op in ("rows", "batch", "schema", "export", "import", "import-plain", "accept", "verify", "salvage")
    }
    rows = read["op-request-rows.json"].content
    assert (rows.sql, rows.args, rows.int64_as_string) == ("SELECT a FROM t WHERE a > :least", {"least": 1}, True)
    steps = read["op-request-batch.json"].content
    assert [step.condition for step in steps] == [None, "unchanged", "changed", "rows", "no_rows"]
    assert (steps[0].request.args, steps[2].request.args) == ([2, 9007199254740993], {"a": 1})
    order = read["op-request-import.json"]
    assert order.upload_bytes == 17
    assert order.content == {
        "table": "people", "format": "csv", "columns": [("name", "TEXT"), ("age", None)],
        "header": True, "delimiter": ",", "null": "",
    }  # fmt: skip
    assert read["op-request-import-plain.json"].content["columns"] is read["op-request-import-plain.json"].content["null"] is None
    assert read["op-request-accept.json"].upload_bytes == 8192


@pytest.mark.parametrize("name", names("op-request-invalid-*.json"))
def test_a_golden_operation_that_breaks_the_format_is_refused(name):
    with pytest.raises(VerdictError) as refusal:
        decode_request((GOLDEN / name).read_bytes())
    assert refusal.value.verdict is Verdict.REQUEST_INVALID


def test_a_batch_has_a_thousand_steps_at_most():
    def batch(count: int) -> bytes:
        steps = [{"sql": "", "args": None, "if": None}] * count
        return json.dumps({"v": 1, "op": "batch", "int64": "number", "steps": steps}).encode()

    assert len(decode_request(batch(1000)).content) == 1000
    with pytest.raises(VerdictError, match="steps"):
        decode_request(batch(1001))


def test_a_value_that_is_none_is_the_failure_of_its_step():
    steps = [{"sql": "SELECT ?", "args": [value], "if": None} for value in (1, {"$int": "x"})]
    with pytest.raises(StepFailedError) as refusal:
        decode_request(json.dumps({"v": 1, "op": "batch", "int64": "number", "steps": steps}).encode())
    assert (refusal.value.step, refusal.value.failure.verdict) == (1, Verdict.ARGS_INVALID)


@pytest.mark.parametrize("key", ["v", "op", "upload", "table", "format", "columns", "header", "delimiter", "null"])
@pytest.mark.parametrize("value", [[], {}, -1, 0.5, "\ud800", "several"])
def test_no_key_of_an_operation_takes_what_it_should_not(key, value):
    if (key, value) in [("columns", []), ("table", "several"), ("null", "several")]:
        return
    document = json.loads((GOLDEN / "op-request-import.json").read_bytes()) | {key: value}
    with pytest.raises(VerdictError) as refusal:
        decode_request(json.dumps(document).encode())
    assert refusal.value.verdict is Verdict.REQUEST_INVALID


def test_every_golden_failure_of_an_operation_is_written():
    no_table = VerdictError(Verdict.SQL_ERROR, "no such table: t")
    assert same(encode_error(StepFailedError(2, no_table)), "op-reply-step-failed.json")
    assert same(encode_error(StepFailedError(0, VerdictError(Verdict.TIMEOUT))), "op-reply-step-failed-timeout.json")
    assert same(encode_error(ImportInvalidError(3, "2 fields, not 3")), "op-reply-import-invalid.json")
    assert same(encode_error(ImportInvalidError(None, "not UTF-8")), "op-reply-import-invalid-no-line.json")
    assert same(encode_error(VerdictError(Verdict.UNSETTLED)), "op-reply-unsettled.json")


def test_a_golden_batch_is_written():
    values = RowEncoder(1 << 20, False)
    rows = [values.encode([1]), values.encode([b"\x00\x01\x02\xff"])]
    results = [encode_step(None, [], 0, False), encode_step(None, [], 1, False), encode_step(encode_columns(["a"]), rows, 0, True)]
    assert same(encode_batch([*results, SKIPPED_STEP]), "op-reply-batch.json")


def test_a_golden_upload_is_read_behind_its_frame():
    stream = (GOLDEN / "op-frame-request-import.bin").read_bytes()
    reading, writing = os.pipe()
    os.write(writing, stream)
    frame, behind = read_frame(reading, 1 << 20)
    assert read_upload(reading, decode_request(frame).upload_bytes, behind) == "name,age\nÄda,36\n".encode()
    os.write(writing, (GOLDEN / "op-frame-request-invalid-upload-short.bin").read_bytes())
    os.close(writing)
    frame, behind = read_frame(reading, 1 << 20)
    with pytest.raises(NoRequestError):
        read_upload(reading, decode_request(frame).upload_bytes, behind)
    os.close(reading)


def test_text_of_any_bytes_can_be_told():
    assert json.loads(encode_reply("schema", {"tables": [{"name": "a\udcff"}]})) == {
        "v": 1, "verdict": "schema", "tables": [{"name": "a\ufffd"}],
    }  # fmt: skip
