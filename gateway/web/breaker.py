"""The circuit breaker: refuses at the door, at next to no cost, what could not be served anyway or would make things worse.

What opens it, and what it then refuses:

    queue     MAYFLY_BREAKER_WAITING requests wait for a slot                creates
    disk      the state disk has less than MAYFLY_MIN_FREE_BYTES             creates
    memory    the host has less than MAYFLY_MIN_FREE_MEMORY_BYTES            everything
    runs      MAYFLY_BREAKER_FAILURE_PERCENT of the last minute's runs fail  everything
    engine    the launcher says that no run can be taken                     everything
    launcher  the launcher gives no answer, or none that can be read         everything

`engine` and `launcher` end with the launcher's first good word. The others last for MAYFLY_BREAKER_OPEN_SECONDS at least: `queue`,
`disk` and `memory` until there is clearly enough again (half the queue; an eighth more room), `runs` until one run has worked: once
the time is over one is let through, which closes the breaker or opens it anew.

A refusal knows whether a token was presented, and never what it is worth. Who waits behind its own instance says nothing about the
service, and does not count as waiting.

A failed run is one that ended in an error of ours: no reply, an invalid one, or a defect. A tenant's deadline, memory limit and
hang-up are none. Still, who can crash a runner makes his own runs fail. So an address, for IPv6 its /48, counts with its last four
runs of the minute, good and bad: it takes five addresses to reach the twenty runs that are needed, and to open the breaker by one's
own runs, about as many addresses as everybody else has together (at 50 %).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from enum import StrEnum
from math import ceil
from types import TracebackType
from typing import Literal, NamedTuple

import msgspec

from ..settings import Settings
from .errors import (
    ApiError,
    CallerError,
    CircuitOpenError,
    EngineUnavailableError,
    InstanceNotFoundError,
    InternalError,
    LauncherUnavailableError,
    QueryQuotaError,
    ReplyInvalidError,
    RunnerFailedError,
)
from .launcher import Launcher
from .rates import network_of
from .runs import Runs

_LOOK_SECONDS = 1.0
# Without an answer to HEALTH for so long the launcher is silent. It answers at once, unless it or the host hangs.
_SILENT_SECONDS = 3.0

_WINDOW_SECONDS = 60.0
_MIN_RUNS = 20
_RUNS_PER_ADDRESS = 4
_IPV6_PREFIX = 48
_MAX_RUNS = 4096
_FAILURES = (RunnerFailedError, ReplyInvalidError, InternalError)
_NO_RUN = (InstanceNotFoundError, QueryQuotaError)

_log = logging.getLogger(__name__)

State = Literal["closed", "open", "half_open"]


class Reason(StrEnum):
    QUEUE = "queue"
    DISK = "disk"
    MEMORY = "memory"
    RUNS = "runs"
    ENGINE = "engine"
    LAUNCHER = "launcher"


_OF_CREATES = frozenset({Reason.QUEUE, Reason.DISK})
_AT_ITS_WORD = frozenset({Reason.ENGINE, Reason.LAUNCHER})


class _Told(msgspec.Struct):
    """What is read of HEALTH."""

    trouble: str | None
    free_bytes: int
    available_memory_bytes: int


_told = msgspec.json.Decoder(_Told)


class _Outcome(NamedTuple):
    at: float
    address: str
    failed: bool


class _Outcomes:
    """The last minute's runs, at most four of an address."""

    def __init__(self) -> None:
        self._runs: OrderedDict[int, _Outcome] = OrderedDict()
        self._of: dict[str, deque[int]] = {}
        self._numbers = itertools.count()
        self._failed = 0

    def add(self, outcome: _Outcome) -> None:
        number = next(self._numbers)
        own = self._of.setdefault(outcome.address, deque())
        self._runs[number] = outcome
        own.append(number)
        self._failed += outcome.failed
        if len(own) > _RUNS_PER_ADDRESS:
            self._drop(own[0])
        if len(self._runs) > _MAX_RUNS:
            self._drop(next(iter(self._runs)))

    def failed_percent(self, now: float) -> float:
        """0 while there are too few to tell."""
        while self._runs and self._runs[first := next(iter(self._runs))].at <= now - _WINDOW_SECONDS:
            self._drop(first)
        return 100 * self._failed / len(self._runs) if len(self._runs) >= _MIN_RUNS else 0.0

    def _drop(self, number: int) -> None:
        """The oldest of its address."""
        outcome = self._runs.pop(number)
        own = self._of[outcome.address]
        own.popleft()
        if not own:
            del self._of[outcome.address]
        self._failed -= outcome.failed


class _Passage:
    """A request on its way from its ticket to its answer, for `with`."""

    __slots__ = ("_end",)

    def __init__(self, end: Callable[[], None] | None) -> None:
        self._end = end

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._end is not None:
            self._end()


_NO_TRIAL = _Passage(None)


