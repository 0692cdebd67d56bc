"""Each `op` of docs/wire.md on a database without a container: streams of rows, batches, the schema, the file, reading alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner import batch
from runner.database import held

from .runner_database import TenantDatabase, frames_of

COUNT = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT {})"
REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def tenant(tmp_path: Path) -> TenantDatabase:
    database = TenantDatabase(tmp_path)
    assert database.run("CREATE TABLE t(a); INSERT INTO t VALUES (1), (2)")["verdict"] == "ok"
    return database


# --- rows


class Streamed:
    def __init__(self, stream: bytes) -> None:
        head, *self.frames = frames_of(stream)
        assert (head["v"], head["verdict"]) == (1, "rows"), head
        self.end = self.frames.pop()
        self.columns = head["columns"]
        self.rows = [row for frame in self.frames for row in frame]
        assert self.end.pop("rows") == len(self.rows)


def rows(tenant: TenantDatabase, sql: str, args: Any = None, int64: str = "number", **more: Any) -> Streamed:
    return Streamed(tenant.stream("rows", sql=sql, args=args, int64=int64, **more))


def refused(tenant: TenantDatabase, sql: str, args: Any = None, **more: Any) -> dict[str, Any]:
    return tenant.perform("rows", sql=sql, args=args, int64="number", **more)


def ended(rows_affected: int = 0, stopped: str | None = None, message: str | None = None) -> dict[str, Any]:
    return {"rows_affected": rows_affected, "stopped": stopped, "message": message}


def test_M10_names_of_columns_that_no_frame_may_hold_are_refused(tenant):
    tenant.limited(max_result_bytes=10_000)
    assert tenant.run(f'CREATE TABLE u("{"n" * 80_000}")')["verdict"] == "ok"
    assert rows(tenant, "SELECT * FROM u").rows == []
    assert refused(tenant, "SELECT * FROM u, u AS v") == {
        "verdict": "sql_error",
        "message": "the names of the columns are too long",
    }


def test_all_rows_come_in_frames_of_a_bounded_size(tenant):
    tenant.limited(max_rows=10, max_result_bytes=1024)
    sql = f"{COUNT.format(5000)} SELECT x, hex(zeroblob(100)) AS z FROM c"
    stream = tenant.stream("rows", sql=sql, args=None, int64="string")
    found = Streamed(stream)
    assert found.columns == ["x", "z"]
    assert found.rows == [[str(number), "00" * 100] for number in range(1, 5001)]
    assert found.end == ended()
    assert 10 < len(found.frames) < 25
    assert len(stream) < 5000 * 220


@pytest.mark.parametrize(("bytes_each", "at_once"), [(60_000, 4), (120_000, 2), (200_000, 1)])
def test_a_frame_of_several_rows_is_never_longer_than_its_bound(tenant, bytes_each, at_once):
    found = rows(tenant, f"{COUNT.format(9)} SELECT hex(zeroblob({bytes_each // 2})) FROM c")
    assert len(found.rows) == 9
    assert max(len(frame) for frame in found.frames) <= at_once
    assert all(len(json.dumps(frame)) <= 1 << 18 for frame in found.frames)


def test_the_rows_are_those_of_the_last_statement_alone(tenant):
    assert rows(tenant, "SELECT 1 AS one; INSERT INTO t VALUES (3)").columns is None
    assert rows(tenant, "SELECT 1 AS one; INSERT INTO t VALUES (3)").end == ended(1)
    found = rows(tenant, "INSERT INTO t VALUES (?); SELECT :no WHERE 0; SELECT count(*) AS n FROM t; -- end", [4, 0])
    assert (found.columns, found.rows, found.end) == (["n"], [[5]], ended(1))
    assert (rows(tenant, "").columns, rows(tenant, " -- nothing").end) == (None, ended())
    assert rows(tenant, "SELECT a FROM t WHERE 0").columns == ["a"]


def test_rows_that_a_write_returns_come_and_are_counted(tenant):
    found = rows(tenant, f"INSERT INTO t {COUNT.format(20_000)} SELECT x FROM c RETURNING a, hex(zeroblob(10))")
    assert (len(found.rows), found.end) == (20_000, ended(20_000))
    assert tenant.rows("SELECT count(*) FROM t") == [[20_002]]


def test_rows_beyond_the_bytes_of_a_stream_stop_it_and_a_write_before_them_stays(tenant):
    tenant.limited(max_stream_bytes=200_000)
    found = rows(tenant, f"INSERT INTO t {COUNT.format(20_000)} SELECT x FROM c RETURNING a, hex(zeroblob(10))")
    assert found.end == ended(20_000, "bytes")
    assert 190_000 < sum(len(json.dumps(row, separators=(",", ":"))) + 1 for row in found.rows) <= 200_000
    assert tenant.rows("SELECT count(*) FROM t") == [[20_002]]


def test_a_row_that_no_frame_may_hold_stops_the_stream_before_it_is_built(tenant):
    tenant.limited(max_result_bytes=300_000)
    long = " , ".join(["hex(zeroblob(100000))"] * 20)
    found = rows(tenant, f"SELECT a FROM (SELECT 1 AS a UNION ALL SELECT 2) ; SELECT {long} FROM t")
    assert (found.rows, found.end) == ([], ended(0, "bytes"))


def test_an_error_before_the_first_frame_is_an_ordinary_failure(tenant):
    assert refused(tenant, "SELECT a FROM nowhere") == {"verdict": "sql_error", "message": "no such table: nowhere"}
    sql = f"{COUNT.format(100)} SELECT abs(CASE x WHEN 50 THEN -9223372036854775808 ELSE x END) FROM c"
    assert refused(tenant, sql) == {"verdict": "sql_error", "message": "integer overflow"}
    assert refused(tenant, "SELECT ?", [1, 2])["verdict"] == "args_invalid"
    assert refused(tenant, "ATTACH 'x' AS y")["verdict"] == "forbidden"
    assert refused(tenant, "SELECT 1", expired=lambda: True) == {"verdict": "timeout"}
    assert refused(tenant, "BEGIN; SELECT 1")["message"] == "transaction left open; it was rolled back"


def test_an_error_after_the_first_frame_is_told_at_the_end_behind_every_row_before_it(tenant):
    sql = f"{COUNT.format(100_000)} SELECT abs(CASE x WHEN 30001 THEN -9223372036854775808 ELSE x END) FROM c"
    found = rows(tenant, f"INSERT INTO t VALUES (3); {sql}")
    assert found.rows == [[number] for number in range(1, 30_001)]
    assert found.end == ended(1, "error", "integer overflow")


def test_what_a_stream_with_an_error_says_was_affected_is_what_stays(tenant):
    sql = f"INSERT INTO t VALUES (3); BEGIN; INSERT INTO t VALUES (4), (5); {COUNT.format(30_000)} SELECT x FROM c"
    found = rows(tenant, sql)
    assert (len(found.rows), found.end) == (30_000, ended(1, "error", "transaction left open; it was rolled back"))
    assert tenant.rows("SELECT count(*) FROM t") == [[3]]


def test_a_stream_that_meets_the_deadline_ends_with_its_last_frame(tenant):
    """An instant later than the first frame: the clock is looked at by SQLite and with each frame."""
    ticks = count()
    found = rows(tenant, f"{COUNT.format(10_000_000)} SELECT x FROM c", expired=lambda: next(ticks) > 500)
    assert found.end == ended(0, "timeout")
    assert found.rows == [[number] for number in range(1, len(found.rows) + 1)]
    assert len(found.frames) >= 1


def test_an_interrupt_in_a_stream_is_the_deadline(tenant):
    sql = f"{COUNT.format(200_000)} SELECT x FROM c"
    watched: list[apsw.Connection | None] = []
    asked = count()

    def expired() -> bool:
        if next(asked) == 300:
            watched[0].interrupt()  # as the watchdog would
        return False

    found = rows(tenant, sql, expired=expired, watch=watched.append)
    assert found.end == ended(0, "timeout")
    assert (len(watched), watched[1]) == (3, None)


STUCK = """
import os, sys, time
from time import monotonic
from runner.answer import OUT
from runner.frames import Outbox, framed
from runner.main import _time_out
from runner.rows import _ending
from runner.watchdog import Watchdog
from functools import partial
watchdog = Watchdog(lambda: _time_out(outbox))
outbox = Outbox(OUT, watchdog.claim_piece, watchdog.release_piece)
watchdog.start()
watchdog.arm(monotonic() + 0.1)
"""


def stuck(program: str) -> bytes:
    done = subprocess.run([sys.executable, "-c", STUCK + program], capture_output=True, cwd=REPO, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def test_where_sqlite_does_not_come_back_the_watchdog_says_what_a_reply_lacks():
    assert frames_of(stuck("time.sleep(60)")) == [{"v": 1, "verdict": "timeout"}]
    sent = "outbox.send(framed(b'[[1],[2]]'), partial(_ending, 2, 7)); time.sleep(60)"
    assert frames_of(stuck(sent)) == [[[1], [2]], {"rows": 2, "rows_affected": 7, "stopped": "timeout", "message": None}]


def test_the_watchdog_says_nothing_behind_half_a_file_and_never_in_the_middle_of_a_piece():
    assert stuck("outbox.send(b'half', lambda failure: None); time.sleep(60)") == b"half"
    in_the_middle = """
