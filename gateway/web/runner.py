"""The web side of the frames in docs/wire.md: what is asked of a runner, and what it may answer. The answer is hostile input.

It has a size cap and a schema in which every key, type and range is fixed; what does not fit is ReplyInvalidError and is never
passed on, not even in part. What comes behind a reply's first frame is read in dialogue.py.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import msgspec

from ..protocol import BULK, NO_TAG, READ_ONLY
from .body import Int64Form, Statement, Step
from .errors import BodyTooLargeError, ReplyInvalidError
from .values import Int64, is_row_tag

_LENGTH = struct.Struct("!I")

Value = None | Int64 | float | str | dict[str, str]
Rows = list[list[Value]]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Place = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Digest = Annotated[str, msgspec.Meta(min_length=64, max_length=64, pattern=r"^[0-9a-f]*\Z")]
ImportFormat = Literal["csv", "json", "ndjson"]
Op = Literal["", "rows", "batch", "schema", "export", "import", "accept", "verify", "salvage"]


class _Strict(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Every key is there, and no other one."""


# ── replies


class _Reply(_Strict, frozen=True, tag_field="verdict"):
    v: Literal[1]


class Ok(_Reply, tag="ok", frozen=True):
    columns: list[str] | None
    rows: Rows
    rows_affected: Count
    truncated: bool


class RowsHead(_Reply, tag="rows", frozen=True):
    """Frames of rows follow."""

    columns: list[str] | None


class RowsEnd(_Strict, frozen=True):
    """The last frame behind the rows."""

    rows: Count
    rows_affected: Count
    stopped: Literal["timeout", "bytes", "error"] | None
    """Why not all came."""
    message: str | None
    """SQLite's words, of an error."""


class StepResult(_Strict, frozen=True):
    columns: list[str] | None
    rows: Rows
    rows_affected: Count
    truncated: bool
    skipped: bool


class Batch(_Reply, tag="batch", frozen=True):
    results: list[StepResult]


class Column(_Strict, frozen=True):
    name: str
    type: str
    not_null: bool
    default: str | None
    primary_key: Count
    hidden: bool


class Table(_Strict, frozen=True):
    name: str
    kind: Literal["table", "virtual", "shadow"]
    strict: bool
    without_rowid: bool
    rows: Count | None
    columns: list[Column]


class Index(_Strict, frozen=True):
    name: str
    table: str
    unique: bool
    origin: Literal["c", "u", "pk"]
    partial: bool
    columns: list[str | None]


class View(_Strict, frozen=True):
    name: str


class Trigger(_Strict, frozen=True):
    name: str
    table: str


class Schema(_Reply, tag="schema", frozen=True):
    tables: list[Table]
    indexes: list[Index]
    views: list[View]
    triggers: list[Trigger]
    page_bytes: Count
    used_bytes: Count
    free_bytes: Count


class FileHead(_Reply, tag="file", frozen=True):
    """So many bytes follow."""

    size: Count
    sha256: Digest


class Imported(_Reply, tag="imported", frozen=True):
    table: str
    created: bool
    columns: list[tuple[str, str]]
    rows: Count


class Accepted(_Reply, tag="accepted", frozen=True):
    size: Count
    sha256: Digest
    converted: Annotated[list[Literal["journal_mode", "page_size"]], msgspec.Meta(max_length=2)]


class Finding(_Strict, frozen=True):
    code: Literal[
        "header", "truncated", "appended", "schema", "page", "overflow", "freelist", "index", "constraint", "content", "other"
    ]
    page: Count | None
    object: str | None
    message: str


class SalvagedTable(_Strict, frozen=True):
    name: str
    kept: Count
    lost: Count
    lost_is_exact: bool


class LostObject(_Strict, frozen=True):
    type: str
    name: str


class Report(_Strict, frozen=True):
    """What a file was found to be, or what became of it; for the caller as it is."""

    kind: Literal["verify", "salvage"]
    ok: bool
    size: Count
    sha256: Digest
    page_size: Count | None
    pages: Count | None
    findings: Annotated[list[Finding], msgspec.Meta(max_length=100)]
    more_findings: bool
    tables: list[SalvagedTable]
    unassigned: Count
    objects_lost: list[LostObject]


class Reported(_Reply, tag="report", frozen=True):
    report: Report


class Failing(_Strict, frozen=True, tag_field="verdict"):
    """A verdict by which nothing was done. That of a batch's step has no `v`; every other one has."""

    v: Literal[1] | msgspec.UnsetType = msgspec.UNSET


class SqlError(Failing, tag="sql_error", frozen=True, kw_only=True):
    message: str


class Forbidden(Failing, tag="forbidden", frozen=True, kw_only=True):
    message: str


class ArgsInvalid(Failing, tag="args_invalid", frozen=True, kw_only=True):
    message: str


class TooComplex(Failing, tag="too_complex", frozen=True, kw_only=True):
    message: str


class Timeout(Failing, tag="timeout", frozen=True):
    pass


class StorageFull(Failing, tag="storage_full", frozen=True):
    pass


