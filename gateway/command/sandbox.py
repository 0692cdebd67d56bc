"""One container, from nothing to gone, and a stream to its stdin and from its stdout."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from ..launcher.engines import daemon
from ..launcher.engines.completion import to_the_end
from ..launcher.engines.relay import Demultiplexer, GarbledStreamError
from ..launcher.errors import EngineError, ImageMissingError, LauncherError
from ..settings import Settings
from .errors import SandboxError

_CHUNK_BYTES = 64 << 10


class Sandbox:
    """What a running container is to us: bytes to it, and bytes of its stdout. Nothing of them is looked at."""

    def __init__(self, stream: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._demultiplexer = Demultiplexer()
        self._received = bytearray()

    async def send(self, data: bytes) -> None:
        """All of it, or as much as the container took before it ended: what counts is what it says."""
        try:
            await self._loop.sock_sendall(self._stream, data)
        except ConnectionError:
            return

    async def receive(self, size: int) -> bytes:
        """The next `size` bytes of the output, fewer where it ends before. Raises SandboxError."""
        while len(self._received) < size and (data := await self._next()):
            try:
                for piece in self._demultiplexer.feed(data):
                    self._received += piece
            except GarbledStreamError as error:
                raise SandboxError("the container's output is not in Docker's form") from error
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    async def _next(self) -> bytes:
        try:
            return await self._loop.sock_recv(self._stream, _CHUNK_BYTES)
        except ConnectionError:
            return b""


@asynccontextmanager
async def sandbox(settings: Settings, specification: dict[str, Any]) -> AsyncIterator[Sandbox]:
    """A container that runs; whatever happens it is gone afterwards. Raises SandboxError."""
    docker = daemon.Daemon(settings.docker_socket, threads=2, timeout_seconds=settings.start_timeout_seconds)
    try:
        await docker.survey(settings)
        # Not to be cut off in the middle: a container whose name is never learnt could not be removed.
        made = asyncio.create_task(docker.call(partial(daemon.create, body=specification)))
        try:
            container, warnings = await asyncio.shield(made)
            if warnings:
                raise SandboxError(f"Docker would leave something out: {'; '.join(warnings)}")
            with await docker.call(partial(daemon.attach, container=container)) as stream:
                await docker.call(lambda client: client.start(container))
                yield Sandbox(stream)
        finally:
            await to_the_end(_destroy(docker, made))
    except ImageMissingError as error:
        raise SandboxError(f"there is no image {settings.image}; ./infra/image makes it") from error
    except EngineError as error:
        raise SandboxError(f"Docker: {error}") from error
    except LauncherError as error:
        raise SandboxError(str(error)) from error
    finally:
        docker.close()


async def _destroy(docker: daemon.Daemon, made: asyncio.Task[tuple[str, list[str]]]) -> None:
    try:
        container, _ = await made
    except EngineError:
        return
    await docker.destroy(container)
