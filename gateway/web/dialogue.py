"""A run of which more is to be read than one frame, or to which more is sent: uploads, files, and rows in frames.

What comes behind the reply's first frame is read as far as there is room for it, whether its reader is quick or slow: a runner that
has said everything ends, and its container and slot are free, while its caller still reads. Without room nothing more is read, the
runner waits, and its deadline ends it.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from .body import Int64Form
from .channel import CHUNK_BYTES, LENGTH, Channel, Streams
from .errors import ApiError, OverloadedError, ReplyInvalidError
from .room import Loan
from .runner import Order, Rows, RowsEnd, read_end, read_rows

FRAME_BYTES = 256 << 10
"""Of rows; one that is longer has a single row."""
# What a stream has for its own from its beginning on: it never waits for room in the middle, rows longer than a frame aside.
_RESERVE_BYTES = 2 * FRAME_BYTES
# A runner fills each frame so far, or sends it because the next row is too long for it: of two frames in a row one is full.
_FULL_BYTES = 64 << 10
_SHORT_FRAMES = 4
_ROWS, _OBJECT = ord("["), ord("{")

MayHold = Callable[[int], bool]


class File(NamedTuple):
    """A database as a file, whole and checked."""

    sha256: str
    """64 hexadecimal digits, computed here."""
    content: bytes


class CutShortError(Exception):
    """The stream ended before all of the reply had come. Why, the launcher knows."""


class Dialogue(Channel):
    """A channel that sends an upload behind its frame, and is read on behind the reply's first one."""

    __slots__ = ("_ended", "_finished", "_may_hold", "_retired", "_upload", "_wanted", "_watched")

    def __init__(self, streams: Streams, stream: socket.socket, order: Order, cap: int, heard: Callable[[], None]) -> None:
        self._upload = memoryview(order.upload)
        self._may_hold: MayHold | None = None
        """Whether so many bytes may wait to be read; None until the first frame is whole."""
        self._ended = False
        self._finished = False
        self._retired = False
        self._watched = True
        self._wanted: asyncio.Future[None] | None = None
        super().__init__(streams, stream, order.frame, cap, heard)

    @property
    def waiting(self) -> int:
        """Bytes that have come and were not read."""
        return len(self._received)

    def read_on(self, may_hold: MayHold) -> None:
        """Behind the first frame, too. `may_hold` is asked before more is read: whether so many bytes may wait."""
        self._may_hold = may_hold
        self._watch()

    async def take(self, size: int) -> bytes:
        """The next bytes, so many; raises CutShortError, or OverloadedError when there is no room for them."""
        await self._have(size)
        taken = self._cut(size)
        self._watch()
        return taken

    async def frame(self, check: Callable[[int, int], None]) -> bytes:
        """The next frame's payload; `check` hears its length and its first byte before the rest is waited for, and may raise."""
        await self._have(LENGTH.size + 1)
        (length,) = LENGTH.unpack_from(self._received)
        check(length, self._received[LENGTH.size])
        await self._have(LENGTH.size + length)
        self._cut(LENGTH.size)
        return await self.take(length)

    async def file(self, size: int) -> File:
        """The bytes behind the first frame, so many and no more, for which there is room."""
        self.read_on(lambda waiting: waiting <= size + CHUNK_BYTES)
        digest, hashed = hashlib.sha256(), 0
        while hashed < size:
            await self._have(hashed + 1)
            end = min(size, self.waiting)
            with memoryview(self._received) as view:
                digest.update(view[hashed:end])
            hashed = end
        content = await self.take(size)
        self.finish()
        return File(digest.hexdigest(), content)

    def finish(self) -> None:
        """The reply is whole; raises ReplyInvalidError if anything came with its last bytes."""
        self._unwatch()
        self._finished = True
        if self._retired:
            self.close()
        if self._received:
            raise ReplyInvalidError(reason="bytes after the reply")

    def retire(self) -> None:
        self._retired = True
        if self._finished or self._ended:
            self.close()

    def close(self) -> None:
        self._unwatch()
        self._upload = memoryview(b"")
        super().close()
        self._wake()

    def _send(self) -> None:
        super()._send()
        if not self._unsent and self._upload:
            self._unsent, self._upload = self._upload, memoryview(b"")
            super()._send()
        if not self._unsent:
            self._unsent = memoryview(b"")  # what was sent is held no longer

    def _readable(self) -> None:
        if self._may_hold is not None and not self._may_hold(len(self._received) + CHUNK_BYTES):
            self._unwatch()
            self._wake()
            return
        try:
            chunk = self._stream.recv(CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""  # as in a channel
        self._received += chunk
        if not chunk:
            self._ended = True
            self._unwatch()
        if self.reply is None and not self._finished:
            self._hear_first(not chunk)
        else:
            self._wake()
        if self._ended and self._retired:
            self.close()

    def _hear_first(self, ended: bool) -> None:
        received = self._received
        if self._expected == LENGTH.size <= len(received):
            (length,) = LENGTH.unpack_from(received)
            if not 1 <= length <= self._cap:
                self._finished = True
                self._hear(ReplyInvalidError(reason=f"a reply frame of {length} bytes, the cap is {self._cap}"))
                return
            self._expected += length
        if len(received) >= self._expected > LENGTH.size:
            self._cut(LENGTH.size)
            self._hear(self._cut(self._expected - LENGTH.size))
        elif ended:
            self._finished = True
            self._hear(ReplyInvalidError(reason=f"the reply stream ended after {len(received)} bytes") if received else None)

    def _hear(self, reply: bytes | ReplyInvalidError | None) -> None:
        self._watched = False
        super()._hear(reply)

    def _cut(self, size: int) -> bytes:
        """The first bytes of what was received."""
        with memoryview(self._received) as view:
            cut = bytes(view[:size])
        del self._received[:size]
        return cut

    async def _have(self, size: int) -> None:
        while len(self._received) < size:
            if self._ended or self.closed:
                raise CutShortError
            self._watch()
            if not self._watched:
                raise OverloadedError(reason="no room for the rest of a reply")
            self._wanted = asyncio.get_running_loop().create_future()
            await self._wanted

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    def _watch(self) -> None:
        """Read on, if there is anything to come and room for it."""
        if self._watched or self._ended or self._finished or self.closed or self._may_hold is None:
            return
        if self._may_hold(len(self._received) + CHUNK_BYTES):
            self._watched = True
            self._streams.wait(self._fileno, self._readable)

    def _unwatch(self) -> None:
        self._watched = False
        self._streams.stop_waiting(self._fileno)


class RowStream:
    """The rows of a run, as its frames come: `async for`, and then `end`. Of the runner's time, its reader takes none.

    Whatever goes wrong on the way is raised as an ApiError; there is no end then.
    """

    def __init__(
        self,
        dialogue: Dialogue,
        columns: list[str] | None,
        int64: Int64Form,
        share: Share,
        most_bytes: int,
        most_frame_bytes: int,
        cut_short: Callable[[], Awaitable[ApiError]],
        hang_up: Callable[[], None],
    ) -> None:
        self.columns = columns
        """Of the last statement; None if it has no rows."""
        self.end: RowsEnd | None = None
        self._dialogue = dialogue
        self._int64 = int64
        self._share = share
        self._left_bytes = most_bytes
        self._left_frames = 2 * (most_bytes // _FULL_BYTES) + _SHORT_FRAMES
        self._most_frame_bytes = most_frame_bytes
        self._cut_short = cut_short
        self._hang_up = hang_up
        self._at_hand = 0
        self._rows = 0
        dialogue.read_on(self._may_hold)

    def __aiter__(self) -> RowStream:
        return self

    async def __anext__(self) -> Rows:
        if self.end is not None:
            raise StopAsyncIteration
        self._put_away()
        await asyncio.sleep(0)  # many frames may be here already, and others want the loop too
        try:
            rows = await self._next()
        except CutShortError:
            error = await self._cut_short()
            await self.aclose()
            raise error from None
        except BaseException:
            await self.aclose()
            raise
        if rows is None:
            raise StopAsyncIteration
        return rows

    async def aclose(self) -> None:
        """Hang up, unless all has come. Doing it again is harmless."""
        if self.end is None:
            self._hang_up()
        self._share.give_back()

    async def _next(self) -> Rows | None:
        payload = await self._dialogue.frame(self._check)
        if payload[0] == _OBJECT:
            end = read_end(payload, self._rows)
            self._dialogue.finish()
            self.end = end
            self._share.give_back()
            return None
        self._at_hand = len(payload)
        self._left_bytes -= _rows_bytes(len(payload))
        self._left_frames -= 1
        rows = read_rows(payload, self.columns, self._int64)
        if _rows_bytes(len(payload)) > FRAME_BYTES and len(rows) > 1:
            raise ReplyInvalidError(reason="a frame of rows that is too long")
        self._rows += len(rows)
        return rows

    def _check(self, length: int, first: int) -> None:
        if first == _ROWS:
            allowed = self._left_frames > 0 and _rows_bytes(length) <= min(
                self._left_bytes, max(self._most_frame_bytes, FRAME_BYTES)
            )
        else:
            allowed = first == _OBJECT and length <= self._most_frame_bytes
        if not allowed:
            raise ReplyInvalidError(reason=f"a frame of {length} bytes behind the head, or of another kind")

    def _put_away(self) -> None:
        """Whoever asks for more is done with the rows at hand."""
        self._at_hand = 0
        self._share.shrink_to(self._dialogue.waiting)

    def _may_hold(self, waiting: int) -> bool:
        return self._share.covers(waiting + self._at_hand)


def _rows_bytes(length: int) -> int:
    """Of a frame of that length: its rows, each with what separates it from the next. The brackets are one byte more."""
    return length - 1


class Share:
    """What a stream holds of its loan: a reserve, and as much more as it needs and there is."""

    def __init__(self, loan: Loan) -> None:
        """Raises OverloadedError if there is no room for the reserve."""
        self._loan = loan
        self._size = 0
        loan.take(_RESERVE_BYTES)
        self._size = _RESERVE_BYTES

    def covers(self, size: int) -> bool:
        if size > self._size:
            try:
                self._loan.take(size - self._size)
            except OverloadedError:
                return False
            self._size = size
        return True

    def shrink_to(self, size: int) -> None:
        least = max(size, _RESERVE_BYTES)
        if least < self._size:
            self._loan.give_back(self._size - least)
            self._size = least

    def give_back(self) -> None:
        """Doing it again is harmless."""
        self._loan.give_back(min(self._size, self._loan.size))
        self._size = 0