def slow(descriptor, data):
    os.write(descriptor, data[:1])
    time.sleep(2)
    os.write(descriptor, data[1:])
import runner.frames
runner.frames.write_all = slow
outbox.send(b'piece', lambda failure: None)
os._exit(0)
"""
    assert stuck(in_the_middle) == b"piece"


# --- batch


def step(sql: str, args: Any = None, condition: str | None = None) -> dict[str, Any]:
    return {"sql": sql, "args": args, "if": condition}


def perform(tenant: TenantDatabase, *steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    return tenant.perform("batch", steps=steps, int64="number", **more)


def result(columns=None, rows=(), rows_affected=0, truncated=False, skipped=False):
    return {
        "columns": columns,
        "rows": [list(row) for row in rows],
        "rows_affected": rows_affected,
        "truncated": truncated,
        "skipped": skipped,
    }


SKIPPED = result(skipped=True)


def test_the_steps_of_a_batch_run_one_after_the_other(tenant):
    reply = perform(
        tenant,
        step("INSERT INTO t VALUES (?), (?)", [3, 4]),
        step("UPDATE t SET a = a * 10; SELECT :n AS n", {"n": 1.5}),
        step("SELECT a FROM t"),
        step(""),
    )
    assert reply == {
        "verdict": "batch",
        "results": [
            result(rows_affected=2),
            result(["n"], [[1.5]], 4),
            result(["a"], [[10], [20], [30], [40]]),
            result(),
        ],
    }
    assert tenant.rows("SELECT a FROM t") == [[10], [20], [30], [40]]


@pytest.mark.parametrize(
    ("before", "holding"),
    [
        (step("INSERT INTO t VALUES (3)"), {"changed", "no_rows"}),
        (step("UPDATE t SET a = 1 WHERE a = 99"), {"unchanged", "no_rows"}),
        (step("SELECT a FROM t"), {"unchanged", "rows"}),
        (step("SELECT a FROM t WHERE 0"), {"unchanged", "no_rows"}),
        (step("DELETE FROM t RETURNING a"), {"changed", "rows"}),
        (step("CREATE TABLE u(a)"), {"unchanged", "no_rows"}),
        (step("SELECT 1", None, "changed"), {"unchanged", "no_rows"}),
    ],
    ids=lambda value: value["sql"] + str(value["if"] or "") if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("condition", ["changed", "unchanged", "rows", "no_rows"])
def test_a_step_runs_if_what_it_asks_of_the_step_before_is_so(tenant, before, holding, condition):
    first = step("SELECT 1 WHERE 0")
    reply = perform(tenant, first, before, step("SELECT 7 AS seven", None, condition))
    assert reply["results"][2] == (result(["seven"], [[7]]) if condition in holding else SKIPPED)


def test_rows_for_which_there_was_no_room_were_returned_all_the_same(tenant):
    tenant.limited(max_rows=2)
    reply = perform(tenant, step("SELECT a FROM t"), step("SELECT a FROM t"), step("SELECT 1", None, "rows"))
    assert reply["results"] == [
        result(["a"], [[1], [2]]),
        result(["a"], [], truncated=True),
        result(["1"], [], truncated=True),
    ]


def test_the_bytes_of_an_answer_hold_for_all_steps_together(tenant):
    tenant.limited(max_result_bytes=1024)
    reply = perform(tenant, *[step("SELECT hex(zeroblob(100))")] * 8)
    assert [len(found["rows"]) for found in reply["results"]] == [1] * 4 + [0] * 4
    assert [found["truncated"] for found in reply["results"]] == [False] * 4 + [True] * 4


FAILING = {
    "an error of SQL": (step("INSERT INTO nowhere VALUES (1)"), "sql_error"),
    "a constraint": (step("INSERT INTO u VALUES (1)"), "sql_error"),
    "a constraint that rolls back": (step("INSERT OR ROLLBACK INTO u VALUES (1)"), "sql_error"),
    "too many values": (step("SELECT ?", [1, 2]), "args_invalid"),
    "what is refused": (step("ATTACH 'x' AS y"), "forbidden"),
    "BEGIN": (step("BEGIN"), "forbidden"),
    "COMMIT": (step("COMMIT"), "forbidden"),
    "ROLLBACK": (step("ROLLBACK"), "forbidden"),
    "END": (step("SELECT 1; END"), "forbidden"),
    "SAVEPOINT": (step("SAVEPOINT s"), "forbidden"),
    "RELEASE": (step("RELEASE s"), "forbidden"),
    "foreign keys too late": (step("PRAGMA foreign_keys = 1"), "forbidden"),
    "VACUUM": (step("VACUUM"), "sql_error"),
    "no room": (step(f"INSERT INTO t {COUNT.format(500)} SELECT zeroblob(100000) FROM c"), "storage_full"),
    "an endless query": (step("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT count(*) FROM c"), "timeout"),
    "a long text": (step(f"SELECT '{'x' * 100_000}'"), "too_complex"),
    "long names": (step(f"""SELECT 1 AS "{"x" * 90_000}" """), "sql_error"),
}


@pytest.mark.parametrize("why", FAILING)
def test_where_one_step_fails_nothing_is_changed_and_the_step_is_named(tenant, why):
    failing, verdict = FAILING[why]
    tenant.limited(max_result_bytes=1024 if why == "long names" else 1 << 20)
    tenant.run("CREATE TABLE u(a UNIQUE); INSERT INTO u VALUES (1)")
    before = tenant.path.read_bytes()
    asked = count()
    reply = perform(
        tenant, step("INSERT INTO t VALUES (3)"), failing, step("INSERT INTO t VALUES (4)"), expired=lambda: next(asked) > 100_000
    )
    assert (reply["verdict"], reply["step"], reply["failure"]["verdict"]) == ("step_failed", 1, verdict), reply
    assert reply.keys() == {"verdict", "step", "failure"}
    assert tenant.path.read_bytes() == before


def test_what_is_refused_in_a_batch_is_named(tenant):
    assert perform(tenant, step("COMMIT"))["failure"]["message"] == "COMMIT in a batch"
    assert perform(tenant, step("ROLLBACK TO s"))["failure"]["message"] == "SAVEPOINT ROLLBACK in a batch"


def test_a_foreign_key_that_is_violated_at_the_commit_is_the_last_steps_failure(tenant):
    tenant.run("CREATE TABLE p(id PRIMARY KEY); CREATE TABLE c(id REFERENCES p DEFERRABLE INITIALLY DEFERRED)")
    on = step("PRAGMA foreign_keys = ON")
    before = tenant.path.read_bytes()
    reply = perform(tenant, on, step("INSERT INTO c VALUES (1)"), step("SELECT 1"))
    assert (reply["step"], reply["failure"]) == (2, {"verdict": "sql_error", "message": "FOREIGN KEY constraint failed"})
    assert tenant.path.read_bytes() == before
    reply = perform(tenant, on, step("INSERT INTO c VALUES (1)"), step("INSERT INTO p VALUES (1)"))
    assert reply["verdict"] == "batch"
    assert perform(tenant, step("INSERT INTO c VALUES (2)"))["verdict"] == "batch"  # SQLite's default


def test_what_has_transactions_of_its_own_works_in_a_batch(tenant):
    reply = perform(
        tenant,
        step("CREATE VIRTUAL TABLE f USING fts5(a); CREATE VIRTUAL TABLE r USING rtree(id, x, y)"),
        step("INSERT INTO f VALUES ('one'), ('two'); INSERT INTO r VALUES (1, 2, 3)"),
        step("INSERT INTO f(f) VALUES ('rebuild'); INSERT INTO f(f) VALUES ('optimize')"),
        step("ALTER TABLE t ADD COLUMN b DEFAULT 5; ALTER TABLE t RENAME COLUMN a TO c; ANALYZE; REINDEX"),
        step("CREATE TRIGGER x AFTER INSERT ON t BEGIN SELECT RAISE(IGNORE); END; DROP TABLE r"),
        step("SELECT (SELECT count(*) FROM f WHERE f MATCH 'two'), max(b) FROM t"),
    )
    assert reply["verdict"] == "batch", reply
    assert reply["results"][-1]["rows"] == [[1, 5]]


def test_a_commit_that_finds_no_room_on_the_disk_changes_nothing(tenant, monkeypatch):
    monkeypatch.setattr(batch._Transaction, "commit", lambda self: 1 // 0)
    before = tenant.path.read_bytes()
    reply = perform(tenant, step("INSERT INTO t VALUES (3)"), step("INSERT INTO t VALUES (4)"))
    assert (reply["step"], reply["failure"]) == (1, {"verdict": "internal", "message": "ZeroDivisionError"})
    assert tenant.path.read_bytes() == before


any_step = st.sampled_from(
    [
        step("INSERT INTO t VALUES (7)"),
        step("UPDATE t SET a = a + 1"),
        step("DELETE FROM t WHERE a % 3 = 0"),
        step("SELECT count(*), sum(a) FROM t"),
        step("CREATE TABLE IF NOT EXISTS u(a UNIQUE)"),
        step("INSERT INTO u VALUES (1)"),
        step("DROP TABLE u"),
        step("PRAGMA user_version = 5"),
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(any_step, min_size=1, max_size=8))
def test_a_batch_does_what_its_steps_do_in_a_transaction_or_nothing_at_all(tmp_path_factory, steps):
    one, other = (TenantDatabase(tmp_path_factory.mktemp("batch")) for _ in range(2))
    for database in (one, other):
        database.run("CREATE TABLE t(a); INSERT INTO t VALUES (1), (2), (3)")
    before = one.path.read_bytes()
    reply = perform(one, *steps)
    script = other.run("; ".join(["BEGIN", *(each["sql"] for each in steps), "COMMIT"]))
    assert (reply["verdict"], script["verdict"]) in {("batch", "ok"), ("step_failed", "sql_error")}
    assert one.path.read_bytes() == other.path.read_bytes()
    assert (one.path.read_bytes() == before) or reply["verdict"] == "batch"


# --- schema


def test_a_schema_has_every_table_index_view_and_trigger(tenant):
    tenant.run(
        """
        CREATE TABLE people(id INTEGER PRIMARY KEY, name TEXT NOT NULL DEFAULT 'nobody', age INT,
                            twice INT GENERATED ALWAYS AS (age * 2)) STRICT;
        CREATE TABLE pairs(a, b, PRIMARY KEY (b, a)) WITHOUT ROWID;
        CREATE INDEX by_name ON people(lower(name), age) WHERE age > 3;
        CREATE UNIQUE INDEX [by "age"] ON people(age);
        CREATE VIEW everybody AS SELECT * FROM people;
        CREATE VIEW broken AS SELECT * FROM nowhere;
        CREATE TRIGGER watch AFTER INSERT ON people BEGIN SELECT 1; END;
        CREATE VIRTUAL TABLE notes USING fts5(a);
        CREATE TABLE "odd "" name"(x);
        INSERT INTO people(name, age) VALUES ('Ada', 36);
        INSERT INTO people(name, age) VALUES ('Bob', 4);
        CREATE TEMP TABLE not_here(a);
        CREATE TABLE counted(a INTEGER PRIMARY KEY AUTOINCREMENT)
        """
    )
    found = tenant.perform("schema")
    tables = {table["name"]: table for table in found["tables"]}
    assert list(tables) == sorted(tables)
    assert {name: table["kind"] for name, table in tables.items() if not name.startswith("notes_")} == {
        "counted": "table", "notes": "virtual", 'odd " name': "table", "pairs": "table", "people": "table", "t": "table",
    }  # fmt: skip
    assert {table["kind"] for name, table in tables.items() if name.startswith("notes_")} == {"shadow"}
    people = tables["people"]
    assert (people["strict"], people["without_rowid"], people["rows"]) == (True, False, 2)
    assert [tuple(column.values()) for column in people["columns"]] == [
        ("id", "INTEGER", False, None, 1, False),
        ("name", "TEXT", True, "'nobody'", 0, False),
        ("age", "INT", False, None, 0, False),
        ("twice", "INT", False, None, 0, True),
    ]
    assert tables["pairs"]["without_rowid"]
    assert [column["primary_key"] for column in tables["pairs"]["columns"]] == [2, 1]
    indexes = [tuple(index.values()) for index in found["indexes"] if not index["table"].startswith("notes_")]
    assert indexes == [
        ('by "age"', "people", True, "c", False, ["age"]),
        ("by_name", "people", False, "c", True, [None, "age"]),
        ("sqlite_autoindex_pairs_1", "pairs", True, "pk", False, ["b", "a"]),
    ]
    assert found["views"] == [{"name": "broken"}, {"name": "everybody"}]
    assert found["triggers"] == [{"name": "watch", "table": "people"}]
    assert found["page_bytes"] == 4096
    assert found["used_bytes"] == tenant.path.stat().st_size
    assert found["used_bytes"] + found["free_bytes"] == tenant.configuration.max_pages * 4096


def test_the_schema_has_the_form_of_the_golden_one(tenant):
    golden = json.loads((REPO / "tests" / "golden" / "op-reply-schema.json").read_bytes())
    tenant.run("CREATE INDEX i ON t(a); CREATE VIEW v AS SELECT 1; CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END")
    found = {"v": 1, **tenant.perform("schema")}
    assert found.keys() == golden.keys()
    for key in ("tables", "indexes", "views", "triggers"):
        assert [item.keys() for item in found[key]] == [golden[key][0].keys()], key
    assert found["tables"][0]["columns"][0].keys() == golden["tables"][1]["columns"][0].keys()


def test_an_empty_database_has_an_empty_schema(tmp_path):
    tenant = TenantDatabase(tmp_path)
    assert tenant.perform("schema") == {
        "verdict": "schema", "tables": [], "indexes": [], "views": [], "triggers": [],
        "page_bytes": 4096, "used_bytes": 0, "free_bytes": 2539 * 4096,
    }  # fmt: skip


def test_free_pages_are_free_room(tenant):
    tenant.run(f"INSERT INTO t {COUNT.format(300)} SELECT zeroblob(3000) FROM c; DELETE FROM t")
    found = tenant.perform("schema")
    assert found["used_bytes"] < tenant.path.stat().st_size / 10


def test_a_table_that_cannot_be_counted_has_no_number_of_rows(tenant):
    tenant.run("CREATE VIRTUAL TABLE f USING fts5(a)")
    with_other_modules(tenant, "UPDATE sqlite_schema SET sql = 'CREATE VIRTUAL TABLE f USING nowhere(a)' WHERE name = 'f'")
    found = {table["name"]: table for table in tenant.perform("schema")["tables"]}
    assert (found["f"]["rows"], found["f"]["columns"], found["t"]["rows"]) == (None, [], 2)


def with_other_modules(tenant: TenantDatabase, sql: str) -> None:
    connection = apsw.Connection(str(tenant.path))
    connection.execute(f"PRAGMA journal_mode=TRUNCATE; PRAGMA writable_schema=ON; {sql}").fetchall()
    connection.close()


def test_a_schema_that_is_longer_than_an_answer_is_refused(tenant):
    tenant.limited(max_result_bytes=1024)
    columns = ",".join("c" * 50 + str(number) for number in range(50))
    tables = ";".join(f"CREATE TABLE t{number}({columns})" for number in range(30))
    assert tenant.run(tables)["verdict"] == "ok"
    assert tenant.perform("schema") == {"verdict": "too_complex", "message": "the schema is longer than an answer may be"}


def test_a_schema_takes_no_longer_than_anything_else(tenant):
    asked = count()
    assert tenant.perform("schema", expired=lambda: next(asked) > 3) == {"verdict": "timeout"}


# --- export


def exported(tenant: TenantDatabase, **more: Any) -> bytes:
    stream = tenant.stream("export", **more)
    end = 4 + int.from_bytes(stream[:4], "big")
    head, content = json.loads(stream[4:end]), stream[end:]
    assert head == {"v": 1, "verdict": "file", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return content


def test_an_export_is_the_file_to_the_byte(tenant, tmp_path_factory):
    tenant.run(f"INSERT INTO t {COUNT.format(300)} SELECT randomblob(3000) FROM c")
    content = exported(tenant)
    assert content == tenant.path.read_bytes()
    assert len(content) > 1 << 19
    copy = tmp_path_factory.mktemp("export") / "copy.sqlite"
    copy.write_bytes(content)
    assert apsw.Connection(str(copy)).execute("SELECT count(*) FROM t").fetchall() == [(302,)]


def test_an_empty_database_is_exported_as_no_bytes(tmp_path):
    assert exported(TenantDatabase(tmp_path)) == b""


def leave_half_a_transaction(tenant: TenantDatabase) -> bytes:
    """What the file was before it. A process that is killed in its middle leaves the rest."""
    before = tenant.path.read_bytes()
    program = """
