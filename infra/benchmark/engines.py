"""What the engine of a deployment is to reach, in one run beside its rivals: Datasette, engine docker, itself with few instances.

Engine docker is a second deployment that starts nothing ahead: a fresh container for every request, as the measured engine gives
one. It and Datasette take turns with the measured deployment. Then come the tail at 70 % of the capacity just measured, memory
before and after many requests, and at last a crowd of instances in the measured deployment, in turns with a new one that has ten.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from gateway.settings import Settings

from . import breakdown
from .accounting import Accounting, disk_bytes
from .client import Address
from .deployments import Deployment, bring_up, measured
from .figures import LATENCY, RATE, Figures, Key, Ratio, percentile, rounded
from .load import OK, Phase, at_rate, closed_loop, paced, poisson
from .plan import Plan
from .processes import DATASETTE_SELECT
from .sides import BLANK, DATASETTE, MAYFLY, Sides
from .targets import Target
from .workloads import CREATE, SELECT, callers, check, make, prepare

RIVAL, FEW, CROWD = "mayfly-docker", "mayfly-few", "mayfly-crowd"
PACED, POISSON = "select at 70 %, paced", "select at 70 %, Poisson"

_ALONE, _CREATORS = 1, 8
_SHARE = 0.7
_FEW_INSTANCES = 10
_IDLE_SLOTS = 8
_SETTLE_SECONDS = 1.0
_LEAST_WINDOW_SECONDS, _MANY_WINDOW_SECONDS = 0.5, 10.0
_RIVAL_SETTINGS = {
    "MAYFLY_ENGINE": "docker",
    "MAYFLY_NURSERY": "0",
    "MAYFLY_SUCCESSORS": "0",
    "MAYFLY_SLOTS": "",
    "MAYFLY_QUEUE_DELAY_SECONDS": "60",  # thirty-two callers wait longer than it likes
}
_SMALL_TABLE = b'{"sql":"CREATE TABLE note(id INTEGER PRIMARY KEY, body TEXT NOT NULL); INSERT INTO note(body) VALUES (\'begun\')"}'

_Turn = tuple[Key, Callable[[], Awaitable[Phase]]]


@dataclass(slots=True)
class Result:
    at_once: int
    """Callers that keep the service at its capacity."""
    idle: dict[str, Any]
    figures: Figures = field(default_factory=Figures)
    breakdown: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    requests: int = 0
    """Between `before` and `after`."""
    instances: dict[str, int] = field(default_factory=dict)
    disk_bytes: float = 0.0
    """Of an instance with a small table."""
    disk_bytes_shared: float = 0.0
    """Each instance's share in the folder that holds them all, and in whatever else grew with their number."""

    @property
    def busy(self) -> Key:
        return Key(MAYFLY, SELECT, self.at_once)

    @property
    def capacity(self) -> float:
        """SELECT 1 per second."""
        return self._rate(self.busy)

    def ratios(self) -> Iterator[Ratio]:
        ratio = self.figures.ratio
        yield from ratio(RATE, self.busy, Key(RIVAL, SELECT, self.at_once))
        for measure, concurrency in itertools.product((LATENCY, RATE), (_ALONE, self.at_once)):
            yield from ratio(measure, Key(MAYFLY, SELECT, concurrency), Key(DATASETTE, SELECT, concurrency))
        for workload in (SELECT, CREATE):
            yield from ratio(RATE, Key(CROWD, workload, _CREATORS), Key(FEW, workload, _CREATORS))

    def targets(self) -> Iterator[Target]:
        found = {(ratio.measure, ratio.of, ratio.to): ratio.value for ratio in self.ratios()}

        def quotient(measure: str, of: Key, to: Key) -> float | None:
            return found.get((measure, str(of), str(to)))

        alone = Key(MAYFLY, SELECT, _ALONE)
        by_docker = quotient(RATE, self.busy, Key(RIVAL, SELECT, self.at_once))
        yield Target(f"SELECT 1 c={self.at_once}, requests/s, by engine docker", by_docker, "×", at_least=40)
        yield Target("SELECT 1 c=1, p50, by Datasette", quotient(LATENCY, alone, Key(DATASETTE, SELECT, _ALONE)), "×", at_most=2)
        live = f"among {self.instances['crowd']} instances, by among {_FEW_INSTANCES}"
        for workload, name in ((SELECT, "SELECT 1"), (CREATE, "creates")):
            value = quotient(RATE, Key(CROWD, workload, _CREATORS), Key(FEW, workload, _CREATORS))
            yield Target(f"{name} c=8, per second, {live}", value, "×", at_least=0.9)
        grown = self.after["service_bytes"] / self.before["service_bytes"]
        yield Target(f"memory after {self.requests} requests, by before", grown, "×", at_most=1.05)
        yield Target(f"SELECT 1 c={self.at_once}", self.capacity, "requests/s", at_least=930)
        yield Target("SELECT 1 c=1, p50", self._latency(alone, 0.5), "ms", at_most=2)
        yield Target("SELECT 1 at 70 % of capacity, p99", self._latency(Key(MAYFLY, PACED, self.at_once), 0.99), "ms", at_most=21)
        yield Target("creates c=8", self._rate(Key(MAYFLY, CREATE, _CREATORS)), "creates/s", at_least=138)
        yield Target(f"memory of the idle service, {_IDLE_SLOTS} slots", self.idle["service_bytes"] / 1e6, "MB", at_most=300)
        yield Target("live instances", self.instances["crowd"], "", at_least=10_000)
        yield Target("disk of an instance with a small table", self.disk_bytes / 1024, "KiB", at_most=20)

    def _rate(self, key: Key) -> float:
        return median(phase.per_second for phase in self.figures.phases[key].values())

    def _latency(self, key: Key, share: float) -> float | None:
        samples = self.figures.samples(key)
        return 1000 * percentile(samples, share) if samples else None

    def as_json(self) -> dict[str, Any]:
        return {
            "figures": self.figures.as_json(),
            "breakdown": self.breakdown,
            "memory": {"idle": self.idle, "before": self.before, "after": self.after, "requests_between": self.requests},
            "instances": self.instances,
            "disk_bytes_per_instance": {"its_own": rounded(self.disk_bytes), "shared": rounded(self.disk_bytes_shared)},
        }


