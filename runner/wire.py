"""The runner's side of docs/wire.md: frames, the request, the reply, and how a value looks in both.

Text that is not UTF-8 is a `str` with surrogate escapes on this side (U+DC80..U+DCFF for the bytes 80..FF), which is also what
the image's apsw gives and takes. A lone surrogate never leaves and never enters as a JSON string.
"""

from __future__ import annotations

import binascii
import json
import math
import os
import re
import struct
from enum import StrEnum
from json.encoder import encode_basestring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

    Value = None | int | float | str | bytes
    Arguments = list[Value] | dict[str, Value] | None

VERSION = 1
LENGTH_BYTES = 4
_LENGTH = struct.Struct("!I")
MAX_MESSAGE_CHARACTERS = 1000

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

_DECIMAL = re.compile(r"-?[0-9]{1,19}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONG_CHARACTERS = 4096
_FIRST_READ_BYTES = 4096


class Verdict(StrEnum):
    """How a request ended; the set is closed."""

    OK = "ok"
    SQL_ERROR = "sql_error"
    FORBIDDEN = "forbidden"
    ARGS_INVALID = "args_invalid"
    TOO_COMPLEX = "too_complex"
    TIMEOUT = "timeout"
    STORAGE_FULL = "storage_full"
    HOST_FULL = "host_full"
    MEMORY_LIMIT = "memory_limit"
    DAMAGED = "damaged"
    REQUEST_INVALID = "request_invalid"
    UNCONFINED = "unconfined"
    INTERNAL = "internal"


WITHOUT_MESSAGE = frozenset({Verdict.OK, Verdict.TIMEOUT, Verdict.STORAGE_FULL, Verdict.HOST_FULL, Verdict.MEMORY_LIMIT})


class VerdictError(Exception):
    """The request ends here, with this verdict."""

    def __init__(self, verdict: Verdict, message: str = "") -> None:
        super().__init__(verdict, message)
        self.verdict = verdict
        self.message = message


class NoRequestError(Exception):
    """The stream ended before a whole request had come."""


class ResultFullError(Exception):
    """A row does not fit into what is left for the result."""


class Request:
    __slots__ = ("args", "int64_as_string", "sql")

    def __init__(self, sql: str, args: Arguments, int64_as_string: bool) -> None:
        self.sql = sql
        self.args = args
        self.int64_as_string = int64_as_string


def read_frame(descriptor: int, max_bytes: int) -> bytes:
    """The inside of one frame. Raises NoRequestError at an early end, VerdictError for a length that is not allowed."""
    # All of most requests in one read. What would follow the frame is not looked at, here or ever.
    data = _read_until(descriptor, LENGTH_BYTES, b"", _FIRST_READ_BYTES)
    (length,) = _LENGTH.unpack_from(data)
    if not 1 <= length <= max_bytes:
        raise VerdictError(Verdict.REQUEST_INVALID, f"a frame of {length} bytes; 1 to {max_bytes} are allowed")
    end = LENGTH_BYTES + length
    return _read_until(descriptor, end, data, 1 << 16)[LENGTH_BYTES:end]


def _read_until(descriptor: int, end: int, data: bytes, most: int) -> bytes:
    """`data` and what comes after it, at least `end` bytes in all. Grows with what has come, not with what was announced."""
    if len(data) >= end:
        return data
    chunk = os.read(descriptor, most)
    if not data and len(chunk) >= end:
        return chunk
    grown = bytearray(data)
    while chunk:
        grown += chunk
        if len(grown) >= end:
            return bytes(grown)
        chunk = os.read(descriptor, most)
    raise NoRequestError


def write_frame(descriptor: int, payload: bytes) -> None:
    frame = len(payload).to_bytes(LENGTH_BYTES, "big") + payload
    sent = os.write(descriptor, frame)
    if sent < len(frame):
        rest = memoryview(frame)[sent:]
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def decode_request(payload: bytes) -> Request:
    """Read the inside of a request frame; raises VerdictError `request_invalid`, or `args_invalid` for a value in `args`."""
    try:
        document = _parse(payload.decode("utf-8"))
    except UnicodeDecodeError:
        _broken("not UTF-8")
    except json.JSONDecodeError:
        _broken("not JSON")
    except RecursionError:
        _broken("nested too deeply")
    except ValueError:  # CPython refuses to convert more than 4,300 digits
        _unfit("an integer is outside of 64 bits")
    if type(document) is not dict:
        _broken("not an object")
    if document.keys() != {"v", "sql", "args", "int64"}:
        _broken("the keys are not v, sql, args, int64")
    sql, args = document["sql"], document["args"]
    if type(document["v"]) is not int or document["v"] != VERSION:
        _broken(f"version is not {VERSION}")
    if type(sql) is not str or not _is_unicode(sql):
        _broken("sql is not a string of Unicode characters")
    if document["int64"] not in ("number", "string"):
        _broken("int64 is neither number nor string")
    return Request(sql, _arguments(args), document["int64"] == "string")


def _parse(text: str) -> Any:
    try:
        document, end = _scan(text, 0)
    except StopIteration:
        end = -1
    # White space around it, or no JSON at all. The gateway sends neither.
    return document if end == len(text) else _decoder.decode(text)


def _arguments(args: Any) -> Arguments:
    if args is None:
        return None
    if type(args) is list:
        return [_argument(value) for value in args]
    if type(args) is dict:
        if not all(map(_is_unicode, args)):
            _unfit("a name holds a lone surrogate")
        return {name: _argument(value) for name, value in args.items()}
    _broken("args is neither array, object nor null")


def _argument(value: Any) -> Value:
    kind = type(value)
    if value is None:
        return None
    if kind is bool:
        return int(value)
    if kind is int:
        return _int64(value)
    if kind is float:
        if math.isinf(value):  # silently storing Infinity for 1e999 would change the caller's data
            _unfit('a number is too large for a REAL; Infinity is {"$real": "Infinity"}')
        return float(value)
    if kind is str:
        if not _is_unicode(value):
            _unfit("a string holds a lone surrogate; other bytes go in $text")
        return str(value)
    if kind is dict and len(value) == 1:
        ((tag, content),) = value.items()
        if tag in _TAGS and type(content) is str:
            return _TAGS[tag](content)
    _unfit("a value is neither null, number, string, true, false nor one of $int, $real, $text, $blob with a string")


def _int64(value: int) -> int:
    if not INT64_MIN <= value <= INT64_MAX:
        _unfit("an integer is outside of 64 bits")
    return value


def _tagged_int(content: str) -> int:
    if not _DECIMAL.fullmatch(content):
        _unfit("$int is not a decimal number of 64 bits")
    return _int64(int(content))


def _tagged_real(content: str) -> float:
    if content not in ("Infinity", "-Infinity"):
        _unfit("$real is neither Infinity nor -Infinity")
    return float(content)


def _tagged_text(content: str) -> str:
    return _tagged_blob(content).decode("utf-8", "surrogateescape")


def _tagged_blob(content: str) -> bytes:
    try:
        data = binascii.a2b_base64(content)
    except ValueError:
        _unfit("not base64")
    if _base64(data) != content:  # one spelling for each value: no line ends, no stray bits, padding
        _unfit("not base64 in its canonical form")
    return data


_TAGS: dict[str, Callable[[str], Value]] = {
    "$int": _tagged_int,
    "$real": _tagged_real,
    "$text": _tagged_text,
    "$blob": _tagged_blob,
}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        _broken("a key is repeated")
    return document


def _no_constant(name: str) -> NoReturn:
    _broken(f"{name} is not JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
_scan: Callable[[str, int], tuple[Any, int]] = _decoder.scan_once  # type: ignore[attr-defined]  # the stubs lack it


def _broken(message: str) -> NoReturn:
    raise VerdictError(Verdict.REQUEST_INVALID, message) from None


def _unfit(message: str) -> NoReturn:
    raise VerdictError(Verdict.ARGS_INVALID, message) from None


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


class RowEncoder:
    """Turns the rows of one result into JSON, each once. `max_bytes` bounds what may be built for a single row.

    A table from type to function beats json.JSONEncoder here (7.4 ms against 13 ms for 10,000 rows of 5 columns) and decides
    every value's form itself: the standard encoder would write Infinity and half surrogates.
    """

    __slots__ = ("_long_characters", "_max_bytes", "_write")

    def __init__(self, max_bytes: int, int64_as_string: bool) -> None:
        self._max_bytes = max_bytes
        self._long_characters = 0
        self._write: dict[type, Callable[[Any], str]] = {
            type(None): _null_json,
            int: '"{}"'.format if int64_as_string else repr,
            float: _real_json,
            str: self._text_json,
            bytes: self._blob_json,
        }

    def encode(self, row: Sequence[Value]) -> bytes:
        """One row as a JSON array. Raises ResultFullError where it is certain that the row does not fit."""
        write = self._write
        try:
            return ("[" + ",".join([write[type(value)](value) for value in row]) + "]").encode("utf-8")
        except UnicodeEncodeError:
            return ("[" + ",".join([_raw_text_json(v) if type(v) is str else write[type(v)](v) for v in row]) + "]").encode("utf-8")

    def _text_json(self, value: str) -> str:
        if len(value) > _LONG_CHARACTERS:
            self._count(len(value))
        return encode_basestring(value)

    def _blob_json(self, value: bytes) -> str:
        if len(value) > _LONG_CHARACTERS:
            self._count(len(value))
        return f'{{"$blob":"{_base64(value)}"}}'

    def _count(self, length: int) -> None:
        # A character takes at least one byte, so the sum over a result never refuses a row that would fit. Without it a row of
        # 100 columns of 300 kB would be built, six times as long, only to be dropped.
        self._long_characters += length
        if self._long_characters > self._max_bytes:
            raise ResultFullError


def _null_json(_: None) -> str:
    return "null"


def _real_json(value: float) -> str:
    text = repr(value)  # the shortest that reads back the same; always with a fraction or an exponent
    if text.endswith("inf"):
        return '{"$real":"-Infinity"}' if value < 0 else '{"$real":"Infinity"}'
    return text


def _raw_text_json(value: str) -> str:
    if _is_unicode(value):
        return encode_basestring(value)
    return f'{{"$text":"{_base64(value.encode("utf-8", "surrogateescape"))}"}}'


def encode_columns(names: Sequence[str]) -> bytes:
    """Names as a JSON array of strings; bytes that are not UTF-8 become U+FFFD."""
    return ("[" + ",".join([encode_basestring(_printable(name)) for name in names]) + "]").encode("utf-8")


def encode_result(columns: bytes | None, rows: Sequence[bytes], rows_affected: int, truncated: bool) -> bytes:
    """The inside of an `ok` reply, from columns and rows that are JSON already."""
    return b'{"v":%d,"verdict":"ok","columns":%b,"rows":[%b],"rows_affected":%d,"truncated":%b}' % (
        VERSION,
        b"null" if columns is None else columns,
        b",".join(rows),
        rows_affected,
        b"true" if truncated else b"false",
    )


def encode_failure(verdict: Verdict, message: str = "") -> bytes:
    """The inside of any reply but `ok`."""
    reply: dict[str, Any] = {"v": VERSION, "verdict": verdict.value}
    if verdict not in WITHOUT_MESSAGE:
        reply["message"] = _printable(message)[:MAX_MESSAGE_CHARACTERS]
    return json.dumps(reply, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _printable(text: str) -> str:
    return text if text.isascii() else _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