import os, sys, apsw
connection = apsw.Connection(sys.argv[1])
connection.execute("PRAGMA journal_mode=TRUNCATE; PRAGMA cache_size=2; PRAGMA cache_spill=1; BEGIN").fetchall()
connection.execute("UPDATE t SET a = a + 100").fetchall()
connection.execute("INSERT INTO t SELECT zeroblob(3000) FROM t, t AS u, t AS v, t AS w, t AS x").fetchall()
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", program, tenant.path], check=False)
    assert tenant.journal.stat().st_size > 512
    assert tenant.path.read_bytes() != before
    return before


def test_an_export_rolls_back_what_a_killed_run_left(tenant):
    before = leave_half_a_transaction(tenant)
    assert exported(tenant) == before
    assert not any(tenant.journal.read_bytes()[:8])


def test_a_damaged_file_is_not_exported_as_if_nothing_were(tenant):
    tenant.path.write_bytes(b"no database" * 1000)
    assert tenant.perform("export") == {"verdict": "damaged", "message": "file is not a database"}


def test_an_export_whose_time_is_over_before_it_begins_is_a_timeout(tenant):
    assert tenant.perform("export", expired=lambda: True) == {"verdict": "timeout"}


# --- import, accept, verify, salvage: their own tests have them; here is that they are reached


