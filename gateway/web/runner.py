"""The web side of the frames in docs/wire.md: one request out, one reply in. The reply is hostile input.

It has a size cap and a schema in which every key, type and range is fixed; what does not fit is ReplyInvalidError and is never
passed on, not even in part.
"""

from __future__ import annotations

import asyncio
import itertools
import select
import socket
import struct
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from .body import Int64Form, Statement
from .errors import BodyTooLargeError, ReplyInvalidError
from .values import Int64, is_row_tag

_LENGTH = struct.Struct("!I")
# Above the allocator's 128 KiB threshold every recv maps and unmaps its buffer: 27 µs instead of 3.
_CHUNK_BYTES = 64 << 10

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


class Streams:
    """Calls back whoever waits for bytes, from one epoll that the loop sees as a single reader.

    A stream is waited on once in its life: that costs 2 µs here and 9 by the loop's own add_reader and remove_reader.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._poll = select.epoll()
        self._waiting: dict[int, Callable[[], None]] = {}
        self._loop.add_reader(self._poll.fileno(), self._look)

    def wait(self, fileno: int, readable: Callable[[], None]) -> None:
        self._poll.register(fileno, select.EPOLLIN)
        self._waiting[fileno] = readable

    def stop_waiting(self, fileno: int) -> None:
        """Before the descriptor is closed. Doing it again is harmless."""
        if self._waiting.pop(fileno, None) is not None:
            self._poll.unregister(fileno)

    def close(self) -> None:
        self._loop.remove_reader(self._poll.fileno())
        self._poll.close()

    def _look(self) -> None:
        for fileno, _ in self._poll.poll(0):
            # One that was called before may have closed this one, and even opened another of its number: nothing is lost by asking.
            if (readable := self._waiting.get(fileno)) is not None:
                readable()


class Channel:
    """Our end of the pair: one frame out, one frame in. `heard` is called once, when there is a reply or will never be one.

    The frame goes into the socket at once, as far as it fits, so that it waits for the runner and not the runner for it. The end of
    the stream is not waited for: a container takes its time to end, and it has nothing more to say.
    """

    __slots__ = ("_cap", "_expected", "_fileno", "_heard", "_loop", "_received", "_stream", "_streams", "_unsent", "reply")

    def __init__(self, streams: Streams, stream: socket.socket, frame: bytes, cap: int, heard: Callable[[], None]) -> None:
        """`stream` does not block, and is this object's to close."""
        self._loop = asyncio.get_running_loop()
        self._streams = streams
        self._stream = stream
        self._fileno = stream.fileno()
        self._cap = cap
        self._heard = heard
        self._received = bytearray()
        self._expected = _LENGTH.size
        self.reply: bytes | ReplyInvalidError | None = None
        """The payload of a whole frame, or what was wrong; None if the stream ended before a single byte of reply."""
        self._unsent = memoryview(frame)
        self._send()
        if self._unsent:
            self._loop.add_writer(self._fileno, self._writable)
        streams.wait(self._fileno, self._readable)

    @property
    def closed(self) -> bool:
        return self._fileno < 0

    def close(self) -> None:
        """Hang up. Doing it again is harmless."""
        if self._fileno >= 0:
            self._streams.stop_waiting(self._fileno)
            if self._unsent:
                self._loop.remove_writer(self._fileno)
            self._fileno = -1
            self._stream.close()

    def _writable(self) -> None:
        self._send()
        if not self._unsent:
            self._loop.remove_writer(self._fileno)

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self._stream.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:
            # A runner may answer without reading all, e.g. `unconfined`; what counts is what it says.
            self._unsent = self._unsent[:0]

    def _readable(self) -> None:
        try:
            chunk = self._stream.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            # The peer closed with bytes of ours unread: for a unix socket that is an end like any other.
            chunk = b""
        received = self._received
        received += chunk
        if self._expected == _LENGTH.size <= len(received):
            (length,) = _LENGTH.unpack_from(received)
            if not 1 <= length <= self._cap:
                self._hear(ReplyInvalidError(reason=f"a reply frame of {length} bytes, the cap is {self._cap}"))
                return
            self._expected += length
        if len(received) > self._expected:
            self._hear(ReplyInvalidError(reason="bytes after the reply frame"))
        elif len(received) == self._expected:
            self._hear(bytes(received[_LENGTH.size :]))
        elif not chunk:
            self._hear(ReplyInvalidError(reason=f"the reply stream ended after {len(received)} bytes") if received else None)

    def _hear(self, reply: bytes | ReplyInvalidError | None) -> None:
        self._streams.stop_waiting(self._fileno)
        self.reply = reply
        self._heard()


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
