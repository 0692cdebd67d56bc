"""The sides that are processes of ours: started, waited for, stopped."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from .client import Address, Connection
from .deployments import free_address
from .errors import BenchmarkError

_START_SECONDS = 60.0
_START_ATTEMPTS = 600
_STOP_SECONDS = 10.0
_LOOPBACK = "127.0.0.1"

DATASETTE_SELECT = b"GET /_memory.json?sql=select+1&_shape=arrays HTTP/1.1\r\nHost: bench\r\n\r\n"


@asynccontextmanager
async def blank() -> AsyncIterator[Address]:
    async with _announcing("infra.benchmark.blank", {}) as address:
        yield address


@asynccontextmanager
async def ceiling(state: Path) -> AsyncIterator[Address]:
    async with _announcing("infra.benchmark.ceiling", {"MAYFLY_STATE_DIR": str(state)}) as address:
        yield address


@asynccontextmanager
async def datasette() -> AsyncIterator[Address]:
    address = free_address()
    command = ["-m", "datasette", "serve", "--memory", "--host", address.host, "--port", str(address.port)]
    async with _process(command, {}, asyncio.subprocess.DEVNULL):
        for _ in range(_START_ATTEMPTS):
            if await _answers(address):
                break
            await asyncio.sleep(_START_SECONDS / _START_ATTEMPTS)
        else:
            raise BenchmarkError("Datasette did not start")
        yield address


@asynccontextmanager
async def _announcing(module: str, more: Mapping[str, str]) -> AsyncIterator[Address]:
    """A server that prints its port."""
    async with _process(["-m", module], more, asyncio.subprocess.PIPE) as process:
        if process.stdout is None:
            raise BenchmarkError(f"{module} has no output")
        async with asyncio.timeout(_START_SECONDS):
            line = await process.stdout.readline()
        if not line.strip().isdigit():
            raise BenchmarkError(f"{module} did not start")
        yield Address(_LOOPBACK, int(line))


@asynccontextmanager
async def _process(arguments: list[str], more: Mapping[str, str], stdout: int) -> AsyncIterator[asyncio.subprocess.Process]:
    quiet = asyncio.subprocess.DEVNULL if stdout == asyncio.subprocess.DEVNULL else None
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env={**os.environ, **more}, stdin=asyncio.subprocess.DEVNULL, stdout=stdout, stderr=quiet
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _STOP_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _answers(address: Address) -> bool:
    try:
        connection = await Connection.open(address)
    except OSError:
        return False
    connection.close()
    return True