def test_an_import_is_answered_and_what_is_wrong_with_one_named(tenant):
    order = {"table": "p", "format": "csv", "columns": None, "header": True, "delimiter": ",", "null": None}
    assert tenant.perform("import", b"a,b\n1,x\n", **order) == {
        "verdict": "imported", "table": "p", "created": True, "columns": [["a", "INTEGER"], ["b", "TEXT"]], "rows": 1,
    }  # fmt: skip
    before = tenant.path.read_bytes()
    reply = tenant.perform("import", b"a,b\n1,x\n2\n", **order)
    assert (reply["verdict"], reply["line"]) == ("import_invalid", 3)
    assert tenant.perform("import", b"a,b\n1,x\n", **order, read_only=True)["verdict"] == "sql_error"
    assert tenant.path.read_bytes() == before


def test_a_file_is_accepted_verified_and_salvaged(tenant, tmp_path_factory):
    healthy = tenant.path.read_bytes()
    other = TenantDatabase(tmp_path_factory.mktemp("other"))
    accepted = other.perform("accept", healthy)
    assert accepted == {"verdict": "accepted", "size": len(healthy), "sha256": hashlib.sha256(healthy).hexdigest(), "converted": []}
    assert other.rows("SELECT a FROM t") == [[1], [2]]
    report = other.perform("verify", read_only=True)["report"]
    assert (report["kind"], report["ok"], report["findings"]) == ("verify", True, [])
    assert other.perform("accept", b"x" * 5000)["report"]["ok"] is False
    assert other.perform("salvage")["report"]["kind"] == "salvage"