class HostFull(Failing, tag="host_full", frozen=True):
    pass


class MemoryLimit(Failing, tag="memory_limit", frozen=True):
    pass


class Damaged(Failing, tag="damaged", frozen=True, kw_only=True):
    message: str


class Unsettled(Failing, tag="unsettled", frozen=True):
    pass


class RequestInvalid(Failing, tag="request_invalid", frozen=True, kw_only=True):
    message: str


class Unconfined(Failing, tag="unconfined", frozen=True, kw_only=True):
    message: str


class Internal(Failing, tag="internal", frozen=True, kw_only=True):
    message: str


class ImportInvalid(Failing, tag="import_invalid", frozen=True, kw_only=True):
    line: Place | None
    message: str


class FileRefused(Failing, tag="file_refused", frozen=True, kw_only=True):
    message: str


Failure = (
    SqlError
    | Forbidden
    | ArgsInvalid
    | TooComplex
    | Timeout
    | StorageFull
    | HostFull
    | MemoryLimit
    | Damaged
    | Unsettled
    | RequestInvalid
    | Unconfined
    | Internal
)


class StepFailed(Failing, tag="step_failed", frozen=True, kw_only=True):
    step: Count
    failure: Failure


Success = Ok | RowsHead | Batch | Schema | FileHead | Imported | Accepted | Reported
Reply = Success | Failure | StepFailed | ImportInvalid | FileRefused

# What each operation may be answered; "" stands for SQL.
_ANSWERS: Mapping[Op, Any] = {
    "": Ok | Failure,
    "rows": RowsHead | Failure,
    "batch": Batch | StepFailed | Failure,
    "schema": Schema | Failure,
    "export": FileHead | Failure,
    "import": Imported | ImportInvalid | Failure,
    "accept": Accepted | Reported | FileRefused | Failure,
    "verify": Reported | Failure,
    "salvage": Reported | Failure,
}
_decoders = {op: msgspec.json.Decoder(answers) for op, answers in _ANSWERS.items()}
_end = msgspec.json.Decoder(RowsEnd)
_rows: msgspec.json.Decoder[Rows] = msgspec.json.Decoder(Rows)
_sql = cast("msgspec.json.Decoder[Ok | Failure]", _decoders[""])


def decode_reply(payload: bytes, int64: Int64Form) -> Ok | Failure:
    """The reply to SQL, or ReplyInvalidError; its reason names the fault and quotes nothing."""
    reply: Ok | Failure = _decode(payload, _sql)
    if isinstance(reply, Ok):
        _check_result(reply.columns, reply.rows, reply.truncated, int64)
    elif reply.v is msgspec.UNSET:
        raise ReplyInvalidError(reason="a verdict without its version")
    return reply


def read_reply(payload: bytes, order: Order) -> Reply:
    """The first frame of the reply to an order, or ReplyInvalidError."""
    reply: Reply = _decode(payload, _decoders[order.op])
    if isinstance(reply, Failing) and reply.v is msgspec.UNSET:
        raise ReplyInvalidError(reason="a verdict without its version")
    match reply:
        case Ok():
            _check_result(reply.columns, reply.rows, reply.truncated, order.int64)
        case RowsHead(columns=[]):
            raise ReplyInvalidError(reason="no columns")
        case Batch():
            _check_batch(reply, order)
        case StepFailed() if reply.step >= order.steps or reply.failure.v is not msgspec.UNSET:
            raise ReplyInvalidError(reason="no step's failure")
        case Accepted() if len({*reply.converted}) != len(reply.converted):
            raise ReplyInvalidError(reason="converted twice")
        case Reported():
            _check_report(reply.report, order.op)
    return reply


def read_rows(payload: bytes, columns: list[str] | None, int64: Int64Form) -> Rows:
    """A frame of rows, one at least, or ReplyInvalidError."""
    rows: Rows = _decode(payload, _rows)
    if columns is None or not rows:
        raise ReplyInvalidError(reason="rows without columns, or a frame without rows")
    _check_rows(columns, rows, int64)
    return rows


def read_end(payload: bytes, rows: int) -> RowsEnd:
    """The frame behind so many rows, or ReplyInvalidError."""
    end: RowsEnd = _decode(payload, _end)
    if end.rows != rows or (end.stopped == "error") != (end.message is not None):
        raise ReplyInvalidError(reason="an end that contradicts what came before it")
    return end


