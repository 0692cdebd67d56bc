"""The web side of the frames in docs/wire.md: one request out, one reply in. The reply is hostile input.

It has a size cap and a schema in which every key, type and range is fixed; what does not fit is ReplyInvalidError and is never
passed on, not even in part.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from contextlib import suppress
from typing import Annotated, Literal

import msgspec

from .body import Int64Form, Statement
from .errors import BodyTooLargeError, ReplyInvalidError
from .values import Int64, is_row_tag

_LENGTH = struct.Struct("!I")
_CHUNK_BYTES = 256 << 10

Value = None | Int64 | float | str | dict[str, str]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Reply(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag_field="verdict"):
    v: Literal[1]


class Ok(_Reply, tag="ok", frozen=True):
    columns: list[str] | None
    rows: list[list[Value]]
    rows_affected: Count
    truncated: bool


class SqlError(_Reply, tag="sql_error", frozen=True):
    message: str


class Forbidden(_Reply, tag="forbidden", frozen=True):
    message: str


class ArgsInvalid(_Reply, tag="args_invalid", frozen=True):
    message: str


class TooComplex(_Reply, tag="too_complex", frozen=True):
    message: str


class Timeout(_Reply, tag="timeout", frozen=True):
    pass


class StorageFull(_Reply, tag="storage_full", frozen=True):
    pass


class HostFull(_Reply, tag="host_full", frozen=True):
    pass


class MemoryLimit(_Reply, tag="memory_limit", frozen=True):
    pass


class Damaged(_Reply, tag="damaged", frozen=True):
    message: str


class RequestInvalid(_Reply, tag="request_invalid", frozen=True):
    message: str


class Unconfined(_Reply, tag="unconfined", frozen=True):
    message: str


class Internal(_Reply, tag="internal", frozen=True):
    message: str


Reply = (
    Ok
    | SqlError
    | Forbidden
    | ArgsInvalid
    | TooComplex
    | Timeout
    | StorageFull
    | HostFull
    | MemoryLimit
    | Damaged
    | RequestInvalid
    | Unconfined
    | Internal
)

_decoder: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def request_frame(statement: Statement, cap: int) -> bytes:
    """One whole frame. A body within its limit can still grow past the cap: `1e15` is written as 1000000000000000.0."""
    payload = msgspec.json.encode({"v": 1, "sql": statement.sql, "args": statement.args, "int64": statement.int64})
    if len(payload) > cap:
        raise BodyTooLargeError(hint="the numbers in args are too long when written out")
    return _LENGTH.pack(len(payload)) + payload


async def exchange(stream: socket.socket, frame: bytes, cap: int) -> bytes | None:
    """Send one frame, read one frame. None if the stream ended before a single byte of reply.

    The end of the stream is not waited for: a container takes 20 to 30 ms to end, and it has nothing more to say.
    """
    loop = asyncio.get_running_loop()
    # A runner may answer without reading all, e.g. `unconfined`; what counts is what it says.
    with suppress(ConnectionError):
        await loop.sock_sendall(stream, frame)
    received = bytearray()
    expected = _LENGTH.size
    while len(received) < expected and (chunk := await _receive(loop, stream)):
        received += chunk
        if expected == _LENGTH.size and len(received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(received)
            if not 1 <= length <= cap:
                raise ReplyInvalidError(reason=f"a reply frame of {length} bytes, the cap is {cap}")
            expected += length
    if not received:
        return None
    if len(received) > expected:
        raise ReplyInvalidError(reason="bytes after the reply frame")
    if len(received) < expected:
        raise ReplyInvalidError(reason=f"the reply stream ended after {len(received)} bytes")
    return bytes(received[_LENGTH.size :])


async def _receive(loop: asyncio.AbstractEventLoop, stream: socket.socket) -> bytes:
    try:
        return await loop.sock_recv(stream, _CHUNK_BYTES)
    except ConnectionError:
        # The peer closed with bytes of ours unread: for a unix socket that is an end like any other.
        return b""


def decode_reply(payload: bytes, int64: Int64Form) -> Reply:
    """The reply, or ReplyInvalidError; its reason names the fault and quotes nothing."""
    try:
        payload.decode()
        reply = _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ReplyInvalidError(reason=f"not of the documented form ({type(error).__name__})") from None
    if isinstance(reply, Ok):
        _check_rows(reply, int64)
    return reply


def _check_rows(reply: Ok, int64: Int64Form) -> None:
    if reply.columns is None:
        if reply.rows or reply.truncated:
            raise ReplyInvalidError(reason="rows without columns")
        return
    width = len(reply.columns)
    if width == 0 or any(len(row) != width for row in reply.rows):
        raise ReplyInvalidError(reason="a row is not as wide as the columns")
    # A set of types first: a megabyte of rows is half a million values, and objects are rare.
    types = set(map(type, itertools.chain.from_iterable(reply.rows)))
    if int64 == "string" and int in types:
        raise ReplyInvalidError(reason="an integer as a number where strings were asked for")
    if dict in types and not all(
        is_row_tag(value) for value in itertools.chain.from_iterable(reply.rows) if isinstance(value, dict)
    ):
        raise ReplyInvalidError(reason="an object that is no documented tag")
