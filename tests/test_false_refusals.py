"""Ordinary SQL is not refused: what SQLite without limits accepts is accepted under the runner's, with the same columns and rows.

MAYFLY_ORDINARY_RECORDS asks for more than the suite's few thousand.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from pathlib import Path
from typing import Any

import apsw

from .corpus import ORDINARY_RECORDS
from .ordinary_sql import OrdinarySql
from .runner_database import TenantDatabase

DEADLINE_SECONDS = 10.0  # what is too slow is not the question, and the machine may be busy
SESSION = 400
"""Records on one database, before it grows too slow to query at random."""


def in_json(value: Any) -> Any:
    """As docs/wire.md writes it."""
    if isinstance(value, bytes):
        return {"$blob": base64.b64encode(value).decode()}
    if isinstance(value, float) and math.isinf(value):
        return {"$real": "Infinity" if value > 0 else "-Infinity"}
    return value


class Control:
    """SQLite as it comes: no limits, no authorizer, no quota."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def run(self, sql: str) -> tuple[list[str] | None, list[list[Any]]] | None:
        """Columns and rows of the last statement that has some; None when SQLite itself refuses. A connection each, as there."""
        connection = apsw.Connection(str(self._path))
        connection.pragma("synchronous", "OFF")
        columns, rows = None, []

        def trace(cursor: apsw.Cursor, statement: str, bindings: Any) -> bool:
            nonlocal columns
            if names := [column[0] for column in cursor.get_description()]:
                columns = names
                rows.clear()
            return True

        cursor = connection.cursor()
        cursor.exec_trace = trace
        try:
            for row in cursor.execute(sql):
                rows.append([in_json(value) for value in row])
        except (apsw.SQLError, apsw.ConstraintError, apsw.MismatchError, apsw.TooBigError):
            return None
        finally:
            connection.close(True)
        return columns, rows


def test_what_stock_sqlite_accepts_is_accepted_with_the_same_rows(tmp_path):
    accepted, refused = 0, Counter()
    different: list[str] = []
    for number in range(ORDINARY_RECORDS // SESSION):
        folder = tmp_path / str(number)
        (folder / "tenant").mkdir(parents=True)
        tenant, control = TenantDatabase(folder / "tenant"), Control(folder / "control")
        for sql in OrdinarySql(number).session(SESSION):
            expected, reply = control.run(sql), tenant.run(sql, seconds=DEADLINE_SECONDS)
            if expected is None:
                continue
            accepted += 1
            if reply["verdict"] != "ok":
                refused[f"{reply['verdict']}: {reply.get('message')}"] += 1
                different.append(f"{reply}: {sql[:300]}")
            elif (reply["columns"], reply["rows"]) != expected and not reply["truncated"]:
                different.append(f"other rows: {sql[:300]}")
    print(f"{accepted} accepted by the control, {refused.total()} of them refused: {refused}")
    assert accepted > ORDINARY_RECORDS * 0.8, "the generator writes too little that is valid"
    assert not different, "\n".join([f"{len(different)} of {accepted}", *different[:20]])


FIRST_REQUESTS = [
    "PRAGMA foreign_keys = ON; CREATE TABLE IF NOT EXISTS users (id INTEGER PRIMARY KEY AUTOINCREMENT, email TEXT UNIQUE NOT NULL, "
    "created_at TEXT DEFAULT CURRENT_TIMESTAMP);",
    "SELECT name FROM sqlite_master WHERE type='table' ORDER BY name;",
    "PRAGMA table_info(users); -- what have we got?",
    "BEGIN TRANSACTION; INSERT INTO users (email) VALUES ('a@b.org'); INSERT INTO users (email) VALUES ('c@b.org'); COMMIT;",
    "INSERT INTO users (email) VALUES ('a@b.org') ON CONFLICT(email) DO UPDATE SET created_at = datetime('now') RETURNING id;",
    "SELECT last_insert_rowid(), changes(), sqlite_version();",
    "INSERT OR REPLACE INTO users (id, email) VALUES (1, lower(hex(randomblob(16))));",
    "WITH recent AS (SELECT *, row_number() OVER (ORDER BY created_at DESC) AS n FROM users) SELECT * FROM recent WHERE n <= 10;",
    "CREATE VIRTUAL TABLE notes USING fts5(title, body); INSERT INTO notes VALUES ('hello', 'big world'); "
    "SELECT snippet(notes, 1, '<b>', '</b>', '…', 8) FROM notes WHERE notes MATCH 'world' ORDER BY rank;",
    "EXPLAIN QUERY PLAN SELECT * FROM users WHERE email = 'a@example.org';",
    "SELECT json_extract('{\"a\": [1, 2]}', '$.a[1]'), strftime('%Y-W%W', 'now'), printf('%.2f', 3.14159);",
    "PRAGMA optimize; ANALYZE; VACUUM; PRAGMA integrity_check;",
    "PRAGMA user_version; PRAGMA page_count; PRAGMA index_list('users'); PRAGMA foreign_key_check;",
    "DROP TABLE IF EXISTS old_users; ALTER TABLE users ADD COLUMN name TEXT; DELETE FROM users;",
]


def test_what_an_agent_writes_on_a_new_database_is_accepted(tmp_path):
    tenant = TenantDatabase(tmp_path)
    for sql in FIRST_REQUESTS:
        reply = tenant.run(sql)
        assert reply["verdict"] == "ok", (reply, sql)
