"""What the launcher's tests are made with: a runner that misbehaves on request, the launcher as a process, a client for its socket,
and a wire to the Docker daemon that can be cut."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import docker

from gateway.launcher.specification import LABEL_DEPLOYMENT
from gateway.protocol import MAX_REPLY_BYTES, NO_INSTANCE, NO_REQUEST, NO_TAG, NOBODY, Reply, Request, Status, Verb

REPO = Path(__file__).resolve().parent.parent
IMAGE = f"mayfly-test-runner:{os.getpid()}"  # two runs of the suite at a time do not take each other's away
DOCKER = "/var/run/docker.sock"

RUNNER = r"""
import json, os, sys, time

def read(count):
    data = b""
    while len(data) < count:
        data += os.read(0, count - len(data)) or os._exit(9)
    return data

def reply(value):
    body = json.dumps(value).encode()
    data = len(body).to_bytes(4, "big") + body
    while data:
        data = data[os.write(1, data):]

if sys.argv[1] == "selftest":
    if json.loads(os.environ["MAYFLY_RUNNER"])["min_landlock_abi"] > 50:
        print(json.dumps({"refused": "Landlock ABI"}))
        sys.exit(1)
    print(json.dumps({"test_runner": True}))
    sys.exit(0)
request = json.loads(read(int.from_bytes(read(4), "big")))
match request["do"]:
    case "echo":
        reply(request)
    case "hang":
        while True:
            time.sleep(60)
    case "eat":
        hoard = []
        while True:
            hoard.append(bytearray(b"x" * (1 << 20)))
    case "exit":
        os._exit(request["code"])
    case "abort":
        os.abort()
    case "flood":
        while True:
            os.write(1, b"x" * 65536)
    case "linger":
        reply(request)
        os.close(1)
        while True:
            time.sleep(60)
    case "append_and_hang":
        with open("/data/db.sqlite", "a") as file:
            file.write(request["text"])
        while True:
            time.sleep(60)
    case "append":
        with open("/data/db.sqlite", "a") as file:
            file.write(request["text"])
        with open("/data/db.sqlite") as file:
            reply({"content": file.read()})
    case "who":
        with open("/proc/self/mountinfo") as file:
            mounts = [line.split() for line in file]
        reply({
            "command": sys.argv[1],
            "writable": os.access("/data/db.sqlite", os.W_OK),
            "sealed": os.statvfs("/data").f_flag & 14 == 14,
            "root": next(mount[-1] for mount in mounts if mount[4] == "/"),
            "volumes": [mount[3] for mount in mounts if "instances" in mount[3]],
            "content": sum(os.stat(f"/data/{name}").st_size for name in ("db.sqlite", "db.sqlite-journal")),
        })
    case "large":
        reply({"x": "y" * request["bytes"]})
"""


@contextmanager
def runner_image() -> Iterator[str]:
    """The real image with another program in it."""
    command = ["/usr/bin/python3.13", "-I", "-S", "-B", "/opt/runner.py"]
    files = {
        "runner.py": RUNNER,
        "Dockerfile": f"FROM mayfly-runner:latest\nADD runner.py /opt/\nENTRYPOINT {json.dumps(command)}\n",
    }
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text.encode()), 0o644
            archive.addfile(entry, io.BytesIO(text.encode()))
    subprocess.run(
        ["docker", "build", "-q", "-t", IMAGE, "-"],
        input=context.getvalue(),
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "DOCKER_BUILDKIT": "0"},
    )
    try:
        yield IMAGE
    finally:
        subprocess.run(["docker", "rmi", "-f", IMAGE], check=True, stdout=subprocess.DEVNULL)


def uuid7() -> uuid.UUID:
    bits = int(time.time() * 1000) << 80 | int.from_bytes(os.urandom(10), "big")
    return uuid.UUID(int=bits & ~(0xF << 76 | 0x3 << 62) | 0x7 << 76 | 0x2 << 62)


def frame(**request: Any) -> bytes:
    body = json.dumps(request).encode()
    return struct.pack("!I", len(body)) + body


def unframe(data: bytes) -> Any:
    (length,) = struct.unpack("!I", data[:4])
    assert len(data) == 4 + length
    return json.loads(data[4:])


async def read_all(sock: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while piece := await loop.sock_recv(sock, 1 << 16):
        data += piece
    return data


async def eventually(true: Any, seconds: float = 20.0) -> None:
    """Wait until a fact outside this process holds; `true` is a function that says whether it does."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.02)


def containers_of(deployment: str) -> list[dict[str, Any]]:
    client = docker.APIClient()
    try:
        return client.containers(all=True, filters={"label": f"{LABEL_DEPLOYMENT}={deployment}"})
    finally:
        client.close()


def inspect(container: str) -> dict[str, Any]:
    client = docker.APIClient()
    try:
        return client.inspect_container(container)
    finally:
        client.close()