async def idle_memory(settings: Settings, sides: Sides) -> dict[str, Any]:
    """Of a deployment of its own, with more slots than the cores need. It goes on being idle for the rest of the run."""
    idle = await bring_up(settings, "idle", {"MAYFLY_SLOTS": str(_IDLE_SLOTS)})
    await asyncio.sleep(_SETTLE_SECONDS)
    return await Accounting(idle, sides.docker).memory()


async def measure(plan: Plan, settings: Settings, sides: Sides, datasette: Address, blank: Address, idle: dict[str, Any]) -> Result:
    result = Result(plan.concurrencies[-1], idle)
    at_once = sides.tokens[: result.at_once]
    deployment = measured(settings)
    accounting = Accounting(deployment, sides.docker)
    rival = await bring_up(settings, "docker", _RIVAL_SETTINGS)
    rival_tokens = await prepare(rival.address, result.at_once, rows=1)
    for number in range(plan.engine_rounds):
        turns = [
            _turn(MAYFLY, SELECT, sides.mayfly, at_once, plan.engine_window, number),
            _datasette(datasette, result.at_once, plan.short_window),
            _turn(MAYFLY, SELECT, sides.mayfly, sides.tokens[:_ALONE], plan.engine_window, number),
            _datasette(datasette, _ALONE, plan.short_window),
            _turn(MAYFLY, CREATE, sides.mayfly, sides.tokens[:_CREATORS], plan.engine_window, number),
            _turn(BLANK, SELECT, blank, at_once, plan.short_window / 2, number),
            _turn(RIVAL, SELECT, rival.address, rival_tokens, plan.rival_window, number),
        ]
        await _take(result.figures, number, turns)
    await _tail(plan, sides, result)
    result.breakdown = await breakdown.measure(plan, sides.mayfly, sides.tokens, accounting)
    await _many(plan, sides, accounting, result)
    await _crowd(plan, settings, sides, deployment, result)
    return result


