"""Docker's Engine API: docker-py's blocking client behind a bounded pool of threads, its errors sorted into the launcher's tree.

One thread for all calls would put every container start (70 ms) in a queue; a thread per call has no bound. A dead daemon costs
nothing here: connecting to its socket fails at once. One that hangs holds its threads no longer than the time-out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import docker
import docker.errors
import urllib3.exceptions

from ...settings import Settings
from ..errors import ContainerRefusedError, EngineDownError, EngineError, ImageMissingError, RefusedError
from ..specification import LABEL_DEPLOYMENT
from . import EngineFacts
from .transport import SCHEME, OnePoolAdapter

log = logging.getLogger(__name__)

Result = TypeVar("Result")
_ANY_VERSION = "1.24"  # to ask for the version; the question itself names none
_REMOVAL_PATIENCE_SECONDS = 10.0
_NEVER_CONNECTED = (ConnectionRefusedError, FileNotFoundError, PermissionError)


class Daemon:
    """`call` runs a function of docker-py's low-level client; whatever it raises comes out as an EngineError."""

    def __init__(self, url: str, *, threads: int, timeout_seconds: float) -> None:
        self._url = url
        self._connections = threads
        self._timeout_seconds: Any = timeout_seconds  # docker-py's stubs say int; requests takes a float
        self._threads = ThreadPoolExecutor(threads, "docker")
        self._client: docker.APIClient | None = None
        self._lock = threading.Lock()

    async def call(self, work: Callable[[docker.APIClient], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._blocking, work)

    async def reconnect(self) -> None:
        """Forget the connection and the API version agreed on: the daemon may be another one since."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._disconnect)

    async def survey(self, settings: Settings) -> tuple[EngineFacts, frozenset[str]]:
        """Connect anew; what is there, and the names of the security modules that the daemon applies.

        Raises EngineDownError, ImageMissingError, or RefusedError if the daemon has no seccomp or not the runtime.
        """
        await self.reconnect()
        runtime = settings.docker_runtime
        info: dict[str, Any] = await self.call(docker.APIClient.info)
        image = await self.call(partial(image_id, image=settings.image))
        security = frozenset(option.split(",")[0].removeprefix("name=") for option in info.get("SecurityOptions") or [])
        if "seccomp" not in security:
            raise RefusedError("the Docker daemon does not apply seccomp profiles")
        if runtime and runtime not in info.get("Runtimes", {}):
            raise RefusedError(f"the Docker daemon has no runtime {runtime!r}")
        return EngineFacts(str(info["ServerVersion"]), runtime or str(info["DefaultRuntime"]), image), security

    async def destroy(self, container: str) -> None:
        """Kill and remove it; on return it is gone. Raises EngineDownError when that cannot be seen in time."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + _REMOVAL_PATIENCE_SECONDS
        while not await self.call(partial(remove, container=container)):
            if loop.time() > give_up_at:
                raise EngineDownError(f"the removal of {container[:12]} is under way and does not end")
            await asyncio.sleep(0.05)

    async def sweep(self, deployment: str, label: str, owns: Callable[[str], bool]) -> int:
        """Destroy the deployment's containers but those whose `label` is owned. Returns how many there were.

        It is asked after the list was made: what began since is not in the list, what had begun before is owned.
        """
        found = await self.call(partial(labelled, labels={LABEL_DEPLOYMENT: deployment}))
        orphans = [item["Id"] for item in found if not owns(item["Labels"].get(label, ""))]
        for container in orphans:
            await self.destroy(container)
            log.info("orphan removed container=%s", container[:12])
        return len(orphans)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._disconnect()

    def _blocking(self, work: Callable[[docker.APIClient], Result]) -> Result:
        try:
            return work(self._connected())
        except Exception as error:
            raise _sorted(error) from error

    def _connected(self) -> docker.APIClient:
        with self._lock:
            if self._client is None:
                first = self._make(_ANY_VERSION)
                try:
                    agreed = str(first.version(api_version=False)["ApiVersion"])
                finally:
                    first.close()
                self._client = self._make(agreed)
            return self._client

    def _make(self, version: str) -> docker.APIClient:
        client = docker.APIClient(self._url, version=version, timeout=self._timeout_seconds)
        if self._url.startswith("unix://"):
            path = self._url.removeprefix("unix://")
            client.mount(SCHEME, OnePoolAdapter(path, timeout_seconds=self._timeout_seconds, connections=self._connections))
        return client

    def _disconnect(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()


def _sorted(error: Exception) -> EngineError:
    causes = list(_causes(error))
    if isinstance(error, docker.errors.ImageNotFound):
        return ImageMissingError(str(error.explanation))
    if isinstance(error, docker.errors.APIError):  # before OSError, of which it is one by way of requests
        words = str(error.explanation or error)
        # So Docker passes on what gRPC says of a containerd that is on its way out or up: with the name of the status at the end.
        return EngineDownError(words) if words.endswith(": unavailable") else ContainerRefusedError(words)
    if any(isinstance(cause, OSError | urllib3.exceptions.HTTPError) for cause in causes):
        return EngineDownError(str(error), nothing_sent=any(isinstance(cause, _NEVER_CONNECTED) for cause in causes))
    return ContainerRefusedError(f"{type(error).__name__}: {error}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from; urllib3 keeps some of it in its arguments alone."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        cause = pending.pop()
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        pending += [cause.__cause__, cause.__context__, *(item for item in cause.args if isinstance(item, BaseException))]


def create(client: docker.APIClient, body: dict[str, Any]) -> tuple[str, list[str]]:
    """The container's id and the daemon's warnings."""
    untyped: Any = client
    answer = untyped.create_container_from_config(body)
    return str(answer["Id"]), [str(warning) for warning in answer.get("Warnings") or []]


def image_id(client: docker.APIClient, image: str) -> str:
    untyped: Any = client
    return str(untyped.inspect_image(image)["Id"])


def attach(client: docker.APIClient, container: str) -> socket.socket:
    """A non-blocking socket to the container's stdin and stdout. Before the start, so that nothing of the output is missed."""
    stream: Any = client.attach_socket(container, params={"stdin": 1, "stdout": 1, "stream": 1})
    try:
        # docker-py ties the socket to the response that it was hijacked from; with a copy both can be closed here and now.
        copy = socket.socket(fileno=os.dup(stream.fileno()))
    finally:
        stream._response.close()
        stream.close()
    copy.setblocking(False)
    return copy


def wait(client: docker.APIClient, container: str, seconds: float) -> int | None:
    """The exit code, or None if the container still runs after so long."""
    untyped: Any = client  # its stubs want whole seconds
    try:
        return int(untyped.wait(container, timeout=seconds)["StatusCode"])
    except OSError as error:
        # requests calls a time-out in the middle of an answer a ConnectionError.
        if any(isinstance(cause, TimeoutError | urllib3.exceptions.ReadTimeoutError) for cause in _causes(error)):
            return None
        raise


def killed_for_memory(client: docker.APIClient, container: str) -> bool:
    return bool(client.inspect_container(container)["State"]["OOMKilled"])


def runtime(client: docker.APIClient, container: str) -> str:
    return str(client.inspect_container(container)["HostConfig"].get("Runtime"))


def remove(client: docker.APIClient, container: str) -> bool:
    """Kill and remove; true when the container is gone, false while another removal of it is under way."""
    try:
        client.remove_container(container, force=True, v=True)
    except docker.errors.NotFound:
        return True
    except docker.errors.APIError as error:
        if error.status_code == 409:
            return False
        raise
    return True


def labelled(client: docker.APIClient, labels: dict[str, str]) -> list[dict[str, Any]]:
    """Containers, running or not, that carry all the labels: `Id` and `Labels` of each."""
    wanted = [f"{name}={value}" for name, value in labels.items()]
    found: list[dict[str, Any]] = client.containers(all=True, filters={"label": wanted})
    return found
