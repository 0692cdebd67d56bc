"""What the verbs do. A run passes here: instance, lease, slot, the instance again, container; and back in reverse."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from ..metrics import Durations
from ..operator_log import about
from ..protocol import BULK, KEEP, NO_TAG, QUIET, READ_ONLY, SALVAGE, Reply, Request, Status, Verb, Verdict
from ..settings import Settings
from ..uuid7 import uuid7
from .engines import Engine
from .engines.completion import to_the_end
from .errors import (
    BusyError,
    EngineDownError,
    EngineError,
    ExtendingOffError,
    HostFullError,
    ImageMissingError,
    LauncherError,
    OwnerFullError,
    QuotaError,
    RepeatedError,
    StorageLowError,
    UnfitVolumeError,
    UnknownInstanceError,
)
from .leases import Lease, Leases
from .memory import available_bytes
from .readiness import Readiness
from .registry import Record, Registry
from .specification import Command
from .warmth import Warmth

log = logging.getLogger(__name__)

Answer = Callable[[Reply], None]
Result = TypeVar("Result")

_STATUSES: dict[type[Exception], Status] = {
    UnknownInstanceError: Status.UNKNOWN,
    StorageLowError: Status.STORAGE_LOW,
    BusyError: Status.BUSY,
    EngineDownError: Status.ENGINE_DOWN,
    ImageMissingError: Status.IMAGE_MISSING,
    QuotaError: Status.QUOTA,
    OwnerFullError: Status.OWNER_FULL,
    HostFullError: Status.HOST_FULL,
    RepeatedError: Status.REPEATED,
    ExtendingOffError: Status.OFF,
}
# By the callers' doing, as often as they like.
_EVERYDAY = frozenset({Status.UNKNOWN, Status.QUOTA, Status.OWNER_FULL, Status.REPEATED, Status.OFF})
_COMMANDS: dict[int, Command] = {
    0: "serve",
    READ_ONLY: "serve-read",
    BULK: "serve-bulk",
    READ_ONLY | BULK: "serve-bulk-read",
}


class Service:
    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        leases: Leases,
        engine: Engine,
        readiness: Readiness,
        warmth: Warmth,
        disk: Executor,
        metrics: Callable[[], str] = str,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._leases = leases
        self._engine = engine
        self._readiness = readiness
        self._warmth = warmth
        self._disk = disk
        self._metrics = metrics
        self.created = 0
        """Instances so far that somebody was given."""
        self.forked = 0
        """Those of them that were copies."""
        self.replaced = 0
        """Volumes so far that took another's place."""
        self.extended = 0
        """Lives so far that were asked to be longer."""
        self.removed = 0
        """Instances so far that the gateway had deleted."""
        self.container_seconds = Durations()
        """From RUN until a container holds its request."""
        self.sql_seconds = Durations()
        """From then until the container's end."""
        self.verdicts: Counter[Verdict] = Counter()
        """Runs so far, by how they ended."""
        self.refusals: Counter[Status] = Counter()
        """What was answered otherwise, by status."""
        # The gateway keeps to its slots by itself; these hold even if it does not, and while a removal is pending.
        self._slots = asyncio.Semaphore(settings.slots)
        self._running = 0

    @property
    def running(self) -> int:
        return self._running

    def tell(self, request: Request) -> Reply:
        """The answer to FIND, HEALTH or METRICS, which nobody has to wait for."""
        try:
            if request.verb is Verb.FIND:
                record = self._registry.find(request.instance)
                flags = SALVAGE if record.salvage else 0
                return Reply(Status.DONE, request.sequence, record.expires_at, instance=request.instance, flags=flags)
            detail = self._health() if request.verb is Verb.HEALTH else self._metrics()
            return Reply(Status.DONE, request.sequence, detail=detail)
        except (LauncherError, OSError) as error:
            return self.refuse(request, error)

    async def answer(self, request: Request, caller: socket.socket | None, send: Answer) -> None:
        """Do what one packet asks for. `caller` is RUN's socket; who calls this closes it, whatever comes of it."""
        try:
            match request.verb:
                case Verb.RUN:
                    if caller is None:
                        raise LauncherError("RUN without a socket")
                    await self._run(request, caller, send)
                case Verb.CREATE:
                    instance, record = await self._create(request)
                    send(Reply(Status.DONE, request.sequence, record.expires_at, instance=instance))
                case Verb.FORK:
                    instance, record = await self._fork(request)
                    send(Reply(Status.DONE, request.sequence, record.expires_at, instance=instance))
                case Verb.REPLACE:
                    record = await self._replace(request)
                    send(Reply(Status.DONE, request.sequence, record.expires_at, instance=request.instance))
                case Verb.EXTEND:
                    record = await self._on_disk(partial(self._registry.extend, wished=request.number), request.instance)
                    self.extended += 1
                    send(Reply(Status.DONE, request.sequence, record.expires_at, instance=request.instance))
                case Verb.REMOVE:
                    await self._remove(request)
                    send(Reply(Status.DONE, request.sequence, instance=request.instance))
                case _:
                    send(self.tell(request))
        except (LauncherError, OSError) as error:
            send(self.refuse(request, error))

    def refuse(self, request: Request, error: Exception) -> Reply:
        """The answer to what could not be done."""
        status = _STATUSES.get(type(error), Status.FAILED)
        self.refusals[status] += 1
        log.log(
            logging.DEBUG if status in _EVERYDAY else logging.WARNING,
            "%s failed instance=%s status=%s: %s",
            request.verb.name,
            request.instance,
            status.name,
            error,
            extra=about(request.request_id),
        )
        until = error.until if isinstance(error, OwnerFullError) else 0
        return Reply(status, request.sequence, until, detail=str(error), instance=request.instance)

    async def _create(self, request: Request) -> tuple[uuid.UUID, Record]:
        owner, salvage = request.other, bool(request.flags & SALVAGE)
        made = await self._warmth.claim(owner, salvage=salvage)
        if made is None:
            instance = uuid7()
            made = instance, await self._on_disk(partial(self._registry.create, owner=owner, salvage=salvage), instance)
        self._given(*made, request)
        return made

    async def _fork(self, request: Request) -> tuple[uuid.UUID, Record]:
        source = request.instance
        self._registry.find(source)
        with await self._hold(source):
            salvage = self._registry.find(source).salvage
            try:
                made = await to_the_end(self._copy(source, request.other, salvage))
            except (UnfitVolumeError, OSError):
                await self._on_disk(self._registry.look_again, source)
                raise
        self.forked += 1
        self._given(*made, request)
        return made

    async def _copy(self, source: uuid.UUID, owner: bytes, salvage: bool) -> tuple[uuid.UUID, Record]:
        instance = uuid7()
        # Beside the thread that creates wait for.
        await asyncio.to_thread(self._registry.copy, source, instance, owner, self._settings.instance_bytes)
        return instance, await self._on_disk(partial(self._registry.adopt, owner=owner, salvage=salvage), instance)

    def _given(self, instance: uuid.UUID, record: Record, request: Request) -> None:
        self.created += 1
        log.debug("created instance=%s expires_at=%d", instance, record.expires_at, extra=about(request.request_id))

    async def _replace(self, request: Request) -> Record:
        instance, other = request.instance, uuid.UUID(bytes=request.other)
        if instance == other:
            raise LauncherError("an instance does not replace itself")
        for each in (instance, other):
            self._registry.find(each)
        first, second = sorted((instance, other))  # or two that want the same two would wait for each other
        with await self._hold(first), await self._hold(second):
            record = self._registry.find(instance)
            self._registry.find(other)
            for each in (instance, other):
                await self._warmth.discard(each)
            keep = bool(request.flags & KEEP)
            await to_the_end(self._on_disk(partial(self._registry.replace, other=other, keep=keep), instance))
        self.replaced += 1
        self._warmth.want(instance)
        log.debug("replaced instance=%s by=%s", instance, other, extra=about(request.request_id))
        return record

    async def _remove(self, request: Request) -> None:
        instance = request.instance
        with await self._hold(instance):
            await self._warmth.discard(instance)
            if await self._on_disk(self._registry.remove, instance):
                self.removed += 1
                log.info("removed instance=%s", instance, extra=about(request.request_id))

    async def _run(self, request: Request, caller: socket.socket, send: Answer) -> None:
        instance = request.instance
        self._usable(instance)
        self._require_engine()
        if self._engine.removal(instance) is not None:
            raise EngineDownError("a container of this instance cannot be removed yet")  # for as long as Docker likes
        asked_at = time.monotonic()
        with await self._hold(instance, self._slots):
            # Below here nobody else uses the volume, and it cannot be reaped. It may have expired in the queue.
            record = self._usable(instance)
            self._require_engine()
            leased_at = time.monotonic()
            command = _COMMANDS[request.flags & (READ_ONLY | BULK)]
            warm = False
            if command == "serve":
                warm = self._warmth.taken(instance)
            else:
                await self._warmth.discard(instance)
            started_at = 0.0

            def started() -> None:
                nonlocal started_at
                started_at = time.monotonic()
                if not request.flags & QUIET:
                    send(Reply(Status.STARTED, request.sequence, record.expires_at, instance=instance))

            once = _Once(self._registry, instance, request.other) if request.other != NO_TAG else None
            self._running += 1
            try:
                if once is not None:
                    await to_the_end(asyncio.to_thread(once.begin))
                verdict = await self._engine.run(instance, self._registry.volume(instance), caller, started, command)
            except (EngineError, OSError) as error:
                if isinstance(error, EngineError):
                    self._readiness.doubt(error)
                await self._on_disk(self._registry.look_again, instance)
                raise
            finally:
                self._running -= 1
                if once is not None and not started_at:
                    await to_the_end(asyncio.to_thread(once.take_back))
            if self._settings.queries_per_instance:
                self._registry.ran(instance)
        ended_at = time.monotonic()
        self.verdicts[verdict] += 1
        if started_at:
            self.container_seconds.observe(started_at - asked_at)
            self.sql_seconds.observe(ended_at - started_at)
        self._warmth.want(instance)
        log.log(
            logging.DEBUG if verdict is Verdict.EXITED else logging.INFO,  # the access log has every run; a line takes 20 µs
            "run ended instance=%s verdict=%s start=%s waited_ms=%d took_ms=%d",
            instance,
            verdict.name,
            "warm" if warm else "cold",
            (leased_at - asked_at) * 1000,
            (ended_at - leased_at) * 1000,
            extra=about(request.request_id),
        )
        send(Reply(Status.ENDED, request.sequence, record.expires_at, verdict, instance=instance))

    def _usable(self, instance: uuid.UUID) -> Record:
        record = self._registry.find(instance)
        if 0 < self._settings.queries_per_instance <= record.queries:
            raise QuotaError(f"{record.queries} runs")
        return record

    def _require_engine(self) -> None:
        if (trouble := self._readiness.trouble) is not None:
            raise type(trouble)(str(trouble))

    async def _hold(self, instance: uuid.UUID, slots: asyncio.Semaphore | None = None) -> _Held:
        """Wait for the instance's lease, then for a slot if one is wanted; raises BusyError when that takes too long."""
        lease = self._leases.try_acquire(instance)
        if lease is None or (slots is not None and slots.locked()):
            lease = await self._queue(instance, lease, slots)
        elif slots is not None:
            await slots.acquire()
        return _Held(lease, slots, self._engine)

    async def _queue(self, instance: uuid.UUID, lease: Lease | None, slots: asyncio.Semaphore | None) -> Lease:
        try:
            async with asyncio.timeout(self._settings.queue_timeout_seconds):
                lease = lease or await self._leases.acquire(instance)
                if slots is not None:
                    await slots.acquire()
        except BaseException as error:
            if lease is not None:
                lease.release()
            if isinstance(error, TimeoutError):
                raise BusyError(f"no lease or slot within {self._settings.queue_timeout_seconds} s") from None
            raise
        return lease

    async def _on_disk(self, work: Callable[[uuid.UUID], Result], instance: uuid.UUID) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, instance)

    def _health(self) -> str:
        trouble, facts = self._readiness.trouble, self._readiness.facts
        own_uid = os.getuid()
        return json.dumps(
            {
                "engine": self._engine.name,
                "engine_choice": self._engine.choice,
                "daemon": "down" if isinstance(trouble, EngineDownError) else "up",
                "trouble": None if trouble is None else str(trouble),
                "engine_version": facts and facts.version,
                "runtime": facts and facts.runtime,
                "image": self._settings.image,
                "image_id": facts and facts.image_id,
                "selftest": self._readiness.selftest,
                "instances": self._registry.count,
                "running": self._running,
                "nursery": self._warmth.nursery,
                "successors": self._warmth.successors,
                "separation": self._settings.web_uid not in (-1, own_uid),
                "free_bytes": self._registry.free_bytes(),
                "min_free_bytes": self._settings.min_free_bytes,
                "available_memory_bytes": available_bytes(),
            }
        )


