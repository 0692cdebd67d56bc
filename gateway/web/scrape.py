"""The operator's listener: GET /metrics on an address of its own, apart from the API's connections, counts, log and headers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from ..settings import SettingsError

PATH = "/metrics"
MAX_CONNECTIONS = 8

Text = Callable[[], Awaitable[bytes]]


class _Server(web.Server):
    """Of few connections: beyond that the oldest makes room, so none that is left open keeps a scrape out."""

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        if len(self.connections) >= MAX_CONNECTIONS:
            self.connections[0].force_close()
        super().connection_made(handler, transport)


@asynccontextmanager
async def scraped(host: str, port: int, text: Text) -> AsyncIterator[int]:
    """Serve while within; the port, which the system chooses if 0 was asked for. Raises SettingsError if it cannot be had."""

    async def answer(request: web.BaseRequest) -> web.Response:
        if request.path != PATH:
            return web.Response(status=404)
        if request.method != "GET":
            return web.Response(status=405, headers={"Allow": "GET"})
        return web.Response(body=await text(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4, "Cache-Control": "no-store"})

    runner = web.ServerRunner(_Server(answer, access_log=None), shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port, backlog=MAX_CONNECTIONS).start()
        except OSError as error:
            raise SettingsError(f"MAYFLY_METRICS_LISTEN: {host} port {port}: {error.strerror}") from None
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
