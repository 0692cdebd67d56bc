"""One run: ticket, lease and slot, socket pair, container, frames. The answer is given before the container is torn down.

Our end of the pair stays open until the launcher's ENDED when a whole reply has come: an ordinary run is no news to the launcher.
Whoever leaves `Turn.run()` otherwise, by error or hang-up, closes it at once, which tells the launcher to destroy what still runs.
Whoever leaves the turn gives lease and slot back; if it ran something, as soon as that has ended.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from ..protocol import Verdict
from ..settings import Settings
from .body import Int64Form
from .errors import ApiError, LauncherUnavailableError, QueryTimeoutError, RunnerFailedError
from .launcher import Launcher
from .leases import Hold, Leases, Ticket
from .rates import counted_as
from .runner import Channel, Ok, Streams, decode_reply
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


class _Run:
    """One RUN as it is seen from here, until the launcher's last word on it. Its caller may leave before."""

    __slots__ = (
        "_answer",
        "_bounds",
        "_channel",
        "_due",
        "_end",
        "_gone",
        "_heard",
        "_launcher",
        "_loop",
        "_rings_at",
        "_timer",
        "expires_at",
    )

    def __init__(self, launcher: Launcher, streams: Streams, bounds: _Bounds, instance: uuid.UUID, frame: bytes) -> None:
        self._loop = asyncio.get_running_loop()
        self._launcher = launcher
        self._bounds = bounds
        self.expires_at: int | None = None
        """The unix second of the instance's deletion, once the container has started."""
        self._heard = False
        self._end: Verdict | ApiError | None = None
        self._gone: Callable[[], None] | None = None
        self._answer: asyncio.Future[bytes | ApiError] = self._loop.create_future()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._channel = Channel(streams, ours, frame, bounds.reply_bytes, self._hear)
        try:
            launcher.run(instance, theirs, self._start, self._over)
        except BaseException:
            self._channel.close()
            raise
        # One timer for all that is waited for in turn. It may ring early and is then set anew; it must not ring late.
        now = self._loop.time()
        self._due = now + bounds.start_seconds
        self._set_timer(now + min(bounds.start_seconds, bounds.reply_seconds))

    async def reply(self) -> bytes:
        """The payload of the runner's frame, or an ApiError."""
        answer = await self._answer
        if isinstance(answer, ApiError):
            raise answer
        return answer

    def hang_up(self) -> None:
        """Have the launcher destroy what still runs."""
        self._channel.close()
        self._wait(self._bounds.end_seconds)

    def leave(self, gone: Callable[[], None]) -> None:
        """Nobody waits for the reply any more; `gone` is called once the container is no more, at once if that is so."""
        self._gone = gone
        if self._end is not None:
            self._finish()

    def _start(self, expires_at: int) -> None:
        self.expires_at = expires_at
        self._wait(self._bounds.reply_seconds)
        self._conclude()

    def _hear(self) -> None:
        self._heard = True
        self._conclude()

    def _over(self, end: Verdict | ApiError) -> None:
        self._end = end
        self._conclude()
        if self._gone is not None:
            self._finish()

    def _conclude(self) -> None:
        """Answer as soon as enough is known. The launcher's packets and the runner's bytes come in any order."""
        if self._answer.done():
            return
        reply, end = self._channel.reply, self._end
        if isinstance(end, ApiError):
            self._answer.set_result(end)
        elif self.expires_at is None:
            if end is not None:
                self._answer.set_result(RunnerFailedError(reason=f"ended before it started: {end.name}"))
        elif reply is not None:
            self._answer.set_result(reply)
        elif self._heard and end is not None:
            self._answer.set_result(error_without_reply(end))
        elif self._heard:
            self._wait(_VERDICT_SECONDS)

    def _wait(self, seconds: float) -> None:
        self._due = self._loop.time() + seconds
        if self._due < self._rings_at:
            self._timer.cancel()
            self._set_timer(self._due)

    def _set_timer(self, at: float) -> None:
        self._rings_at = at
        self._timer = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._rings_at = math.inf
        if self._loop.time() < self._due:
            self._set_timer(self._due)
            return
        # The launcher has bounds of its own for all of this, and they are shorter.
        self._launcher.silent = True
        if not self._answer.done():
            self._answer.set_result(self._too_late())
        elif not self._channel.closed:
            self.hang_up()
        else:
            # The launcher keeps a lease of its own, so letting go here cannot put two runners on one volume.
            _log.error("no ENDED after %.1f s; slot released", self._bounds.end_seconds)
            self._over(Verdict.LOST)

    def _too_late(self) -> ApiError:
        if self.expires_at is None:
            return LauncherUnavailableError(reason=f"no answer to RUN in {self._bounds.start_seconds:.1f} s")
        if not self._heard:
            return QueryTimeoutError()
        return RunnerFailedError(reason="no reply and no verdict")

    def _finish(self) -> None:
        gone, self._gone = self._gone, None
        if gone is not None:
            self._timer.cancel()
            self._channel.close()
            gone()


