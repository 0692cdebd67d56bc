"""The body of POST /sql: headers that describe it, its size, and its strict form. Never a 500, whatever the bytes."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError

from .errors import (
    BadRequestError,
    BodyTooLargeError,
    InvalidArgsError,
    InvalidJsonError,
    MissingSqlError,
    OverloadedError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from .exchange import EXCHANGE
from .rates import counted_as
from .values import Int64, is_argument_tag

# Of all bodies that are arriving; beyond it the one that grows is refused.
ROOM_BYTES = 64 << 20
# Far beyond what statements of the documented sizes take; each costs time on the loop that all callers share.
MAX_ARGUMENTS = 10_000

_JSON_TYPE = re.compile(r'application/json[ \t]*(;[ \t]*charset[ \t]*=[ \t]*("utf-8"|utf-8)[ \t]*)?;?', re.ASCII | re.IGNORECASE)
_HALF_A_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]")

Argument = None | bool | Int64 | float | str | dict[str, str]
Arguments = list[Argument] | dict[str, Argument] | None
Int64Form = Literal["number", "string"]


class Statement(msgspec.Struct, frozen=True):
    """A request that is in order: SQL, checked arguments, and how INTEGER values are to be written."""

    sql: str
    args: Arguments
    int64: Int64Form


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    """The three fields unread, so that a fault in one is told apart from a fault in another."""

    sql: msgspec.Raw = msgspec.Raw(b"")
    args: msgspec.Raw = msgspec.Raw(b"null")
    int64: msgspec.Raw = msgspec.Raw(b'"number"')


_envelope = msgspec.json.Decoder(_Envelope)
_sql = msgspec.json.Decoder(str)
_arguments: msgspec.json.Decoder[Arguments] = msgspec.json.Decoder(Arguments)
_int64: msgspec.json.Decoder[Int64Form] = msgspec.json.Decoder(Int64Form)


def check_headers(request: web.Request, max_bytes: int) -> None:
    """Refuse by the headers what need not be read."""
    codings = request.headers.getall("Content-Encoding", [])
    if any(coding.strip().lower() != "identity" for coding in codings):
        raise UnsupportedMediaTypeError(hint="send the body without Content-Encoding")
    types = request.headers.getall("Content-Type", [])
    if len(types) > 1 or (types and _JSON_TYPE.fullmatch(types[0].strip()) is None):
        raise UnsupportedMediaTypeError(hint="send Content-Type: application/json")
    if (request.content_length or 0) > max_bytes:
        raise BodyTooLargeError(hint=f"at most {max_bytes} bytes")


class Bodies:
    """Reads bodies, each counted while it arrives. A body that came with its head takes no room.

    Together they take a bounded room, and those of one address no more of it than they leave free.
    """

    def __init__(self, max_bytes: int, seconds: float, room_bytes: int = ROOM_BYTES) -> None:
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._room = room_bytes
        self._held: Counter[str] = Counter()

    async def read(self, request: web.Request) -> bytes:
        """The whole body; raises BodyTooLargeError, RequestTimeoutError, BadRequestError, or OverloadedError without room."""
        received = bytearray()
        taken = 0
        address = counted_as(request[EXCHANGE].address)
        try:
            if request.content.is_eof():  # as most do
                received += request.content.read_nowait()
                self._check_size(received)
                return bytes(received)
            async with asyncio.timeout(self._seconds):
                async for chunk in request.content.iter_any():
                    received += chunk
                    self._check_size(received)
                    self._room -= len(chunk)
                    self._held[address] += len(chunk)
                    taken += len(chunk)
                    if self._held[address] > self._room:
                        raise OverloadedError(reason="bodies that arrive take all the room they may")
        except TimeoutError:
            raise RequestTimeoutError(hint=f"the body must arrive within {self._seconds:g} s") from None
        except (HttpProcessingError, ClientPayloadError, web.RequestPayloadError):
            raise BadRequestError(hint="the body's transfer coding is broken") from None
        finally:
            self._room += taken
            self._held[address] -= taken
            if not self._held[address]:
                del self._held[address]
        return bytes(received)

    def _check_size(self, received: bytearray) -> None:
        if len(received) > self._max_bytes:
            raise BodyTooLargeError(hint=f"at most {self._max_bytes} bytes")


def parse(raw: bytes) -> Statement:
    """One strict object; raises InvalidJsonError, MissingSqlError or InvalidArgsError with a hint."""
    try:
        raw.decode()
        envelope = _envelope.decode(raw)
        sql = _parse_sql(envelope.sql)
        args = _parse_args(envelope.args)
        int64 = _int64.decode(envelope.int64)
    except UnicodeDecodeError:
        raise InvalidJsonError(hint="the body is not UTF-8") from None
    except RecursionError:
        raise InvalidJsonError(hint="the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise InvalidJsonError(hint=_form_hint(str(error))) from None
    except msgspec.DecodeError as error:
        raise InvalidJsonError(hint=_syntax_hint(raw, error)) from None
    return Statement(sql, args, int64)


def _parse_sql(raw: msgspec.Raw) -> str:
    if not bytes(raw):
        raise MissingSqlError(hint='the body needs a string "sql"')
    try:
        sql = _sql.decode(raw)
    except msgspec.ValidationError:
        raise MissingSqlError(hint='"sql" must be a string') from None
    if not sql.strip():
        raise MissingSqlError(hint='"sql" is empty')
    return sql


def _parse_args(raw: msgspec.Raw) -> Arguments:
    try:
        args = _arguments.decode(raw)
    except msgspec.ValidationError as error:
        raise InvalidArgsError(hint=_args_hint(str(error))) from None
    if args is not None:
        if len(args) > MAX_ARGUMENTS:
            raise InvalidArgsError(hint=f"at most {MAX_ARGUMENTS} arguments")
        _check_tags(args.values() if isinstance(args, dict) else args)
    return args


def _check_tags(values: Iterable[Any]) -> None:
    for position, value in enumerate(values):
        if type(value) is dict and not is_argument_tag(value):
            raise InvalidArgsError(hint=f"argument {position + 1}: an object must be one of $int, $real, $text, $blob, well formed")


def _form_hint(text: str) -> str:
    return (
        text
        if "unknown field" in text
        else f'{text}; the body is {{"sql": string, "args": array or object, "int64": "number" or "string"}}'
    )


def _args_hint(text: str) -> str:
    if "out of range" in text or "`int` <=" in text or "`int` >=" in text:
        return "a number does not fit 64 bits; use a REAL within range, or a string"
    return "args is an array or an object; an argument is null, a boolean, a number, a string or an object of one tag"


def _syntax_hint(raw: bytes, error: msgspec.DecodeError) -> str:
    if _HALF_A_PAIR.search(raw):
        return "a \\u escape is half of a surrogate pair"
    return str(error)
