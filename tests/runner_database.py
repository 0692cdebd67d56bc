"""A tenant's database on a temporary path, and requests run on it by the runner's own functions, without a container."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import apsw

from runner import answer, operations
from runner.configuration import Configuration
from runner.execute import run_request
from runner.frames import Outbox, framed
from runner.wire import Operation, Request, decode_request

CONFIGURATION_KEYS: dict[str, Any] = {
    "deadline_ms": 2000,
    "bulk_deadline_ms": 20_000,
    "max_request_bytes": 2 << 20,
    "max_rows": 10_000,
    "max_result_bytes": 1 << 20,
    "max_stream_bytes": 64 << 20,
    "instance_bytes": 10 << 20,
    "heap_bytes": 48 << 20,
    "nofile": 64,
    "min_landlock_abi": 3,
    "sqlite_limits": {
        "LENGTH": 300_000,
        "SQL_LENGTH": 100_000,
        "COLUMN": 100,
        "EXPR_DEPTH": 100,
        "PARSER_DEPTH": 200,
        "COMPOUND_SELECT": 50,
        "VDBE_OP": 100_000,
        "FUNCTION_ARG": 32,
        "ATTACHED": 0,
        "LIKE_PATTERN_LENGTH": 100,
        "VARIABLE_NUMBER": 250,
        "TRIGGER_DEPTH": 10,
        "WORKER_THREADS": 0,
    },
}

CONFIGURATION = Configuration.parse(json.dumps(CONFIGURATION_KEYS))


class TenantDatabase:
    """What a volume holds: two empty files, and nothing else may appear beside them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "db.sqlite"
        self.journal = folder / "db.sqlite-journal"
        self.path.touch()
        self.journal.touch()
        self.configuration = CONFIGURATION
        self._keys = CONFIGURATION_KEYS

    def limited(self, **changes: Any) -> None:
        self._keys = {**self._keys, **changes}
        self.configuration = Configuration.parse(json.dumps(self._keys))

    def run(
        self,
        sql: str,
        args: Any = None,
        *,
        int64: str = "number",
        seconds: float = 60.0,
        watch: Callable[[apsw.Connection | None], None] = lambda _: None,
        read_only: bool = False,
    ) -> dict[str, Any]:
        """The reply, decoded."""
        deadline = monotonic() + seconds
        path, outbox = str(self.path), Outbox(-1)
        reply = answer.reply_to(
            Request(sql, args, int64 == "string"),
            lambda request, expired: run_request(request, self.configuration, expired, watch, path, read_only),
            lambda: monotonic() >= deadline,
            outbox,
        )
        document = json.loads(reply.decode("utf-8"))
        assert document.pop("v") == 1
        self._check_folder()
        return document

    def stream(
        self,
        op: str,
        upload: bytes = b"",
        *,
        expired: Callable[[], bool] = lambda: False,
        watch: Callable[[apsw.Connection | None], None] = lambda _: None,
        read_only: bool = False,
        **keys: Any,
    ) -> bytes:
        """All bytes of the reply to an operation."""
        if upload or op in ("import", "accept"):
            keys["upload"] = len(upload)
        request = decode_request(json.dumps({"v": 1, "op": op, **keys}).encode())
        assert isinstance(request, Operation)
        request.upload = upload

        def run(asked: Any, expired: Callable[[], bool]) -> bytes | None:
            return operations.perform(asked, self.configuration, expired, watch, outbox, str(self.path), read_only)

        with tempfile.TemporaryFile() as sent:
            outbox = Outbox(sent.fileno())
            reply = answer.reply_to(request, run, expired, outbox)
            if reply is not None:
                os.write(sent.fileno(), framed(reply))
            sent.seek(0)
            self._check_folder()
            return sent.read()

    def perform(self, op: str, upload: bytes = b"", **keys: Any) -> dict[str, Any]:
        """The reply to an operation that is one frame, decoded."""
        (reply,) = frames_of(self.stream(op, upload, **keys))
        assert reply.pop("v") == 1
        return reply

    def _check_folder(self) -> None:
        assert {file.name for file in self.path.parent.iterdir()} == {self.path.name, self.journal.name}

    def rows(self, sql: str, args: Any = None) -> list[list[Any]]:
        reply = self.run(sql, args)
        assert reply["verdict"] == "ok", reply
        return reply["rows"]


def frames_of(stream: bytes) -> list[Any]:
    """The documents of frames that end where the stream does."""
    found = []
    while stream:
        end = 4 + int.from_bytes(stream[:4], "big")
        assert len(stream) >= end
        found.append(json.loads(stream[4:end].decode("utf-8")))
        stream = stream[end:]
    return found