def test_M10_a_report_is_never_longer_than_a_reply(tenant):
    tenant.limited(max_result_bytes=1024)
    tables = ";".join(
        f'CREATE TABLE "t{number}{chr(1) * 290}"(a); CREATE INDEX i{number} ON "t{number}{chr(1) * 290}"(a)'
        for number in range(150)
    )
    assert tenant.run(tables)["verdict"] == "ok"
    content = bytearray(tenant.path.read_bytes())
    for page in range(len(content) // 4096 // 2, len(content) // 4096):
        content[page * 4096] = 77
    tenant.path.write_bytes(content)
    for op in ("verify", "salvage"):
        stream = tenant.stream(op)
        assert len(stream) <= tenant.configuration.max_reply_bytes + 4
        report = json.loads(stream[4:])["report"]
        assert b"\\u0001" not in stream
    assert report["more_findings"]
    assert "\ufffd" in stream[4:].decode()


# --- reading alone


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t VALUES (3)", "UPDATE t SET a = 0", "DELETE FROM t", "CREATE TABLE u(a)", "DROP TABLE t", "VACUUM",
        "PRAGMA user_version = 3", "REINDEX; ANALYZE", "BEGIN IMMEDIATE; INSERT INTO t VALUES (3); COMMIT",
    ],
)  # fmt: skip
def test_a_read_only_run_refuses_every_write_in_sqlites_words(tenant, sql):
    before = tenant.path.read_bytes()
    refusal = {"verdict": "sql_error", "message": "attempt to write a readonly database"}
    assert tenant.run(sql, read_only=True) == refusal
    if not sql.startswith("BEGIN"):
        assert perform(tenant, step(sql), read_only=True)["verdict"] == "step_failed"
    assert tenant.path.read_bytes() == before
    assert tenant.journal.stat().st_size == 0