class Turn:
    """Lease and slot of one instance, within `async with`, for one run at most. Entering waits; raises OverloadedError."""

    __slots__ = ("_hold", "_instance", "_run", "_runs", "_ticket")

    def __init__(self, runs: Runs, ticket: Ticket, instance: uuid.UUID) -> None:
        self._runs = runs
        self._ticket = ticket
        self._instance = instance
        self._run: _Run | None = None

    async def __aenter__(self) -> Turn:
        self._hold = await self._ticket.hold(self._instance)
        # Below here lease and slot are held; __aexit__ alone gives them back.
        return self

    async def __aexit__(self, *_: object) -> None:
        self._runs._settle(self._run, self._hold)

    @property
    def expires_at(self) -> int | None:
        """The unix second of the instance's deletion, known once its container has started."""
        return None if self._run is None else self._run.expires_at

    def rename(self, instance: uuid.UUID) -> None:
        """The instance has got its name; nobody else knows it yet."""
        self._hold.rename(instance)
        self._instance = instance

    async def run(self, frame: bytes, int64: Int64Form) -> Ok:
        """Run one request frame in a container of its own; raises an ApiError for everything but rows."""
        run = self._run = self._runs._begin(self._instance, frame)
        try:
            reply = decode_reply(await run.reply(), int64)
        except BaseException:
            run.hang_up()
            raise
        return rows_or_raise(reply)


class Runs:
    def __init__(self, settings: Settings, launcher: Launcher) -> None:
        self._launcher = launcher
        self._leases = Leases(settings.slots, settings.queue_length, settings.queue_timeout_seconds, settings.queue_delay_seconds)
        self._bounds = _Bounds(
            start_seconds=settings.start_timeout_seconds + _CHANNEL_SECONDS,
            reply_seconds=settings.deadline_seconds + settings.grace_seconds + _CHANNEL_SECONDS,
            reply_bytes=settings.max_reply_frame_bytes,
        )
        self._open = 0
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def leases(self) -> Leases:
        return self._leases

    def ticket(self, address: str) -> Ticket:
        """A place among those that wait, before anything is asked of the launcher; raises OverloadedError."""
        return self._leases.ticket(counted_as(address))

    def turn(self, ticket: Ticket, instance: uuid.UUID) -> Turn:
        """Lease and slot, once they are had. Leaving is enough, whatever happened within."""
        return Turn(self, ticket, instance)

    def discard(self, instance: uuid.UUID) -> None:
        """Remove an instance that nobody will ever hold a token of, once its container is gone."""
        task = asyncio.get_running_loop().create_task(self._discard(instance))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def open(self) -> None:
        """Within the running loop, before the first turn."""
        self._streams = Streams()

    async def close(self) -> None:
        """Wait for every container's end; each wait is bounded."""
        await self._none_open.wait()
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        self._streams.close()

    def _begin(self, instance: uuid.UUID, frame: bytes) -> _Run:
        return _Run(self._launcher, self._streams, self._bounds, instance, frame)

    def _settle(self, run: _Run | None, hold: Hold) -> None:
        if run is None:
            hold.release()
            return
        self._open += 1
        self._none_open.clear()

        def gone() -> None:
            hold.release()
            self._open -= 1
            if self._open == 0:
                self._none_open.set()

        run.leave(gone)

    async def _discard(self, instance: uuid.UUID) -> None:
        try:
            hold = await self._leases.lease(instance)
            try:
                await self._launcher.remove(instance)
            finally:
                hold.release()
        except ApiError as error:
            _log.warning("instance %s left to its expiry: %s %s", instance, error.code, error.reason)
