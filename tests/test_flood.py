"""A flood from thousands of addresses for a moment, on the real process: who is served, in how much memory, on how many sockets."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from infra.benchmark.flooding import CREATE, FORGED, GARBAGE

from .test_web_process import REPO, Web, web

CONNECTIONS = 512
FLOOD_SECONDS = "2"
# Each connection holds its parser and a task; a leak of each one that ever came would be many times this.
MAX_GROWTH_BYTES = 64 << 20


def resident_bytes(running: Web) -> int:
    pages = Path(f"/proc/{running.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def open_files(running: Web) -> int:
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


async def test_a_well_behaved_caller_is_served_in_a_flood_and_memory_and_connections_stay_bounded(tmp_path):
    settings = {"MAYFLY_CONNECTIONS": str(CONNECTIONS), "MAYFLY_RATE_REQUESTS_PER_MINUTE": "0"}
    async with web(tmp_path, **settings) as running:
        made = await running.sql()
        token = made.headers["X-Walkin-Session"]
        assert (await running.sql(token)).status == 200
        files, memory = open_files(running), resident_bytes(running)
        flood = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "infra.benchmark.flooding",
            str(running.port),
            FLOOD_SECONDS,
            cwd=REPO,
            stdout=asyncio.subprocess.PIPE,
        )
        printed = asyncio.ensure_future(flood.communicate())
        statuses, most_files = set(), 0
        while not printed.done():
            statuses.add((await running.sql(token)).status)
            most_files = max(most_files, open_files(running))
        outcomes = json.loads((await printed)[0])
        assert statuses == {200}
        assert most_files <= files + CONNECTIONS + 64
        assert resident_bytes(running) - memory < MAX_GROWTH_BYTES
        assert outcomes[FORGED].get("404", 0) > 0
        assert outcomes[GARBAGE].get("400", 0) > 0
        assert not {"500"} & (outcomes[FORGED].keys() | outcomes[CREATE].keys() | outcomes[GARBAGE].keys())
