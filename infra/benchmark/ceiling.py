"""`python -m infra.benchmark.ceiling`: the gateway's own application with nothing between it and SQLite.

Two parts of the application are replaced from here, by the keys under which it holds them: the launcher by the launcher's registry,
and the run of a container by the runner's own code in this process. HTTP, tokens, frames, policy, limits and durability are the
product's; only processes, sockets and containers are gone. So this is what no engine can exceed, and it is no sandbox.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from pathlib import Path
from time import monotonic

import uvloop

from gateway.launcher.errors import UnknownInstanceError
from gateway.launcher.registry import Registry
from gateway.launcher.specification import runner_configuration
from gateway.settings import Settings
from gateway.web.app import build_app
from gateway.web.appkeys import LAUNCHER, RUNS
from gateway.web.body import Int64Form
from gateway.web.launcher import Launcher
from gateway.web.runner import Ok, decode_reply
from gateway.web.runs import Runs
from gateway.web.server import Server
from gateway.web.verdicts import rows_or_raise
from runner.configuration import Configuration
from runner.execute import run_request
from runner.wire import VerdictError, decode_request, encode_failure

_FRAME_HEADER_BYTES = 4


class InProcessLauncher(Launcher):
    """The registry without the process around it."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(Path("/nonexistent"))
        self._registry = registry

    async def create(self, instance: uuid.UUID) -> int:
        return self._registry.create(instance).expires_at

    async def find(self, instance: uuid.UUID) -> int | None:
        try:
            return self._registry.find(instance).expires_at
        except UnknownInstanceError:
            return None

    async def remove(self, instance: uuid.UUID) -> None:
        self._registry.remove(instance)


class InProcessRuns(Runs):
    """A frame in, a reply out, in one step of the event loop: no lease is needed where nothing overlaps."""

    def __init__(self, settings: Settings, launcher: InProcessLauncher, registry: Registry) -> None:
        super().__init__(settings, launcher)
        self._registry = registry
        self._configuration = Configuration.parse(runner_configuration(settings))

    async def run(self, instance: uuid.UUID, frame: bytes, int64: Int64Form) -> Ok:
        deadline = monotonic() + self._configuration.deadline_ms / 1000
        database = str(self._registry.volume(instance) / "db.sqlite")
        try:
            request = decode_request(frame[_FRAME_HEADER_BYTES:])
            reply = run_request(request, self._configuration, lambda: monotonic() >= deadline, lambda _: None, database)
        except VerdictError as error:
            reply = encode_failure(error.verdict, error.message)
        return rows_or_raise(decode_reply(reply, int64))


async def _serve(settings: Settings) -> None:
    folder = settings.state_dir / "instances"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("keys", "log"):
        (settings.state_dir / name).mkdir(mode=0o700, exist_ok=True)
    registry = Registry(folder, ttl_seconds=settings.ttl_seconds, min_free_bytes=settings.min_free_bytes)
    app = build_app(settings)
    app[LAUNCHER] = launcher = InProcessLauncher(registry)
    app[RUNS] = InProcessRuns(settings, launcher, registry)
    async with Server(app, shutdown_seconds=1.0) as server:
        print(await server.listen("127.0.0.1", 0), flush=True)
        await asyncio.Event().wait()


def main() -> int:
    uvloop.run(_serve(Settings.from_environment()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
