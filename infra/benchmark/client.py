"""A keep-alive HTTP/1.1 client that costs little: it shares its processors with what it measures.

One request at a time per connection, prepared bytes out, status and body in. Its own cost is measured in every run, against a
server that answers a constant. Only loopback is spoken to.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
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


@dataclass(slots=True)  # not frozen: that costs a microsecond for each
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


Answered = Callable[[Answer | None], None]
"""Called with nothing when the server hung up instead of answering."""


class Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._started = 0.0
        self._answered: Answered | None = None

    @classmethod
    async def open(cls, address: Address) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, address.host, address.port)
        return connection

    def send(self, request: bytes, answered: Answered) -> None:
        """Without a task or a future, which would cost as much as all else. Raises ConnectionError when the server has hung up."""
        if self._transport is None:
            raise ConnectionError("closed")
        self._answered = answered
        self._started = perf_counter()
        self._transport.write(request)

    async def ask(self, request: bytes) -> Answer:
        """Raises ConnectionError when the server hangs up instead of answering."""
        future: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self.send(request, lambda answer: None if future.done() else future.set_result(answer))
        answer = await future
        if answer is None:
            raise ConnectionError("closed by the server")
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by what it does, not by its class

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._tell(None)

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
        self._tell(Answer(int(head[9:12]), head, body, self._started, perf_counter()))

    def _tell(self, answer: Answer | None) -> None:
        answered, self._answered = self._answered, None
        if answered is not None:
            answered(answer)


def _joined(chunks: bytes) -> bytes:
    body = b""
    while chunks:
        size, _, rest = chunks.partition(b"\r\n")
        length = int(size, 16)
        body, chunks = body + rest[:length], rest[length + 2 :]
    return body
