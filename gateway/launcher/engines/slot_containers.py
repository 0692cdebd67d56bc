"""The containers that zygotes live in, by Docker's Engine API. Their sockets and what passes over them are `slots`'s."""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from pathlib import Path

from ...settings import Settings
from ..errors import ContainerRefusedError, RefusedError
from ..specification import LABEL_DEPLOYMENT, LABEL_SLOT, slot_specification
from . import EngineFacts, daemon
from .starts import cores

_WAIT_SECONDS = 1.0


class SlotContainers:
    """A slot's name finds its container, whatever went wrong when it was made."""

    def __init__(self, settings: Settings, deployment: str, seccomp_profile: str) -> None:
        self._settings = settings
        self._deployment = deployment
        self._seccomp_profile = seccomp_profile
        self._apparmor = False
        # Each slot is started or removed, not both; sweep and survey come on top.
        self._daemon = daemon.Daemon(
            settings.docker_socket, threads=settings.slots + cores() + 4, timeout_seconds=settings.start_timeout_seconds
        )

    async def survey(self) -> EngineFacts:
        """As Daemon's."""
        facts, security = await self._daemon.survey(self._settings)
        self._apparmor = "apparmor" in security
        return facts

    async def ping(self) -> None:
        """Raises EngineDownError unless the daemon answers."""
        await self._daemon.call(lambda client: client.ping())

    async def start(self, slot: str, socket: Path) -> str:
        """The container's id. On an exception there may be one: `remove` it."""
        body = slot_specification(self._settings, slot, socket, self._deployment, self._seccomp_profile, apparmor=self._apparmor)
        container, warnings = await self._daemon.call(partial(daemon.create, body=body))
        if warnings:
            raise ContainerRefusedError(f"Docker would leave something out: {'; '.join(warnings)}")
        if wanted := self._settings.docker_runtime:
            runtime = await self._daemon.call(partial(daemon.runtime, container=container))
            if runtime != wanted:
                raise RefusedError(f"Docker would run it by {runtime!r} instead of {wanted!r}")
        await self._daemon.call(lambda client: client.start(container))
        return container

    async def exit_code(self, container: str) -> int:
        """Once it has ended."""
        code = None
        while code is None:  # not in one call: it would hold a thread for as long as the container lives
            code = await self._daemon.call(partial(daemon.wait, container=container, seconds=_WAIT_SECONDS))
        return code

    async def remove(self, slot: str) -> None:
        """On return no container of this slot is left. Raises EngineError."""
        labels = {LABEL_DEPLOYMENT: self._deployment, LABEL_SLOT: slot}
        for item in await self._daemon.call(partial(daemon.labelled, labels=labels)):
            await self._daemon.destroy(item["Id"])

    async def sweep(self, owned: Set[str]) -> int:
        """Remove every container of the deployment but those of the `owned` slots; how many there were."""
        return await self._daemon.sweep(self._deployment, LABEL_SLOT, owned.__contains__)

    def close(self) -> None:
        self._daemon.close()
