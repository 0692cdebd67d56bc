"""A runner that is killed at any system call of a write leaves the state before a statement or the state after it."""

from __future__ import annotations

import base64
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from .every_syscall import ALL, MOST_OF_THE_OTHERS, Case, explore

TABLE = (
    "CREATE TABLE t(id INTEGER PRIMARY KEY, a);"
    "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c WHERE n<100) INSERT INTO t SELECT n, hex(zeroblob(200+n)) FROM c;"
)
TRANSACTION = "BEGIN; UPDATE t SET a='x'||a; INSERT INTO t VALUES (200, 1), (201, 2); DELETE FROM t WHERE id<20; COMMIT"

CASES = [
    Case("the first rows", "", ["CREATE TABLE t(a)", "INSERT INTO t VALUES (1)"]),
    Case("one row", TABLE, ["INSERT INTO t VALUES (101, 'more')"]),
    Case("several statements", TABLE, ["UPDATE t SET a=1 WHERE id=50", "DELETE FROM t WHERE id=7", "CREATE TABLE u(b)"]),
    Case("a transaction", TABLE, [TRANSACTION]),
    Case("a savepoint", TABLE, ["SAVEPOINT s; DELETE FROM t; ROLLBACK TO s; INSERT INTO t VALUES (300, 1); RELEASE s"]),
    Case(
        "an index and a trigger",
        f"{TABLE} CREATE INDEX i ON t(a); CREATE TABLE log(x);"
        "CREATE TRIGGER g AFTER UPDATE ON t BEGIN INSERT INTO log VALUES (old.a); END",
        ["UPDATE t SET a='y'||id WHERE id%25=0"],
    ),
    Case("a vacuum", f"{TABLE} DELETE FROM t WHERE id%2=0", ["VACUUM", "INSERT INTO t VALUES (500, 1)"]),
    Case("an altered table", TABLE, ["ALTER TABLE t RENAME COLUMN a TO b", "ALTER TABLE t ADD COLUMN c", "ALTER TABLE t DROP b"]),
    Case(
        "pages that overflow",
        TABLE,
        ["INSERT INTO t VALUES (400, zeroblob(50000))", "UPDATE t SET a=zeroblob(9000) WHERE id=400"],
    ),
    Case(
        "a full-text index",
        "CREATE VIRTUAL TABLE f USING fts5(x); INSERT INTO f VALUES ('one two'), ('three')",
        ["INSERT INTO f VALUES ('four one')", "DELETE FROM f WHERE f MATCH 'two'"],
    ),
    Case(
        "a freelist",
        f"{TABLE} CREATE TABLE u(b); DELETE FROM t WHERE id>10",
        ["DROP TABLE t", "INSERT INTO u VALUES (zeroblob(9000))"],
    ),
]

STEPS = [f"UPDATE t SET a={n} WHERE id%10={n}" for n in range(3)] + [
    "CREATE TABLE u AS SELECT * FROM t",
    "DELETE FROM t WHERE id>50",
]
BATCH = {"op": "batch", "steps": [{"sql": sql, "args": None, "if": None} for sql in STEPS], "int64": "number"}
LINES = b"id,a\n" + b"".join(b"%d,%s\n" % (number, b"x" * 300) for number in range(1000, 1100))
IMPORT = {
    **{"op": "import", "upload": len(LINES), "table": "t", "format": "csv"},
    **{"columns": None, "header": True, "delimiter": ",", "null": None},
}


def database_of(script):
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(script)
        return connection.serialize()


def assert_all_is_well(case, found, answer="ok"):
    assert not found.broken, "\n".join(found.broken)
    assert found.answer == answer
    assert found.at_changes >= 10
    assert found.killed == found.stops or (found.killed - found.at_changes == MOST_OF_THE_OTHERS and not ALL)
    # A vacuum changes nothing that could be asked for.
    last = 1 if case.order else len(case.statements)
    assert found.states == [place for place in range(last + 1) if case.order or case.statements[place - 1] != "VACUUM"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_M7_a_runner_killed_at_any_system_call_leaves_the_state_before_or_after_a_statement(case):
    assert_all_is_well(case, explore(case))


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.name)
def test_M7_a_zygotes_child_killed_at_any_system_call_leaves_the_state_before_or_after_a_statement(case):
    assert_all_is_well(case, explore(replace(case, life="prepared")))


@pytest.mark.parametrize("life", ["serve", "prepared"])
def test_M7_a_runner_killed_at_any_system_call_of_a_rollback_leaves_the_state_before_the_killed_write(life):
    found = explore(replace(CASES[3], life=life, rollback=True))
    assert not found.broken, "\n".join(found.broken)
    assert found.at_changes >= 10
    assert found.states == [0]


def test_M7_a_runner_killed_at_any_system_call_of_a_batch_leaves_the_state_before_or_after_all_of_it():
    case = Case("a batch", TABLE, order=BATCH)
    assert_all_is_well(case, explore(case), "batch")


def test_M7_a_runner_killed_at_any_system_call_of_an_import_leaves_the_state_before_or_after_all_of_it():
    case = Case("an import", TABLE, order=IMPORT, upload=base64.b64encode(LINES).decode(), life="serve-bulk")
    assert_all_is_well(case, explore(case), "imported")


def test_M7_a_file_that_was_accepted_is_kept_at_whatever_system_call_its_runner_is_killed():
    # Nobody serves it before: it is put into a copy that takes the instance's place afterwards.
    upload = database_of(TABLE)
    order = {"op": "accept", "upload": len(upload)}
    found = explore(Case("an upload", "", order=order, upload=base64.b64encode(upload).decode(), life="serve-bulk", staged=True))
    assert not found.broken, "\n".join(found.broken)
    assert found.answer == "accepted"
    assert found.at_changes >= 3
    assert found.states == [1]


def test_M7_with_the_journal_in_memory_the_same_deaths_do_leave_broken_databases():
    found = explore(replace(CASES[3], journal_mode="MEMORY"))
    assert found.answer == "ok"
    assert found.broken
