"""Every workload at every concurrency on every side, in turns."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from time import perf_counter

from .client import Address
from .figures import LATENCY, RATE, TAIL, Figures, Key, Ratio
from .load import Phase, closed_loop
from .plan import Plan
from .processes import DATASETTE_SELECT
from .sides import BLANK, CEILING, CONTAINER, CORES, DATASETTE, DOCKER, MAYFLY, Neighbours, Sides
from .workloads import SELECT, WORKLOADS, callers, check

_Turn = tuple[Key, Callable[[], Awaitable[Phase]]]


async def measure(plan: Plan, sides: Sides, neighbours: Neighbours) -> Figures:
    figures = Figures()
    began = perf_counter()
    for number in range(plan.rounds):
        for workload, turns in _round(plan, sides, neighbours, number):
            # The first round is always whole; a later one may end early, because ratios are of neighbours in time.
            if number and perf_counter() - began > plan.side_by_side_budget:
                return figures
            # Every other round the order is reversed: who comes first finds another machine than who comes last.
            for key, turn in turns if number % 2 == 0 else reversed(turns):
                figures.add(key, (number, workload), await turn())
    return figures


def ratios(plan: Plan, figures: Figures) -> Iterator[Ratio]:
    for workload, concurrency in itertools.product(WORKLOADS, plan.concurrencies):
        mayfly = Key(MAYFLY, workload, concurrency)
        if concurrency == 1:
            yield from figures.ratio(LATENCY, mayfly, Key(DOCKER, CONTAINER, 1))
            yield from figures.ratio(TAIL, mayfly, Key(DOCKER, CONTAINER, 1))
        else:
            yield from figures.ratio(RATE, mayfly, Key(DOCKER, CONTAINER, CORES))
    for workload, concurrency in itertools.product(WORKLOADS, plan.concurrencies):
        for measure in (LATENCY, RATE):
            yield from figures.ratio(measure, Key(MAYFLY, workload, concurrency), Key(CEILING, workload, concurrency))
    for side, concurrency in itertools.product((MAYFLY, CEILING), plan.concurrencies):
        for measure in (LATENCY, RATE):
            yield from figures.ratio(measure, Key(side, SELECT, concurrency), Key(DATASETTE, SELECT, concurrency))


def _round(plan: Plan, sides: Sides, neighbours: Neighbours, number: int) -> Iterator[tuple[str, list[_Turn]]]:
    """Groups of turns that are compared with each other, and the workload that they are about."""
    floors = {1: 1, plan.concurrencies[1]: CORES}
    for workload, concurrency in itertools.product(WORKLOADS, plan.concurrencies):

        def turn(side: str, address: Address, tokens: list[bytes], seconds: float, about: tuple[str, int]) -> _Turn:
            name, count = about
            right = partial(check, name)
            streams = callers(name, address, tokens[:count], f"{side} {number}")
            return Key(side, name, count), lambda: closed_loop(address, streams, right, seconds)

        about = workload, concurrency
        turns = [
            turn(MAYFLY, sides.mayfly, sides.tokens, plan.window, about),
            turn(CEILING, neighbours.ceiling, neighbours.ceiling_tokens, plan.short_window, about),
        ]
        if parallelism := floors.get(concurrency):
            turns.insert(1, (Key(DOCKER, CONTAINER, parallelism), partial(sides.docker.measure, parallelism, plan.floor_window)))
        if workload == SELECT:
            turns.append(turn(BLANK, neighbours.blank, sides.tokens, plan.short_window / 2, about))
            turns.append((Key(DATASETTE, *about), partial(_datasette, neighbours.datasette, concurrency, plan.short_window)))
        yield workload, turns


async def _datasette(address: Address, concurrency: int, seconds: float) -> Phase:
    return await closed_loop(address, [itertools.repeat(DATASETTE_SELECT)] * concurrency, partial(check, SELECT), seconds)
