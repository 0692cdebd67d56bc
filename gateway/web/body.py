"""Bodies: their headers, their size and their time, and the strict form of those that hold SQL. Never a 500, whatever the bytes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Iterable
from typing import Any, Literal, TypeVar

import msgspec
from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError

from .errors import (
    BadRequestError,
    BodyTooLargeError,
    InvalidArgsError,
    InvalidJsonError,
    MissingSqlError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from .room import Loan
from .values import Int64, is_argument_tag

# Far beyond what statements of the documented sizes take; each costs time on the loop that all callers share.
MAX_ARGUMENTS = 10_000
MEBIBYTE = 1 << 20
_FORM = '{"sql": string, "args": array or object, "int64": "number" or "string"}'
JSON_TYPES = ("", "application/json")
"""Media types of a body of JSON; "" stands for none being named."""

_MEDIA_TYPE = re.compile(
    r'([\w.+-]+/[\w.+-]+)[ \t]*(;[ \t]*charset[ \t]*=[ \t]*("utf-8"|utf-8)[ \t]*)?;?', re.ASCII | re.IGNORECASE
)
_HALF_A_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]")

Argument = None | bool | Int64 | float | str | dict[str, str]
Arguments = list[Argument] | dict[str, Argument] | None
Int64Form = Literal["number", "string"]
Condition = Literal["changed", "unchanged", "rows", "no_rows"]
Decoded = TypeVar("Decoded")


class Statement(msgspec.Struct, frozen=True):
    """A request that is in order: SQL, checked arguments, and how INTEGER values are to be written."""

    sql: str
    args: Arguments
    int64: Int64Form


class Step(msgspec.Struct, frozen=True):
    """One of a batch, with the condition on the step before it."""

    sql: str
    args: Arguments
    condition: Condition | None = msgspec.field(default=None, name="if")


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    """The three fields unread, so that a fault in one is told apart from a fault in another."""

    sql: msgspec.Raw = msgspec.Raw(b"")
    args: msgspec.Raw = msgspec.Raw(b"null")
    int64: msgspec.Raw = msgspec.Raw(b'"number"')


_envelope = msgspec.json.Decoder(_Envelope)
_sql = msgspec.json.Decoder(str)
_arguments: msgspec.json.Decoder[Arguments] = msgspec.json.Decoder(Arguments)
_int64: msgspec.json.Decoder[Int64Form] = msgspec.json.Decoder(Int64Form)


def check_headers(request: web.Request, max_bytes: int, types: Collection[str] = JSON_TYPES) -> str:
    """Refuse by the headers what need not be read. Returns the media type that was named, in lower case, or "" for none."""
    codings = request.headers.getall("Content-Encoding", [])
    if any(coding.strip().lower() != "identity" for coding in codings):
        raise UnsupportedMediaTypeError(hint="send the body without Content-Encoding")
    named = request.headers.getall("Content-Type", [])
    found = _MEDIA_TYPE.fullmatch(named[0].strip()) if named else None
    media_type = found[1].lower() if found else ""
    if len(named) > 1 or (named and found is None) or media_type not in types:
        raise UnsupportedMediaTypeError(hint=f"send Content-Type: {' or '.join(filter(None, types))}")
    if (request.content_length or 0) > max_bytes:
        raise BodyTooLargeError(hint=f"at most {max_bytes} bytes")
    return media_type


def mebibytes_begun(size: int) -> int:
    """1 for nothing at all: what a time or an allowance for each MiB is multiplied by."""
    return max(1, -(-size // MEBIBYTE))


class Bodies:
    """Reads bodies, each counted while it arrives; `seconds` for each MiB of it, which none saves up for the next."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def read(self, request: web.Request, loan: Loan, max_bytes: int) -> bytes:
        """The whole body; the loan is taken for it. BodyTooLargeError, RequestTimeoutError, BadRequestError, OverloadedError."""
        received = bytearray()
        try:
            if request.content.is_eof():  # as most do
                _add(received, request.content.read_nowait(), loan, max_bytes)
                return bytes(received)
            now = asyncio.get_running_loop().time
            async with asyncio.timeout(self._seconds) as deadline:
                async for chunk in request.content.iter_any():
                    begun = mebibytes_begun(len(received))
                    _add(received, chunk, loan, max_bytes)
                    if mebibytes_begun(len(received)) > begun:
                        deadline.reschedule(now() + self._seconds)
        except TimeoutError:
            raise RequestTimeoutError(hint=f"the body must arrive within {self._seconds:g} s for each MiB") from None
        except (HttpProcessingError, ClientPayloadError, web.RequestPayloadError):
            raise BadRequestError(hint="the body's transfer coding is broken") from None
        return bytes(received)


