"""Bytes between a caller's socket and a container's attached stream. Counted, never read.

Docker multiplexes an attached container's output: 8 bytes of header (stream, three zeroes, length) before each piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

_HEADER_BYTES = 8
_STDOUT, _STDERR = 1, 2
_CHUNK_BYTES = 64 << 10


class End(Enum):
    """Why the relay stopped."""

    OUTPUT_OVER = auto()
    DEADLINE = auto()
    CALLED_OFF = auto()
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
    """Sets `over` once the other end of a stream socket is closed, as against shut for writing: only the former is EPOLLHUP."""

    def __init__(self, sock: socket.socket, over: asyncio.Event) -> None:
        self._over = over
        self._loop = asyncio.get_running_loop()
        self._poll = select.epoll()
        self._poll.register(sock.fileno(), 0)  # EPOLLHUP is reported unasked, and nothing else is
        self._loop.add_reader(self._poll.fileno(), self._notice)
        if self._poll.poll(0):
            self._notice()

    def _notice(self) -> None:
        self._loop.remove_reader(self._poll.fileno())
        self._over.set()

    def close(self) -> None:
        if not self._poll.closed:
            self._loop.remove_reader(self._poll.fileno())
            self._poll.close()


class Relay:
    """One caller's conversation with its container, or, for as long as it is `untouched`, with another one in its place."""

    def __init__(self, caller: socket.socket, limits: RelayLimits, over: asyncio.Event) -> None:
        self._caller = caller
        self._limits = limits
        self._over = over
        self._unsent = b""  # read from the caller, refused by a container that was dead already
        self._request_left = limits.request_bytes
        self._request_sent = False
        self.replied = False
        self.kill_at = 0.0
        """The loop's time at which to kill the container."""

    async def drain(self, container: socket.socket, seconds: float) -> End:
        """The caller has gone with its reply; what is still said is for nobody. CALLED_OFF when the output is not over in time."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            try:
                async with asyncio.timeout(seconds):
                    while await loop.sock_recv(container, _CHUNK_BYTES):
                        pass
            except TimeoutError:
                return End.CALLED_OFF
        return End.OUTPUT_OVER

    @property
    def untouched(self) -> bool:
        """No byte of the request has reached a container, and no byte of a reply has come."""
        return not (self._request_sent or self.replied)

    async def carry(self, container: socket.socket) -> End:
        """Carry bytes both ways until one of the reasons in End."""
        loop = asyncio.get_running_loop()
        clock = asyncio.timeout_at(loop.time() + self._limits.idle_seconds)
        end = End.DEADLINE
        with contextlib.suppress(TimeoutError):
            async with clock:
                request = asyncio.create_task(self._carry_request(container, clock))
                reply = asyncio.create_task(self._carry_reply(container))
                called_off = asyncio.create_task(self._over.wait())
                tasks = (request, reply, called_off)
                try:
                    await asyncio.wait((reply, called_off), return_when=asyncio.FIRST_COMPLETED)
                    end = reply.result() if reply.done() else End.CALLED_OFF
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
        self.kill_at = clock.when() or loop.time()
        return end

    async def _carry_request(self, container: socket.socket, clock: asyncio.Timeout) -> None:
        loop = asyncio.get_running_loop()
        # A container that stopped reading still may have something to say, and a caller that is gone is HangUp's to notice.
        with contextlib.suppress(OSError):
            while data := self._unsent or await self._read_request():
                if not self._request_sent:
                    clock.reschedule(loop.time() + self._limits.kill_after_seconds)
                    self._unsent = data
                    sent = container.send(data)  # a stream that nothing was written to takes some at once, unless it is dead
                    self._request_sent = True
                    self._unsent, data = b"", data[sent:]
                await loop.sock_sendall(container, data)
            container.shutdown(socket.SHUT_WR)

    async def _read_request(self) -> bytes:
        if not self._request_left:
            return b""
        data = await asyncio.get_running_loop().sock_recv(self._caller, min(self._request_left, _CHUNK_BYTES))
        self._request_left -= len(data)
        return data

    async def _carry_reply(self, container: socket.socket) -> End:
        loop = asyncio.get_running_loop()
        demultiplexer = Demultiplexer()
        left = self._limits.reply_bytes
        while True:
            try:
                data = await loop.sock_recv(container, _CHUNK_BYTES)
            except ConnectionError:
                data = b""
            if not data:
                return End.OUTPUT_OVER
            try:
                for piece in demultiplexer.feed(data):
                    self.replied = True
                    await loop.sock_sendall(self._caller, piece[:left])
                    left -= len(piece)
                    if left <= 0:
                        return End.TOO_LONG
            except GarbledStreamError:
                return End.GARBLED
            except ConnectionError:
                return End.CALLED_OFF
