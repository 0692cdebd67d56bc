"""Standing slot containers, each with a zygote that clones one sealed container per run. The contract is Engine's.

A run is here from its slot to its verdict: a detached mount of its volume, one packet with two descriptors, one packet back; 30 µs
of processor time in all. What could keep it longer is looked at by one tick for all runs, and only while there are any. A timer and
an epoll entry for each took 5 µs, and a turn of the loop too: the gateway hangs up on every run, as soon as it has the reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import get_args

from ...protocol import Verdict
from ...settings import Settings
from ..errors import ContainerRefusedError, EngineDownError, RefusedError
from ..mounts import detached
from ..specification import READ_ONLY, Command
from . import EngineFacts, SlotFigures, host, kill_after_seconds
from .completion import to_the_end
from .slot import Run, Slot
from .slot_containers import SlotContainers
from .slots import Slots

_TICK_SECONDS = 0.02
"""How exactly deadlines are kept. A caller that has hung up is seen by one tick and its run killed by the next: most have read
their reply, and the runner is on its way out."""


class ZygoteEngine:
    """Nothing is prepared for an instance: a child that waits has no volume, and any instance can have it."""

    name = "zygote"
    choice = "set"
    starts_ahead = False

    def __init__(self, settings: Settings, containers: SlotContainers) -> None:
        self._settings = settings
        self._containers = containers
        self._kill_after_seconds = {command: kill_after_seconds(settings, command) for command in get_args(Command)}
        self._slots = Slots(settings, containers, freed=self._free, lost=self._forget, hopeless=self._give_up)
        self._idle: list[Slot] = []
        """In the order in which they were freed."""
        self._waiters: deque[asyncio.Future[Slot]] = deque()
        self._removals: dict[uuid.UUID, asyncio.Task[None]] = {}
        self._ticking = False

    @property
    def slots(self) -> SlotFigures:
        return SlotFigures(len(self._slots.alive), self._slots.replaced)

    async def open(self) -> EngineFacts:
        facts = await self._containers.survey()
        host.require(self._settings.state_dir)
        try:
            await self._slots.fill()
        except ContainerRefusedError as error:
            raise RefusedError(f"engine zygote: Docker gives no slot container: {error}") from error
        return facts

    async def ping(self) -> None:
        """A daemon that is down stops no run: it is needed to replace a slot."""
        if not self._slots.alive:
            raise EngineDownError("no slot is left")

    async def run(
        self,
        instance: uuid.UUID,
        volume: str,
        caller: socket.socket,
        started: Callable[[], None],
        command: Command = "serve",
    ) -> Verdict:
        try:
            run = Run(caller, asyncio.get_running_loop().create_future())
            while True:
                slot = self._take_idle() if self._idle else await self._next_slot()
                if self._hand_over(slot, run, volume, command):
                    break
            if not self._ticking:
                self._tick_later()
            try:
                started()
                await run.end
            except BaseException:
                slot.kill(run, Verdict.CANCELLED)
                await to_the_end(self._see_to_the_end(instance, slot, run))
                raise
            if run.verdict is None:
                return await to_the_end(self._mourn(instance, slot, run))
            return run.verdict
        finally:
            caller.close()

    def spare_turn(self) -> AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()

    async def prepare(self, instance: uuid.UUID, volume: str, lost: Callable[[], None]) -> None:
        raise ContainerRefusedError("engine zygote prepares nothing")

    def is_prepared(self, instance: uuid.UUID) -> bool:
        return False

    async def discard(self, instance: uuid.UUID) -> None:
        """Nothing ever waits."""

    def removal(self, instance: uuid.UUID) -> asyncio.Task[None] | None:
        return self._removals.get(instance)

    async def sweep(self) -> int:
        return await self._containers.sweep(self._slots.owned)

    async def close(self) -> None:
        await self._slots.close()
        self._containers.close()

    # --- slots come and go

    def _take_idle(self) -> Slot:
        """The last but one that was freed. The last one only begins to clone its next child; those before have had the time, and of
        them this one's memory is most likely still in the processor's caches: a tenth of the time of a request that comes alone."""
        return self._idle.pop(-2 if len(self._idle) > 1 else -1)

    def _free(self, slot: Slot) -> None:
        if slot.condemned:
            return
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(slot)
                return
        self._idle.append(slot)

    def _forget(self, slot: Slot) -> None:
        with contextlib.suppress(ValueError):
            self._idle.remove(slot)

    def _give_up(self, trouble: str) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(EngineDownError(trouble))
        self._waiters.clear()

    async def _next_slot(self) -> Slot:
        """There are as many slots as runs at a time, so whoever waits here waits for one that is being replaced."""
        if (trouble := self._slots.trouble) is not None:
            raise EngineDownError(trouble)
        waiter: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(self._settings.start_timeout_seconds):
                return await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._free(waiter.result())
            if isinstance(error, TimeoutError):
                raise EngineDownError(f"no slot within {self._settings.start_timeout_seconds} s") from None
            raise

    # --- one run

    def _hand_over(self, slot: Slot, run: Run, volume: str, command: Command) -> bool:
        try:
            mount = detached(volume, read_only=command in READ_ONLY)
        except OSError as error:
            self._free(slot)
            raise ContainerRefusedError(f"no mount of the volume: {error.strerror}") from error
        try:
            return slot.hand_over(run, mount, command, self._kill_after_seconds[command])
        finally:
            os.close(mount)

    async def _see_to_the_end(self, instance: uuid.UUID, slot: Slot, run: Run) -> None:
        """Of a run whose `end` was cancelled with the task that waited for it."""
        if slot.run is run:
            run.end = asyncio.get_running_loop().create_future()
            await run.end
        if run.verdict is None:
            await self._mourn(instance, slot, run)

    async def _mourn(self, instance: uuid.UUID, slot: Slot, run: Run) -> Verdict:
        """The slot is condemned, and its container may still have the volume. Without an answer from Docker, `removal` tells."""
        if slot.removed is not None and await slot.removed:
            return run.killed_as or Verdict.LOST
        if (removal := self._slots.removal(slot)) is not None:
            self._removals[instance] = removal
            removal.add_done_callback(lambda _: self._removals.pop(instance))
        return Verdict.LOST

    # --- the tick

    def _tick_later(self) -> None:
        self._ticking = True
        asyncio.get_running_loop().call_later(_TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        busy = [slot for slot in self._slots.alive if slot.run is not None]
        if not busy:
            return
        now = asyncio.get_running_loop().time()
        for slot in busy:
            slot.look(now)
        self._notice_hang_ups(busy)
        self._tick_later()

    @staticmethod
    def _notice_hang_ups(busy: list[Slot]) -> None:
        """A caller that has closed its socket, as against shut it for writing: only the former is POLLHUP."""
        runs = {slot.run.caller.fileno(): slot.run for slot in busy if slot.run is not None}
        poll = select.poll()
        for descriptor in runs:
            poll.register(descriptor, 0)  # POLLHUP is reported unasked, and nothing else is
        for descriptor, _ in poll.poll(0):
            runs[descriptor].hung_up = True
