"""Everything that is measured, up and ready."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from gateway.settings import Settings

from . import deployments, floor, processes, workloads
from .client import Address

MAYFLY, DOCKER, CEILING, DATASETTE, BLANK = "mayfly", "docker", "ceiling", "datasette", "blank"
CONTAINER = "container"
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Sides:
    mayfly: Address
    tokens: list[bytes]
    """Of prepared instances."""
    docker: floor.Docker


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What only the side-by-side comparison needs."""

    ceiling: Address
    ceiling_tokens: list[bytes]
    datasette: Address
    blank: Address


@asynccontextmanager
async def sides(settings: Settings, instances: int, rows: int) -> AsyncIterator[Sides]:
    mayfly = deployments.measured(settings).address
    async with floor.docker(settings, settings.state_dir / "bench" / "floor") as docker:
        yield Sides(mayfly, await workloads.prepare(mayfly, instances, rows), docker)


@asynccontextmanager
async def neighbours(settings: Settings, instances: int) -> AsyncIterator[Neighbours]:
    async with AsyncExitStack() as stack:
        ceiling = await stack.enter_async_context(processes.ceiling(settings.state_dir / "bench" / "ceiling"))
        datasette = await stack.enter_async_context(processes.datasette())
        blank = await stack.enter_async_context(processes.blank())
        yield Neighbours(ceiling, await workloads.prepare(ceiling, instances), datasette, blank)