def test_a_read_only_run_reads_everything_and_has_temporary_tables(tenant):
    assert tenant.run("SELECT a FROM t", read_only=True)["rows"] == [[1], [2]]
    assert tenant.run("CREATE TEMP TABLE x AS SELECT a FROM t; INSERT INTO x VALUES (3); SELECT sum(a) FROM x", read_only=True) == {
        "verdict": "ok", "columns": ["sum(a)"], "rows": [[6]], "rows_affected": 1, "truncated": False,
    }  # fmt: skip
    assert rows(tenant, "SELECT a FROM t", read_only=True).rows == [[1], [2]]
    assert perform(tenant, step("SELECT a FROM t"), read_only=True)["results"][0]["rows"] == [[1], [2]]
    assert tenant.perform("schema", read_only=True)["tables"][0]["rows"] == 2
    assert exported(tenant, read_only=True) == tenant.path.read_bytes()


def test_an_empty_database_can_be_read(tmp_path):
    tenant = TenantDatabase(tmp_path)
    assert tenant.run("SELECT 1", read_only=True)["rows"] == [[1]]
    assert tenant.run("CREATE TABLE t(a)", read_only=True)["message"] == "attempt to write a readonly database"
    assert exported(tenant, read_only=True) == b""


@pytest.mark.parametrize("op", ["sql", "rows", "batch", "schema", "export"])
def test_a_read_only_run_that_finds_half_a_transaction_says_so_until_a_plain_run_has_settled_it(tenant, op):
    before = leave_half_a_transaction(tenant)
    left = tenant.path.read_bytes(), tenant.journal.read_bytes()
    keys = {"rows": {"sql": "SELECT 1", "args": None, "int64": "number"}, "batch": {"steps": [step("SELECT 1")], "int64": "number"}}

    def read() -> bytes:
        if op == "sql":
            return json.dumps(tenant.run("SELECT 1", read_only=True)).encode()
        return tenant.stream(op, read_only=True, **keys.get(op, {}))

    assert b'"unsettled"' in read()
    assert (tenant.path.read_bytes(), tenant.journal.read_bytes()) == left
    assert tenant.run("SELECT 1")["verdict"] == "ok"
    assert tenant.path.read_bytes() == before
    assert b'"unsettled"' not in read()


