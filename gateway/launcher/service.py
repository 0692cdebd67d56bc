"""What the verbs do. A run passes here: instance, lease, slot, the instance again, container; and back in reverse."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from ..protocol import Reply, Request, Status, Verb, Verdict
from ..settings import Settings
from ..uuid7 import uuid7
from .engines import Engine
from .errors import (
    BusyError,
    EngineDownError,
    EngineError,
    ImageMissingError,
    LauncherError,
    StorageLowError,
    UnknownInstanceError,
)
from .leases import Lease, Leases
from .readiness import Readiness
from .registry import Record, Registry
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
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._leases = leases
        self._engine = engine
        self._readiness = readiness
        self._warmth = warmth
        self._disk = disk
        # The gateway keeps to its slots by itself; these hold even if it does not, and while a removal is pending.
        self._slots = asyncio.Semaphore(settings.slots)
        self._running = 0

    def tell(self, request: Request) -> Reply:
        """The answer to FIND or HEALTH, which nobody has to wait for."""
        try:
            if request.verb is Verb.FIND:
                expires_at = self._registry.find(request.instance).expires_at
                return Reply(Status.DONE, request.sequence, expires_at, instance=request.instance)
            return Reply(Status.DONE, request.sequence, detail=self._health())
        except (LauncherError, OSError) as error:
            return _refusal(request, error)

    async def answer(self, request: Request, caller: socket.socket | None, send: Answer) -> None:
        """Do what one packet asks for. `caller` is RUN's socket; who calls this closes it, whatever comes of it."""
        try:
            match request.verb:
                case Verb.RUN:
                    if caller is None:
                        raise LauncherError("RUN without a socket")
                    await self._run(request, caller, send)
                case Verb.CREATE:
                    instance, record = await self._warmth.claim() or await self._create()
                    log.debug("created instance=%s expires_at=%d", instance, record.expires_at)
                    send(Reply(Status.DONE, request.sequence, record.expires_at, instance=instance))
                case Verb.REMOVE:
                    await self._remove(request.instance)
                    send(Reply(Status.DONE, request.sequence, instance=request.instance))
                case _:
                    send(self.tell(request))
        except (LauncherError, OSError) as error:
            send(_refusal(request, error))

    async def _create(self) -> tuple[uuid.UUID, Record]:
        instance = uuid7()
        return instance, await self._on_disk(self._registry.create, instance)

    async def _remove(self, instance: uuid.UUID) -> None:
        with await self._hold(instance):
            await self._warmth.discard(instance)
            if await self._on_disk(self._registry.remove, instance):
                log.info("removed instance=%s", instance)

    async def _run(self, request: Request, caller: socket.socket, send: Answer) -> None:
        instance = request.instance
        self._registry.find(instance)
        self._require_engine()
        if self._engine.removal(instance) is not None:
            raise EngineDownError("a container of this instance cannot be removed yet")  # for as long as Docker likes
        asked_at = time.monotonic()
        with await self._hold(instance, self._slots):
            # Below here nobody else uses the volume, and it cannot be reaped. It may have expired in the queue.
            expires_at = self._registry.find(instance).expires_at
            self._require_engine()
            leased_at = time.monotonic()
            self._running += 1
            warm = self._warmth.taken(instance)
            try:
                verdict = await self._engine.run(
                    instance,
                    self._registry.volume(instance),
                    caller,
                    lambda: send(Reply(Status.STARTED, request.sequence, expires_at, instance=instance)),
                )
            except (EngineError, OSError) as error:
                if isinstance(error, EngineError):
                    self._readiness.doubt(error)
                await self._on_disk(self._registry.look_again, instance)
                raise
            finally:
                self._running -= 1
        self._warmth.want(instance)
        log.log(
            logging.DEBUG if verdict is Verdict.EXITED else logging.INFO,  # the access log has every run; a line takes 20 µs
            "run ended instance=%s verdict=%s start=%s waited_ms=%d took_ms=%d",
            instance,
            verdict.name,
            "warm" if warm else "cold",
            (leased_at - asked_at) * 1000,
            (time.monotonic() - leased_at) * 1000,
        )
        send(Reply(Status.ENDED, request.sequence, expires_at, verdict, instance=instance))

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
            }
        )


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


def _refusal(request: Request, error: Exception) -> Reply:
    status = _STATUSES.get(type(error), Status.FAILED)
    level = logging.DEBUG if status is Status.UNKNOWN else logging.WARNING
    log.log(level, "%s failed instance=%s status=%s: %s", request.verb.name, request.instance, status.name, error)
    return Reply(status, request.sequence, detail=str(error), instance=request.instance)
