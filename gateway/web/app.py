"""Wiring: every part is made here, once, and lives in a clean-up context that ends in reverse order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress

from aiohttp import web

from ..settings import Settings
from . import handlers
from .access_log import AccessLog
from .appkeys import (
    ACCESS_LOG,
    CREATE_RATE,
    DRAIN,
    HEALTH,
    KEYS,
    LAUNCHER,
    REQUEST_RATE,
    RUNS,
    SETTINGS,
    TOKENS,
)
from .drain import Drain
from .health import Health
from .keys import KeyRing
from .launcher import Launcher
from .middleware import enveloped, finish_headers, logged
from .rates import Rate
from .runs import Runs
from .tokens import Tokens


def build_app(settings: Settings) -> web.Application:
    """Construct and return; nothing is opened before the application starts."""
    app = web.Application(middlewares=[logged, enveloped])
    app[SETTINGS] = settings
    app[KEYS] = KeyRing(settings.state_dir / "keys", settings.key_rotation_seconds)
    app[TOKENS] = Tokens(app[KEYS])
    app[REQUEST_RATE] = Rate(settings.rate_requests_per_minute)
    app[CREATE_RATE] = Rate(settings.rate_creates_per_minute)
    app[LAUNCHER] = Launcher(settings.state_dir / "run" / "launcher.sock")
    app[RUNS] = Runs(settings, app[LAUNCHER])
    app[ACCESS_LOG] = AccessLog(settings.state_dir / "log", settings.access_log_days)
    app[DRAIN] = Drain()
    app[HEALTH] = Health(settings, app[LAUNCHER], app[DRAIN])

    app.router.add_post("/sql", handlers.sql, expect_handler=handlers.expect)
    app.router.add_get("/healthz", handlers.healthz)
    app.router.add_get("/openapi.json", handlers.openapi_json)
    for path in handlers.PATHS:
        app.router.add_options(path, handlers.preflight)

    app.on_response_prepare.append(finish_headers)
    app.cleanup_ctx.extend([_keys, _access_log, _launcher, _runs])
    return app


async def _keys(app: web.Application) -> AsyncIterator[None]:
    await asyncio.to_thread(app[KEYS].open)
    async with _background(app[KEYS].keep_rotating()):
        yield


async def _access_log(app: web.Application) -> AsyncIterator[None]:
    await asyncio.to_thread(app[ACCESS_LOG].open)
    async with _background(app[ACCESS_LOG].keep_writing()):
        yield
    await app[ACCESS_LOG].flush()


async def _launcher(app: web.Application) -> AsyncIterator[None]:
    yield
    app[LAUNCHER].close()


async def _runs(app: web.Application) -> AsyncIterator[None]:
    app[RUNS].open()
    yield
    await app[RUNS].close()


@asynccontextmanager
async def _background(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    task = asyncio.get_running_loop().create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
