"""How to run a probe in a container of each engine: one adapter per engine, one `Contained` for the tests.

The container is the engine's own, made by the production path: the real engine class, the real specification, a real volume made
by the registry inside a sealed state folder. Only the image differs, in what stands in the runner's place: probes/conformance.py.
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gateway.launcher.engines import Engine
from gateway.launcher.engines.docker import DockerEngine
from gateway.launcher.registry import Registry
from gateway.protocol import Verdict
from gateway.settings import Settings
from gateway.uuid7 import uuid7

from .containers import PROFILE, Probes, probes_beside_the_runner
from .sealed import sealed_directory

ENTRY = ["/usr/bin/python3.11", "-I", "-S", "-B", "/opt/mayfly/probes/conformance.py"]
PATIENT = 30.0  # the deadline of a probe; what a test wants to see ends long before


@dataclass(frozen=True, slots=True)
class Run:
    verdict: Verdict
    output: bytes

    @property
    def report(self) -> dict[str, Any]:
        assert self.output, f"no report: {self.verdict.name}"
        report: dict[str, Any] = json.loads(self.output)
        return report


@dataclass
class Contained:
    """One engine and the volumes of one state folder."""

    name: str
    settings: Settings
    state: Path
    registry: Registry
    volumes: dict[uuid.UUID, Path] = field(default_factory=dict)

    def engine(self, settings: Settings) -> Engine:
        adapters = {"docker": lambda: DockerEngine(settings, f"conformance-{uuid.uuid4().hex}", PROFILE)}
        return adapters[self.name]()

    def new_volume(self) -> tuple[uuid.UUID, Path]:
        instance = uuid7()
        self.registry.create(instance)
        return instance, self.registry.volume(instance)

    async def run(self, order: Mapping[str, Any], *, instance: uuid.UUID | None = None, **settings: Any) -> Run:
        """One container: it reads the order, does it, reports. `settings` replace those of production."""
        if instance is None:
            instance, _ = self.new_volume()
        engine = self.engine(replace(self.settings, **settings))
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await engine.open()
            with ours:
                running = asyncio.create_task(engine.run(instance, self.registry.volume(instance), theirs, lambda: None))
                await loop.sock_sendall(ours, json.dumps(order).encode() + b"\n")
                output = b""
                with suppress(ConnectionError):
                    while piece := await loop.sock_recv(ours, 1 << 16):
                        output += piece
                return Run(await running, output)
        finally:
            await engine.close()


@contextmanager
def probe_image() -> Iterator[tuple[Probes, str]]:
    """The probes' image, and one more in which a probe stands in the runner's place."""
    with probes_beside_the_runner() as probes:
        tag = f"{probes.image}-entry"
        recipe = io.BytesIO(f"FROM {probes.image}\nENTRYPOINT {json.dumps(ENTRY)}\n".encode())
        probes.client.images.build(fileobj=recipe, tag=tag, rm=True, network_mode="none")
        try:
            yield probes, tag
        finally:
            probes.client.images.remove(tag, force=True)


@contextmanager
def contained(name: str) -> Iterator[tuple[Contained, Probes]]:
    with probe_image() as (probes, image), sealed_directory() as state:
        (state / "instances").mkdir(mode=0o700)
        registry = Registry(state / "instances", ttl_seconds=600, min_free_bytes=0)
        try:
            yield Contained(name, Settings(image=image, deadline_seconds=PATIENT), state, registry), probes
        finally:
            registry.close()