class Client:
    """Speaks docs/wire.md to a launcher's socket, one waiter per reply."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        self.sock.connect(str(path))
        self._sequences = itertools.count(1)
        self._replies: dict[int, asyncio.Queue[Reply]] = {}
        self._reader = asyncio.create_task(self._read())

    async def close(self) -> None:
        self._reader.cancel()
        with suppress(asyncio.CancelledError):
            await self._reader
        self.sock.close()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while packet := await loop.sock_recv(self.sock, MAX_REPLY_BYTES):
            reply = Reply.unpack(packet)
            self._replies[reply.sequence].put_nowait(reply)

    async def ask(
        self,
        verb: Verb,
        instance: uuid.UUID | None = None,
        *,
        flags: int = 0,
        other: bytes = NOBODY,
        number: int = 0,
        request_id: bytes = NO_REQUEST,
    ) -> Reply:
        request = Request(verb, next(self._sequences), instance or NO_INSTANCE, flags, request_id, other, number)
        replies = self._send(request, [])
        async with asyncio.timeout(60):
            return await replies.get()

    def _send(self, request: Request, descriptors: list[int]) -> asyncio.Queue[Reply]:
        replies = self._replies[request.sequence] = asyncio.Queue()
        socket.send_fds(self.sock, [request.pack()], descriptors)
        return replies

    async def health(self) -> dict[str, Any]:
        return json.loads((await self.ask(Verb.HEALTH)).detail)

    async def create(self) -> uuid.UUID:
        made = await self.ask(Verb.CREATE)
        assert made.status is Status.DONE, made
        return made.instance

    @asynccontextmanager
    async def run(
        self, instance: uuid.UUID, request_id: bytes = NO_REQUEST, *, flags: int = 0, tag: bytes = NO_TAG
    ) -> AsyncIterator[tuple[socket.socket, asyncio.Queue[Reply]]]:
        """Our end of the socket, and the replies as they come."""
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            with theirs:
                request = Request(Verb.RUN, next(self._sequences), instance, flags, request_id, tag)
                replies = self._send(request, [theirs.fileno()])
            async with asyncio.timeout(60):
                yield ours, replies

    async def do(self, instance: uuid.UUID, *, flags: int = 0, tag: bytes = NO_TAG, **request: Any) -> tuple[list[Reply], bytes]:
        """One whole run: the replies up to the last, and what came back."""
        async with self.run(instance, flags=flags, tag=tag) as (ours, replies):
            # The launcher may close without reading a byte, which is for its replies to explain.
            with suppress(ConnectionError):
                await asyncio.get_running_loop().sock_sendall(ours, frame(**request))
            try:
                output = await read_all(ours)
            except ConnectionError:
                output = b""
            seen = [await replies.get()]
            while seen[-1].status is Status.STARTED:
                seen.append(await replies.get())
            return seen, output


class Launcher:
    """`python -m gateway.launcher` on a state folder, with settings named without MAYFLY_."""

    def __init__(self, state: Path, checkout: Path = REPO, **settings: Any) -> None:
        self.state = state
        self.checkout = checkout
        self.socket = state / "run" / "launcher.sock"
        self.log = state / "launcher.log"
        # Warmth is off unless a test is about it: containers are counted here. The runner that misbehaves is no zygote.
        own = {"engine": "docker", "state_dir": state, "image": IMAGE, "min_free_bytes": 0, "nursery": 0, "successors": 0}
        self.environment = {f"MAYFLY_{name.upper()}": str(value) for name, value in {**own, **settings}.items()}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def deployment(self) -> str:
        return (self.state / "launcher" / "deployment-id").read_text()

    def spawn(self) -> subprocess.Popen[bytes]:
        (self.state / "run").mkdir(exist_ok=True)  # mode 755: another user may try to connect
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAYFLY_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "gateway.launcher"],
                cwd=self.checkout,
                env=environment | self.environment,
                stderr=log,
            )
        return self.process

    async def start(self) -> None:
        process = self.spawn()
        await eventually(lambda: process.poll() is not None or self._answers(), 60)
        assert process.poll() is None, self.log.read_text()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
            return True

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return await asyncio.to_thread(self.process.wait, 60)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def descriptors(self) -> int:
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@asynccontextmanager
async def launched(state: Path, checkout: Path = REPO, **settings: Any) -> AsyncIterator[tuple[Launcher, Client]]:
    launcher = Launcher(state, checkout, **settings)
    try:
        await launcher.start()
        client = Client(launcher.socket)
        try:
            yield launcher, client
        finally:
            await client.close()
        assert await launcher.stop() == 0, launcher.log.read_text()
        assert containers_of(launcher.deployment) == []
        assert " exc=" not in launcher.log.read_text()
        assert "ResourceWarning" not in launcher.log.read_text()
    except BaseException:
        if launcher.log.exists():
            print(launcher.log.read_text()[-8000:])
        raise
    finally:
        if launcher.process is not None and launcher.process.poll() is None:
            launcher.kill()
        if (state / "launcher" / "deployment-id").exists():
            for item in containers_of(launcher.deployment):
                subprocess.run(["docker", "rm", "-f", item["Id"]], check=True, stdout=subprocess.DEVNULL)


class Wire:
    """A path to the real Docker daemon that can be cut and mended: the daemon is as good as dead to whoever uses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._server: asyncio.Server | None = None
        self._ends: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    async def mend(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def cut(self) -> None:
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self.path.unlink(missing_ok=True)
        for end in list(self._ends):
            end.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there, back = await asyncio.open_unix_connection(DOCKER)
        self._ends |= {writer, back}
        try:
            await asyncio.gather(self._carry(reader, back), self._carry(there, writer))
        finally:
            for end in (writer, back):
                self._ends.discard(end)
                end.close()
                with suppress(OSError):
                    await end.wait_closed()
            self._tasks.discard(task)

    @staticmethod
    async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        with suppress(OSError, RuntimeError):
            target.write_eof()


@asynccontextmanager
async def wire(folder: Path, *, mended: bool = False) -> AsyncIterator[Wire]:
    line = Wire(folder / "docker.sock")
    try:
        if mended:
            await line.mend()
        yield line
    finally:
        await line.cut()
