"""One connection: aiohttp's protocol with deadlines, bounded memory, a place behind other strangers, and refusals of our own form.

aiohttp answers bytes that are not HTTP itself, outside every middleware, with a page of text, a Server header and a log entry that
quotes them; a token in a broken header would end up in the log. Here that answer and that entry are replaced.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import struct
import time
from email.utils import formatdate
from http import HTTPStatus
from math import inf
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestPayloadError, _ErrInfo

from ..operator_log import about, where
from .body import mebibytes_begun
from .errors import ApiError, BadRequestError, InternalError, RequestTimeoutError
from .framing import ends_connection, is_faulty
from .middleware import COMMON_HEADERS

if TYPE_CHECKING:
    from .door import Door

# Of one request line and all its headers, counted while they arrive.
MAX_HEADER_BYTES = 16 << 10
# What a stranger's bytes are cut to, so that no turn is much longer than others.
PIECE_BYTES = 16 << 10
# What chunk sizes, chunk extensions and trailers may add to each MiB begun of a body.
MAX_CHUNKING_BYTES = 64 << 10
# Requests that may wait on one connection; what comes behind them is not read.
MAX_PIPELINED = 8
# A token that is none, a path that is none, or too much.
_DISTRUSTED = (404, 429)

_log = logging.getLogger(__name__)


class _NoTimer(asyncio.Handle):
    """Stands where aiohttp would put a timer for each idle connection: the door watches them all."""

    def __init__(self) -> None:
        pass

    def cancel(self) -> None:
        pass


_NO_TIMER = _NoTimer()


class _Refusal(web.Response):
    """An answer outside the application, where no signal takes the Server header away."""

    async def _prepare_headers(self) -> None:
        await super()._prepare_headers()
        self.headers.pop("Server", None)


class Connection(web.RequestHandler):
    __slots__ = (
        "_begun",
        "_body",
        "_clock",
        "_delivered_mebibytes",
        "_door",
        "_full",
        "_held",
        "_raw_bytes",
        "_unread_seconds",
        "_unread_since",
        "_unsent_most",
        "address",
        "deadline",
        "line",
        "served",
        "trusted_proxy",
    )

    def __init__(self, manager: web.Server, door: Door, address: str, trusted_proxy: bool, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self._door = door
        self.address = address
        """What callers are counted by."""
        self.trusted_proxy = trusted_proxy
        """Many callers share it, so that none of them can vouch for it."""
        self.deadline = inf
        """An instant of time.monotonic; none while an answer is being made."""
        self.served = False
        """Whether it has been answered a request."""
        self.line: dict[Connection, None] | None = None
        """Where it stands, at the door, among those that give way to newcomers."""
        self._begun = False
        self._raw_bytes = 0
        self._body: StreamReader | None = None
        self._held = b""
        self._full = False
        # Runs while an answer is not wholly in the kernel, which is rare: most need no timer. An answer's times add up: whoever
        # takes a little now and then gets no more of it.
        self._clock: asyncio.TimerHandle | None = None
        self._delivered_mebibytes = self._unsent_most = 0
        self._unread_seconds = 0.0
        self._unread_since = 0.0

    # ── opening and closing

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._keepalive_handle = _NO_TIMER
        self.deadline = time.monotonic() + self._door.header_seconds
        self._door.entered(self)
        if self.transport is not None:  # uvloop's transports are no instances of asyncio's classes
            # An answer counts as sent when the kernel has all of it: a transport that is closed waits for its buffer without end.
            self.transport.set_write_buffer_limits(0)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_clock()
        self._held = b""
        self._door.left(self)
        super().connection_lost(exc)

    def reset(self) -> None:
        """Reset, and not closed: a closed socket would keep what is unread in the kernel's buffers."""
        if self.transport is not None:
            reset_on_close(self.transport.get_extra_info("socket"))
            self.transport.abort()

    @property
    def unsent_bytes(self) -> int:
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def expire(self) -> None:
        """Its deadline has passed: a request that was begun is told so."""
        self.distrust()
        self._door.evicted["idle" if self.served and not self._begun else "header"] += 1
        if self._begun and self.transport is not None:
            error = RequestTimeoutError(hint="the header must arrive in time")
            self._door.answered[error.status, error.code] += 1
            self.transport.write(_refusal_in_full(error))
        if self.unsent_bytes:
            self.reset()
        else:
            self.force_close()

    # ── who it is

    @property
    def known(self) -> bool:
        return self.trusted_proxy or self.address in self._door.acquaintances

    def vouch(self) -> None:
        """A genuine token was shown, and answered."""
        if not self.trusted_proxy:
            self._door.acquaintances.add(self.address)

    def distrust(self) -> None:
        """It sent what a well-behaved caller does not."""
        self._door.acquaintances.forget(self.address)

    # ── what it sends

    def data_received(self, data: bytes) -> None:
        if data and (self._held or not self._goes_first()):
            self._wait(data)
        else:
            self._parse(data)

    def _goes_first(self) -> bool:
        return self.trusted_proxy or self._door.acquaintances.spend(self.address) or self._door.turnstile.passes()

    def proceed(self) -> None:
        """Its turn among strangers has come."""
        if self.transport is None:
            return
        piece, self._held = self._held[:PIECE_BYTES], self._held[PIECE_BYTES:]
        self._parse(piece)
        if self._held:
            self._door.turnstile.wait(self)
        elif not self._reading_paused and not self._buffer_paused:
            self._resume_transport_reading()

    def _wait(self, data: bytes) -> None:
        if not self._held:
            self._door.turnstile.wait(self)
        self._held += data
        self._pause_transport_reading()

    def _resume_transport_reading(self) -> None:
        if not self._held:
            super()._resume_transport_reading()

    def _parse(self, data: bytes) -> None:
        if self._close or self._force_close or self._full:
            return
        before, body = len(self._messages), self._body
        super().data_received(data)
        if len(self._messages) > before:
            self._screen(before)
        elif body is not None:
            if self._body is body:  # the piece that ends a body is no header, and what may follow in it is short
                self._count_chunking(body, len(data))
        elif data:
            self._count_header(len(data))

    def _screen(self, start: int) -> None:
        """Requests whose headers are complete, before anybody has looked at them."""
        messages = self._messages
        if len(messages) > MAX_PIPELINED:
            # One piece holds hundreds, and took one turn: those at hand are answered, the last of them as the connection's last.
            self._full = True
            while len(messages) > MAX_PIPELINED:
                messages.pop()
            last, payload = messages[-1]
            if not isinstance(last, _ErrInfo):
                messages[-1] = last._replace(should_close=True), payload
        for place in range(start, len(messages)):
            message, payload = messages[place]
            if isinstance(message, _ErrInfo):
                self.distrust()
            elif is_faulty(message):
                self.distrust()
                messages[place] = _fault("not HTTP as we read it")
            elif ends_connection(message):
                messages[place] = message._replace(should_close=True), payload
        self.deadline = inf
        self._begun, self._raw_bytes = False, 0
        payload = messages[-1][1]
        if payload.is_eof():
            self._door.at_work(self)
        else:
            # It can still be made to give way: a request that is not whole costs nobody its work.
            self._body = payload
            payload.on_eof(self._whole)

    def _whole(self) -> None:
        self._body = None
        self._raw_bytes = 0
        if self.deadline == inf:
            self._door.at_work(self)

    def _count_header(self, size: int) -> None:
        if not self._begun:
            self._begun = True
            if self.served and self.deadline < inf:
                self.deadline = time.monotonic() + self._door.header_seconds
        self._raw_bytes += size
        if self._raw_bytes > MAX_HEADER_BYTES:
            self.distrust()
            self._messages.append(_fault("header too long"))
            self._close = True
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)

    def _count_chunking(self, body: StreamReader, size: int) -> None:
        self._raw_bytes += size
        if self._raw_bytes - body.total_bytes > MAX_CHUNKING_BYTES * mebibytes_begun(body.total_bytes):
            self.distrust()
            body.set_exception(RequestPayloadError("more chunking than body"))
            self._close = True

    # ── what it is answered

    def log_access(self, request: web.BaseRequest, response: web.StreamResponse, time: float | None) -> None:
        """Called by aiohttp when an answer has been handed to the kernel, or could not be."""
        self.served = True
        self._delivered_mebibytes = self._unsent_most = 0
        self._unread_seconds = 0.0
        if response.status in _DISTRUSTED:
            self.distrust()
        if not self._messages:
            self._door.idle(self, self._begun)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_since = self._loop.time()
        self._clock = self._loop.call_later(self._answer_seconds_left, self._unread_for_long)
        self._door.unread(self)

    def resume_writing(self) -> None:
        self._unread_seconds += self._loop.time() - self._unread_since
        self._unsent_most = 0
        if (delivered := self._streamed_bytes >> 20) > self._delivered_mebibytes:
            self._delivered_mebibytes, self._unread_seconds = delivered, 0.0
        self._stop_clock()
        super().resume_writing()

    @property
    def _answer_seconds_left(self) -> float:
        """Of the time in which the answer at hand may be unread: so much for each MiB of it, which none saves up for the next."""
        self._unsent_most = max(self._unsent_most, self.unsent_bytes)
        had = self._unread_seconds + self._loop.time() - self._unread_since
        return self._door.answer_seconds * mebibytes_begun(self._unsent_most) - had

    @property
    def _streamed_bytes(self) -> int:
        """Of an answer that its handler writes; one that is given at once is written after its request is no longer current."""
        return 0 if self._current_request is None else self._current_request.writer.output_size

    def _unread_for_long(self) -> None:
        if (left := self._answer_seconds_left) > 0:  # it has grown since
            self._clock = self._loop.call_later(left, self._unread_for_long)
            return
        self._door.evicted["answer"] += 1
        self.reset()

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
            self._door.read(self)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        request_id = secrets.token_hex(16)
        error = BadRequestError() if status < InternalError.status else InternalError()
        self._door.answered[error.status, error.code] += 1
        if isinstance(error, InternalError):
            _log.error("%d %s %s", error.status, error.code, where(exc) if exc else "", extra=about(request_id))
        headers = {**COMMON_HEADERS, "X-Request-ID": request_id}
        refusal = _Refusal(status=error.status, body=error.body(request_id), content_type="application/json", headers=headers)
        refusal.force_close()
        return refusal

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        exc = kwargs.get("exc_info")
        _log.error("connection failed: %s", where(exc) if isinstance(exc, BaseException) else "unknown")


def reset_on_close(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def vouch_for(request: web.Request) -> None:
    """The caller has shown a genuine token, and its request was answered: it, and who comes from its address, need not wait."""
    if isinstance(request.protocol, Connection):
        request.protocol.vouch()


def _fault(message: str) -> tuple[_ErrInfo, StreamReader]:
    return _ErrInfo(BadRequestError.status, BadHttpMessage(message), message), EMPTY_PAYLOAD


def _refusal_in_full(error: ApiError) -> bytes:
    """An answer to a request that never became one."""
    request_id = secrets.token_hex(16)
    body = error.body(request_id)
    headers = {
        **COMMON_HEADERS,
        "X-Request-ID": request_id,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Date": formatdate(usegmt=True),
        "Connection": "close",
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body
