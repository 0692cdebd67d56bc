"""How to run a probe in a container of each engine: one adapter per engine, one `Contained` for the tests.

The container is the engine's own, made by the production path: the real engine class, the real specification, a real volume made
by the registry inside a sealed state folder. Only the image differs, in what stands in the runner's place: probes/conformance.py,
and probes/clone.py for what a zygote's children do once they have a run.

A child of a zygote sees no /proc. What the kernel says about it is read by the host, while the child pauses.
"""

from __future__ import annotations

import asyncio
import ctypes
import io
import json
import os
import socket
import struct
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gateway.launcher import mounts
from gateway.launcher.engines import Engine, slot_containers, zygote
from gateway.launcher.engines.docker import DockerEngine
from gateway.launcher.engines.slot_containers import SlotContainers
from gateway.launcher.engines.zygote import ZygoteEngine
from gateway.launcher.registry import Registry
from gateway.launcher.specification import Command, slot_specification
from gateway.protocol import Verdict
from gateway.settings import Settings
from gateway.uuid7 import uuid7

from .containers import PROFILE, SLOT_PROFILE, Probes, probes_beside_the_runner
from .launcher_harness import containers_of, inspect
from .probes.looks import look, parse_status, read
from .sealed import sealed_directory

ENTRY = ["/usr/bin/python3.13", "-s", "-P", "-S", "-B", "/opt/mayfly/probes/conformance.py"]
ENTRIES = {"docker": ENTRY, "zygote": [*ENTRY[:-1], "/opt/mayfly/probes/clone.py"]}
MOUNT_SETATTR, AT_EMPTY_PATH, MOUNT_ATTR_NOSUID_NODEV_NOEXEC = 442, 0x1000, 2 | 4 | 8
PATIENT = 30.0  # the deadline of a probe; what a test wants to see ends long before

Change = Callable[[dict[str, Any]], dict[str, Any]]
"""Of a slot's specification."""


@dataclass(frozen=True, slots=True)
class Run:
    verdict: Verdict
    output: bytes
    seen: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """By the name of each pause: what the child found, and what the host sees of it."""

    @property
    def report(self) -> dict[str, Any]:
        assert self.output, f"no report: {self.verdict.name}"
        report: dict[str, Any] = json.loads(self.output)
        assert not report or "error" not in report, report["error"]
        return report


@dataclass
class Opened:
    """An engine that serves."""

    here: Contained
    engine: Engine
    deployment: str

    async def run(
        self,
        order: Mapping[str, Any] | bytes,
        *,
        instance: uuid.UUID | None = None,
        meanwhile: Callable[[str], object] | None = None,
        command: Command = "serve",
        volume: Path | None = None,
    ) -> Run:
        """One container: it reads the order, does it, reports. At each pause of it, `meanwhile` is told the pause's name.

        Bytes are for a real runner, as they are."""
        if instance is None:
            instance, _ = self.here.new_volume()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        with ours:
            volume = volume or Path(self.here.registry.volume(instance))
            running = asyncio.create_task(self.engine.run(instance, volume, theirs, lambda: None, command))
            output, seen = b"", {}
            with suppress(ConnectionError):
                await loop.sock_sendall(ours, order if isinstance(order, bytes) else json.dumps(order).encode() + b"\n")
                while piece := await loop.sock_recv(ours, 1 << 16):
                    output += piece
                    if output.startswith(b'{"pause"') and output.endswith(b"\n"):
                        pause = json.loads(output)
                        seen[pause["pause"]] = self._see(pause["found"])
                        if meanwhile is not None:
                            meanwhile(pause["pause"])
                        output = b""
                        await loop.sock_sendall(ours, b"\n")
            return Run(await running, output, seen)

    def _see(self, found: Any) -> dict[str, Any]:
        child = self.child()
        seen = look(f"/proc/{child}") | {"found": found, "processes": processes_beside(child)}
        if isinstance(found, dict):
            seen |= found
            if read(f"/proc/{child}/cgroup") != read(f"/proc/{self.zygote()}/cgroup"):
                del seen["cgroup"]  # which is the slot's
        return seen

    def zygote(self) -> int:
        """Of the one slot, as the host numbers it."""
        (slot,) = containers_of(self.deployment)
        pid: int = inspect(slot["Id"])["State"]["Pid"]
        return pid

    def child(self) -> int:
        zygote = self.zygote()
        (pid,) = read(f"/proc/{zygote}/task/{zygote}/children").split()
        return int(pid)


