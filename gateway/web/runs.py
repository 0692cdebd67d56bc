"""Turns: ticket, lease and slot, and the runs that are made with them.

Whoever leaves a turn gives lease and slot back; if it ran something, as soon as that has ended. A turn's next run begins when the
container of the one before is gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..metrics import Durations
from ..operator_log import about
from ..protocol import NO_TAG, READ_ONLY
from ..settings import Settings
from .body import Int64Form, Statement
from .channel import Streams
from .dialogue import CutShortError, File, RowStream, Share
from .errors import ApiError, ReplyInvalidError
from .launcher import Launcher
from .leases import Hold, Leases, Ticket
from .rates import counted_as
from .room import Loan
from .run import Bounds, Expiries, Run, Talk
from .runner import (
    Accepted,
    Batch,
    Failing,
    Failure,
    FileHead,
    Imported,
    Ok,
    Order,
    Reported,
    RowsHead,
    Schema,
    Success,
    Unsettled,
    decode_reply,
    read_reply,
    request_frame,
)
from .verdicts import error_of, rows_or_raise

# The launcher kills at deadline plus grace; this much later it is the channel itself that hangs.
_CHANNEL_SECONDS = 1.0
# How exactly all of these are kept, by one timer for all runs: one for each took 2 µs, and nearly none ever rang.
_TICK_SECONDS = 0.1
# Of whatever kind, a run that may write rolls back what a killed one left.
_SETTLING = request_frame(Statement("SELECT 1", None, "number"), 1 << 10)

_log = logging.getLogger(__name__)

Outcome = Batch | Schema | Imported | Accepted | Reported
"""What `perform` returns."""
Wanted = TypeVar("Wanted")


class Turn:
    """Lease and slot of one instance, within `async with`, for one run after the other. Entering waits; raises OverloadedError.

    A read-only run may find what a killed one has left undone: then one that may write is made first, and it is run again.
    """

    __slots__ = ("_hold", "_instance", "_request_id", "_run", "_runs", "_ticket", "expires_at")

    def __init__(self, runs: Runs, ticket: Ticket, instance: uuid.UUID, request_id: bytes) -> None:
        self._runs = runs
        self._ticket = ticket
        self._instance = instance
        self._request_id = request_id
        self._run: Run | None = None
        self._hold: Hold | None = None
        self.expires_at: int | None = None
        """The unix second of the instance's deletion, known once its container has started if not before."""

    async def __aenter__(self) -> Turn:
        asked_at = time.perf_counter()
        self._hold = await self._ticket.hold(self._instance)
        self._runs.queue_seconds.observe(time.perf_counter() - asked_at)
        # Below here lease and slot are held; __aexit__ gives them back, or the stream of rows that has taken them over.
        return self

    async def __aexit__(self, *_: object) -> None:
        self._let_go()

    def rename(self, instance: uuid.UUID, expires_at: int) -> None:
        """The instance has got its name and its end; nobody else knows it yet."""
        if self._hold is not None:
            self._hold.rename(instance)
        self._runs._expiries.remember(instance, expires_at)
        self._instance = instance

    async def run(self, frame: bytes, int64: Int64Form, *, read_only: bool = False, tag: bytes = NO_TAG) -> Ok:
        """Run one request frame in a container of its own; raises an ApiError for everything but rows, or RepeatedError."""
        flags = READ_ONLY if read_only else 0
        reply = await self._sql(self._instance, frame, int64, flags, tag)
        if isinstance(reply, Unsettled) and read_only:
            await self._roll_back(self._instance)
            reply = await self._sql(self._instance, frame, int64, flags, tag)
        return rows_or_raise(reply)

    async def perform(self, order: Order, *, on: uuid.UUID | None = None) -> Outcome:
        """What has a reply of one frame; raises an ApiError for a verdict by which nothing was done, or RepeatedError.

        `on`: another instance, which nobody else knows of, here and below.
        """
        outcome = await self._answer(order, on, _whole)
        if isinstance(outcome, Ok | RowsHead | FileHead):
            raise ValueError(f"not one frame: {order.op}")
        return outcome

    async def fetch(self, order: Order, loan: Loan, *, on: uuid.UUID | None = None) -> File:
        """The file of an `export`, for which the loan is taken; as `perform`, and raises OverloadedError."""

        async def content(talk: Talk, head: Success) -> File:
            if not isinstance(head, FileHead):
                raise ValueError(f"no file: {order.op}")
            if head.size > self._runs.file_bytes:
                raise ReplyInvalidError(reason=f"a file of {head.size} bytes")
            loan.take(head.size)
            try:
                file = await talk.dialogue.file(head.size)
                if file.sha256 != head.sha256:
                    raise ReplyInvalidError(reason="a file of another SHA-256 than its head's")
            except BaseException:
                loan.give_back(head.size)
                raise
            return file

        return await self._answer(order, on, content)

    async def rows(self, order: Order, loan: Loan) -> RowStream:
        """All rows of a statement, behind the first frame; as `perform`, and raises OverloadedError.

        The stream takes lease and slot over: they are free when the container is gone, however long its reader takes. It is the
        last run of this turn, which may be left while it is read.
        """

        async def stream(talk: Talk, head: Success) -> RowStream:
            if not isinstance(head, RowsHead):
                raise ValueError(f"no rows: {order.op}")
            rows = RowStream(
                talk.dialogue,
                head.columns,
                order.int64,
                share,
                most_bytes=self._runs.stream_bytes,
                most_frame_bytes=self._runs.reply_bytes,
                cut_short=talk.cut_short,
                hang_up=talk.hang_up,
            )
            self._let_go()
            return rows

        share = Share(loan)
        try:
            return await self._answer(order, None, stream)
        except BaseException:
            share.give_back()
            raise

    async def _sql(self, instance: uuid.UUID, frame: bytes, int64: Int64Form, flags: int, tag: bytes) -> Ok | Failure:
        if self._run is not None or self._hold is None:
            await self._last_gone()
        asked_at = time.perf_counter()
        run = self._run = self._runs._begin(instance, self._request_id, frame, flags, tag)
        try:
            return decode_reply(await run.reply(), int64)
        except BaseException:
            run.hang_up()
            raise
        finally:
            self._learn(run, instance)
            self._runs.run_seconds.observe(time.perf_counter() - asked_at)

    async def _answer(self, order: Order, on: uuid.UUID | None, rest: Callable[[Talk, Success], Awaitable[Wanted]]) -> Wanted:
        instance = on or self._instance
        answer = await self._talk(order, instance, rest)
        if isinstance(answer, Unsettled) and order.read_only:
            await self._roll_back(instance)
            answer = await self._talk(order, instance, rest)
        if isinstance(answer, Failing):
            raise error_of(answer)
        return answer

    async def _talk(
        self, order: Order, instance: uuid.UUID, rest: Callable[[Talk, Success], Awaitable[Wanted]]
    ) -> Wanted | Failing:
        if self._run is not None or self._hold is None:
            await self._last_gone()
        asked_at = time.perf_counter()
        talk = self._run = self._runs._begin_talk(instance, self._request_id, order)
        try:
            reply = read_reply(await talk.reply(), order)
            self._learn(talk, instance)
            if isinstance(reply, Failing):
                talk.dialogue.finish()
                return reply
            return await rest(talk, reply)
        except CutShortError:
            error = await talk.cut_short()
            talk.hang_up()
            raise error from None
        except BaseException:
            talk.hang_up()
            raise
        finally:
            self._learn(talk, instance)
            self._runs.run_seconds.observe(time.perf_counter() - asked_at)

    def _learn(self, run: Run, instance: uuid.UUID) -> None:
        if instance is self._instance:
            self.expires_at = run.expires_at

    async def _roll_back(self, instance: uuid.UUID) -> None:
        """What a killed run has left; raises what keeps it from being done."""
        rows_or_raise(await self._sql(instance, _SETTLING, "number", 0, NO_TAG))

    async def _last_gone(self) -> None:
        """Wait for the container of the run before."""
        if self._hold is None:
            raise ValueError("the turn is over")
        run = self._run
        if run is not None:
            gone = asyncio.Event()
            run.leave(gone.set)
            await gone.wait()
            self._runs._forget(run)
            self._run = None

    def _let_go(self) -> None:
        hold, self._hold = self._hold, None
        if hold is not None:
            self._runs._settle(self._run, hold)