def test_damage_is_damage_when_it_is_only_read(tenant):
    tenant.path.write_bytes(b"no database" * 1000)
    assert tenant.run("SELECT 1", read_only=True) == {"verdict": "damaged", "message": "file is not a database"}


def test_readers_share_the_file_and_keep_every_writer_away(tenant):
    path = str(tenant.path)
    first, second = held(path, True), held(path, True)
    with pytest.raises(BlockingIOError):
        held(path, False)
    for descriptor in (first, second):
        os.close(descriptor)
    writer = held(path, False)
    with pytest.raises(BlockingIOError):
        held(path, True)
    os.close(writer)


# --- the request and the answer, as a process has them


ANSWERING = """
import sys
from runner.answer import OUT, Clock, Exit, answer, read_request, reply_to
from runner.frames import Outbox
from runner.operations import perform_on_a_foreign_file
from tests.runner_database import CONFIGURATION
clock, outbox = Clock(60.0), Outbox(OUT)
def run(asked, expired):
    if sys.argv[1] == "upload":
        return b"%d:%b" % (len(asked.upload), asked.upload[:4] + asked.upload[-4:])
    return perform_on_a_foreign_file(asked, CONFIGURATION, expired, outbox, sys.argv[1])
answer(reply_to(read_request(CONFIGURATION, clock), run, clock.expired, outbox), Exit.ANSWERED)
"""


