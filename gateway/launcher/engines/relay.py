"""Bytes between a caller's socket and a container's attached stream. Counted, never read.

Docker multiplexes an attached container's output: 8 bytes of header (stream, three zeroes, length) before each piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto

_HEADER_BYTES = 8
_STDOUT, _STDERR = 1, 2
_CHUNK_BYTES = 64 << 10


class End(Enum):
    """Why the relay stopped."""

    OUTPUT_OVER = auto()
    DEADLINE = auto()
    HUNG_UP = auto()
    STOPPED = auto()
    TOO_LONG = auto()
    GARBLED = auto()


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """`kill_after_seconds` counts from the first byte of the request, `idle_seconds` is how long to wait for that byte."""

    request_bytes: int
    reply_bytes: int
    kill_after_seconds: float
    idle_seconds: float


class GarbledStreamError(Exception):
    """The attached stream is not of Docker's form."""


class Demultiplexer:
    """Takes Docker's headers out of a stream that arrives in pieces of any size."""

    __slots__ = ("_header", "_left", "_stream")

    def __init__(self) -> None:
        self._header = bytearray()
        self._left = 0
        self._stream = _STDOUT

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """The pieces of stdout in `data`; what a daemon sends of stderr, which is not attached, is dropped."""
        view = memoryview(data)
        while view:
            if self._left:
                piece, view = view[: self._left], view[self._left :]
                self._left -= len(piece)
                if self._stream == _STDOUT:
                    yield piece
                continue
            wanted = _HEADER_BYTES - len(self._header)
            self._header += view[:wanted]
            view = view[wanted:]
            if len(self._header) == _HEADER_BYTES:
                self._stream, zeroes = self._header[0], bytes(self._header[1:4])
                if self._stream not in (_STDOUT, _STDERR) or zeroes != b"\0\0\0":
                    raise GarbledStreamError(self._header.hex())
                self._left = int.from_bytes(self._header[4:], "big")
                self._header.clear()


class HangUp:
    """Set once the other end of a stream socket is closed, as against shut for writing: only the former is EPOLLHUP."""

    def __init__(self, sock: socket.socket) -> None:
        self.event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._poll = select.epoll()
        self._poll.register(sock.fileno(), 0)  # EPOLLHUP is reported unasked, and nothing else is
        self._loop.add_reader(self._poll.fileno(), self._notice)
        if self._poll.poll(0):
            self._notice()

    def _notice(self) -> None:
        self._loop.remove_reader(self._poll.fileno())
        self.event.set()

    def close(self) -> None:
        if not self._poll.closed:
            self._loop.remove_reader(self._poll.fileno())
            self._poll.close()


async def relay(
    caller: socket.socket, container: socket.socket, limits: RelayLimits, hang_up: HangUp, stop: asyncio.Event
) -> tuple[End, float]:
    """Carry bytes both ways until one of the reasons in End. Returns it, and the loop time at which to kill the container."""
    loop = asyncio.get_running_loop()
    clock = asyncio.timeout_at(loop.time() + limits.idle_seconds)

    def first_byte() -> None:
        clock.reschedule(loop.time() + limits.kill_after_seconds)

    end = End.DEADLINE
    with contextlib.suppress(TimeoutError):
        async with clock:
            request = asyncio.create_task(_carry_request(caller, container, limits.request_bytes, first_byte))
            reply = asyncio.create_task(_carry_reply(container, caller, limits.reply_bytes))
            hung_up = asyncio.create_task(hang_up.event.wait())
            stopped = asyncio.create_task(stop.wait())
            tasks = (request, reply, hung_up, stopped)
            try:
                await asyncio.wait((reply, hung_up, stopped), return_when=asyncio.FIRST_COMPLETED)
                end = reply.result() if reply.done() else End.STOPPED if stopped.done() else End.HUNG_UP
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    return end, clock.when() or loop.time()


async def _carry_request(caller: socket.socket, container: socket.socket, limit: int, first_byte: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    left = limit
    # A container that stopped reading still may have something to say, and a caller that is gone is HangUp's to notice.
    with contextlib.suppress(OSError):
        while left and (data := await loop.sock_recv(caller, min(left, _CHUNK_BYTES))):
            if left == limit:
                first_byte()
            left -= len(data)
            await loop.sock_sendall(container, data)
        container.shutdown(socket.SHUT_WR)


async def _carry_reply(container: socket.socket, caller: socket.socket, limit: int) -> End:
    loop = asyncio.get_running_loop()
    demultiplexer = Demultiplexer()
    left = limit
    while True:
        try:
            data = await loop.sock_recv(container, _CHUNK_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            return End.OUTPUT_OVER
        try:
            for piece in demultiplexer.feed(data):
                await loop.sock_sendall(caller, piece[:left])
                left -= len(piece)
                if left <= 0:
                    return End.TOO_LONG
        except GarbledStreamError:
            return End.GARBLED
        except ConnectionError:
            return End.HUNG_UP