async def _take(figures: Figures, number: int, turns: Sequence[_Turn]) -> None:
    """Every other round the order is reversed: who comes first finds another machine than who comes last."""
    for key, turn in turns if number % 2 == 0 else reversed(turns):
        figures.add(key, number, await turn())


def _turn(side: str, workload: str, address: Address, tokens: Sequence[bytes], seconds: float, number: int) -> _Turn:
    streams = callers(workload, address, tokens, f"{side} {number}")
    return Key(side, workload, len(tokens)), partial(closed_loop, address, streams, partial(check, workload), seconds)


def _datasette(address: Address, concurrency: int, seconds: float) -> _Turn:
    streams = [itertools.repeat(DATASETTE_SELECT)] * concurrency
    return Key(DATASETTE, SELECT, concurrency), partial(closed_loop, address, streams, partial(check, SELECT), seconds)


async def _tail(plan: Plan, sides: Sides, result: Result) -> None:
    rate = _SHARE * result.capacity
    streams = callers(SELECT, sides.mayfly, sides.tokens[: result.at_once], "tail")
    arrivals = {PACED: paced(rate), POISSON: poisson(rate, random.Random("tail"))}  # noqa: S311 -- to be repeatable
    for name, pauses in arrivals.items():
        phase = await at_rate(sides.mayfly, streams, pauses, partial(check, SELECT), plan.tail_window)
        result.figures.add(Key(MAYFLY, name, result.at_once), 0, phase)


async def _many(plan: Plan, sides: Sides, accounting: Accounting, result: Result) -> None:
    streams = callers(SELECT, sides.mayfly, sides.tokens[: result.at_once], "many")
    await asyncio.sleep(_SETTLE_SECONDS)
    result.before = await accounting.memory()
    while (missing := plan.many_requests - result.requests) > 0:
        seconds = min(_MANY_WINDOW_SECONDS, max(_LEAST_WINDOW_SECONDS, missing / result.capacity))
        phase = await closed_loop(sides.mayfly, streams, partial(check, SELECT), seconds)
        result.requests += phase.statuses[OK]
    await asyncio.sleep(_SETTLE_SECONDS)
    result.after = await accounting.memory()


async def _crowd(plan: Plan, settings: Settings, sides: Sides, deployment: Deployment, result: Result) -> None:
    few = await bring_up(settings, "few", {})
    few_tokens = await make(few.address, _FEW_INSTANCES, _SMALL_TABLE, _CREATORS, plan.crowd_seconds)
    there, before = set(deployment.instances.iterdir()), disk_bytes(deployment.instances)
    tokens = await make(sides.mayfly, max(_CREATORS, plan.crowd - len(there)), _SMALL_TABLE, _CREATORS, plan.crowd_seconds)
    result.instances = {"few": len(few_tokens), "crowd": len(there) + len(tokens)}
    grown = disk_bytes(deployment.instances) - before
    result.disk_bytes = median(disk_bytes(instance) for instance in set(deployment.instances.iterdir()) - there)
    result.disk_bytes_shared = grown / len(tokens) - result.disk_bytes
    for number in range(plan.engine_rounds):
        turns = [
            _queries(CROWD, sides.mayfly, tokens, plan.engine_window),
            _queries(FEW, few.address, few_tokens, plan.engine_window),
            _turn(CROWD, CREATE, sides.mayfly, tokens[:_CREATORS], plan.engine_window, number),
            _turn(FEW, CREATE, few.address, few_tokens[:_CREATORS], plan.engine_window, number),
        ]
        await _take(result.figures, number, turns)


def _queries(side: str, address: Address, tokens: Sequence[bytes], seconds: float) -> _Turn:
    """Each caller has its own share of the instances, so that none waits for another's, and goes round it."""
    request = partial(address.post_sql, json.dumps({"sql": "SELECT 1"}).encode())
    streams = [map(request, itertools.cycle(tokens[number::_CREATORS])) for number in range(_CREATORS)]
    return Key(side, SELECT, _CREATORS), partial(closed_loop, address, streams, partial(check, SELECT), seconds)