async def _whole(talk: Talk, reply: Success) -> Success:
    talk.dialogue.finish()
    return reply


class Runs:
    def __init__(self, settings: Settings, launcher: Launcher) -> None:
        self._launcher = launcher
        self._leases = Leases(settings.slots, settings.queue_length, settings.queue_timeout_seconds, settings.queue_delay_seconds)
        self._bounds, self._bulk_bounds = (
            Bounds(
                start_seconds=settings.start_timeout_seconds + _CHANNEL_SECONDS,
                reply_seconds=deadline_seconds + settings.grace_seconds + _CHANNEL_SECONDS,
                reply_bytes=settings.max_reply_frame_bytes,
            )
            for deadline_seconds in (settings.deadline_seconds, settings.bulk_deadline_seconds)
        )
        self.reply_bytes = settings.max_reply_frame_bytes
        """Of a reply's first frame, and of one behind rows that is longer than most."""
        self.file_bytes = settings.instance_bytes
        self.stream_bytes = settings.max_stream_bytes
        """Of all frames of rows together."""
        self.queue_seconds = Durations()
        """Waits that ended with lease and slot."""
        self.run_seconds = Durations()
        """From RUN to the reply, or to whatever came instead."""
        self._expiries = Expiries()
        self._open = 0
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way: set[Run] = set()
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

    def end_to_come(self, instance: uuid.UUID) -> int | None:
        """The unix second of the deletion of an instance that is known to live: the launcher's last word on it."""
        return self._expiries.to_come(instance)

    def ended(self, instance: uuid.UUID) -> None:
        """It has been deleted before its time."""
        self._expiries.forget(instance)

    def extended(self, instance: uuid.UUID, expires_at: int) -> None:
        """The launcher says that the instance ends at that unix second from now on."""
        self._expiries.remember(instance, expires_at)

    def _begin(self, instance: uuid.UUID, request_id: bytes, frame: bytes, flags: int, tag: bytes) -> Run:
        run = Run(self._launcher, self._streams, self._bounds, self._expiries, instance, request_id, frame, flags, tag)
        self._watch(run)
        return run

    def _begin_talk(self, instance: uuid.UUID, request_id: bytes, order: Order) -> Talk:
        bounds = self._bulk_bounds if order.bulk else self._bounds
        talk = Talk(self._launcher, self._streams, bounds, self._expiries, instance, request_id, order)
        self._watch(talk)
        return talk

    def _watch(self, run: Run) -> None:
        self._under_way.add(run)
        if not self._ticking:
            self._tick_later()

    def _forget(self, run: Run) -> None:
        self._under_way.discard(run)

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

    def _settle(self, run: Run | None, hold: Hold) -> None:
        if run is None:
            hold.release()
            return
        self._open += 1
        self._none_open.clear()

        def gone() -> None:
            hold.release()
            self._forget(run)
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
