"""One run: socket pair, container, frames. The answer is given before the container is torn down.

Our end of the pair stays open until the launcher's ENDED when a whole reply has come: an ordinary run is no news to the launcher.
Whoever leaves a run otherwise, by error or hang-up, closes it at once, which tells the launcher to destroy what still runs.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from ..operator_log import about
from ..protocol import Verdict
from .channel import Channel, Streams
from .dialogue import Dialogue
from .errors import ApiError, InstanceNotFoundError, LauncherUnavailableError, QueryTimeoutError, RunnerFailedError
from .launcher import Launcher, RepeatedError, RunEnd
from .runner import Order
from .verdicts import error_without_reply

# Between the end of a stream and the launcher's word on how the container ended.
_VERDICT_SECONDS = 5.0
# A quarter of a kilobyte each.
_MAX_EXPIRIES = 16_384

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The longest of everything a run waits for."""

    start_seconds: float
    reply_seconds: float
    reply_bytes: int

    @property
    def end_seconds(self) -> float:
        return self.start_seconds + self.reply_seconds + _VERDICT_SECONDS


class Expiries:
    """When instances end, which EXTEND alone changes: who knows need not be told with every run. Those heard of last are kept."""

    def __init__(self) -> None:
        # Not a plain dict, which walks over all that went before to find its first.
        self._known: OrderedDict[uuid.UUID, int] = OrderedDict()

    def get(self, instance: uuid.UUID) -> int | None:
        return self._known.get(instance)

    def to_come(self, instance: uuid.UUID) -> int | None:
        """The end of an instance that still lives, as far as is known."""
        expires_at = self._known.get(instance)
        return expires_at if expires_at is not None and expires_at > time.time() else None

    def forget(self, instance: uuid.UUID) -> None:
        self._known.pop(instance, None)

    def remember(self, instance: uuid.UUID, expires_at: int) -> None:
        self._known[instance] = expires_at
        if len(self._known) > _MAX_EXPIRIES:
            self._known.popitem(last=False)


class Run:
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
        "_overdue",
        "_quiet",
        "_request_id",
        "_told",
        "expires_at",
    )

    def __init__(
        self,
        launcher: Launcher,
        streams: Streams,
        bounds: Bounds,
        expiries: Expiries,
        instance: uuid.UUID,
        request_id: bytes,
        frame: bytes,
        flags: int,
        tag: bytes,
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
        self._overdue = False
        self._end: RunEnd | None = None
        self._told: asyncio.Event | None = None
        self._gone: Callable[[], None] | None = None
        self._answer: asyncio.Future[bytes | ApiError | RepeatedError] = self._loop.create_future()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._channel = self._connect(streams, ours, frame)
        try:
            launcher.run(instance, theirs, None if self._quiet else self._start, self._over, request_id, flags, tag)
        except BaseException:
            self._channel.close()
            raise
        self._wait(bounds.start_seconds + (bounds.reply_seconds if self._quiet else 0.0))

    def _connect(self, streams: Streams, ours: socket.socket, frame: bytes) -> Channel:
        return Channel(streams, ours, frame, self._bounds.reply_bytes, self._hear)

    async def reply(self) -> bytes:
        """The payload of the runner's first frame, or an ApiError or RepeatedError."""
        answer = await self._answer
        if not isinstance(answer, bytes):
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

    async def cut_short(self) -> ApiError:
        """Why there was no more of a reply than has come, as far as the launcher tells soon."""
        if self._end is None:
            self._told = asyncio.Event()
            with suppress(TimeoutError):
                async with asyncio.timeout(_VERDICT_SECONDS):
                    await self._told.wait()
        if self._overdue:
            return QueryTimeoutError()
        if isinstance(self._end, ApiError):
            return self._end
        if isinstance(self._end, Verdict):
            return error_without_reply(self._end)
        return RunnerFailedError(reason="half of a reply and no verdict")

    def _over(self, end: RunEnd) -> None:
        self._end = end
        if isinstance(end, InstanceNotFoundError):
            self._expiries.forget(self._instance)
        if self._told is not None:
            self._told.set()
        self._conclude()
        if self._gone is not None:
            self._finish()

    def _conclude(self) -> None:
        """Answer as soon as enough is known. The launcher's packets and the runner's bytes come in any order."""
        if self._answer.done():
            return
        reply, end = self._channel.reply, self._end
        if isinstance(end, ApiError | RepeatedError):
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
            self._overdue = True
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
            self._channel.retire()
            gone()


class Talk(Run):
    """A run by dialogue."""

    __slots__ = ("_order", "dialogue")

    def __init__(
        self,
        launcher: Launcher,
        streams: Streams,
        bounds: Bounds,
        expiries: Expiries,
        instance: uuid.UUID,
        request_id: bytes,
        order: Order,
    ) -> None:
        self._order = order
        super().__init__(launcher, streams, bounds, expiries, instance, request_id, order.frame, order.flags, order.tag)

    def _connect(self, streams: Streams, ours: socket.socket, frame: bytes) -> Channel:
        self.dialogue = Dialogue(streams, ours, self._order, self._bounds.reply_bytes, self._hear)
        return self.dialogue
