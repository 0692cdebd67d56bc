"""`python -m gateway.web`: read the settings, serve until SIGTERM, finish what runs, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
from typing import Any

import uvloop

from ..settings import Settings, SettingsError
from .app import build_app
from .appkeys import DRAIN
from .keys import KeysError
from .middleware import where
from .server import Server

_log = logging.getLogger("gateway.web")


def split_address(listen: str) -> tuple[str, int]:
    """`127.0.0.1:8080` or `[::1]:8080`; raises SettingsError."""
    host, colon, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"MAYFLY_LISTEN={listen!r} is not an address and a port")
    return host, int(port)


async def serve(settings: Settings) -> None:
    host, port = split_address(settings.listen)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_unhandled)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # The longest a request at hand can take: it may still wait for its slot and its container.
    drain_seconds = settings.start_timeout_seconds + settings.deadline_seconds + settings.grace_seconds + 2.0
    app = build_app(settings)
    async with Server(app, shutdown_seconds=2.0) as server:
        _log.info("listening on %s port %d", host, await server.listen(host, port))
        await stop.wait()
        # The sockets stay open: whoever comes now reads 503 and when to come back.
        if not await app[DRAIN].begin(drain_seconds):
            _log.warning("requests still ran after %.1f s", drain_seconds)
    _log.info("stopped")


def _log_unhandled(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio's own handler prints messages and objects, which can quote a tenant."""
    error = context.get("exception")
    _log.error("unhandled in the event loop: %s", where(error) if error else context.get("message"))


def main() -> int:
    os.umask(0o077)
    # A core file would hold the token keys.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        settings = Settings.from_environment()
        split_address(settings.listen)
    except SettingsError as error:
        print(f"mayfly web: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings))
    except (KeysError, OSError) as error:
        print(f"mayfly web: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
