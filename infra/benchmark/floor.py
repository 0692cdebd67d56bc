"""The floor: a container by the bare Engine API, of the launcher's image and specification, whose command does nothing."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp

from gateway.launcher.specification import LABEL_DEPLOYMENT, container_specification
from gateway.settings import Settings

from .errors import BenchmarkError
from .load import OK, Phase, Window, all_of

_CALL_SECONDS = 60.0
_PATIENCE_SECONDS = 60.0
_PROFILE = Path(__file__).resolve().parents[1] / "seccomp.json"


@dataclass(frozen=True, slots=True)
class Docker:
    http: aiohttp.ClientSession
    body: dict[str, Any]
    deployment: str

    async def measure(self, parallelism: int, seconds: float) -> Phase:
        """Containers that each begin when the one before is gone, so many lines of them side by side."""
        window = Window(parallelism, seconds)

        async def line() -> None:
            await self._container()
            window.warmed_up()
            while window.is_open():
                started = perf_counter()
                await self._container()
                window.record(started, perf_counter(), OK)

        await all_of([line() for _ in range(parallelism)], seconds + _PATIENCE_SECONDS)
        return window.phase()

    async def facts(self) -> dict[str, Any]:
        version, info = await self._call("GET", "/version"), await self._call("GET", "/info")
        return {
            "version": version["Version"],
            "runtime": info["DefaultRuntime"],
            "storage": info["Driver"],
            "cgroup": f"{info.get('CgroupDriver')} {info.get('CgroupVersion', '1')}",
        }

    async def _container(self) -> None:
        container = (await self._call("POST", "/containers/create", json=self.body))["Id"]
        await self._call("POST", f"/containers/{container}/start")
        code = (await self._call("POST", f"/containers/{container}/wait"))["StatusCode"]
        await self._call("DELETE", f"/containers/{container}")
        if code != 0:
            raise BenchmarkError(f"the floor's container ended with {code}")

    async def _call(self, method: str, path: str, **more: Any) -> Any:
        async with self.http.request(method, f"http://docker{path}", **more) as answer:
            if answer.status >= 300:
                raise BenchmarkError(f"Docker: {method} {path}: {answer.status} {(await answer.text())[:300]}")
            return await answer.json() if answer.content_type == "application/json" else None

    async def pids(self, deployment: str) -> dict[str, int]:
        """The first process of every running container of a deployment, by the container's id."""
        found: dict[str, int] = {}
        for item in await self._containers(deployment):
            async with self.http.get(f"http://docker/containers/{item['Id']}/json") as answer:
                if answer.status == 200 and (pid := (await answer.json())["State"]["Pid"]):
                    found[item["Id"]] = pid
        return found

    async def remove_leftovers(self) -> None:
        for item in await self._containers(self.deployment, all="1"):
            await self._call("DELETE", f"/containers/{item['Id']}", params={"force": "1"})

    async def _containers(self, deployment: str, **more: str) -> Any:
        label = f'{{"label":["{LABEL_DEPLOYMENT}={deployment}"]}}'
        return await self._call("GET", "/containers/json", params={"filters": label, **more})


@asynccontextmanager
async def docker(settings: Settings, volume: Path) -> AsyncIterator[Docker]:
    """`volume` is an empty folder on the same mount as the instances; it is made here."""
    if not settings.docker_socket.startswith("unix://"):
        raise BenchmarkError(f"the floor needs Docker's unix socket, not {settings.docker_socket}")
    os.makedirs(volume, exist_ok=True)
    connector = aiohttp.UnixConnector(settings.docker_socket.removeprefix("unix://"))
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=_CALL_SECONDS)) as http:
        deployment = f"bench-{uuid.uuid4()}"
        body = container_specification(settings, uuid.uuid4(), volume, deployment, _PROFILE.read_text())
        docker = Docker(http, body, deployment)
        image = await docker._call("GET", f"/images/{settings.image}/json")
        # The cheapest program in the image: the interpreter prints its version and ends before it is initialised.
        body["Entrypoint"], body["Cmd"] = [image["Config"]["Entrypoint"][0]], ["--version"]
        try:
            yield docker
        finally:
            await docker.remove_leftovers()
