"""One run: ticket, lease and slot, socket pair, container, frames. The answer is given before the container is torn down.

Our end of the pair stays open until the launcher's ENDED when a whole reply has come: an ordinary run is no news to the launcher.
Whoever leaves `Turn.run()` otherwise, by error or hang-up, closes it at once, which tells the launcher to destroy what still runs.
Whoever leaves the turn gives lease and slot back; if it ran something, as soon as that has ended.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ..metrics import Durations
from ..operator_log import about
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
# How exactly all of these are kept, by one timer for all runs: one for each took 2 µs, and nearly none ever rang.
_TICK_SECONDS = 0.1
# A quarter of a kilobyte each.
_MAX_EXPIRIES = 16_384

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


class _Expiries:
    """When instances end, which never changes: whoever knows need not be told with every run. Those heard of last are kept."""

    def __init__(self) -> None:
        # Not a plain dict, which walks over all that went before to find its first.
        self._known: OrderedDict[uuid.UUID, int] = OrderedDict()

    def get(self, instance: uuid.UUID) -> int | None:
        return self._known.get(instance)

    def remember(self, instance: uuid.UUID, expires_at: int) -> None:
        self._known[instance] = expires_at
        if len(self._known) > _MAX_EXPIRIES:
            self._known.popitem(last=False)


class _Run:
    """One RUN as it is seen from here, until the launcher's last word on it. Its caller may leave before."""

    __slots__ = (
        "_answer",
        "_bounds",
        "_channel",
        "_due",
        "_end",
        "_expiries",
        "_gone",
        "_heard",
        "_instance",
        "_launcher",
        "_loop",
        "_quiet",
        "_request_id",
        "expires_at",
    )

    def __init__(
        self,
        launcher: Launcher,
        streams: Streams,
        bounds: _Bounds,
        expiries: _Expiries,
        instance: uuid.UUID,
        frame: bytes,
        request_id: bytes,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._launcher = launcher
        self._bounds = bounds
        self._expiries = expiries
        self._instance = instance
        self._request_id = request_id
        self.expires_at = expiries.get(instance)
        """The unix second of the instance's deletion: known before, or told once the container has started."""
        self._quiet = self.expires_at is not None
        self._heard = False
        self._end: Verdict | ApiError | None = None
        self._gone: Callable[[], None] | None = None
        self._answer: asyncio.Future[bytes | ApiError] = self._loop.create_future()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._channel = Channel(streams, ours, frame, bounds.reply_bytes, self._hear)
        try:
            launcher.run(instance, theirs, None if self._quiet else self._start, self._over, request_id)
        except BaseException:
            self._channel.close()
            raise
        self._wait(bounds.start_seconds + (bounds.reply_seconds if self._quiet else 0.0))

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
        self._expiries.remember(self._instance, expires_at)
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
            _log.info("run ended without a reply verdict=%s", end.name, extra=about(self._request_id))
            self._answer.set_result(error_without_reply(end))
        elif self._heard:
            self._wait(_VERDICT_SECONDS)

    def _wait(self, seconds: float) -> None:
        self._due = self._loop.time() + seconds

    def hurry(self) -> None:
        """The launcher is silent: what has not started will not, and what has ends in so much time."""
        if not self._answer.done():
            self._due = min(self._due, self._loop.time() + self._bounds.reply_seconds)

    def look(self, now: float) -> None:
        """Give up on what is overdue."""
        if now < self._due:
            return
        # The launcher has bounds of its own for all of this, and they are shorter.
        self._launcher.silent = True
        if not self._answer.done():
            self._answer.set_result(self._too_late())
        elif not self._channel.closed:
            self.hang_up()
        else:
            # The launcher keeps a lease of its own, so letting go here cannot put two runners on one volume.
            _log.error("no ENDED after %.1f s; slot released", self._bounds.end_seconds, extra=about(self._request_id))
            self._over(Verdict.LOST)

    def _too_late(self) -> ApiError:
        if self.expires_at is None or (self._quiet and not self._heard):
            return LauncherUnavailableError(reason="no answer to RUN in time")
        if not self._heard:
            return QueryTimeoutError()
        return RunnerFailedError(reason="no reply and no verdict")

    def _finish(self) -> None:
        gone, self._gone = self._gone, None
        if gone is not None:
            self._channel.close()
            gone()


class Turn:
    """Lease and slot of one instance, within `async with`, for one run at most. Entering waits; raises OverloadedError."""

    __slots__ = ("_hold", "_instance", "_request_id", "_run", "_runs", "_ticket")

    def __init__(self, runs: Runs, ticket: Ticket, instance: uuid.UUID, request_id: bytes) -> None:
        self._runs = runs
        self._ticket = ticket
        self._instance = instance
        self._request_id = request_id
        self._run: _Run | None = None

    async def __aenter__(self) -> Turn:
        asked_at = time.perf_counter()
        self._hold = await self._ticket.hold(self._instance)
        self._runs.queue_seconds.observe(time.perf_counter() - asked_at)
        # Below here lease and slot are held; __aexit__ alone gives them back.
        return self

    async def __aexit__(self, *_: object) -> None:
        self._runs._settle(self._run, self._hold)

    @property
    def expires_at(self) -> int | None:
        """The unix second of the instance's deletion, known once its container has started if not before."""
        return None if self._run is None else self._run.expires_at

    def rename(self, instance: uuid.UUID, expires_at: int) -> None:
        """The instance has got its name and its end; nobody else knows it yet."""
        self._hold.rename(instance)
        self._runs._expiries.remember(instance, expires_at)
        self._instance = instance

    async def run(self, frame: bytes, int64: Int64Form) -> Ok:
        """Run one request frame in a container of its own; raises an ApiError for everything but rows."""
        asked_at = time.perf_counter()
        run = self._run = self._runs._begin(self._instance, frame, self._request_id)
        try:
            reply = decode_reply(await run.reply(), int64)
        except BaseException:
            run.hang_up()
            raise
        finally:
            self._runs.run_seconds.observe(time.perf_counter() - asked_at)
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
        self.queue_seconds = Durations()
        """Waits that ended with lease and slot."""
        self.run_seconds = Durations()
        """From RUN to the reply, or to whatever came instead."""
        self._expiries = _Expiries()
        self._open = 0
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way: set[_Run] = set()
        self._ticking = False

    @property
    def leases(self) -> Leases:
        return self._leases

    def ticket(self, address: str, *, creates: bool) -> Ticket:
        """A place among those that wait, before anything is asked of the launcher; raises OverloadedError."""
        return self._leases.ticket(counted_as(address), creates=creates)

    def turn(self, ticket: Ticket, instance: uuid.UUID, request_id: bytes) -> Turn:
        """Lease and slot, once they are had. Leaving is enough, whatever happened within."""
        return Turn(self, ticket, instance, request_id)

    def discard(self, instance: uuid.UUID, request_id: bytes) -> None:
        """Remove an instance that nobody will ever hold a token of, once its container is gone."""
        task = asyncio.get_running_loop().create_task(self._discard(instance, request_id))
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

    def hurry(self) -> None:
        """The launcher is silent: nobody waits for what it has not begun."""
        for run in self._under_way:
            run.hurry()
        self._launcher.hurry()

    def _begin(self, instance: uuid.UUID, frame: bytes, request_id: bytes) -> _Run:
        run = _Run(self._launcher, self._streams, self._bounds, self._expiries, instance, frame, request_id)
        self._under_way.add(run)
        if not self._ticking:
            self._tick_later()
        return run

    def _tick_later(self) -> None:
        self._ticking = True
        asyncio.get_running_loop().call_later(_TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        now = asyncio.get_running_loop().time()
        for run in tuple(self._under_way):
            run.look(now)
        if self._under_way:
            self._tick_later()

    def _settle(self, run: _Run | None, hold: Hold) -> None:
        if run is None:
            hold.release()
            return
        self._open += 1
        self._none_open.clear()

        def gone() -> None:
            hold.release()
            self._under_way.discard(run)
            self._open -= 1
            if self._open == 0:
                self._none_open.set()

        run.leave(gone)

    async def _discard(self, instance: uuid.UUID, request_id: bytes) -> None:
        try:
            hold = await self._leases.lease(instance)
            try:
                await self._launcher.remove(instance, request_id)
            finally:
                hold.release()
        except ApiError as error:
            _log.warning("instance %s left to its expiry: %s %s", instance, error.code, error.reason, extra=about(request_id))