class _Once:
    """A run that must not be had twice. Its methods block, and are called under the instance's lease."""

    __slots__ = ("_begun", "_instance", "_registry", "_tag")

    def __init__(self, registry: Registry, instance: uuid.UUID, tag: bytes) -> None:
        self._registry = registry
        self._instance = instance
        self._tag = tag
        self._begun = False

    def begin(self) -> None:
        """Raises RepeatedError or QuotaError."""
        self._registry.begin_once(self._instance, self._tag)
        self._begun = True

    def take_back(self) -> None:
        """It has not run."""
        if self._begun:
            try:
                self._registry.take_back(self._instance, self._tag)
            except OSError as error:  # it stays one that was begun, as it would after a crash
                log.warning("tag not taken back instance=%s: %s", self._instance, error)


class _Held:
    """An instance's lease and perhaps a slot; on exit both are let go, but only once no container of the instance is left."""

    __slots__ = ("_engine", "_lease", "_slots")

    def __init__(self, lease: Lease, slots: asyncio.Semaphore | None, engine: Engine) -> None:
        self._lease = lease
        self._slots = slots
        self._engine = engine

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if (removal := self._engine.removal(self._lease.instance)) is None:
            self._release()
        else:
            removal.add_done_callback(lambda _: self._release())

    def _release(self) -> None:
        if self._slots is not None:
            self._slots.release()
        self._lease.release()
