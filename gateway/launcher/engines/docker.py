"""One Docker container per run: create, attach, start, relay, wait, remove."""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import docker

from ...protocol import Verdict
from ...settings import Settings
from ..errors import ContainerRefusedError, EngineDownError, EngineError, RefusedError
from ..specification import LABEL_DEPLOYMENT, LABEL_INSTANCE, Command, container_specification
from . import EngineFacts, daemon
from .relay import End, HangUp, RelayLimits, relay

log = logging.getLogger(__name__)

_FRAME_HEADER_BYTES = 4
_EXCESS_BYTES = 1  # one byte past the cap tells the caller that a reply is too long
_REMOVAL_PATIENCE_SECONDS = 10.0
_RETRY_SECONDS = (0.2, 5.0)  # first and longest pause between attempts to remove what an unreachable daemon still has
_OOM_REPORT_ATTEMPTS = 3
_OOM_REPORT_PAUSE_SECONDS = 0.05

_VERDICTS = {
    End.DEADLINE: Verdict.DEADLINE,
    End.HUNG_UP: Verdict.CANCELLED,
    End.STOPPED: Verdict.CANCELLED,
    End.TOO_LONG: Verdict.SIGNALLED,
    End.GARBLED: Verdict.LOST,
}


@dataclass(slots=True)
class _Run:
    """One run on its way; `container` is None until the daemon has said what it is called."""

    instance: uuid.UUID
    body: dict[str, Any]
    caller: socket.socket
    started: Callable[[], None]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    container: str | None = None
    nothing_created: bool = False


