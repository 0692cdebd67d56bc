"""The deployment that is measured, and others beside it: brought up by infra/up as an operator would, taken down by infra/bench."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.settings import Settings

from .client import Address
from .errors import BenchmarkError

_UP = Path(__file__).resolve().parents[1] / "up"
_START_SECONDS = 120.0
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Deployment:
    address: Address
    state: Path

    @property
    def label(self) -> str:
        """What its containers carry."""
        return (self.state / "launcher" / "deployment-id").read_text().strip()

    @property
    def instances(self) -> Path:
        return self.state / "instances"

    def pid(self, name: str) -> int:
        """Of `web` or `launcher`."""
        return int((self.state / "operator" / f"{name}.pid").read_text().split()[0])


def measured(settings: Settings) -> Deployment:
    host, _, port = settings.listen.rpartition(":")
    return Deployment(Address(host, int(port)), settings.state_dir)


async def bring_up(settings: Settings, name: str, more: Mapping[str, str]) -> Deployment:
    """One more: settings of the measured one, but for `more`, where an empty value stands for the default.

    Its state lies beside the measured one's, where infra/bench finds and removes it however the run ends.
    """
    state = settings.state_dir.parent / name
    address = free_address()
    own = {"MAYFLY_STATE_DIR": str(state), "MAYFLY_LISTEN": f"{address.host}:{address.port}", "MAYFLY_METRICS_LISTEN": ""}
    environment = {key: value for key, value in {**os.environ, **own, **more}.items() if value or key not in more}
    process = await asyncio.create_subprocess_exec(_UP, "-d", env=environment, stdin=asyncio.subprocess.DEVNULL)
    finished = asyncio.create_task(process.wait())
    try:
        async with asyncio.timeout(_START_SECONDS):
            code = await asyncio.shield(finished)
    except TimeoutError:
        process.terminate()
        raise BenchmarkError(f"the deployment {name!r} did not come up within {_START_SECONDS:.0f} s") from None
    except asyncio.CancelledError:
        # Half a deployment is harder to take down than a whole one.
        await asyncio.wait([finished], timeout=_START_SECONDS)
        raise
    if code != 0:
        raise BenchmarkError(f"the deployment {name!r} did not come up")
    return Deployment(address, state)


def free_address() -> Address:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return Address(_LOOPBACK, probe.getsockname()[1])
