"""Three times the load that can be served, from callers who wait for nobody; then, how soon all is well again."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from .client import Address, Connection
from .figures import RATE, Figures, Key, Ratio, latency_summary, rounded
from .load import OK, Arrival, Offered, Phase, closed_loop, open_loop
from .plan import Plan
from .sides import CONTAINER, CORES, DOCKER, MAYFLY, Sides
from .workloads import SELECT, callers, check

OVERLOAD = 3.0
SERVED, CAPACITY = "served under overload", "capacity"
UNAVAILABLE = 503

_MOMENT = "the only one"
_MEASURE_SECONDS = 2.0
_PROBE_PAUSE_SECONDS = 0.05
_PAST_FULL = 1.3
_RECOVERED = 2.0  # times the unloaded median


@dataclass(frozen=True, slots=True)
class Result:
    figures: Figures
    offered: Offered
    offered_per_second: float
    unloaded_seconds: float
    recovery_seconds: float | None

    @property
    def served(self) -> list[Arrival]:
        return [arrival for arrival in self.offered.arrivals if arrival.status == OK]

    def latencies(self, status: int) -> list[float]:
        return [arrival.ended - arrival.due for arrival in self.offered.arrivals if arrival.status == status]

    def as_json(self) -> dict[str, Any]:
        statuses = Counter(arrival.status for arrival in self.offered.arrivals)
        codes = Counter(_code(arrival) for arrival in self.offered.arrivals if arrival.status != OK)
        return {
            "figures": self.figures.as_json(),
            "offered_per_second": rounded(self.offered_per_second),
            "seconds": rounded(self.offered.ended - self.offered.began),
            "requests": len(self.offered.arrivals),
            "withheld": self.offered.withheld,
            "statuses": {str(status): count for status, count in sorted(statuses.items())},
            "error_codes": dict(sorted(codes.items())),
            "latency_200": latency_summary(self.latencies(OK)),
            "latency_503": latency_summary(self.latencies(UNAVAILABLE)),
            "unloaded_p50_ms": rounded(1000 * self.unloaded_seconds),
            "recovery_seconds": None if self.recovery_seconds is None else rounded(self.recovery_seconds),
        }

    def ratios(self, concurrency: int) -> Iterator[Ratio]:
        served = Key(MAYFLY, SERVED, 0)
        yield from self.figures.ratio(RATE, served, Key(DOCKER, CONTAINER, CORES))
        yield from self.figures.ratio(RATE, served, Key(MAYFLY, CAPACITY, concurrency))


def enough(slots: int, available: int) -> int:
    """Callers that keep every slot busy."""
    return min(max(8, 2 * slots), available - 1)


async def measure(plan: Plan, sides: Sides, slots: int, queue_length: int) -> Result:
    figures = Figures()
    seconds = min(_MEASURE_SECONDS, plan.saturation)
    *tokens, probe_token = sides.tokens
    right = partial(check, SELECT)
    concurrency = enough(slots, len(sides.tokens))
    figures.add(Key(DOCKER, CONTAINER, CORES), _MOMENT, await sides.docker.measure(CORES, seconds))
    unloaded = await closed_loop(sides.mayfly, callers(SELECT, sides.mayfly, [probe_token], "unloaded"), right, seconds)
    figures.add(Key(MAYFLY, SELECT, 1), _MOMENT, unloaded)
    capacity = await closed_loop(sides.mayfly, callers(SELECT, sides.mayfly, tokens[:concurrency], "capacity"), right, seconds)
    figures.add(Key(MAYFLY, CAPACITY, concurrency), _MOMENT, capacity)
    unloaded_seconds = latency_summary(unloaded.latencies)["p50_ms"] / 1000

    everyone = callers(SELECT, sides.mayfly, tokens, "overload")
    orders = (next(caller) for caller in itertools.cycle(everyone))
    over = asyncio.Event()
    chance = random.Random("overload")  # noqa: S311 -- to be repeatable
    rate = OVERLOAD * capacity.per_second
    fills_after = queue_length / (rate - capacity.per_second)
    lasts = min(max(plan.saturation, _PAST_FULL * fills_after), plan.saturation_limit)
    recovery = asyncio.create_task(_recovery(over, sides.mayfly, probe_token, _RECOVERED * unloaded_seconds, plan.recovery))
    try:
        offered = await open_loop(sides.mayfly, orders, rate, lasts, chance, over.set)
        recovery_seconds = await recovery
    finally:
        recovery.cancel()
    served = Phase(statuses=Counter(arrival.status for arrival in offered.arrivals))
    served.latencies = [arrival.ended - arrival.due for arrival in offered.arrivals if arrival.status == OK]
    in_time = sum(arrival.status == OK and arrival.ended <= offered.ended for arrival in offered.arrivals)
    served.per_second = in_time / (offered.ended - offered.began)
    figures.add(Key(MAYFLY, SERVED, 0), _MOMENT, served)
    return Result(figures, offered, rate, unloaded_seconds, recovery_seconds)


async def _recovery(over: asyncio.Event, address: Address, token: bytes, good_seconds: float, patience: float) -> float | None:
    """Seconds from the end of the load until a request is answered as fast as on an idle service; None if that was not seen."""
    await over.wait()
    began = perf_counter()
    (orders,) = callers(SELECT, address, [token], "probe")
    while perf_counter() - began < patience:
        try:
            connection = await Connection.open(address)
            async with asyncio.timeout(patience):
                answer = await connection.ask(next(orders))
        except (OSError, TimeoutError):
            await asyncio.sleep(_PROBE_PAUSE_SECONDS)
            continue
        connection.close()
        if answer.status == OK and answer.ended - answer.started <= good_seconds:
            return answer.ended - began
        await asyncio.sleep(_PROBE_PAUSE_SECONDS)
    return None


def _code(arrival: Arrival) -> str:
    try:
        return str(json.loads(arrival.body)["code"])
    except (ValueError, KeyError, TypeError):
        return f"status {arrival.status}"