def answered(request: dict[str, Any], behind: bytes, what: str = "upload") -> subprocess.CompletedProcess[bytes]:
    payload = json.dumps({"v": 1, **request}).encode()
    stream = len(payload).to_bytes(4, "big") + payload + behind
    return subprocess.run([sys.executable, "-c", ANSWERING, what], input=stream, capture_output=True, cwd=REPO, timeout=60)


@pytest.mark.parametrize("length", [0, 1, 4000, 5000, 3_000_000])
def test_an_upload_is_taken_to_its_last_byte_and_no_further(length):
    upload = os.urandom(length)
    done = answered({"op": "accept", "upload": length}, upload + b"more")
    assert done.stdout[4:] == b"%d:%b" % (length, upload[:4] + upload[-4:])


def test_an_upload_that_is_too_long_is_refused_before_it_is_read():
    most = 10 << 20
    (reply,) = frames_of(answered({"op": "accept", "upload": most + 1}, b"").stdout)
    assert reply == {"v": 1, "verdict": "request_invalid", "message": f"an upload of {most + 1} bytes; {most} are allowed"}


def test_a_request_whose_upload_ends_early_gets_no_answer():
    done = answered({"op": "accept", "upload": 10}, b"123456789")
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


@pytest.fixture
def foreign(tmp_path: Path) -> str:
    for name in ("db.sqlite", "db.sqlite-journal"):
        (tmp_path / name).touch()
    return str(tmp_path / "db.sqlite")


def test_a_foreign_file_is_verified_and_salvaged(tenant, foreign, tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    content = tenant.path.read_bytes()
    request = {"upload": len(content)}
    (reply,) = frames_of(answered({"op": "verify_file", **request}, content, foreign).stdout)
    assert (reply["verdict"], reply["report"]["kind"], reply["report"]["ok"]) == ("report", "verify", True)
    for name in ("db.sqlite", "db.sqlite-journal"):
        (folder / name).touch()
    stream = answered({"op": "salvage_file", **request}, content, str(folder / "db.sqlite")).stdout
    size = json.loads(stream[4 : 4 + int.from_bytes(stream[:4], "big")])["report"]["size"]
    report, head = frames_of(stream[:-size])
    assert (report["verdict"], report["report"]["kind"], report["report"]["ok"]) == ("report", "salvage", True)
    assert head == {"v": 1, "verdict": "file", "size": size, "sha256": hashlib.sha256(stream[-size:]).hexdigest()}


@pytest.mark.parametrize("op", ["schema", "export", "verify", "salvage"])
def test_on_a_foreign_file_nothing_else_is_done(foreign, op):
    (reply,) = frames_of(answered({"op": op}, b"", foreign).stdout)
    assert reply == {"v": 1, "verdict": "request_invalid", "message": f"{op} is not done here"}


@pytest.mark.parametrize("op", ["verify_file", "salvage_file"])
def test_no_other_runner_takes_a_foreign_file(tenant, op):
    assert tenant.perform(op, b"content") == {"verdict": "request_invalid", "message": f"{op} is not done here"}


def test_a_reader_that_is_gone_does_not_hold_the_end_up():
    gone = """
import signal
reading, writing = os.pipe()
os.close(reading)
outbox = Outbox(writing, watchdog.claim_piece, watchdog.release_piece)
try:
    outbox.send(b"piece", lambda failure: None)
except OSError:
    watchdog.claim_answer()
    os._exit(0)
"""
    assert stuck(gone) == b""


# --- no file can be opened any more


LOADED = """
import json, sys
import runner.main, runner.zygote
print(json.dumps(sorted(name for name in sys.modules if name.startswith("runner."))))
"""


def test_all_that_an_operation_can_need_is_loaded_before_the_confinement():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, cwd=REPO, check=True)
    there = {f"runner.{path.stem}" for path in (REPO / "runner").glob("*.py")}
    assert there - {*json.loads(done.stdout)} == {"runner.__init__", "runner.__main__"}
