"""What was measured on: without it the absolute figures mean nothing."""

from __future__ import annotations

import os
import platform
import sqlite3
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import apsw

from gateway.settings import Settings

from .client import Connection
from .sides import CORES, Sides

_HEALTHZ = b"GET /healthz HTTP/1.1\r\nHost: bench\r\n\r\n"


async def describe(settings: Settings, sides: Sides) -> dict[str, Any]:
    connection = await Connection.open(sides.mayfly)
    health = (await connection.ask(_HEALTHZ)).json()
    version_asked = sides.mayfly.post_sql(b'{"sql":"SELECT sqlite_version()"}', sides.tokens[0])
    runner_sqlite = (await connection.ask(version_asked)).json()["rows"][0][0]
    connection.close()
    return {
        "cpu": _cpu_model(),
        "cores": CORES,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "file_system": _file_system(settings.state_dir),
        "docker": await sides.docker.facts(),
        "python": platform.python_version(),
        "sqlite": {"mayfly": runner_sqlite, "ceiling": apsw.sqlite_lib_version(), "datasette": sqlite3.sqlite_version},
        "packages": {name: version(name) for name in ("mayfly", "aiohttp", "uvloop", "apsw", "datasette")},
        "load_average": os.getloadavg()[0],
        "healthz": health,
    }


def settings_in_effect(settings: Settings) -> dict[str, Any]:
    """By their names without MAYFLY_."""
    values = {item.name: getattr(settings, item.name) for item in fields(settings)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def _file_system(path: Path) -> str:
    best = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mounted_on, kind, *_ = line.split()
        if path.is_relative_to(mounted_on) and len(mounted_on) >= len(best[0]):
            best = mounted_on, kind
    return best[1]