def unsealed(folder: Path, *, read_only: bool = False) -> int:
    """As mounts.detached, but without the seal."""
    mount = mounts.detached(folder, read_only=read_only)
    nothing = struct.pack("=QQQQ", 0, MOUNT_ATTR_NOSUID_NODEV_NOEXEC, 0, 0)
    assert ctypes.CDLL(None).syscall(MOUNT_SETATTR, mount, b"", AT_EMPTY_PATH, nothing, ctypes.c_size_t(len(nothing))) == 0
    return mount


def leaving_out(*names: str) -> dict[str, str]:
    """What tells a probe's zygote to do without these; see probes/clone.py."""
    return {"MAYFLY_PROBE": json.dumps({"without": names})}


def processes_beside(pid: int) -> list[int]:
    """Every process of its pid namespace, as it is numbered there."""
    mine = os.readlink(f"/proc/{pid}/ns/pid")
    status = (parse_status(read(f"/proc/{other}/status")) for other in processes_where("ns/pid", mine))
    return sorted(int(found["NSpid"].split()[-1]) for found in status)


def processes_where(link: str, leads: str) -> list[int]:
    """Every process whose link of that name in its folder in /proc leads there."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                if os.readlink(f"/proc/{name}/{link}") == leads:
                    found.append(int(name))
    return found


def processes_that_see(words: str) -> list[int]:
    """Every process in whose mount table the words occur."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                if words in read(f"/proc/{name}/mountinfo"):
                    found.append(int(name))
    return found


@dataclass
class Contained:
    """One engine and the volumes of one state folder."""

    name: str
    settings: Settings
    state: Path
    registry: Registry
    volumes: dict[uuid.UUID, Path] = field(default_factory=dict)

    @asynccontextmanager
    async def open(
        self, change: Change | None = None, *, profile: str = SLOT_PROFILE, sealed: bool = True, **settings: Any
    ) -> AsyncIterator[Opened]:
        """`settings` replace those of production; `change`, `profile` and `sealed`, of the volume, are for a zygote alone."""
        deployment = f"conformance-{uuid.uuid4().hex}"
        folder = self.state / deployment  # an engine takes the slots' sockets that it finds for those of one that was killed
        (folder / "launcher").mkdir(parents=True)
        wanted = replace(self.settings, state_dir=folder, **settings)

        def changed(*arguments: Any, **more: Any) -> dict[str, Any]:
            body = slot_specification(*arguments, **more)
            return body if change is None else change(body)

        with (
            patch.object(slot_containers, "slot_specification", changed),
            patch.object(zygote, "detached", mounts.detached if sealed else unsealed),
        ):
            if self.name == "docker":
                engine: Engine = DockerEngine(wanted, deployment, PROFILE)
            else:
                engine = ZygoteEngine(wanted, SlotContainers(wanted, deployment, profile))
            try:
                await engine.open()
                yield Opened(self, engine, deployment)
            finally:
                await engine.close()

    def new_volume(self) -> tuple[uuid.UUID, Path]:
        instance = uuid7()
        self.registry.create(instance)
        return instance, Path(self.registry.volume(instance))

    async def run(self, order: Mapping[str, Any], *, instance: uuid.UUID | None = None, **settings: Any) -> Run:
        """One container of an engine of its own. `settings` replace those of production."""
        async with self.open(**settings) as opened:
            return await opened.run(order, instance=instance)

    async def survey(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a container of production looks like before its confinement, and after."""
        run = await self.run({"do": "survey", "confine": True})
        if self.name == "docker":
            return run.report["before"], run.report["after"]
        assert run.report is None
        return run.seen["before"], run.seen["after"]


@contextmanager
def probe_image(entry: list[str] = ENTRY) -> Iterator[tuple[Probes, str]]:
    """The probes' image, and one more in which a probe stands in the runner's place."""
    with probes_beside_the_runner() as probes:
        tag = f"{probes.image}-entry"
        recipe = io.BytesIO(f"FROM {probes.image}\nENTRYPOINT {json.dumps(entry)}\n".encode())
        probes.client.images.build(fileobj=recipe, tag=tag, rm=True, network_mode="none")
        try:
            yield probes, tag
        finally:
            probes.client.images.remove(tag, force=True)


@contextmanager
def contained(name: str, *, image: str | None = None) -> Iterator[tuple[Contained, Probes]]:
    """`image` in the place of the probes'."""
    with probe_image(ENTRIES[name]) as (probes, tag), sealed_directory() as state:
        (state / "instances").mkdir(mode=0o700)
        registry = Registry(state / "instances", ttl_seconds=600, min_free_bytes=0)
        settings = Settings(image=image or tag, slots=1, deadline_seconds=PATIENT, grace_seconds=0.5)
        try:
            yield Contained(name, settings, state, registry), probes
        finally:
            registry.close()
