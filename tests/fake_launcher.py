"""A small launcher for tests of the web process alone: a real SEQPACKET peer that speaks docs/wire.md.

It starts no container. It plays the runner itself on the socket it was handed, from a script each test can replace, and it
remembers every verb and every request frame. Below it are the helpers by which the tests start the web process on a real port
and assert the one error envelope.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import re
import select
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from gateway.protocol import (
    BULK,
    KEEP,
    NO_TAG,
    QUIET,
    READ_ONLY,
    REQUEST_BYTES,
    SALVAGE,
    Reply,
    Request,
    Status,
    Verb,
    Verdict,
)
from gateway.settings import Settings
from gateway.uuid7 import uuid7
from gateway.web import errors
from gateway.web.app import build_app
from gateway.web.appkeys import TOKENS
from gateway.web.channel import Channel, Streams
from gateway.web.server import Server

GOLDEN = Path(__file__).parent / "golden"
EVERY_TEST_SECONDS = 20.0


def frame(payload: bytes | dict[str, Any]) -> bytes:
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return struct.pack("!I", len(raw)) + raw


def ok(columns: list[str] | None = None, rows: list[list[Any]] | None = None, affected: int = 0, truncated: bool = False) -> bytes:
    return frame(
        {"v": 1, "verdict": "ok", "columns": columns, "rows": rows or [], "rows_affected": affected, "truncated": truncated}
    )


def verdict(name: str, **keys: Any) -> bytes:
    """A reply of one frame."""
    return frame({"v": 1, "verdict": name, **keys})


def file_reply(content: bytes, **head: Any) -> bytes:
    """The reply to `export`; `head` says what is not true of the content."""
    told = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), **head}
    return verdict("file", **told) + content


def rows_reply(columns: list[str] | None, *frames: list[list[Any]], affected: int = 0, **end: Any) -> bytes:
    """The reply to `rows`; `end` says what is not so in its last frame."""
    told = {"rows": sum(map(len, frames)), "rows_affected": affected, "stopped": None, "message": None, **end}
    return verdict("rows", columns=columns) + b"".join(frame(json.dumps(rows).encode()) for rows in frames) + frame(told)


def report(kind: str = "verify", **keys: Any) -> dict[str, Any]:
    """A report of a healthy file, but for what `keys` says."""
    healthy = {"kind": kind, "ok": True, "size": 4096, "sha256": "0" * 64, "page_size": 4096, "pages": 1}
    return {
        **healthy,
        **{"findings": [], "more_findings": False, "tables": [], "unassigned": 0, "objects_lost": []},
        **keys,
    }


FINDING = {"code": "page", "page": 2, "object": "t", "message": "a cell beyond the page"}


async def exchange(ours: socket.socket, sent: bytes, cap: int) -> bytes | None:
    """What the web process hears on its end of a pair, which the caller closes; raises what is wrong with it."""
    ours.setblocking(False)
    heard, streams = asyncio.Event(), Streams()
    try:
        channel = Channel(streams, ours, sent, cap, heard.set)
        await asyncio.wait_for(heard.wait(), EVERY_TEST_SECONDS)
    finally:
        streams.close()
    if isinstance(channel.reply, Exception):
        raise channel.reply
    return channel.reply


class FakeRun:
    """One RUN as the launcher and the runner see it."""

    def __init__(self, launcher: FakeLauncher, request: Request, answer: Callable[[Reply], None], stream: socket.socket) -> None:
        self.launcher = launcher
        self.instance = request.instance
        self.sequence = request.sequence
        self.quiet = bool(request.flags & QUIET)
        self.read_only = bool(request.flags & READ_ONLY)
        self.bulk = bool(request.flags & BULK)
        self.tag = request.other
        self.upload = b""
        self._unread = bytearray()
        self._answer = answer
        self.stream = stream
        stream.setblocking(False)

    def started(self) -> None:
        if not self.quiet:
            self._answer(Reply(Status.STARTED, self.sequence, self.launcher.instances.get(self.instance, 0)))

    def ended(self, verdict: Verdict = Verdict.EXITED) -> None:
        self.stream.close()
        self._answer(Reply(Status.ENDED, self.sequence, verdict=verdict))

    def refused(self, status: Status, detail: str = "") -> None:
        self.stream.close()
        self._answer(Reply(status, self.sequence, detail=detail))

    async def read_request(self) -> dict[str, Any]:
        """The request frame, and the upload behind it if it has one."""
        length = await self._receive(4)
        payload = await self._receive(struct.unpack("!I", length)[0])
        request = json.loads(payload)
        self.upload = await self._receive(request.get("upload", 0))
        self.launcher.requests.append(request)
        self.launcher.frames.append(length + payload)
        self.launcher.uploads.append(self.upload)
        return request

    async def _receive(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        while len(self._unread) < size:
            chunk = await loop.sock_recv(self.stream, 1 << 16)
            if not chunk:
                raise ConnectionError("the web process hung up")
            self._unread += chunk
        received = bytes(self._unread[:size])
        del self._unread[:size]
        return received

    async def send(self, raw: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.stream, raw)

    def sees_a_hang_up(self) -> bool:
        """Whether the web process has closed its end by now."""
        with select.epoll() as poll:
            poll.register(self.stream, 0)
            return any(events & select.EPOLLHUP for _, events in poll.poll(0))

    async def hung_up(self) -> None:
        """Until the web process closes its end."""
        while await asyncio.get_running_loop().sock_recv(self.stream, 1 << 16):
            pass


Script = Callable[[FakeRun], Awaitable[None]]


def replying_after(finish: asyncio.Event) -> Script:
    """A runner that answers once the event is set."""

    async def script(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await finish.wait()
        await run.send(ok(["a"], [[1]]))
        run.ended()

    return script


def ending_after(gone: asyncio.Event) -> Script:
    """A runner that answers at once, and a container that is gone once the event is set."""

    async def script(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await run.send(ok(["a"], [[1]]))
        run.stream.close()
        await gone.wait()
        run.ended()

    return script


def replying(stream: bytes, verdict: Verdict = Verdict.EXITED) -> Script:
    """A runner that reads its request, answers these bytes and ends."""

    async def script(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await run.send(stream)
        run.ended(verdict)

    return script


def answering(streams: dict[str, bytes]) -> Script:
    """A runner that answers each operation with its bytes; "" stands for SQL."""

    async def script(run: FakeRun) -> None:
        run.started()
        request = await run.read_request()
        await run.send(streams[request.get("op", "")])
        run.ended()

    return script


class FakeLauncher:
    def __init__(self, path: Path, ttl_seconds: int = 600) -> None:
        self.path = path
        self.ttl_seconds = ttl_seconds
        self.instances: dict[uuid.UUID, int] = {}
        self.verbs: list[tuple[Verb, uuid.UUID]] = []
        self.requests: list[dict[str, Any]] = []
        self.frames: list[bytes] = []
        self.uploads: list[bytes] = []
        """One for each request, most of them empty."""
        self.runs: list[FakeRun] = []
        self.salvaging: set[uuid.UUID] = set()
        """Instances that are to be salvaged by whoever finds them damaged."""
        self.replaced: list[tuple[uuid.UUID, uuid.UUID, bool]] = []
        """By which other, and whether the volume was kept."""
        self.latest_end = 1 << 40
        """What no instance can be extended beyond."""
        self.tags: set[tuple[uuid.UUID, bytes]] = set()
        self.script: Script = replying(ok(["one"], [[1]]))
        self.refusals: dict[Verb, Status] = {}
        self.silent: set[Verb] = set()
        self.health: dict[str, Any] = {
            **{"engine": "docker", "daemon": "up", "trouble": None, "instances": 0, "secret_path": "/x"},
            **{"free_bytes": 1 << 40, "available_memory_bytes": 1 << 40},
        }
        self.health_asked = 0
        """Not among the verbs: the breaker asks when it likes."""
        self.request_ids: list[bytes] = []
        self.owners: list[bytes] = []
        self.earliest_end = 0
        self.metrics = ""
        self.running = 0
        self.most_running = 0
        self._connections: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    async def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind(str(self.path))
        self._listener.listen(8)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def stop(self) -> None:
        self.drop_connections()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        self.path.unlink(missing_ok=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def drop_connections(self) -> None:
        for connection in self._connections:
            asyncio.get_running_loop().remove_reader(connection)
            connection.close()
        self._connections.clear()

    def count(self, verb: Verb) -> int:
        return sum(1 for seen, _ in self.verbs if seen is verb)

    def broadcast(self, packet: bytes) -> None:
        for connection in self._connections:
            connection.send(packet)

    def _accept(self) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        self._connections.append(connection)
        asyncio.get_running_loop().add_reader(connection, self._receive, connection)

    def _receive(self, connection: socket.socket) -> None:
        packet, descriptors, _, _ = socket.recv_fds(connection, REQUEST_BYTES + 1, 4)
        if not packet:
            asyncio.get_running_loop().remove_reader(connection)
            connection.close()
            self._connections.remove(connection)
            return
        request = Request.unpack(packet)
        assert len(descriptors) == (1 if request.verb is Verb.RUN else 0)
        if request.verb is Verb.HEALTH:
            self.health_asked += 1
        else:
            self.verbs.append((request.verb, request.instance))
            self.request_ids.append(request.request_id)
        if request.verb in (Verb.CREATE, Verb.FORK):
            self.owners.append(request.other)

        def answer(reply: Reply) -> None:
            if connection.fileno() >= 0:
                connection.send(reply.pack())

        if request.verb in self.silent:
            return
        if request.verb in self.refusals:
            for descriptor in descriptors:
                socket.socket(fileno=descriptor).close()
            answer(Reply(self.refusals[request.verb], request.sequence, self.earliest_end, detail="operator's detail"))
        elif request.verb is Verb.RUN and (status := self._refusal(request)) is not None:
            socket.socket(fileno=descriptors[0]).close()
            answer(Reply(status, request.sequence))
        elif request.verb is Verb.RUN:
            run = FakeRun(self, request, answer, socket.socket(fileno=descriptors[0]))
            self.runs.append(run)
            task = asyncio.get_running_loop().create_task(self._run(run))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            answer(self._answer(request))

    async def _run(self, run: FakeRun) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.script(run)
        except ConnectionError:
            # The web process closed its end: the launcher would destroy the container and say so.
            run.ended(Verdict.CANCELLED)
        finally:
            self.running -= 1
            run.stream.close()

    def _refusal(self, request: Request) -> Status | None:
        if request.instance not in self.instances:
            return Status.UNKNOWN
        if request.other != NO_TAG:
            if (request.instance, request.other) in self.tags:
                return Status.REPEATED
            self.tags.add((request.instance, request.other))
        return None

    def _answer(self, request: Request) -> Reply:
        instance, instances = request.instance, self.instances
        if request.verb in (Verb.FIND, Verb.FORK, Verb.REPLACE, Verb.EXTEND) and instance not in instances:
            return Reply(Status.UNKNOWN, request.sequence)
        flags = 0
        match request.verb:
            case Verb.CREATE | Verb.FORK:
                salvages = instance in self.salvaging or request.flags & SALVAGE
                instance = uuid7()
                instances[instance] = int(time.time()) + self.ttl_seconds
                if salvages:
                    self.salvaging.add(instance)
            case Verb.FIND:
                flags = SALVAGE if instance in self.salvaging else 0
            case Verb.REPLACE:
                other = uuid.UUID(bytes=request.other)
                if instances.pop(other, None) is None:
                    return Reply(Status.UNKNOWN, request.sequence)
                self.replaced.append((instance, other, bool(request.flags & KEEP)))
            case Verb.EXTEND:
                instances[instance] = max(instances[instance], min(request.number, self.latest_end))
            case Verb.REMOVE:
                instances.pop(instance, None)
                return Reply(Status.DONE, request.sequence)
            case Verb.METRICS:
                return Reply(Status.DONE, request.sequence, detail=self.metrics)
            case _:
                return Reply(Status.DONE, request.sequence, detail=json.dumps(self.health))
        return Reply(Status.DONE, request.sequence, instances[instance], instance=instance, flags=flags)


class Gateway:
    """The web process's application on a real port, with its launcher and a client."""

    def __init__(
        self, server: Server, port: int, launcher: FakeLauncher, client: aiohttp.ClientSession, settings: Settings
    ) -> None:
        self.server = server
        self.app = server.app
        self.port = port
        self.launcher = launcher
        self.client = client
        self.settings = settings
        self.url = f"http://127.0.0.1:{port}"

    async def sql(self, sql: object = "SELECT 1", token: str | None = None, **more: object) -> aiohttp.ClientResponse:
        headers = {"X-Walkin-Session": token} if token is not None else {}
        return await self.post(json.dumps({"sql": sql, **more}).encode(), headers)

    def unheard_of(self) -> str:
        """A token of an instance that the gateway has not made, so that it must be told when it ends: STARTED is asked for."""
        instance = uuid7()
        self.launcher.instances[instance] = int(time.time()) + self.launcher.ttl_seconds
        return self.app[TOKENS].issue(instance).reveal()

    async def post(self, raw: bytes, headers: dict[str, str] | None = None) -> aiohttp.ClientResponse:
        async with self.client.post(
            self.url + "/sql", data=raw, headers={"Content-Type": "application/json", **(headers or {})}
        ) as response:
            await response.read()
            return response

    async def get(self, path: str) -> aiohttp.ClientResponse:
        async with self.client.get(self.url + path) as response:
            await response.read()
            return response

    async def token(self) -> str:
        response = await self.sql()
        assert response.status == 200
        return response.headers["X-Walkin-Session"]

    async def raw(self, sent: bytes) -> bytes:
        """What comes back for bytes that need not be HTTP."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(sent)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()


TEST_SETTINGS = Settings(
    rate_requests_per_minute=0,
    rate_creates_per_minute=0,
    deadline_seconds=0.2,
    grace_seconds=0.1,
    start_timeout_seconds=1.0,
    queue_timeout_seconds=5.0,
)


@asynccontextmanager
async def gateway(state_dir: Path, **settings: Any) -> AsyncIterator[Gateway]:
    chosen = replace(TEST_SETTINGS, state_dir=state_dir, **settings)
    launcher = FakeLauncher(state_dir / "run" / "launcher.sock")
    await launcher.start()
    try:
        async with (
            asyncio.timeout(EVERY_TEST_SECONDS),
            Server(build_app(chosen), shutdown_seconds=1.0) as server,
            aiohttp.ClientSession() as client,
        ):
            yield Gateway(server, await server.listen("127.0.0.1", 0), launcher, client, chosen)
    finally:
        await launcher.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until something has become true; the test's own time-out ends a wait in vain."""
    async with asyncio.timeout(EVERY_TEST_SECONDS):
        for _ in itertools.count():
            if condition():
                return
            await asyncio.sleep(0)


async def assert_error(response: aiohttp.ClientResponse, code: str) -> dict[str, Any]:
    """The one envelope, whatever the error: status and text of the table, id in body and header, nothing of the inside."""
    (row,) = [row for row in errors.table() if row.code == code]
    body = await response.json()
    assert body["code"] == code, body
    assert response.status == row.status
    assert set(body) <= {"error", "code", "request_id", "hint", "report", "line", "statement"}
    start, _, _ = row.text.partition("…")
    assert body["error"].startswith(start) if "…" in row.text else body["error"] == row.text
    assert re.fullmatch("[0-9a-f]{32}", body["request_id"])
    assert response.headers["X-Request-ID"] == body["request_id"]
    assert (body["request_id"] == errors.NO_REQUEST_ID) == (code == "instance_not_found")
    assert ("Retry-After" in response.headers) == row.retry_after
    assert "Server" not in response.headers
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert response.content_type == "application/json"
    if row.status in (500, 503):
        assert "hint" not in body
        assert "operator" not in str(body)
    return body
