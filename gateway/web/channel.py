"""The web side of a run's stream: one frame out, one frame in, and one epoll for all of them."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections.abc import Callable

from .errors import ReplyInvalidError

LENGTH = struct.Struct("!I")
# Above the allocator's 128 KiB threshold every recv maps and unmaps its buffer: 27 µs instead of 3.
CHUNK_BYTES = 64 << 10


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
        self._expected = LENGTH.size
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

    def retire(self) -> None:
        """The container is gone: there is nobody to hang up on."""
        self.close()

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
            chunk = self._stream.recv(CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            # The peer closed with bytes of ours unread: for a unix socket that is an end like any other.
            chunk = b""
        received = self._received
        received += chunk
        if self._expected == LENGTH.size <= len(received):
            (length,) = LENGTH.unpack_from(received)
            if not 1 <= length <= self._cap:
                self._hear(ReplyInvalidError(reason=f"a reply frame of {length} bytes, the cap is {self._cap}"))
                return
            self._expected += length
        if len(received) > self._expected:
            self._hear(ReplyInvalidError(reason="bytes after the reply frame"))
        elif len(received) == self._expected:
            self._hear(bytes(received[LENGTH.size :]))
        elif not chunk:
            self._hear(ReplyInvalidError(reason=f"the reply stream ended after {len(received)} bytes") if received else None)

    def _hear(self, reply: bytes | ReplyInvalidError | None) -> None:
        self._streams.stop_waiting(self._fileno)
        self.reply = reply
        self._heard()