class DockerEngine:
    """Plain Engine API, any OCI runtime. The contract is Engine's."""

    name = "docker"

    def __init__(self, settings: Settings, deployment: str, seccomp_profile: str) -> None:
        self._settings = settings
        self._deployment = deployment
        self._seccomp_profile = seccomp_profile
        self._limits = RelayLimits(
            request_bytes=settings.max_request_frame_bytes + _FRAME_HEADER_BYTES,
            reply_bytes=settings.max_reply_frame_bytes + _FRAME_HEADER_BYTES + _EXCESS_BYTES,
            kill_after_seconds=settings.deadline_seconds + settings.grace_seconds,
            idle_seconds=settings.start_timeout_seconds,
        )
        # Each run holds at most one thread at a time, each pending removal another; sweep and ping come on top.
        self._daemon = daemon.Daemon(
            settings.docker_socket, threads=2 * settings.slots + 4, timeout_seconds=settings.start_timeout_seconds
        )
        self._owned: set[uuid.UUID] = set()
        self._removals: dict[uuid.UUID, asyncio.Task[None]] = {}

    async def open(self) -> EngineFacts:
        await self._daemon.reconnect()
        runtime = self._settings.docker_runtime
        info: dict[str, Any] = await self._daemon.call(docker.APIClient.info)
        image_id = await self._daemon.call(partial(daemon.image_id, image=self._settings.image))
        if not any(option.startswith("name=seccomp") for option in info.get("SecurityOptions") or []):
            raise RefusedError("the Docker daemon does not apply seccomp profiles")
        if runtime and runtime not in info.get("Runtimes", {}):
            raise RefusedError(f"the Docker daemon has no runtime {runtime!r}")
        return EngineFacts(str(info["ServerVersion"]), runtime or str(info["DefaultRuntime"]), image_id)

    async def ping(self) -> None:
        await self._daemon.call(lambda client: client.ping())

    async def run(
        self,
        instance: uuid.UUID,
        volume: Path,
        caller: socket.socket,
        started: Callable[[], None],
        command: Command = "serve",
    ) -> Verdict:
        body = container_specification(self._settings, instance, volume, self._deployment, self._seccomp_profile, command)
        run = _Run(instance, body, caller, started)
        work = asyncio.create_task(self._run(run), name=f"run {instance}")
        cancelled = False
        while not work.done():
            try:
                await asyncio.wait((work,))
            except asyncio.CancelledError:
                cancelled = True
                run.stop.set()  # `work` itself is never cancelled: it takes its container with it
        if cancelled:
            work.exception()
            raise asyncio.CancelledError
        return work.result()

    def removal(self, instance: uuid.UUID) -> asyncio.Task[None] | None:
        return self._removals.get(instance)

    async def sweep(self) -> int:
        found = await self._daemon.call(partial(daemon.labelled, labels={LABEL_DEPLOYMENT: self._deployment}))
        # Looked at after the list was made: what a run of ours has made since is not in the list, what it had made before is owned.
        owned = {str(instance) for instance in self._owned}
        orphans = [item["Id"] for item in found if item["Labels"].get(LABEL_INSTANCE) not in owned]
        for container in orphans:
            await self._remove_container(container)
            log.info("orphan removed container=%s", container[:12])
        return len(orphans)

    async def close(self) -> None:
        for task in list(self._removals.values()):
            task.cancel()
        await asyncio.gather(*self._removals.values(), return_exceptions=True)
        self._daemon.close()

    async def _run(self, run: _Run) -> Verdict:
        with run.caller, closing(HangUp(run.caller)) as hang_up:
            if run.instance in self._owned:
                raise ContainerRefusedError("the instance still has a container")
            self._owned.add(run.instance)
            gone = False
            try:
                verdict = await self._live(run, hang_up)
            finally:
                hang_up.close()
                run.caller.close()
                gone = await self._destroy(run)
        return verdict if gone else Verdict.LOST

    async def _live(self, run: _Run, hang_up: HangUp) -> Verdict:
        """From nothing to how the container ended. Whatever exists then is `_destroy`'s to remove."""
        if hang_up.event.is_set() or run.stop.is_set():
            run.nothing_created = True
            return Verdict.CANCELLED
        try:
            container, warnings = await self._daemon.call(partial(daemon.create, body=run.body))
        except EngineError as error:
            # An answer, or no connection: there is no container. Silence: there may be one.
            run.nothing_created = not isinstance(error, EngineDownError) or error.nothing_sent
            raise
        run.container = container
        if warnings:
            raise ContainerRefusedError(f"Docker would leave something out: {'; '.join(warnings)}")
        with await self._daemon.call(partial(daemon.attach, container=container)) as stream:
            if hang_up.event.is_set() or run.stop.is_set():
                return Verdict.CANCELLED
            await self._daemon.call(lambda client: client.start(container))
            run.started()
            end, kill_at = await relay(run.caller, stream, self._limits, hang_up, run.stop)
        hang_up.close()
        run.caller.close()  # the reply is with the caller; what follows costs it nothing
        if end is not End.OUTPUT_OVER:
            return _VERDICTS[end]
        return await self._exit_verdict(container, kill_at)

    async def _exit_verdict(self, container: str, kill_at: float) -> Verdict:
        left = max(kill_at - asyncio.get_running_loop().time(), self._settings.grace_seconds)
        try:
            code = await self._daemon.call(partial(daemon.wait, container=container, seconds=left))
            if code is None:
                return Verdict.DEADLINE
            if code <= 128:
                return Verdict.EXITED
            for attempt in range(_OOM_REPORT_ATTEMPTS):  # the kernel's report reaches the daemon on another way than the exit
                if attempt:
                    await asyncio.sleep(_OOM_REPORT_PAUSE_SECONDS)
                if await self._daemon.call(partial(daemon.killed_for_memory, container=container)):
                    return Verdict.OUT_OF_MEMORY
            return Verdict.SIGNALLED
        except EngineError as error:
            log.warning("container=%s lost: %s", container[:12], error)
            return Verdict.LOST

    async def _destroy(self, run: _Run) -> bool:
        """True when nothing of the run is left; otherwise its removal goes on behind, and `removal` tells of it."""
        if not run.nothing_created:
            try:
                await self._remove(run)
            except EngineError as error:
                log.warning("instance=%s container=%s not removed, trying on: %s", run.instance, (run.container or "?")[:12], error)
                self._removals[run.instance] = asyncio.create_task(self._remove_at_last(run), name=f"removal {run.instance}")
                return False
        self._owned.discard(run.instance)
        return True

    async def _remove_at_last(self, run: _Run) -> None:
        pause, longest = _RETRY_SECONDS
        try:
            while True:
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
                try:
                    await self._remove(run)
                except EngineError as error:
                    log.debug("instance=%s not removed yet: %s", run.instance, error)
                    continue
                break
            self._owned.discard(run.instance)
            log.info("instance=%s container=%s removed at last", run.instance, (run.container or "?")[:12])
        finally:
            del self._removals[run.instance]

    async def _remove(self, run: _Run) -> None:
        """By its name, or, if the daemon never told it, by its labels."""
        if run.container is not None:
            await self._remove_container(run.container)
            return
        labels = {LABEL_DEPLOYMENT: self._deployment, LABEL_INSTANCE: str(run.instance)}
        for item in await self._daemon.call(partial(daemon.labelled, labels=labels)):
            await self._remove_container(item["Id"])

    async def _remove_container(self, container: str) -> None:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + _REMOVAL_PATIENCE_SECONDS
        while not await self._daemon.call(partial(daemon.remove, container=container)):
            if loop.time() > give_up_at:
                raise EngineDownError(f"the removal of {container[:12]} is under way and does not end")
            await asyncio.sleep(0.05)
