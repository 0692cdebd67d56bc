"""GET /healthz and /readyz: whether a request could be served now, from the launcher's own word, asked at most once a second."""

from __future__ import annotations

import asyncio
import logging

import msgspec

from .. import __version__
from ..settings import Settings
from .breaker import Breaker
from .drain import Drain
from .errors import ApiError, EngineUnavailableError, LauncherUnavailableError, ShuttingDownError
from .launcher import Launcher

_FRESH_SECONDS = 1.0
# Who starts the service wants to know soon that it is there.
_FRESH_TROUBLE_SECONDS = 0.2
_MAX_STRING_CHARS = 200

# What of the launcher's report is for everybody; paths, ids and the words of a failure at work are for the operator.
PUBLIC_KEYS = frozenset({"engine", "engine_choice", "daemon", "runtime", "instances", "running", "nursery", "successors"})

LIVE = msgspec.json.encode({"status": "ok"})
"""The answer of GET /livez."""

_log = logging.getLogger(__name__)
_report = msgspec.json.Decoder(dict[str, object])

Report = dict[str, object]


class Health:
    def __init__(self, settings: Settings, launcher: Launcher, drain: Drain, breaker: Breaker) -> None:
        self._engine = settings.engine
        self._launcher = launcher
        self._drain = drain
        self._breaker = breaker
        self._asking = asyncio.Lock()
        self._known_until = 0.0
        self._known: tuple[int, Report] = (503, {})
        self._said = ""

    async def report(self) -> tuple[int, Report]:
        """HTTP status and body of GET /healthz."""
        if self._drain.draining:
            return self._unavailable(ShuttingDownError())
        if self._breaker.refuses(creates=False):
            return self._unavailable(self._breaker.trouble())
        loop = asyncio.get_running_loop()
        async with self._asking:
            lost = self._known[0] == 200 and not self._launcher.connected
            if lost or loop.time() >= self._known_until:
                self._known = status, _ = await self._ask()
                self._known_until = loop.time() + (_FRESH_SECONDS if status == 200 else _FRESH_TROUBLE_SECONDS)
            return self._known

    async def readiness(self) -> tuple[int, Report]:
        """HTTP status and body of GET /readyz: the same in short."""
        status, report = await self.report()
        return status, {key: report[key] for key in ("status", "reason") if key in report}

    async def _ask(self) -> tuple[int, Report]:
        try:
            told = _report.decode(await self._launcher.health())
        except msgspec.MsgspecError:
            return self._unavailable(LauncherUnavailableError(reason="HEALTH is not a JSON object"))
        except ApiError as error:
            return self._unavailable(error)
        if (trouble := told.get("trouble")) is not None:
            return self._unavailable(EngineUnavailableError(reason=f"launcher: {trouble!r}"))
        self._said = ""
        public = {key: _cut(value) for key, value in told.items() if key in PUBLIC_KEYS and _is_plain(value)}
        return 200, {
            "status": "ok",
            "version": __version__,
            "engine": self._engine,
            **public,
            "separation": self._launcher.separated,
            "runner": _runner(told.get("selftest")),
        }

    def _unavailable(self, error: ApiError) -> tuple[int, Report]:
        if error.code != self._said:
            self._said = error.code
            _log.warning("not ready: %s %s", error.code, error.reason)
        return 503, {"status": "unavailable", "version": __version__, "reason": error.code}


def _runner(selftest: object) -> Report:
    """What the runner found of itself at start: a Landlock ABI of 0 or a stock SQLite is the operator's choice, and no secret."""
    facts = _part(selftest)
    options = facts.get("compile_options")
    return {
        "landlock_abi": _part(facts.get("confinement")).get("landlock_abi"),
        "sqlite": facts.get("sqlite"),
        "sqlite_build": _part(facts.get("build")).get("sqlite_build"),
        "compile_options": [str(option) for option in options] if isinstance(options, list) else None,
    }


def _part(value: object) -> Report:
    return value if isinstance(value, dict) else {}


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _cut(value: object) -> object:
    return value[:_MAX_STRING_CHARS] if isinstance(value, str) else value
