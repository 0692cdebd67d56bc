"""One Docker container per run: create, attach, start, and, now or later, relay and remove."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import uuid
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from ...protocol import Verdict
from ...settings import Settings
from ..errors import ContainerRefusedError, DeadContainerError, EngineDownError, EngineError, RefusedError
from ..specification import BULK, LABEL_DEPLOYMENT, LABEL_INSTANCE, Command, container_specification
from . import EngineFacts, SlotFigures, daemon, kill_after_seconds
from .completion import to_the_end
from .relay import End, HangUp, Relay, RelayLimits
from .starts import Starts, cores

log = logging.getLogger(__name__)

_FRAME_HEADER_BYTES = 4
_EXCESS_BYTES = 1  # one byte past the cap tells the caller that a reply is too long
_RETRY_SECONDS = (0.2, 5.0)  # first and longest pause between attempts to remove what an unreachable daemon still has
_OOM_REPORT_ATTEMPTS = 3
_OOM_REPORT_PAUSE_SECONDS = 0.05

_VERDICTS = {
    End.DEADLINE: Verdict.DEADLINE,
    End.CALLED_OFF: Verdict.CANCELLED,
    End.TOO_LONG: Verdict.SIGNALLED,
    End.GARBLED: Verdict.LOST,
}


@dataclass(slots=True)
class _Container:
    """One container from nothing to gone; `id` is None until the daemon has said what it is called."""

    instance: uuid.UUID
    body: dict[str, Any]
    id: str | None = None
    nothing_created: bool = False
    stream: socket.socket | None = None

    @property
    def silent(self) -> bool:
        """Whether it lives and has said nothing. One that ended, or could not confine itself and said so, is readable."""
        if self.stream is None:
            return False
        poll = select.poll()
        poll.register(self.stream, select.POLLIN)
        return not poll.poll(0)


class _Run:
    """One run on its way. `over` is set when its caller has hung up or it was cancelled."""

    def __init__(self, caller: socket.socket, limits: RelayLimits, started: Callable[[], None]) -> None:
        self.over = asyncio.Event()
        self.cancelled = False
        caller.setblocking(False)
        self._caller = caller
        self._hang_up = HangUp(caller, self.over)
        self._relay = Relay(caller, limits, self.over)
        self._started: Callable[[], None] | None = started

    def cancel(self) -> None:
        self.cancelled = True
        self.over.set()

    async def converse(self, stream: socket.socket) -> tuple[End, Relay]:
        """Carry request and reply; `started` is told the first time."""
        started, self._started = self._started, None
        if started is not None:
            started()
        return await self._relay.carry(stream), self._relay

    def close(self) -> None:
        self._hang_up.close()
        self._caller.close()


class DockerEngine:
    """Plain Engine API, any OCI runtime. The contract is Engine's."""

    name = "docker"
    choice = "set"
    starts_ahead = True

    def __init__(self, settings: Settings, deployment: str, seccomp_profile: str) -> None:
        self._settings = settings
        self._deployment = deployment
        self._seccomp_profile = seccomp_profile
        self._limits = {command: _relay_limits(settings, command) for command in get_args(Command)}
        # Each run holds at most one thread at a time, each pending removal another, each start that nobody waits for a third;
        # sweep and ping come on top.
        self._daemon = daemon.Daemon(
            settings.docker_socket, threads=2 * settings.slots + cores() + 4, timeout_seconds=settings.start_timeout_seconds
        )
        self._starts = Starts(cores(), settings.slots)
        self._owned: set[uuid.UUID] = set()
        self._prepared: dict[uuid.UUID, _Container] = {}
        self._removals: dict[uuid.UUID, asyncio.Task[None]] = {}

    @property
    def slots(self) -> SlotFigures:
        return SlotFigures(self._settings.slots, {})

    async def open(self) -> EngineFacts:
        facts, _ = await self._daemon.survey(self._settings)
        return facts

    async def ping(self) -> None:
        await self._daemon.call(lambda client: client.ping())

    async def run(
        self,
        instance: uuid.UUID,
        volume: str,
        caller: socket.socket,
        started: Callable[[], None],
        command: Command = "serve",
    ) -> Verdict:
        run = _Run(caller, self._limits[command], started)
        new = _Container(instance, self._body(instance, volume, command))
        return await to_the_end(self._run(run, new, command), run.cancel)

    def spare_turn(self) -> AbstractAsyncContextManager[None]:
        return self._starts.spare()

    async def prepare(self, instance: uuid.UUID, volume: str, lost: Callable[[], None]) -> None:
        await to_the_end(self._prepare(_Container(instance, self._body(instance, volume, "serve")), lost))

    def is_prepared(self, instance: uuid.UUID) -> bool:
        container = self._prepared.get(instance)
        return container is not None and container.silent

    async def discard(self, instance: uuid.UUID) -> None:
        if (container := self._take(instance)) is not None:
            await to_the_end(self._destroy(container))

    def removal(self, instance: uuid.UUID) -> asyncio.Task[None] | None:
        return self._removals.get(instance)

    async def sweep(self) -> int:
        return await self._daemon.sweep(self._deployment, LABEL_INSTANCE, lambda label: label in map(str, self._owned))

    async def close(self) -> None:
        for instance in list(self._prepared):
            if (container := self._take(instance)) is not None and container.stream is not None:
                container.stream.close()
        for task in list(self._removals.values()):
            task.cancel()
        await asyncio.gather(*self._removals.values(), return_exceptions=True)
        self._daemon.close()

    def _body(self, instance: uuid.UUID, volume: str, command: Command) -> dict[str, Any]:
        return container_specification(self._settings, instance, Path(volume), self._deployment, self._seccomp_profile, command)

    async def _run(self, run: _Run, new: _Container, command: Command) -> Verdict:
        with closing(run), self._starts.serving():
            if command == "serve" and (prepared := self._take(new.instance)) is not None:
                try:
                    return await self._until_gone(prepared, self._serve_prepared(prepared, run))
                except DeadContainerError as error:
                    log.info("instance=%s container=%s %s", new.instance, _short(prepared), error)
                if new.instance in self._removals:
                    raise EngineDownError("a dead container cannot be removed")
            self._own(new)
            return await self._until_gone(new, self._serve_new(new, run))

    async def _until_gone(self, container: _Container, work: Coroutine[None, None, Verdict]) -> Verdict:
        """What `work` gives, once the container is no more; LOST if it cannot be got rid of now."""
        gone = False
        try:
            verdict = await work
        finally:
            gone = await self._destroy(container)
        return verdict if gone else Verdict.LOST

    async def _serve_prepared(self, container: _Container, run: _Run) -> Verdict:
        if container.stream is None or not container.silent:
            raise DeadContainerError("was dead when its run came")
        end, relay = await run.converse(container.stream)
        if end is End.OUTPUT_OVER and relay.untouched:
            raise DeadContainerError("died before its request reached it")
        return await self._ended(container, run, end, relay)

    async def _serve_new(self, container: _Container, run: _Run) -> Verdict:
        """From nothing to how the container ended."""
        try:
            async with self._starts.urgent():
                if run.over.is_set():
                    container.nothing_created = True
                    return Verdict.CANCELLED
                stream = await self._start(container, run.over)
            if stream is None:
                return Verdict.CANCELLED
            end, relay = await run.converse(stream)
            return await self._ended(container, run, end, relay)
        finally:
            run.close()

    async def _ended(self, container: _Container, run: _Run, end: End, relay: Relay) -> Verdict:
        run.close()  # the reply is with the caller; what follows costs it nothing
        if end is End.CALLED_OFF and relay.replied and not run.cancelled and container.stream is not None:
            # A gateway that has its reply closes its end. The runner is on its way out; killing it would cost runc a process.
            end = await relay.drain(container.stream, self._settings.grace_seconds)
        if end is not End.OUTPUT_OVER:
            return _VERDICTS[end]
        if relay.replied:
            return Verdict.EXITED  # the end of its output is the end of its process, and a call less
        return await self._exit_verdict(container, relay.kill_at)

    def _own(self, container: _Container) -> None:
        if container.instance in self._owned:
            raise ContainerRefusedError("the instance still has a container")
        self._owned.add(container.instance)

    def _take(self, instance: uuid.UUID) -> _Container | None:
        container = self._prepared.pop(instance, None)
        if container is not None and container.stream is not None:
            asyncio.get_running_loop().remove_reader(container.stream)
        return container

    async def _prepare(self, container: _Container, lost: Callable[[], None]) -> None:
        self._own(container)
        try:
            stream = await self._start(container)
        except BaseException:
            await self._destroy(container)
            raise
        if stream is None:
            return
        loop = asyncio.get_running_loop()

        def readable() -> None:
            loop.remove_reader(stream)
            lost()

        self._prepared[container.instance] = container
        loop.add_reader(stream, readable)

    async def _start(self, container: _Container, over: asyncio.Event | None = None) -> socket.socket | None:
        """Create, attach, start; whatever exists then is `_destroy`'s to remove. None: `over` was set before the start."""
        try:
            created, warnings = await self._daemon.call(partial(daemon.create, body=container.body))
        except EngineError as error:
            # An answer, or no connection: there is no container. Silence: there may be one.
            container.nothing_created = not isinstance(error, EngineDownError) or error.nothing_sent
            raise
        container.id = created
        if warnings:
            raise ContainerRefusedError(f"Docker would leave something out: {'; '.join(warnings)}")
        container.stream = await self._daemon.call(partial(daemon.attach, container=created))
        if over is not None and over.is_set():
            return None
        if (wanted := container.body["HostConfig"].get("Runtime")) is not None and container.body["Cmd"] == ["selftest"]:
            runtime = await self._daemon.call(partial(daemon.runtime, container=created))
            if runtime != wanted:
                raise RefusedError(f"Docker would run it by {runtime!r} instead of {wanted!r}")
        await self._daemon.call(lambda client: client.start(created))
        return container.stream

    async def _exit_verdict(self, container: _Container, kill_at: float) -> Verdict:
        if container.id is None:
            return Verdict.LOST
        left = max(kill_at - asyncio.get_running_loop().time(), self._settings.grace_seconds)
        try:
            code = await self._daemon.call(partial(daemon.wait, container=container.id, seconds=left))
            if code is None:
                return Verdict.DEADLINE
            if code <= 128:
                return Verdict.EXITED
            for attempt in range(_OOM_REPORT_ATTEMPTS):  # the kernel's report reaches the daemon on another way than the exit
                if attempt:
                    await asyncio.sleep(_OOM_REPORT_PAUSE_SECONDS)
                if await self._daemon.call(partial(daemon.killed_for_memory, container=container.id)):
                    return Verdict.OUT_OF_MEMORY
            return Verdict.SIGNALLED
        except EngineError as error:
            log.warning("container=%s lost: %s", container.id[:12], error)
            return Verdict.LOST

    async def _destroy(self, container: _Container) -> bool:
        """True when nothing of it is left; otherwise its removal goes on behind, and `removal` tells of it."""
        if container.stream is not None:
            container.stream.close()
        if not container.nothing_created:
            try:
                await self._remove(container)
            except EngineError as error:
                log.warning("instance=%s container=%s not removed, trying on: %s", container.instance, _short(container), error)
                removal = asyncio.create_task(self._remove_at_last(container), name=f"removal {container.instance}")
                self._removals[container.instance] = removal
                return False
        self._owned.discard(container.instance)
        return True

    async def _remove_at_last(self, container: _Container) -> None:
        pause, longest = _RETRY_SECONDS
        try:
            while True:
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
                try:
                    await self._remove(container)
                except EngineError as error:
                    log.debug("instance=%s not removed yet: %s", container.instance, error)
                    continue
                break
            self._owned.discard(container.instance)
            log.info("instance=%s container=%s removed at last", container.instance, _short(container))
        finally:
            del self._removals[container.instance]

    async def _remove(self, container: _Container) -> None:
        """By its name, or, if the daemon never told it, by its labels."""
        if container.id is not None:
            await self._daemon.destroy(container.id)
            return
        labels = {LABEL_DEPLOYMENT: self._deployment, LABEL_INSTANCE: str(container.instance)}
        for item in await self._daemon.call(partial(daemon.labelled, labels=labels)):
            await self._daemon.destroy(item["Id"])


def _relay_limits(settings: Settings, command: Command) -> RelayLimits:
    """Nothing is read here, so these are caps on whatever may come: an upload of a bulk run, a file or a stream of any."""
    upload_bytes = settings.instance_bytes if command in BULK else 0
    # Rows are counted without what stands between them.
    behind_bytes = max(settings.instance_bytes, 2 * settings.max_stream_bytes)
    return RelayLimits(
        request_bytes=_FRAME_HEADER_BYTES + settings.max_request_frame_bytes + upload_bytes,
        reply_bytes=_FRAME_HEADER_BYTES + settings.max_reply_frame_bytes + behind_bytes + _EXCESS_BYTES,
        kill_after_seconds=kill_after_seconds(settings, command),
        idle_seconds=settings.start_timeout_seconds,
    )


def _short(container: _Container) -> str:
    return (container.id or "?")[:12]