class Breaker:
    def __init__(self, settings: Settings, launcher: Launcher, runs: Runs, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._launcher = launcher
        self._runs = runs
        self._clock = clock
        self._open: dict[Reason, float] = {}  # when each may be looked at again
        self._outcomes = _Outcomes()
        self._on_trial = False
        self._asked: asyncio.Task[str] | None = None
        self._traffic = False
        self._awake = asyncio.Event()
        self.opened_total: Counter[Reason] = Counter()
        self.refused_total = 0

    @property
    def reasons(self) -> list[Reason]:
        """Why it is open; none when it is closed."""
        return sorted(self._open)

    @property
    def state(self) -> State:
        if not self._open:
            return "closed"
        return "half_open" if self._tries() else "open"

    def refuses(self, *, creates: bool) -> bool:
        """Whether a request would be refused now. Changes nothing."""
        if creates and self._open.keys() & _OF_CREATES:
            return True
        return bool(self._open.keys() - _OF_CREATES) and (self._on_trial or not self._tries())

    def trouble(self) -> ApiError:
        """While everything is refused: why, for who asks whether the service is ready."""
        if Reason.LAUNCHER in self._open:
            return LauncherUnavailableError()
        return EngineUnavailableError() if Reason.ENGINE in self._open else CircuitOpenError()

    def refuse_if_open(self, *, creates: bool) -> None:
        """For each request, before anything else is done for it; raises CircuitOpenError. `creates`: it presents no token."""
        self._traffic = True
        if not self._awake.is_set():
            self._awake.set()
        if creates and 0 < self._settings.breaker_waiting <= (waiting := self._runs.leases.lacking_slots):
            self._opens(Reason.QUEUE, f"{waiting} requests wait for a slot")
        if self._open and self.refuses(creates=creates):
            raise self._refusal()

    def passage(self, *, creates: bool) -> _Passage:
        """Around everything from the ticket on, whatever the token is worth; raises CircuitOpenError.

        It may have opened while the body arrived. Of those that it lets through for a trial there is one at a time.
        """
        if not self._open:
            return _NO_TRIAL
        if self.refuses(creates=creates):
            raise self._refusal()
        if Reason.RUNS not in self._open:
            return _NO_TRIAL
        self._on_trial = True
        return _Passage(self._trial_over)

    def saw(self, address: str, error: ApiError | None) -> None:
        """How a run ended, a hang-up being no error. What kept it from beginning, or was the engine's doing, says nothing."""
        failed = isinstance(error, _FAILURES)
        if not failed and error is not None and (not isinstance(error, CallerError) or isinstance(error, _NO_RUN)):
            return
        now = self._clock()
        if Reason.RUNS in self._open:
            if failed:
                self._open[Reason.RUNS] = now + self._settings.breaker_open_seconds
            elif self._tries():
                self._outcomes = _Outcomes()
                self._closes(Reason.RUNS)
            return
        self._outcomes.add(_Outcome(now, network_of(address, _IPV6_PREFIX), failed))
        if failed and 0 < self._settings.breaker_failure_percent <= (percent := self._outcomes.failed_percent(now)):
            self._opens(Reason.RUNS, f"{percent:.0f} % of the last minute's runs failed")

    async def watch(self) -> None:
        """Until cancelled: look once a second for as long as requests come, and while anything is open."""
        try:
            while True:
                await self._awake.wait()
                await self._look()
                if not self._traffic and not self._open:
                    self._awake.clear()
                self._traffic = False
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            if self._asked is not None:
                self._asked.cancel()

    async def _look(self) -> None:
        now = self._clock()
        if self._may_close(Reason.QUEUE, now) and 2 * self._runs.leases.lacking_slots < self._settings.breaker_waiting:
            self._closes(Reason.QUEUE)
        told = await self._ask()
        if told is None:
            return
        self._closes(Reason.LAUNCHER)
        if told.trouble is not None:
            self._opens(Reason.ENGINE, told.trouble)
        else:
            self._closes(Reason.ENGINE)
        self._weigh(Reason.DISK, told.free_bytes, self._settings.min_free_bytes)
        self._weigh(Reason.MEMORY, told.available_memory_bytes, self._settings.min_free_memory_bytes)

    async def _ask(self) -> _Told | None:
        """None without an answer, and the breaker is open then. A question that is still open is not asked again."""
        asked = self._asked = self._asked or asyncio.create_task(self._launcher.health())
        await asyncio.wait((asked,), timeout=_SILENT_SECONDS)
        if not asked.done():
            self._launcher.silent = True
            self._opens(Reason.LAUNCHER, f"no answer in {_SILENT_SECONDS:.0f} s")
            return None
        self._asked = None
        try:
            return _told.decode(asked.result())
        except ApiError as error:
            self._opens(Reason.LAUNCHER, error.reason)
        except msgspec.MsgspecError as error:
            self._opens(Reason.LAUNCHER, f"HEALTH: {error}")
        return None

    def _weigh(self, reason: Reason, found: int, least: int) -> None:
        if found < least:
            self._opens(reason, f"{found} bytes are to be had, fewer than {least}")
        elif found >= least + least // 8 and self._may_close(reason, self._clock()):
            self._closes(reason)

    def _tries(self) -> bool:
        """Whether nothing but failed runs keeps it from running anything, and it is time to let one through."""
        return self._open.keys() - _OF_CREATES == {Reason.RUNS} and self._may_close(Reason.RUNS, self._clock())

    def _trial_over(self) -> None:
        self._on_trial = False

    def _may_close(self, reason: Reason, now: float) -> bool:
        return reason in self._open and now >= self._open[reason]

    def _opens(self, reason: Reason, why: str) -> None:
        if reason in self._open:
            return
        self._open[reason] = self._clock() + self._settings.breaker_open_seconds
        self.opened_total[reason] += 1
        _log.warning("circuit breaker open reason=%s: %s", reason, why)
        if reason not in _OF_CREATES:
            self._runs.leases.refuse_waiting(self._refusal)
        if reason is Reason.LAUNCHER:
            self._runs.hurry()

    def _closes(self, reason: Reason) -> None:
        if self._open.pop(reason, None) is not None:
            _log.info("circuit breaker no longer open reason=%s", reason)

    def _refusal(self) -> CircuitOpenError:
        self.refused_total += 1
        left = max(self._open.values(), default=0.0) - self._clock()
        least = 1 if self._on_trial else CircuitOpenError.retry_after_seconds
        return CircuitOpenError(headers={"Retry-After": str(max(least, ceil(left)))})
