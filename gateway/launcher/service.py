"""What the verbs do. A run passes here: instance, lease, slot, the instance again, container; and back in reverse."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import TypeVar

from ..protocol import Reply, Request, Status, Verb
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
from .leases import Leases
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

    async def answer(self, request: Request, caller: socket.socket | None, send: Answer) -> None:
        """Do what one packet asks for. `caller` is RUN's socket; it is closed in every case, as is everything made here."""
        instance, reply = request.instance, partial(Reply, sequence=request.sequence, instance=request.instance)
        try:
            match request.verb:
                case Verb.CREATE:
                    instance, record = await self._warmth.claim() or await self._create()
                    log.info("created instance=%s expires_at=%d", instance, record.expires_at)
                    send(reply(Status.DONE, instance=instance, expires_at=record.expires_at))
                case Verb.FIND:
                    send(reply(Status.DONE, expires_at=self._registry.find(instance).expires_at))
                case Verb.REMOVE:
                    async with self._leased(instance):
                        await self._warmth.discard(instance)
                        if await self._on_disk(self._registry.remove, instance):
                            log.info("removed instance=%s", instance)
                    send(reply(Status.DONE))
                case Verb.HEALTH:
                    send(reply(Status.DONE, detail=self._health()))
                case Verb.RUN:
                    if caller is None:
                        raise LauncherError("RUN without a socket")
                    await self._run(instance, caller, partial(self._report, reply, send))
        except (LauncherError, OSError) as error:
            status = _STATUSES.get(type(error), Status.FAILED)
            level = logging.DEBUG if status is Status.UNKNOWN else logging.WARNING
            log.log(level, "%s failed instance=%s status=%s: %s", request.verb.name, instance, status.name, error)
            send(reply(status, detail=str(error)))
        finally:
            if caller is not None:
                caller.close()

    async def _create(self) -> tuple[uuid.UUID, Record]:
        instance = uuid7()
        return instance, await self._on_disk(self._registry.create, instance)

    async def _run(self, instance: uuid.UUID, caller: socket.socket, report: Callable[..., None]) -> None:
        self._registry.find(instance)
        self._require_engine()
        asked_at = time.monotonic()
        async with self._leased(instance, with_slot=True):
            # Below here nobody else uses the volume, and it cannot be reaped. It may have expired in the queue.
            expires_at = self._registry.find(instance).expires_at
            self._require_engine()
            leased_at = time.monotonic()
            self._running += 1
            warm = self._warmth.taken(instance)
            try:
                started = partial(report, Status.STARTED, expires_at=expires_at)
                verdict = await self._engine.run(instance, self._registry.volume(instance), caller, started)
            except EngineError as error:
                self._readiness.doubt(error)
                raise
            finally:
                self._running -= 1
        self._warmth.want(instance)
        log.info(
            "run ended instance=%s verdict=%s start=%s waited_ms=%d took_ms=%d",
            instance,
            verdict.name,
            "warm" if warm else "cold",
            (leased_at - asked_at) * 1000,
            (time.monotonic() - leased_at) * 1000,
        )
        report(Status.ENDED, expires_at=expires_at, verdict=verdict)

    @staticmethod
    def _report(reply: Callable[..., Reply], send: Answer, status: Status, **fields: int) -> None:
        send(reply(status, **fields))

    def _require_engine(self) -> None:
        if (trouble := self._readiness.trouble) is not None:
            raise type(trouble)(str(trouble))

    @asynccontextmanager
    async def _leased(self, instance: uuid.UUID, *, with_slot: bool = False) -> AsyncIterator[None]:
        """Hold the instance's lease, and a slot if wanted; both are let go only once no container of the instance is left."""
        with ExitStack() as held:
            try:
                async with asyncio.timeout(self._settings.queue_timeout_seconds):
                    held.callback((await self._leases.acquire(instance)).release)
                    if with_slot:
                        await self._slots.acquire()
                        held.callback(self._slots.release)
            except TimeoutError:
                raise BusyError(f"no lease or slot within {self._settings.queue_timeout_seconds} s") from None
            try:
                yield
            finally:
                if (removal := self._engine.removal(instance)) is not None:
                    until_gone = held.pop_all()
                    removal.add_done_callback(lambda _: until_gone.close())

    async def _on_disk(self, work: Callable[[uuid.UUID], Result], instance: uuid.UUID) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, instance)

    def _health(self) -> str:
        trouble, facts = self._readiness.trouble, self._readiness.facts
        own_uid = os.getuid()
        return json.dumps(
            {
                "engine": self._engine.name,
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
