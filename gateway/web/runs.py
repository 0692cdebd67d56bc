"""One run: ticket, lease and slot, socket pair, container, frames. The answer is given before the container is torn down.

Whoever leaves `Turn.run()`, by answer, error or hang-up, closes our end of the pair, which tells the launcher to destroy what
still runs. Whoever leaves the turn gives lease and slot back; if it ran something, a task of its own waits for ENDED first.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from ..protocol import Verdict
from ..settings import Settings
from .body import Int64Form
from .errors import ApiError, EngineUnavailableError, QueryTimeoutError, RunnerFailedError
from .launcher import Launcher, RunCall
from .leases import Hold, Leases, Ticket
from .rates import counted_as
from .runner import Ok, decode_reply, exchange
from .verdicts import error_without_reply, rows_or_raise

# The launcher kills at deadline plus grace; this much later it is the channel itself that hangs.
_CHANNEL_SECONDS = 1.0
# Between the end of a stream and the launcher's word on how the container ended.
_VERDICT_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Bounds:
    """The longest of everything a run waits for."""

    start_seconds: float
    reply_seconds: float
    reply_bytes: int

    @property
    def end_seconds(self) -> float:
        return self.start_seconds + self.reply_seconds + _VERDICT_SECONDS


class Turn:
    """Lease and slot of one instance while they are held, for one run at most."""

    def __init__(self, launcher: Launcher, bounds: _Bounds, instance: uuid.UUID, hold: Hold) -> None:
        self._launcher = launcher
        self._bounds = bounds
        self._instance = instance
        self._hold = hold
        self.call: RunCall | None = None

    def rename(self, instance: uuid.UUID) -> None:
        """The instance has got its name; nobody else knows it yet."""
        self._hold.rename(instance)
        self._instance = instance

    async def run(self, frame: bytes, int64: Int64Form) -> Ok:
        """Run one request frame in a container of its own; raises an ApiError for everything but rows."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours:
            ours.setblocking(False)
            self.call = self._launcher.run(self._instance, theirs)
            return await self._converse(self.call, ours, frame, int64)

    async def _converse(self, call: RunCall, ours: socket.socket, frame: bytes, int64: Int64Form) -> Ok:
        await asyncio.wait({call.started}, timeout=self._bounds.start_seconds)
        if not call.started.done():
            raise EngineUnavailableError(reason=f"no container in {self._bounds.start_seconds:.1f} s")
        call.started.result()
        # A launcher that goes away takes the container along: end the stream rather than wait for the deadline.
        call.ended.add_done_callback(lambda ended: _hang_up_if_lost(ended, ours))
        try:
            async with asyncio.timeout(self._bounds.reply_seconds):
                payload = await exchange(ours, frame, self._bounds.reply_bytes)
        except TimeoutError:
            raise QueryTimeoutError from None
        except ApiError:
            _raise_if_lost(call.ended)
            raise
        if payload is None:
            await asyncio.wait({call.ended}, timeout=_VERDICT_SECONDS)
            if not call.ended.done():
                raise RunnerFailedError(reason="no reply and no verdict")
            raise error_without_reply(call.ended.result())
        return rows_or_raise(decode_reply(payload, int64))


class Runs:
    def __init__(self, settings: Settings, launcher: Launcher) -> None:
        self._launcher = launcher
        self._leases = Leases(settings.slots, settings.queue_length, settings.queue_timeout_seconds, settings.queue_delay_seconds)
        self._bounds = _Bounds(
            start_seconds=settings.start_timeout_seconds + _CHANNEL_SECONDS,
            reply_seconds=settings.deadline_seconds + settings.grace_seconds + _CHANNEL_SECONDS,
            reply_bytes=settings.max_reply_frame_bytes,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def leases(self) -> Leases:
        return self._leases

    def ticket(self, address: str) -> Ticket:
        """A place among those that wait, before anything is asked of the launcher; raises OverloadedError."""
        return self._leases.ticket(counted_as(address))

    @asynccontextmanager
    async def turn(self, ticket: Ticket, instance: uuid.UUID) -> AsyncIterator[Turn]:
        """Lease and slot, once they are had; raises OverloadedError. Leaving is enough, whatever happened within."""
        hold = await ticket.hold(instance)
        # Below here lease and slot are held; _settle alone gives them back.
        turn = Turn(self._launcher, self._bounds, instance, hold)
        try:
            yield turn
        finally:
            self._settle(turn.call, hold)

    def discard(self, instance: uuid.UUID) -> None:
        """Remove an instance that nobody will ever hold a token of, once its container is gone."""
        self._spawn(self._discard(instance))

    async def close(self) -> None:
        """Wait for every container's end; each wait is bounded."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def _settle(self, call: RunCall | None, hold: Hold) -> None:
        if call is None or call.ended.done():
            hold.release()
        else:
            self._spawn(self._release_at_end(call, hold))

    async def _release_at_end(self, call: RunCall, hold: Hold) -> None:
        try:
            await asyncio.wait({call.ended}, timeout=self._bounds.end_seconds)
            if not call.ended.done():
                # The launcher keeps a lease of its own, so letting go here cannot put two runners on one volume.
                _log.error("no ENDED after %.1f s; slot released", self._bounds.end_seconds)
        finally:
            hold.release()

    async def _discard(self, instance: uuid.UUID) -> None:
        try:
            hold = await self._leases.lease(instance)
            try:
                await self._launcher.remove(instance)
            finally:
                hold.release()
        except ApiError as error:
            _log.warning("instance %s left to its expiry: %s %s", instance, error.code, error.reason)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _hang_up_if_lost(ended: asyncio.Future[Verdict], ours: socket.socket) -> None:
    if not ended.cancelled() and ended.exception() is not None:
        with suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)


def _raise_if_lost(ended: asyncio.Future[Verdict]) -> None:
    if ended.done():
        ended.result()
