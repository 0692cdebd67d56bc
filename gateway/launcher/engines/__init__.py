"""What an engine is: something that gives an instance one sealed container and takes it away again."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from ...protocol import Verdict
from ...settings import Settings
from ..specification import BULK, Command


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What `open` found, for HEALTH."""

    version: str
    runtime: str
    image_id: str


def kill_after_seconds(settings: Settings, command: Command) -> float:
    """From the beginning of a run to its kill, deadline and grace together."""
    return (settings.bulk_deadline_seconds if command in BULK else settings.deadline_seconds) + settings.grace_seconds


@dataclass(frozen=True, slots=True)
class SlotFigures:
    """For the metrics. `standing` slots serve a run or could; `replaced` counts since the start, by reason."""

    standing: int
    replaced: Mapping[str, int]


class Engine(Protocol):
    """The sandbox contract.

    A container means kernel facts, tested from the inside: fresh mount, pid, ipc, uts and net namespaces; a read-only root; one
    volume at /data (nosuid, nodev, noexec); no capabilities; no_new_privs; a seccomp profile; limits on memory, processes,
    processors and file size. A layer that the host cannot apply is a refusal, never a warning.

    One container serves one run of one instance and is never used again, whatever happens in it. It may be started before the
    run: with the instance's volume already mounted, and then it is that instance's alone, or without any, and then for anybody.
    The caller of `run`, `prepare` and `discard` holds the instance's lease, so that no two containers of one volume exist at a
    time. A container outlives its run only while the engine does not answer; `removal` then says what to wait for before the
    lease may be let go. Destroying twice is harmless, at any time and from anywhere: what is already gone, or on its way, counts
    as destroyed.
    """

    @property
    def name(self) -> str:
        """What MAYFLY_ENGINE calls it."""

    @property
    def choice(self) -> str:
        """Why it is this one, for the operator."""

    @property
    def starts_ahead(self) -> bool:
        """Whether `prepare` saves a run anything. Where not, nobody calls it, and nothing ever waits for an instance."""

    @property
    def slots(self) -> SlotFigures:
        """Of MAYFLY_SLOTS. An engine without standing containers has all of them."""

    async def open(self) -> EngineFacts:
        """Connect, or connect again, and start what has to stand. What stands already is kept.

        Raises EngineDownError, ImageMissingError, or RefusedError if the host falls short.
        """

    async def ping(self) -> None:
        """Raises EngineDownError unless the engine can take a run."""

    async def run(
        self,
        instance: uuid.UUID,
        volume: str,
        caller: socket.socket,
        started: Callable[[], None],
        command: Command = "serve",
    ) -> Verdict:
        """Give the instance a container whose only way to the world is `caller`, and return how it ended.

        It is the container that `prepare` made, if that one lives, and otherwise a new one. One that was prepared and turns out to
        be dead before a byte of the request has reached it is replaced, and the caller sees nothing of it. What is prepared is
        prepared for `serve`: with any other command nothing may wait for the instance, the caller has discarded it.

        The socket is the engine's from now on, and closed in every case, at the latest when the container is gone. `started` is
        called at most once, when the container runs and holds the socket. A container is killed at its deadline plus grace, counted
        from the first byte of the request or, where the engine never sees that, from the moment at which it got the socket; or
        soon after the caller has closed its end, if it does not end by itself meanwhile.
        Cancelling kills the container; CancelledError is raised after it is gone. Raises EngineError if no container started.
        On return and on every exception the container is gone, unless `removal` gives something to wait for.
        """

    def spare_turn(self) -> AbstractAsyncContextManager[None]:
        """Wait until a start would be in nobody's way; held around `prepare`."""

    async def prepare(self, instance: uuid.UUID, volume: str, lost: Callable[[], None]) -> None:
        """Start the container of the instance's next run, to wait for it. `lost` is called at most once, if it ends while it waits.

        Raises EngineError if it did not start. On an exception nothing waits, unless it is CancelledError: then something may.
        """

    def is_prepared(self, instance: uuid.UUID) -> bool:
        """Whether a living container waits for the instance's next run. Asks nobody."""

    async def discard(self, instance: uuid.UUID) -> None:
        """Destroy what waits for the instance's next run, if anything does. On return it is gone, or `removal` tells of it."""

    def removal(self, instance: uuid.UUID) -> asyncio.Task[None] | None:
        """What ends when the container that had to be left behind is gone; None when there is none."""

    async def sweep(self) -> int:
        """Remove the containers of this deployment that belong to nothing of this process. Returns how many there were."""

    async def close(self) -> None:
        """Let go of the engine, when no run is left. Containers that still exist are left to the next start's sweep."""
