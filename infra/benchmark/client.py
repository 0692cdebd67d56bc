"""A keep-alive HTTP/1.1 client that costs little: it shares its processors with what it measures.

One request at a time per connection, prepared bytes out, status and body in. Its own cost is measured in every run, against a
server that answers a constant. Only loopback is spoken to.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

from .errors import BenchmarkError

_SESSION = b"\r\nx-walkin-session:"
_LENGTH = b"\r\ncontent-length:"
_CHUNKED = b"\r\ntransfer-encoding: chunked"
_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    def __post_init__(self) -> None:
        if self.host not in ("127.0.0.1", "::1"):
            raise BenchmarkError(f"{self.host} is not loopback")

    def post_sql(self, body: bytes, token: bytes = b"") -> bytes:
        """One whole request."""
        session = b"X-Walkin-Session: %b\r\n" % token if token else b""
        return b"POST /sql HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n%b" % (
            len(body),
            session,
            body,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """`started` and `ended` are instants of perf_counter: from the write of the request to the last byte of the answer."""

    status: int
    head: bytes
    body: bytes
    started: float
    ended: float

    @property
    def token(self) -> bytes:
        """The session token, or nothing."""
        at = self.head.lower().find(_SESSION)
        return self.head[at + len(_SESSION) :].split(b"\r\n", 1)[0].strip() if at >= 0 else b""

    def json(self) -> Any:
        return json.loads(self.body)


class Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._started = 0.0
        self._answer: asyncio.Future[Answer] | None = None

    @classmethod
    async def open(cls, address: Address) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, address.host, address.port)
        return connection

    async def ask(self, request: bytes) -> Answer:
        """Raises ConnectionError when the server hangs up instead of answering."""
        if self._transport is None:
            raise ConnectionError("closed")
        self._answer = asyncio.get_running_loop().create_future()
        self._started = perf_counter()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by what it does, not by its class

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("closed by the server"))

    def data_received(self, data: bytes) -> None:
        self._received = received = self._received + data if self._received else data
        end_of_head = received.find(b"\r\n\r\n")
        if end_of_head < 0:
            return
        head, body = received[:end_of_head], received[end_of_head + 4 :]
        low = head.lower()
        at = low.find(_LENGTH)
        if at >= 0:
            if len(body) < int(low[at + len(_LENGTH) :].split(b"\r\n", 1)[0]):
                return
        elif _CHUNKED in low:
            # Only one answer is ever under way, and JSON holds no bare line end: this can be nothing but the last chunk.
            if not body.endswith(_LAST_CHUNK):
                return
            body = _joined(body)
        self._received = b""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(int(head[9:12]), head, body, self._started, perf_counter()))


def _joined(chunks: bytes) -> bytes:
    body = b""
    while chunks:
        size, _, rest = chunks.partition(b"\r\n")
        length = int(size, 16)
        body, chunks = body + rest[:length], rest[length + 2 :]
    return body