def _add(received: bytearray, chunk: bytes, loan: Loan, max_bytes: int) -> None:
    if len(received) + len(chunk) > max_bytes:
        raise BodyTooLargeError(hint=f"at most {max_bytes} bytes")
    loan.take(len(chunk))
    received += chunk


def parse(raw: bytes) -> Statement:
    """One strict object; raises InvalidJsonError, MissingSqlError or InvalidArgsError with a hint."""
    envelope = decoded(raw, _envelope, _FORM)
    sql, args = parse_sql(envelope.sql), parse_args(envelope.args)
    return Statement(sql, args, decoded(envelope.int64, _int64, _FORM))


def decoded(raw: bytes | msgspec.Raw, decoder: msgspec.json.Decoder[Decoded], form: str) -> Decoded:
    """What the decoder reads in a body, or in a part of one; raises InvalidJsonError. `form`: how it is written, for the hint."""
    try:
        if isinstance(raw, bytes):
            raw.decode()
        return _decode(raw, decoder)
    except UnicodeDecodeError:
        raise InvalidJsonError(hint="the body is not UTF-8") from None
    except msgspec.ValidationError as error:
        raise InvalidJsonError(hint=str(error) if "unknown field" in str(error) else f"{error}; the body is {form}") from None


def parse_sql(raw: msgspec.Raw) -> str:
    """The string that a field "sql" holds; raises MissingSqlError or InvalidJsonError."""
    if not bytes(raw):
        raise MissingSqlError(hint='the body needs a string "sql"')
    try:
        sql = _decode(raw, _sql)
    except msgspec.ValidationError:
        raise MissingSqlError(hint='"sql" must be a string') from None
    if not sql.strip():
        raise MissingSqlError(hint='"sql" is empty')
    return sql


def parse_args(raw: msgspec.Raw) -> Arguments:
    """The checked arguments that a field "args" holds; raises InvalidArgsError or InvalidJsonError."""
    try:
        args = _decode(raw, _arguments)
    except msgspec.ValidationError as error:
        raise InvalidArgsError(hint=_args_hint(str(error))) from None
    if args is not None:
        if len(args) > MAX_ARGUMENTS:
            raise InvalidArgsError(hint=f"at most {MAX_ARGUMENTS} arguments")
        _check_tags(args.values() if isinstance(args, dict) else args)
    return args


def _decode(raw: bytes | msgspec.Raw, decoder: msgspec.json.Decoder[Decoded]) -> Decoded:
    """A fault in the form, other than in the syntax, is the caller's to tell: it is msgspec.ValidationError."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError:
        raise
    except RecursionError:
        raise InvalidJsonError(hint="the body is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise InvalidJsonError(hint=_syntax_hint(bytes(raw), error)) from None


def _check_tags(values: Iterable[Any]) -> None:
    for position, value in enumerate(values):
        if type(value) is dict and not is_argument_tag(value):
            raise InvalidArgsError(hint=f"argument {position + 1}: an object must be one of $int, $real, $text, $blob, well formed")


def _args_hint(text: str) -> str:
    if "out of range" in text or "`int` <=" in text or "`int` >=" in text:
        return "a number does not fit 64 bits; use a REAL within range, or a string"
    return "args is an array or an object; an argument is null, a boolean, a number, a string or an object of one tag"


def _syntax_hint(raw: bytes, error: msgspec.DecodeError) -> str:
    if _HALF_A_PAIR.search(raw):
        return "a \\u escape is half of a surrogate pair"
    return str(error)
