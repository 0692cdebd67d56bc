"""A well-behaved client before, in and after a flood: keep-alive, its own instance, a request every few milliseconds."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from .client import Address, Connection
from .deployments import Deployment
from .errors import BenchmarkError
from .figures import latency_summary, percentile, rounded
from .flooding import ADDRESSES
from .load import HUNG_UP, OK
from .plan import Plan
from .workloads import SELECT, check

_PACE_SECONDS = 0.01
_PATIENCE_SECONDS = 60.0
TARGET = 5.0


@dataclass(slots=True)
class Seen:
    """By the well-behaved client. Latencies in seconds, of answers with status 200."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        return {**latency_summary(self.latencies), "statuses": {str(status): count for status, count in self.statuses.items()}}


async def measure(plan: Plan, deployment: Deployment, token: bytes) -> dict[str, Any]:
    address = deployment.address
    await well_behaved(address, token, plan.flood / 10)
    quiet = await well_behaved(address, token, plan.flood / 2)
    before = _memory(deployment)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "infra.benchmark.flooding", str(address.port), str(plan.flood + 2), stdout=asyncio.subprocess.PIPE
    )
    try:
        began = perf_counter()
        await asyncio.sleep(1)  # until the flood is at its height
        flooded = await well_behaved(address, token, plan.flood)
        during = _memory(deployment)
        async with asyncio.timeout(_PATIENCE_SECONDS):
            printed, _ = await process.communicate()
        seconds = perf_counter() - began
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    await asyncio.sleep(plan.flood / 5)
    after = await well_behaved(address, token, plan.flood / 5)
    if not quiet.latencies or not flooded.latencies:
        raise BenchmarkError("the well-behaved client was not served")
    outcomes: dict[str, dict[str, int]] = json.loads(printed)
    connections = sum(sum(counts.values()) for counts in outcomes.values())
    return {
        "p99_ratio": rounded(percentile(sorted(flooded.latencies), 0.99) / percentile(sorted(quiet.latencies), 0.99)),
        "target": TARGET,
        "quiet": quiet.as_json(),
        "flooded": flooded.as_json(),
        "after": after.as_json(),
        "resident_bytes": {"before": before, "during": during, "after": _memory(deployment)},
        "flood": {"addresses": ADDRESSES, "connections_per_second": rounded(connections / seconds), "outcomes": outcomes},
    }


async def well_behaved(address: Address, token: bytes, seconds: float) -> Seen:
    """One request at a time, due at a pace, on a connection that is opened anew only when it is closed."""
    seen = Seen()
    request = address.post_sql(b'{"sql":"SELECT 1"}', token)
    connection = await Connection.open(address)
    began = perf_counter()
    for number in range(int(seconds / _PACE_SECONDS)):
        due = began + number * _PACE_SECONDS
        await asyncio.sleep(max(0.0, due - perf_counter()))
        if perf_counter() > began + seconds:
            break
        try:
            answer = await connection.ask(request)
        except OSError:
            seen.statuses[HUNG_UP] += 1
            connection = await Connection.open(address)
            continue
        seen.statuses[answer.status] += 1
        if answer.status == OK:
            check(SELECT, answer)
            seen.latencies.append(answer.ended - answer.started)
    connection.close()
    return seen


def _memory(deployment: Deployment) -> dict[str, int]:
    """Resident set sizes of the two processes."""
    return {name: _resident(deployment.pid(name)) for name in ("web", "launcher")}


def _resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise BenchmarkError(f"process {pid} is gone")
