"""`python -m infra.benchmark.flooding PORT SECONDS`: a flood, against loopback alone, from thousands of its addresses.

Strangers of five kinds: forged tokens, creates, bytes that are no HTTP, headers that never end, and connections that say nothing.
The first three are so many at a time, each from its next address; the last two are held. It runs at the lowest priority: on one
machine with what it floods it is to take what that leaves, not the processors themselves. Prints counts as JSON.
"""

from __future__ import annotations

import errno
import json
import os
import random
import selectors
import socket
import struct
import sys
from collections import Counter
from time import perf_counter
from typing import NamedTuple

ADDRESSES = 4096
_AT_ONCE = 256
_HELD = 3000
_ANSWER_SECONDS = 10.0
_NICE = 19
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_POST = (
    b"POST /sql HTTP/1.1\r\nHost: flood\r\nContent-Type: application/json\r\nContent-Length: 18\r\n%b\r\n" + b'{"sql":"SELECT 1"}'
)
FORGED, CREATE, GARBAGE, SLOW, SILENT = "forged", "create", "garbage", "slow", "silent"
_BYTES = {
    FORGED: _POST % (b"X-Walkin-Session: wkn_" + b"A" * 107 + b"\r\n"),
    CREATE: _POST % b"",
    GARBAGE: b"\x16\x03\x01\x02\x00" + b"\xff" * 512,
    SLOW: b"POST /sql HTTP/1.1\r\nHost: flood\r\nX-Slow: ",
    SILENT: b"",
}
_KINDS = (FORGED, CREATE, GARBAGE)
_SHARES = (70, 10, 20)
RESET, SILENCE, UNANSWERED = "reset", "closed", "unanswered"


class _Attempt(NamedTuple):
    kind: str
    since: float


class Flood:
    def __init__(self, port: int, chance: random.Random) -> None:
        self._target = ("127.0.0.1", port)
        self._chance = chance
        self._selector = selectors.DefaultSelector()
        self._busy: dict[socket.socket, _Attempt] = {}
        self._held: dict[socket.socket, _Attempt] = {}
        self._number = 0
        self.outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in _BYTES}

    def run(self, seconds: float) -> None:
        end = perf_counter() + seconds
        swept = perf_counter()
        while (now := perf_counter()) < end:
            # A few at a time, so that answers are read while the rest is sent.
            for _ in range(min(16, _AT_ONCE - len(self._busy))):
                self._begin(self._chance.choices(_KINDS, _SHARES)[0], now, self._busy)
            for _ in range(min(8, _HELD - len(self._held))):
                self._begin(self._chance.choice((SLOW, SILENT)), now, self._held)
            for key, events in self._selector.select(0.01):
                self._go_on(key.fileobj, events)  # type: ignore[arg-type]
            if now - swept > 1.0:
                swept = now
                self._sweep(now)
        for connection in [*self._busy, *self._held]:
            self._finish(connection, UNANSWERED)

    def _begin(self, kind: str, now: float, group: dict[socket.socket, _Attempt]) -> None:
        self._number += 1
        number = self._number % ADDRESSES
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        connection.bind((f"127.{1 + number // 65536}.{number // 256 % 256}.{1 + number % 254}", 0))
        failed = connection.connect_ex(self._target)
        if failed not in (0, errno.EINPROGRESS):
            connection.close()
            self.outcomes[kind][errno.errorcode[failed]] += 1
            return
        group[connection] = _Attempt(kind, now)
        self._selector.register(connection, selectors.EVENT_WRITE)

    def _go_on(self, connection: socket.socket, events: int) -> None:
        attempt = self._busy.get(connection) or self._held[connection]
        try:
            if events & selectors.EVENT_WRITE:
                connection.send(_BYTES[attempt.kind])
                self._selector.modify(connection, selectors.EVENT_READ)
                return
            answer = connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            self._finish(connection, RESET)
            return
        self._finish(connection, answer[9:12].decode("ascii", "replace") if answer else SILENCE)

    def _sweep(self, now: float) -> None:
        for connection in [each for each, attempt in self._busy.items() if now - attempt.since > _ANSWER_SECONDS]:
            self._finish(connection, UNANSWERED)

    def _finish(self, connection: socket.socket, outcome: str) -> None:
        attempt = self._busy.pop(connection, None) or self._held.pop(connection)
        self.outcomes[attempt.kind][outcome] += 1
        self._selector.unregister(connection)
        connection.close()


def main() -> int:
    port, seconds = int(sys.argv[1]), float(sys.argv[2])
    os.nice(_NICE)
    flood = Flood(port, random.Random("flood"))  # noqa: S311 -- to be repeatable
    flood.run(seconds)
    print(json.dumps({kind: dict(counts) for kind, counts in flood.outcomes.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
