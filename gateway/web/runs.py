"""One run: lease and slot, socket pair, container, frames. The answer is given before the container is torn down.

Whoever leaves `run()`, by answer, error or hang-up, closes our end of the pair, which tells the launcher to destroy what still
runs. A task of its own then waits for ENDED and only then gives lease and slot back.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections.abc import Coroutine
from contextlib import suppress

from ..protocol import Verdict
from ..settings import Settings
from .body import Int64Form
from .errors import ApiError, EngineUnavailableError, QueryTimeoutError, RunnerFailedError
from .launcher import Launcher, RunCall
from .leases import Hold, Leases
from .runner import Ok, decode_reply, exchange
from .verdicts import error_without_reply, rows_or_raise

# The launcher kills at deadline plus grace; this much later it is the channel itself that hangs.
_CHANNEL_SECONDS = 1.0
# Between the end of a stream and the launcher's word on how the container ended.
_VERDICT_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Runs:
    def __init__(self, settings: Settings, launcher: Launcher) -> None:
        self._launcher = launcher
        self._leases = Leases(settings.slots, settings.queue_length, settings.queue_timeout_seconds)
        self._start_seconds = settings.start_timeout_seconds + _CHANNEL_SECONDS
        self._reply_seconds = settings.deadline_seconds + settings.grace_seconds + _CHANNEL_SECONDS
        self._end_seconds = self._start_seconds + self._reply_seconds + _VERDICT_SECONDS
        self._max_reply_bytes = settings.max_reply_frame_bytes
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def leases(self) -> Leases:
        return self._leases

    async def run(self, instance: uuid.UUID, frame: bytes, int64: Int64Form) -> Ok:
        """Run one request frame in a container of its own; raises an ApiError for everything but rows."""
        hold = await self._leases.acquire(instance)
        # Below here lease and slot are held; _settle alone gives them back.
        call: RunCall | None = None
        ours: socket.socket | None = None
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            ours.setblocking(False)
            call = self._launcher.run(instance, theirs)
            return await self._converse(call, ours, frame, int64)
        finally:
            if ours is not None:
                ours.close()
            self._settle(call, hold)

    def discard(self, instance: uuid.UUID) -> None:
        """Remove an instance that nobody will ever hold a token of, once its container is gone."""
        self._spawn(self._discard(instance))

    async def close(self) -> None:
        """Wait for every container's end; each wait is bounded."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _converse(self, call: RunCall, ours: socket.socket, frame: bytes, int64: Int64Form) -> Ok:
        await asyncio.wait({call.started}, timeout=self._start_seconds)
        if not call.started.done():
            raise EngineUnavailableError(reason=f"no container in {self._start_seconds:.1f} s")
        call.started.result()
        # A launcher that goes away takes the container along: end the stream rather than wait for the deadline.
        call.ended.add_done_callback(lambda ended: _hang_up_if_lost(ended, ours))
        try:
            async with asyncio.timeout(self._reply_seconds):
                payload = await exchange(ours, frame, self._max_reply_bytes)
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

    def _settle(self, call: RunCall | None, hold: Hold) -> None:
        if call is None or call.ended.done():
            hold.release()
        else:
            self._spawn(self._release_at_end(call, hold))

    async def _release_at_end(self, call: RunCall, hold: Hold) -> None:
        try:
            await asyncio.wait({call.ended}, timeout=self._end_seconds)
            if not call.ended.done():
                # The launcher keeps a lease of its own, so letting go here cannot put two runners on one volume.
                _log.error("no ENDED after %.1f s; slot released", self._end_seconds)
        finally:
            hold.release()

    async def _discard(self, instance: uuid.UUID) -> None:
        try:
            hold = await self._leases.acquire(instance, with_slot=False)
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
