"""What the gateway tells Prometheus: its own metrics, read from the parts that count, and the launcher's text behind them.

The launcher has no network, so its text comes over its socket. All its families begin with `mayfly_launcher_`, and none of ours but
`mayfly_launcher_up` does: no family is there twice, and a text that has any other line is not passed on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import get_args

from aiohttp import web
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from .. import __version__
from ..metrics import Family, Process, exposition, process_families
from .appkeys import ACCESS_LOG, BREAKER, CREATE_RATE, KEYS, LAUNCHER, REQUEST_RATE, RUNS, SETTINGS, SHIPPING, TRAFFIC
from .breaker import Reason, State
from .errors import ApiError
from .server import Server
from .traffic import OTHER

PREFIX = "mayfly"
PROCESS_PREFIX = "mayfly_web"
LAUNCHER_PREFIX = "mayfly_launcher_"
# Prometheus gives a scrape ten seconds, unless it is told otherwise.
LAUNCHER_SECONDS = 2.0

BUILD = Family(f"{PREFIX}_build_info", "gauge", "Always 1. The version.", ("version",))
REQUESTS = Family(
    f"{PREFIX}_requests_total",
    "counter",
    "HTTP requests, by route, method, status and the error's code (docs/api.md); 499: the caller hung up.",
    ("route", "method", "status", "code"),
)
REQUEST_SECONDS = Family(f"{PREFIX}_request_seconds", "histogram", "From a request's header to its answer.", ("route",))
QUEUE_SECONDS = Family(f"{PREFIX}_queue_seconds", "histogram", "Of that, the wait for instance and slot, where both were had.")
RUN_SECONDS = Family(f"{PREFIX}_run_seconds", "histogram", "Of that, from the order to the launcher to the runner's reply.")
WAITING = Family(f"{PREFIX}_waiting_requests", "gauge", "Requests that wait for instance and slot.")
RATE_LIMITED = Family(f"{PREFIX}_rate_limited_total", "counter", "Requests refused by a rate per address, by limit.", ("limit",))
CONNECTIONS = Family(f"{PREFIX}_connections", "gauge", "Open connections.")
REFUSED = Family(
    f"{PREFIX}_connections_refused_total",
    "counter",
    "New connections that were reset: their address had its most, or all that were open were at work.",
    ("reason",),
)
EVICTED = Family(
    f"{PREFIX}_connections_evicted_total",
    "counter",
    "Connections closed: to make room, for an answer left unread or read too slowly, for want of a whole header, or idle.",
    ("reason",),
)
BREAKER_STATE = Family(f"{PREFIX}_breaker_state", "gauge", "1 for the state that the circuit breaker is in.", ("state",))
BREAKER_REASON = Family(f"{PREFIX}_breaker_open", "gauge", "1 for each reason for which it is open now.", ("reason",))
BREAKER_OPENINGS = Family(f"{PREFIX}_breaker_openings_total", "counter", "Openings of the circuit breaker.", ("reason",))
BREAKER_REFUSED = Family(f"{PREFIX}_breaker_refused_total", "counter", "Requests that it refused.")
KEY_AGE = Family(f"{PREFIX}_key_age_seconds", "gauge", "Age of the newest token key.")
KEY_ROTATION = Family(f"{PREFIX}_key_rotation_seconds", "gauge", "MAYFLY_KEY_ROTATION_SECONDS, the age at which it is replaced.")
KEY_FAILURES = Family(f"{PREFIX}_key_rotation_failures_total", "counter", "Looks at the token keys that failed.")
LOG_LOST = Family(
    f"{PREFIX}_access_log_lost_lines_total",
    "counter",
    "Access log lines dropped: no memory, the day's bytes are used up, the disk takes none, their day is not kept.",
    ("reason",),
)
LOG_SHIPPED = Family(f"{PREFIX}_access_log_shipped_total", "counter", "Days of the access log copied to S3.")
LOG_MISSED = Family(f"{PREFIX}_access_log_missed_total", "counter", "Days that can no longer be copied there.")
LOG_FAILURES = Family(f"{PREFIX}_access_log_shipping_failures_total", "counter", "Attempts to copy that failed, to be made again.")
LAUNCHER_UP = Family(f"{LAUNCHER_PREFIX}up", "gauge", "1 if the launcher told its metrics; if 0 they are missing here.")

FAMILIES = (
    BUILD,
    REQUESTS,
    REQUEST_SECONDS,
    QUEUE_SECONDS,
    RUN_SECONDS,
    WAITING,
    RATE_LIMITED,
    CONNECTIONS,
    REFUSED,
    EVICTED,
    BREAKER_STATE,
    BREAKER_REASON,
    BREAKER_OPENINGS,
    BREAKER_REFUSED,
    KEY_AGE,
    KEY_ROTATION,
    KEY_FAILURES,
    LOG_LOST,
    LOG_SHIPPED,
    LOG_MISSED,
    LOG_FAILURES,
    LAUNCHER_UP,
    *process_families(PROCESS_PREFIX),
)

_REFUSED = ("address", "full")
_EVICTED = ("room", "unread", "answer", "header", "idle")
_LOST = ("memory", "day_bytes", "disk", "day")


class Metrics:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._launcher = server.app[LAUNCHER]
        self._process = Process(PROCESS_PREFIX)

    async def text(self) -> bytes:
        """The whole exposition, within LAUNCHER_SECONDS and some milliseconds."""
        told = await self._told()
        return exposition(_Web(self._server, told is not None), self._process) + (told or b"")

    async def _told(self) -> bytes | None:
        try:
            async with asyncio.timeout(LAUNCHER_SECONDS):
                text = (await self._launcher.metrics()).encode()
        except (ApiError, TimeoutError):
            return None
        return text if _is_the_launchers(text) else None


def _is_the_launchers(text: bytes) -> bool:
    own = LAUNCHER_PREFIX.encode()
    beginnings = (own, b"# HELP " + own, b"# TYPE " + own)
    up = LAUNCHER_UP.name.encode()
    return text.endswith(b"\n") and all(line.startswith(beginnings) and up not in line for line in text.splitlines())


class _Web(Collector):
    def __init__(self, server: Server, launcher_up: bool) -> None:
        self._app: web.Application = server.app
        self._door = server.door
        self._launcher_up = launcher_up

    def collect(self) -> Iterator[Metric]:
        app, runs, traffic = self._app, self._app[RUNS], self._app[TRAFFIC]
        yield BUILD.by({(__version__,): 1})
        yield REQUESTS.by({(route, method, str(status), code): n for (route, method, status, code), n in self._requests().items()})
        yield REQUEST_SECONDS.spread({(route,): durations for route, durations in traffic.seconds.items()})
        yield QUEUE_SECONDS.spread({(): runs.queue_seconds})
        yield RUN_SECONDS.spread({(): runs.run_seconds})
        yield WAITING.of(runs.leases.waiting)
        yield RATE_LIMITED.by({("requests",): app[REQUEST_RATE].refused, ("creates",): app[CREATE_RATE].refused})
        yield from self._connections()
        yield from self._breaker()
        yield from self._keys_and_log()
        yield LAUNCHER_UP.of(self._launcher_up)

    def _requests(self) -> Counter[tuple[str, str, int, str]]:
        """Those that the application saw, and those that never became a request to it."""
        counted = self._app[TRAFFIC].requests.copy()
        if self._door is not None:
            for (status, code), answers in self._door.answered.items():
                counted[OTHER, OTHER, status, code] += answers
        return counted

    def _connections(self) -> Iterator[Metric]:
        door = self._door
        yield CONNECTIONS.of(door.connections if door else 0)
        yield REFUSED.by({(reason,): door.refused[reason] if door else 0 for reason in _REFUSED})
        yield EVICTED.by({(reason,): door.evicted[reason] if door else 0 for reason in _EVICTED})

    def _breaker(self) -> Iterator[Metric]:
        breaker = self._app[BREAKER]
        state, reasons = breaker.state, breaker.reasons
        yield BREAKER_STATE.by({(name,): name == state for name in get_args(State)})
        yield BREAKER_REASON.by({(reason,): reason in reasons for reason in Reason})
        yield BREAKER_OPENINGS.by({(reason,): breaker.opened_total[reason] for reason in Reason})
        yield BREAKER_REFUSED.of(breaker.refused_total)

    def _keys_and_log(self) -> Iterator[Metric]:
        app, shipping = self._app, self._app.get(SHIPPING)
        yield KEY_AGE.of(app[KEYS].age_seconds)
        yield KEY_ROTATION.of(app[SETTINGS].key_rotation_seconds)
        yield KEY_FAILURES.of(app[KEYS].rotation_failures)
        yield LOG_LOST.by({(reason,): app[ACCESS_LOG].lost[reason] for reason in _LOST})
        yield LOG_SHIPPED.of(shipping.shipped if shipping else 0)
        yield LOG_MISSED.of(shipping.missed if shipping else 0)
        yield LOG_FAILURES.of(shipping.failures if shipping else 0)
