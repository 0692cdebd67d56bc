"""Load as agents make it: a few sessions, each with its own database, thinking between requests, starting anew now and then."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from time import perf_counter

from .client import Address, Connection
from .errors import BenchmarkError
from .figures import LATENCY, TAIL, Figures, Key, Ratio
from .load import OK, Phase, all_of
from .plan import Plan
from .sides import CONTAINER, DOCKER, MAYFLY, Sides

AGENTS = 8
FIRST, FOLLOW_UP = "first", "follow-up"

_REQUESTS_PER_SESSION = 5
_FLOOR_SECONDS = 2.0
_PATIENCE_SECONDS = 60.0
_CREATE = "CREATE TABLE note(id INTEGER PRIMARY KEY, body TEXT NOT NULL); INSERT INTO note(body) VALUES ('begun')"
_FOLLOW_UPS = (
    "INSERT INTO note(body) VALUES ('something to remember')",
    "SELECT id, body FROM note ORDER BY id DESC LIMIT 5",
    "UPDATE note SET body = body || '.' WHERE id = 1",
    "SELECT count(*) FROM note",
)


async def measure(plan: Plan, sides: Sides) -> Figures:
    """In segments, each with bare Docker before it."""
    figures = Figures()
    for segment in range(plan.agent_segments):
        floor_seconds = min(_FLOOR_SECONDS, plan.agents)
        figures.add(Key(DOCKER, CONTAINER, 1), segment, await sides.docker.measure(1, floor_seconds))
        phases = {FIRST: Phase(), FOLLOW_UP: Phase()}
        seconds = plan.agents / plan.agent_segments
        began = perf_counter()
        chances = [random.Random(f"agent {segment} {number}") for number in range(AGENTS)]  # noqa: S311 -- to be repeatable
        work = [_agent(sides.mayfly, chance, began + seconds, plan.think, phases) for chance in chances]
        await all_of(work, seconds + _PATIENCE_SECONDS)
        for name, phase in phases.items():
            phase.per_second = sum(phase.statuses.values()) / (perf_counter() - began)
            figures.add(Key(MAYFLY, name, AGENTS), segment, phase)
    return figures


def ratios(figures: Figures) -> Iterator[Ratio]:
    for name in (FIRST, FOLLOW_UP):
        for measured in (LATENCY, TAIL):
            yield from figures.ratio(measured, Key(MAYFLY, name, AGENTS), Key(DOCKER, CONTAINER, 1))


async def _agent(address: Address, chance: random.Random, until: float, think: float, phases: dict[str, Phase]) -> None:
    while True:
        # A new connection for a new session: agents keep one open no longer than they use it.
        connection = await Connection.open(address)
        token = b""
        for _ in range(_REQUESTS_PER_SESSION):
            await asyncio.sleep(chance.expovariate(1 / think))
            if perf_counter() >= until:
                connection.close()
                return
            sql = chance.choice(_FOLLOW_UPS) if token else _CREATE
            answer = await connection.ask(address.post_sql(json.dumps({"sql": sql}).encode(), token))
            phase = phases[FOLLOW_UP if token else FIRST]
            phase.statuses[answer.status] += 1
            if answer.status == OK:
                phase.latencies.append(answer.ended - answer.started)
            elif answer.status < 500:
                raise BenchmarkError(f"{sql!r} answered {answer.status} {answer.body[:300]!r}")
            token = token or answer.token
        connection.close()
