"""A tenant's database on a temporary path, and requests run on it by the runner's own functions, without a container."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import apsw

from runner.configuration import Configuration
from runner.execute import run_request
from runner.failures import verdict_of
from runner.wire import Request, encode_failure

CONFIGURATION_KEYS: dict[str, Any] = {
    "deadline_ms": 2000,
    "max_request_bytes": 2 << 20,
    "max_rows": 10_000,
    "max_result_bytes": 1 << 20,
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
    ) -> dict[str, Any]:
        """The reply, decoded."""
        deadline = monotonic() + seconds
        request = Request(sql, args, int64 == "string")
        try:
            reply = run_request(request, self.configuration, lambda: monotonic() >= deadline, watch, str(self.path))
        except Exception as error:
            verdict = verdict_of(error, None, 0)
            reply = encode_failure(verdict.verdict, verdict.message)
        document = json.loads(reply.decode("utf-8"))
        assert document.pop("v") == 1
        assert {file.name for file in self.path.parent.iterdir()} == {self.path.name, self.journal.name}
        return document

    def rows(self, sql: str, args: Any = None) -> list[list[Any]]:
        reply = self.run(sql, args)
        assert reply["verdict"] == "ok", reply
        return reply["rows"]
