"""`python -m gateway.web`: read the settings, serve until SIGTERM, finish what runs, stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import sys
from contextlib import AsyncExitStack
from typing import Any

import uvloop

from .. import operator_log
from ..operator_log import where
from ..settings import Settings, SettingsError
from .access_log import AccessLogError
from .app import build_app
from .appkeys import DRAIN
from .keys import KeysError
from .metrics import Metrics
from .scrape import scraped
from .server import Server

# Log, keys, launcher, listeners, answers under way.
OTHER_DESCRIPTORS = 256

_log = logging.getLogger("gateway.web")


Address = tuple[str, int]


def split_address(listen: str, name: str = "MAYFLY_LISTEN") -> Address:
    """`127.0.0.1:8080` or `[::1]:8080`; raises SettingsError."""
    host, colon, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"{name}={listen!r} is not an address and a port")
    return host, int(port)


def addresses(settings: Settings) -> tuple[Address, Address | None]:
    """Of the API and of the operator's metrics, if they are served; raises SettingsError."""
    api = split_address(settings.listen)
    if not settings.metrics_listen:
        return api, None
    metrics = split_address(settings.metrics_listen, "MAYFLY_METRICS_LISTEN")
    if metrics == api and api[1] != 0:
        raise SettingsError(f"MAYFLY_METRICS_LISTEN={settings.metrics_listen!r} is the address of the API; choose another port")
    return api, metrics


async def serve(settings: Settings) -> None:
    (host, port), metrics_address = addresses(settings)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_unhandled)
    stop = asyncio.Event()
    app = build_app(settings)
    # The longest a request at hand can take: it may still wait for its slot and its container.
    run_seconds = max(settings.deadline_seconds, settings.bulk_deadline_seconds) + settings.grace_seconds
    drain_seconds = settings.start_timeout_seconds + run_seconds + 2.0
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(Server(app, shutdown_seconds=2.0))
        if metrics_address is not None:
            told_at = await stack.enter_async_context(scraped(*metrics_address, Metrics(server).text))
            _log.info("metrics on %s port %d", metrics_address[0], told_at)

        def told_to_stop() -> None:
            """Once: finish what runs. Again: at once."""
            if stop.is_set():
                server.hurry()
                app[DRAIN].hurry()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told_to_stop)
        # What has been made so far stays: no collection looks at it again.
        gc.collect()
        gc.freeze()
        _log.info("listening on %s port %d", host, await server.listen(host, port))
        await stop.wait()
        # The sockets stay open: whoever comes now reads 503 and when to come back.
        server.close_idle()
        if not await app[DRAIN].begin(drain_seconds):
            _log.warning("requests still ran when the wait for them ended")
    _log.info("stopped")


def _log_unhandled(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio's own handler prints messages and objects, which can quote a tenant."""
    error = context.get("exception")
    _log.error("unhandled in the event loop: %s", where(error) if error else context.get("message"))


def _allow_descriptors(settings: Settings) -> None:
    """As many as may be; raises SettingsError if that is too few for all connections and runs."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = settings.connections + 2 * settings.slots + OTHER_DESCRIPTORS
    if settings.connections and hard != resource.RLIM_INFINITY and hard < needed:
        raise SettingsError(f"MAYFLY_CONNECTIONS={settings.connections} needs {needed} open files and the limit is {hard}")


def main() -> int:
    os.umask(0o077)
    # A core file would hold the token keys.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        settings = Settings.from_environment()
        addresses(settings)
        _allow_descriptors(settings)
    except SettingsError as error:
        print(f"mayfly web: {error}", file=sys.stderr)
        return 2
    operator_log.configure(settings, "web")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings))
    except (KeysError, AccessLogError, SettingsError, OSError) as error:
        operator_log.last_words(settings, "web", str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