def _decode(payload: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    """What the decoder reads; raises ReplyInvalidError."""
    try:
        payload.decode()
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ReplyInvalidError(reason=f"not of the documented form ({type(error).__name__})") from None


def _check_rows(columns: list[str], rows: Rows, int64: Int64Form) -> None:
    """Raise ReplyInvalidError for rows that are not of these columns, or hold what is no value."""
    width = len(columns)
    if width == 0 or any(len(row) != width for row in rows):
        raise ReplyInvalidError(reason="a row is not as wide as the columns")
    # A set of types first: a megabyte of rows is half a million values, and objects are rare.
    types = set(map(type, itertools.chain.from_iterable(rows)))
    if int64 == "string" and int in types:
        raise ReplyInvalidError(reason="an integer as a number where strings were asked for")
    if dict in types and not all(is_row_tag(value) for value in itertools.chain.from_iterable(rows) if isinstance(value, dict)):
        raise ReplyInvalidError(reason="an object that is no documented tag")


def _check_result(columns: list[str] | None, rows: Rows, truncated: bool, int64: Int64Form) -> None:
    if columns is not None:
        _check_rows(columns, rows, int64)
    elif rows or truncated:
        raise ReplyInvalidError(reason="rows without columns")


def _check_batch(reply: Batch, order: Order) -> None:
    if len(reply.results) != order.steps:
        raise ReplyInvalidError(reason="not one result for each step")
    for result in reply.results:
        _check_result(result.columns, result.rows, result.truncated, order.int64)
        if result.skipped and (result.columns is not None or result.rows_affected):
            raise ReplyInvalidError(reason="a step that was skipped did something")


def _check_report(report: Report, op: Op) -> None:
    if report.kind != ("salvage" if op == "salvage" else "verify"):
        raise ReplyInvalidError(reason="a report of another kind")
    if report.kind == "verify" and (
        report.ok == bool(report.findings) or report.tables or report.unassigned or report.objects_lost
    ):
        raise ReplyInvalidError(reason="a report that contradicts itself")
    if op == "accept" and report.ok:
        raise ReplyInvalidError(reason="a file that is in order and was not accepted")


# ── requests


@dataclass(frozen=True, slots=True)
class Order:
    """What one container is to do: its request frame, the bytes behind it, and how it runs."""

    frame: bytes
    op: Op
    upload: bytes = b""
    read_only: bool = False
    """The container cannot write to the volume."""
    bulk: bool = False
    """It has the deadline of bulk operations."""
    tag: bytes = NO_TAG
    """Of a write that must not run twice."""
    int64: Int64Form = "number"
    steps: int = 0
    """Of a batch."""

    @property
    def flags(self) -> int:
        """As in the launcher's packets."""
        return (READ_ONLY if self.read_only else 0) | (BULK if self.bulk else 0)


def request_frame(statement: Statement, cap: int) -> bytes:
    """One whole frame. A body within its limit can still grow past the cap: `1e15` is written as 1000000000000000.0."""
    return _frame({"v": 1, "sql": statement.sql, "args": statement.args, "int64": statement.int64}, cap)


def rows_order(statement: Statement, cap: int, *, read_only: bool = False, tag: bytes = NO_TAG) -> Order:
    """All rows of the last statement, in frames. `cap`, here and below: bytes of the request frame; BodyTooLargeError."""
    sql = {"sql": statement.sql, "args": statement.args, "int64": statement.int64}
    return Order(_operation("rows", sql, cap), "rows", read_only=read_only, tag=tag, int64=statement.int64)


def batch_order(steps: Sequence[Step], int64: Int64Form, cap: int, *, read_only: bool = False, tag: bytes = NO_TAG) -> Order:
    """Steps in one transaction."""
    frame = _operation("batch", {"steps": steps, "int64": int64}, cap)
    return Order(frame, "batch", read_only=read_only, tag=tag, int64=int64, steps=len(steps))


def schema_order(*, read_only: bool = True) -> Order:
    return Order(_operation("schema", {}), "schema", read_only=read_only)


def export_order(*, read_only: bool = True) -> Order:
    """The database as a file."""
    return Order(_operation("export", {}), "export", read_only=read_only)


def import_order(
    upload: bytes,
    *,
    table: str,
    format: ImportFormat,
    columns: Sequence[tuple[str, str | None]] | None,
    header: bool,
    delimiter: str,
    null: str | None,
    cap: int,
    tag: bytes = NO_TAG,
) -> Order:
    """Rows of the upload into a table. `null`: the CSV field that means NULL."""
    how = {"table": table, "format": format, "columns": columns, "header": header, "delimiter": delimiter, "null": null}
    return Order(_operation("import", {"upload": len(upload), **how}, cap), "import", upload, bulk=True, tag=tag)


def accept_order(upload: bytes) -> Order:
    """A database file that replaces what the volume holds."""
    return Order(_operation("accept", {"upload": len(upload)}), "accept", upload, bulk=True)


def verify_order() -> Order:
    return Order(_operation("verify", {}), "verify", read_only=True, bulk=True)


def salvage_order() -> Order:
    return Order(_operation("salvage", {}), "salvage", bulk=True)


# Of frames without anything of a caller's.
_SMALL = 1 << 10


def _operation(op: Op, keys: Mapping[str, Any], cap: int = _SMALL) -> bytes:
    return _frame({"v": 1, "op": op, **keys}, cap)


def _frame(request: Mapping[str, Any], cap: int) -> bytes:
    payload = msgspec.json.encode(request)
    if len(payload) > cap:
        raise BodyTooLargeError(hint="the numbers in args are too long when written out")
    return _LENGTH.pack(len(payload)) + payload
