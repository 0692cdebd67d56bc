"""HTTP hygiene: how connections are parsed, bounded, and answered when what arrives is not HTTP.

aiohttp answers such bytes itself, outside every middleware, with a page of text, a Server header and a log entry that quotes them;
a token in a broken header would end up in the log. The two small subclasses here replace that answer and that entry.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import struct
from typing import Any

from aiohttp import web

from .errors import BadRequestError, InternalError
from .middleware import COMMON_HEADERS, where

MAX_LINE_BYTES = 8190
MAX_HEADERS = 64
# An idle connection, or one whose first request does not come, is closed after this.
KEEPALIVE_SECONDS = 30.0
# How long the rest of a refused body is read, so that the caller sees the refusal and not a reset.
LINGERING_SECONDS = 2.0
# How long a caller may take to read its answer. What it does not read is held in memory, a megabyte of rows at most.
ANSWER_SECONDS = 60.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

_log = logging.getLogger(__name__)


class _Refusal(web.Response):
    """An answer outside the application, where no signal takes the Server header away."""

    async def _prepare_headers(self) -> None:
        await super()._prepare_headers()
        self.headers.pop("Server", None)


class _Connection(web.RequestHandler):
    __slots__ = ("_clock",)

    def __init__(self, manager: web.Server, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        # Runs while an answer is not wholly in the kernel, which is rare: most need no timer.
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.transport is not None:  # uvloop's transports are no instances of asyncio's classes
            # An answer counts as sent when the kernel has all of it: a transport that is closed waits for its buffer without end.
            self.transport.set_write_buffer_limits(0)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._clock = self._loop.call_later(ANSWER_SECONDS, self._reset)

    def resume_writing(self) -> None:
        self._stop_clock()
        super().resume_writing()

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _reset(self) -> None:
        if self.transport is not None:
            # Reset, and not closed: a closed socket would keep what is unread in the kernel's buffers.
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.transport.abort()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        request_id = secrets.token_hex(16)
        error = BadRequestError() if status < InternalError.status else InternalError()
        if isinstance(error, InternalError):
            _log.error("%s %d %s %s", request_id, error.status, error.code, where(exc) if exc else "")
        headers = {**COMMON_HEADERS, "X-Request-ID": request_id}
        refusal = _Refusal(status=error.status, body=error.body(request_id), content_type="application/json", headers=headers)
        refusal.force_close()
        return refusal

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        exc = kwargs.get("exc_info")
        _log.error("connection failed: %s", where(exc) if isinstance(exc, BaseException) else "unknown")


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class Server(web.AppRunner):
    """Runs the application on real sockets; `async with` starts and stops it."""

    def __init__(self, app: web.Application, shutdown_seconds: float) -> None:
        super().__init__(
            app,
            # A caller that hangs up ends its request, and with it its container.
            handler_cancellation=True,
            shutdown_timeout=shutdown_seconds,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=KEEPALIVE_SECONDS,
            lingering_time=LINGERING_SECONDS,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
        )

    async def __aenter__(self) -> Server:
        await self.setup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cleanup()

    async def listen(self, host: str, port: int) -> int:
        """Listen on one address; the port, which the system chooses if 0 was asked for."""
        await web.TCPSite(self, host, port, backlog=1024).start()
        return int(self.addresses[-1][1])

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=made._loop,
            **made._kwargs,
        )
