"""`python -m infra.benchmark.ceiling`: the gateway's own application with no launcher and no container behind it.

One part of the application is replaced from here: its launcher, by one that keeps the real registry and answers a RUN itself, with
the runner's own code, in this process. HTTP, tokens, leases, frames, policy, limits and durability are the product's; only
the other processes and their containers are gone. So this is what no engine can exceed, and it is no sandbox.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import uvloop

from gateway.launcher.errors import UnknownInstanceError
from gateway.launcher.registry import Registry
from gateway.launcher.specification import runner_configuration
from gateway.protocol import NO_REQUEST, NO_TAG, Verdict
from gateway.settings import Settings
from gateway.uuid7 import uuid7
from gateway.web.app import build_app
from gateway.web.appkeys import BREAKER, LAUNCHER, RUNS
from gateway.web.breaker import Breaker
from gateway.web.launcher import Found, Launcher, RunEnd
from gateway.web.runs import Runs
from gateway.web.server import Server
from runner.configuration import Configuration
from runner.execute import run_request
from runner.wire import VerdictError, decode_request, encode_failure

_LENGTH = struct.Struct("!I")
_CHUNK_BYTES = 256 << 10


class InProcessLauncher(Launcher):
    """The verbs of docs/wire.md without a launcher. Nothing overlaps: a run is one step of the event loop."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        super().__init__(Path("/nonexistent"))
        self._registry = registry
        self._configuration = Configuration.parse(runner_configuration(settings))

    async def create(self, owner: bytes, request_id: bytes, *, salvage: bool = False) -> tuple[uuid.UUID, int]:
        instance = uuid7()
        return instance, self._registry.create(instance).expires_at

    async def look(self, instance: uuid.UUID, request_id: bytes = NO_REQUEST) -> Found | None:
        try:
            return Found(self._registry.find(instance).expires_at, False)
        except UnknownInstanceError:
            return None

    async def remove(self, instance: uuid.UUID, request_id: bytes = NO_REQUEST) -> None:
        self._registry.remove(instance)

    async def health(self) -> str:
        return '{"daemon": "up", "trouble": null, "free_bytes": 1000000000000, "available_memory_bytes": 1000000000000}'

    def run(
        self,
        instance: uuid.UUID,
        passed: socket.socket,
        started: Callable[[int], None] | None,
        over: Callable[[RunEnd], None],
        request_id: bytes = NO_REQUEST,
        flags: int = 0,
        tag: bytes = NO_TAG,
    ) -> None:
        loop = asyncio.get_running_loop()
        expires_at = self._registry.find(instance).expires_at
        passed.setblocking(False)
        received = bytearray()

        def receive() -> None:
            chunk = passed.recv(_CHUNK_BYTES)
            received.extend(chunk)
            if len(received) >= _LENGTH.size and len(received) == _LENGTH.size + _LENGTH.unpack_from(received)[0]:
                if started is not None:
                    started(expires_at)
                reply = self._reply(instance, bytes(received[_LENGTH.size :]))
                # The benchmark's replies are far smaller than a socket's buffer.
                passed.sendall(_LENGTH.pack(len(reply)) + reply)
            elif chunk:
                return
            loop.remove_reader(passed)
            passed.close()
            over(Verdict.EXITED)

        loop.add_reader(passed, receive)

    def _reply(self, instance: uuid.UUID, frame: bytes) -> bytes:
        deadline = monotonic() + self._configuration.deadline_ms / 1000
        database = f"{self._registry.volume(instance)}/db.sqlite"
        try:
            return run_request(
                decode_request(frame), self._configuration, lambda: monotonic() >= deadline, lambda _: None, database
            )
        except VerdictError as error:
            return encode_failure(error.verdict, error.message)


async def _serve(settings: Settings) -> None:
    folder = settings.state_dir / "instances"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("keys", "log"):
        (settings.state_dir / name).mkdir(mode=0o700, exist_ok=True)
    registry = Registry(folder, ttl_seconds=settings.ttl_seconds, min_free_bytes=settings.min_free_bytes)
    app = build_app(settings)
    app[LAUNCHER] = launcher = InProcessLauncher(settings, registry)
    app[RUNS] = Runs(settings, launcher)
    app[BREAKER] = Breaker(settings, launcher, app[RUNS])
    async with Server(app, shutdown_seconds=1.0) as server:
        print(await server.listen("127.0.0.1", 0), flush=True)
        await asyncio.Event().wait()


def main() -> int:
    uvloop.run(_serve(Settings.from_environment()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
