"""The application on real sockets: the runner that starts and stops it, and its site, the door."""

from __future__ import annotations

from aiohttp import web

from .appkeys import CALLERS, SETTINGS
from .connection import Connection
from .door import Door

MAX_LINE_BYTES = 8190
MAX_HEADERS = 64
# What of a body may wait to be read by its handler before the connection is read no further, and half of what it may be then.
READ_AHEAD_BYTES = 32 << 10
# How long the rest of a refused body is read, so that the caller sees the refusal and not a reset.
LINGERING_SECONDS = 2.0
# aiohttp takes 0 for no limit.
_AT_ONCE_SECONDS = 0.01


class _Site(web.BaseSite):
    """What the runner stops first."""

    def __init__(self, runner: Server, door: Door, host: str, port: int) -> None:
        super().__init__(runner)
        self._door = door
        self._host = host
        self._port = port

    @property
    def name(self) -> str:
        return f"http://{self._host}:{self._port}"

    async def start(self) -> None:
        await super().start()
        await self._door.listen(self._host, self._port)
        self._server = self._door  # type: ignore[assignment]  # of a server, the runner uses sockets and close() alone


class Server(web.AppRunner):
    """`async with` starts and stops it."""

    def __init__(self, app: web.Application, shutdown_seconds: float) -> None:
        super().__init__(
            app,
            # A caller that hangs up ends its request, and with it its container.
            handler_cancellation=True,
            shutdown_timeout=shutdown_seconds,
            access_log=None,
            auto_decompress=False,
            # The door watches all deadlines: no timer for each connection, no probes by the kernel.
            keepalive_timeout=0,
            tcp_keepalive=False,
            lingering_time=LINGERING_SECONDS,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
            read_bufsize=READ_AHEAD_BYTES,
        )
        self.door: Door | None = None

    async def __aenter__(self) -> Server:
        await self.setup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cleanup()

    async def listen(self, host: str, port: int) -> int:
        """Listen on every address of the host; the port of the last, which the system chooses if 0 was asked for."""
        if self.door is None:
            self.door = Door(self.app[SETTINGS], self.app[CALLERS], self._make_connection)
        await _Site(self, self.door, host, port).start()
        return int(self.addresses[-1][1])

    def close_idle(self) -> None:
        """Connections that wait for their next request are closed; newcomers still come in."""
        if self.door is not None:
            self.door.close_idle()

    def hurry(self) -> None:
        """No request is waited for when this stops."""
        self._shutdown_timeout = _AT_ONCE_SECONDS

    def _make_connection(self, door: Door, address: str, trusted_proxy: bool) -> Connection:
        server = self.server
        if server is None:
            raise RuntimeError("the server is not set up")
        return Connection(server, door, address, trusted_proxy, loop=server._loop, **server._kwargs)
