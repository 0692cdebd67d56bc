"""Wiring: every part is made here, once, and lives in a clean-up context that ends in reverse order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

from aiohttp import web

from ..operator_log import where
from ..settings import Settings
from . import routes
from .access_log import AccessLog
from .appkeys import (
    ACCESS_LOG,
    ANSWERS,
    BODIES,
    BREAKER,
    BULK_GATE,
    CALLERS,
    CREATE_RATE,
    DRAIN,
    HEALTH,
    KEYS,
    LAUNCHER,
    REPLAYS,
    REQUEST_RATE,
    ROOM,
    RUNS,
    SETTINGS,
    SHIPPING,
    TOKENS,
    TRAFFIC,
)
from .body import Bodies
from .breaker import Breaker
from .bulk import BulkGate
from .callers import Callers
from .drain import Drain
from .health import Health
from .keys import KeyRing, source_of
from .launcher import Launcher
from .middleware import enveloped, finish_headers, logged
from .rates import Rate
from .replays import Replays
from .room import ANSWERS_BYTES, ROOM_BYTES, Room
from .runs import Runs
from .tokens import Tokens
from .traffic import Traffic

_log = logging.getLogger(__name__)


def build_app(settings: Settings) -> web.Application:
    """Construct and return; nothing is opened before the application starts. Raises SettingsError."""
    app = web.Application(middlewares=[logged, enveloped])
    app[SETTINGS] = settings
    app[KEYS] = KeyRing(source_of(settings), settings.key_rotation_seconds)
    app[TOKENS] = Tokens(app[KEYS])
    app[CALLERS] = Callers(settings.trusted_proxies)
    factors = {56: settings.rate_ipv6_56_factor, 48: settings.rate_ipv6_48_factor}
    app[REQUEST_RATE] = Rate(settings.rate_requests_per_minute, factors)
    app[CREATE_RATE] = Rate(settings.rate_creates_per_minute, factors)
    app[LAUNCHER] = Launcher(settings.state_dir / "run" / "launcher.sock")
    app[RUNS] = Runs(settings, app[LAUNCHER])
    app[BREAKER] = Breaker(settings, app[LAUNCHER], app[RUNS])
    app[ACCESS_LOG] = AccessLog(settings.state_dir / "log", settings.access_log_days, settings.access_log_bytes)
    if settings.access_log_bucket:
        from .shipping import Shipping  # and boto3 with it

        app[SHIPPING] = Shipping(settings, settings.state_dir / "log")
    app[BODIES] = Bodies(settings.body_seconds)
    app[ROOM] = Room(ROOM_BYTES)
    app[ANSWERS] = Room(ANSWERS_BYTES)
    app[BULK_GATE] = BulkGate(settings)
    app[REPLAYS] = Replays()
    app[DRAIN] = Drain()
    app[TRAFFIC] = Traffic(routes.PATHS)
    app[HEALTH] = Health(settings, app[LAUNCHER], app[DRAIN], app[BREAKER])

    routes.add_to(app.router)
    app.on_response_prepare.append(finish_headers)
    app.cleanup_ctx.extend([_keys, _access_log, _shipping, _launcher, _runs, _replays])
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


async def _shipping(app: web.Application) -> AsyncIterator[None]:
    shipping = app.get(SHIPPING)
    if shipping is None:
        yield
        return
    await asyncio.to_thread(shipping.open)
    async with _background(shipping.run()):
        yield


async def _launcher(app: web.Application) -> AsyncIterator[None]:
    yield
    app[LAUNCHER].close()


async def _runs(app: web.Application) -> AsyncIterator[None]:
    app[RUNS].open()
    async with _background(app[BREAKER].watch()):
        yield
    await app[RUNS].close()


async def _replays(app: web.Application) -> AsyncIterator[None]:
    yield
    await app[REPLAYS].close()


@asynccontextmanager
async def _background(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """What is to go on for as long as the process: if it fails, the process stops, and whoever started it starts it anew."""
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(_stop_if_failed)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))


def _stop_if_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("the process stops: %s", where(error))
        os.kill(os.getpid(), signal.SIGTERM)
