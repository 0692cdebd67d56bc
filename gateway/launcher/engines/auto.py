"""MAYFLY_ENGINE=auto: zygote where the host can, docker where it cannot. Settled once, by the first attempt that says which.

An engine that is down, or an image that is missing, says nothing about the host and settles nothing.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

from ...protocol import Verdict
from ..errors import RefusedError
from ..registry import Registry
from ..selftest import self_test
from ..specification import Command
from . import Engine, EngineFacts, SlotFigures

log = logging.getLogger(__name__)


class AutoEngine:
    """`preferred`, or, where the host refuses it, `fallback`. Until that is settled it passes for the former."""

    def __init__(self, preferred: Engine, fallback: Engine, registry: Registry) -> None:
        self._engine = preferred
        self._fallback = fallback
        self._registry = registry
        self._settled = False
        self.choice = "auto: not settled"

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def starts_ahead(self) -> bool:
        return self._engine.starts_ahead

    @property
    def slots(self) -> SlotFigures:
        return self._engine.slots

    async def open(self) -> EngineFacts:
        if self._settled:
            return await self._engine.open()
        try:
            facts = await self._engine.open()
            await self_test(self._engine, self._registry)
        except RefusedError as error:
            log.warning("engine %s is refused, %s takes its place: %s", self._engine.name, self._fallback.name, error)
            self.choice = f"auto: {self._engine.name} is refused: {error}"
            self._settled = True
            await self._engine.close()
            self._engine = self._fallback
            return await self._engine.open()
        self.choice = "auto: the self-test passed"
        self._settled = True
        return facts

    async def ping(self) -> None:
        await self._engine.ping()

    def run(
        self,
        instance: uuid.UUID,
        volume: str,
        caller: socket.socket,
        started: Callable[[], None],
        command: Command = "serve",
    ) -> Coroutine[Any, Any, Verdict]:
        """No frame of its own on the way of every request."""
        return self._engine.run(instance, volume, caller, started, command)

    def spare_turn(self) -> AbstractAsyncContextManager[None]:
        return self._engine.spare_turn()

    async def prepare(self, instance: uuid.UUID, volume: str, lost: Callable[[], None]) -> None:
        await self._engine.prepare(instance, volume, lost)

    def is_prepared(self, instance: uuid.UUID) -> bool:
        return self._engine.is_prepared(instance)

    async def discard(self, instance: uuid.UUID) -> None:
        await self._engine.discard(instance)

    def removal(self, instance: uuid.UUID) -> asyncio.Task[None] | None:
        return self._engine.removal(instance)

    async def sweep(self) -> int:
        return await self._engine.sweep()

    async def close(self) -> None:
        await self._engine.close()
        if self._engine is not self._fallback:
            await self._fallback.close()
