"""Salvage: what comes back was committed, what SQLite can still read comes back too, and a file is never lost.

Debian's sqlite3 shell is no measure: its SQLite is built without `sqlite_dbpage`, and so `.recover` finds nothing in any file.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner import salvage as subject
from runner.image import rolled_back
from runner.salvage import recover, salvage
from runner.verify import report_of
from runner.wire import Verdict, VerdictError

from . import corpus
from .damage import BASES, KINDS, Damaged, Rows, base, damaged, open_bytes, readable, rows_of
from .runner_database import CONFIGURATION, TenantDatabase

REPO = Path(__file__).resolve().parent.parent
KEYS = {"kind", "ok", "size", "sha256", "page_size", "pages", "findings", "more_findings", "tables", "unassigned", "objects_lost"}
CODES = {"header", "truncated", "appended", "schema", "page", "overflow", "freelist", "index", "constraint", "content", "other"}
DERIVED = ("words_data", "words_idx", "words_docsize", "words_config", "boxes_node", "boxes_parent", "boxes_rowid")
"""Tables of virtual tables that SQLite makes anew from others."""


def never() -> bool:
    return False


@pytest.fixture
def tenant(tmp_path) -> TenantDatabase:
    return TenantDatabase(tmp_path)


def recovered_rows(data: bytes) -> tuple[dict[str, Any], Rows]:
    """The report, and what is in the tables afterwards."""
    report, new = recover(data, CONFIGURATION, never)
    if not report["ok"]:
        return report, {}
    return report, rows_of(open_bytes(data if new is None else new))


def is_held_to_account(table: str) -> bool:
    return not table.startswith(("sqlite_", "lost_and_found")) and table not in DERIVED


def still_readable(data: bytes) -> Rows:
    """What plain questions to SQLite give, from either end of each table, up to the first error."""
    found: Rows = {}
    try:
        connection = open_bytes(data)
        for name, rows in rows_of(connection).items():
            found[name] = rows | Counter(readable(connection, f'SELECT rowid, * FROM "{name}" ORDER BY rowid DESC'))
    except (apsw.Error, UnicodeDecodeError):
        pass
    return found


def assert_documented(report: dict[str, Any]) -> None:
    assert report.keys() == KEYS
    assert len(report["findings"]) <= 100
    for finding in report["findings"]:
        assert finding.keys() == {"code", "page", "object", "message"}
        assert finding["code"] in CODES
        assert finding["page"] is None or type(finding["page"]) is int
        assert len(finding["message"]) <= 300
        assert len(finding["object"] or "") <= 300
    for table in report["tables"]:
        assert table.keys() == {"name", "kept", "lost", "lost_is_exact"}
        assert table["kept"] >= 0
        assert table["lost"] >= 0
    assert all(lost.keys() == {"type", "name"} for lost in report["objects_lost"])
    assert len(json.dumps(report).encode()) < 1 << 20


def complaints(case: Damaged, report: dict[str, Any], ours: Rows, theirs: Rows) -> list[str]:
    """What is not as it should be."""
    said = []
    for table, rows in ours.items():
        if is_held_to_account(table) and (extra := rows - case.base.rows.get(table, Counter())):
            said.append(f"{case.name}: {len(extra)} rows in {table} were never committed: {str(list(extra)[:1])[:100]}")
    for table, rows in theirs.items():
        if is_held_to_account(table):
            committed = rows & case.base.rows.get(table, Counter())
            if less := committed - ours.get(table, Counter()):
                said.append(f"{case.name}: {len(less)} rows of {table} that can still be read: {str(list(less)[:1])[:100]}")
    for table in report["tables"]:
        name = table["name"]
        if not report["ok"] or not is_held_to_account(name):
            continue
        if sum(ours[name].values()) != table["kept"]:
            said.append(f"{case.name}: {name} has {sum(ours[name].values())} rows, the report counts {table['kept']}")
        committed_rows = sum(case.base.rows.get(name, Counter()).values())
        if table["kept"] + table["lost"] > committed_rows:
            said.append(f"{case.name}: {name} kept {table['kept']} and lost {table['lost']} of {committed_rows}")
        if table["lost_is_exact"] and table["kept"] + table["lost"] != committed_rows:
            said.append(f"{case.name}: {name} kept {table['kept']} and lost exactly {table['lost']} of {committed_rows}")
    return said


@pytest.mark.parametrize("name", BASES)
def test_D9_what_comes_back_was_committed_and_is_no_less_than_sqlite_can_still_read(name):
    said = []
    for case in damaged(name, range(1)):
        report, ours = recovered_rows(case.data)
        assert_documented(report)
        said += complaints(case, report, ours, still_readable(case.data))
    assert not said, "\n".join(said)


@pytest.mark.parametrize("name", BASES)
def test_the_control_a_healthy_database_is_left_alone(name):
    data = base(name).data
    report, new = recover(data, CONFIGURATION, never)
    assert report["ok"]
    assert not report["findings"]
    if base(name).page_size == 4096:
        assert new is None
    else:  # it cannot be served with another page size: all of it comes back with the right one
        assert new is not None
        assert {table: rows for table, rows in rows_of(open_bytes(new)).items() if table in base(name).rows} == base(name).rows


def case_of(name: str, kind: str, seed: int = 0) -> bytes:
    data = KINDS[kind](random.Random(seed), base(name))
    assert data is not None
    return data


def made(script: str, page_size: int = 4096) -> bytes:
    connection = apsw.Connection(":memory:")
    connection.execute(f"PRAGMA page_size = {page_size}; {script}").fetchall()
    data = connection.serialize("main")
    connection.close()
    return data


def pages_of(data: bytes, table: str, kind: str = "leaf") -> list[int]:
    """The pages of one table, as SQLite names them."""
    rows = open_bytes(data).execute("SELECT pageno FROM dbstat WHERE name = ? AND pagetype = ? ORDER BY pageno", (table, kind))
    return [number for (number,) in rows]


def without_page(data: bytes, number: int, size: int = 4096) -> bytes:
    return data[: (number - 1) * size] + bytes(size) + data[number * size :]


SERIES = "WITH RECURSIVE s(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM s WHERE i < {}) "
TWO_TABLES = f"""
    CREATE TABLE a(id INTEGER PRIMARY KEY, t TEXT);
    CREATE TABLE b(x TEXT, y TEXT, z TEXT);
    {SERIES.format(1000)} INSERT INTO a SELECT i, printf('%.*c', 50, 'a') FROM s;
    {SERIES.format(1000)} INSERT INTO b SELECT 'b' || i, i, printf('%.*c', 30, 'b') FROM s;
"""


def test_the_pages_below_a_lost_one_find_their_table_again():
    data = made(TWO_TABLES)
    (top,) = pages_of(data, "a", "internal")
    report, rows = recovered_rows(without_page(data, top))
    assert rows == rows_of(open_bytes(data))
    assert report["unassigned"] == 0
    assert [table for table in report["tables"] if table["lost"]] == []
    assert not next(table for table in report["tables"] if table["name"] == "a")["lost_is_exact"]


def test_rows_that_could_be_of_two_tables_are_kept_apart():
    twins = TWO_TABLES.replace("b(x TEXT, y TEXT, z TEXT)", "b(id INTEGER PRIMARY KEY, t TEXT)").replace(
        "SELECT 'b' || i, i, printf('%.*c', 30, 'b')", "SELECT i, printf('%.*c', 30, 'b')"
    )
    data = made(twins)
    for table in ("a", "b"):
        (top,) = pages_of(data, table, "internal")
        data = without_page(data, top)
    report, rows = recovered_rows(data)
    assert not rows["a"]
    assert not rows["b"]
    assert report["unassigned"] == 2000
    assert sum(rows["lost_and_found"].values()) == 2000


def test_without_a_schema_all_rows_are_kept_apart_and_what_was_deleted_is_not():
    data = base("plain").data
    report, _ = recovered_rows(bytes(4096) + data[4096:])
    committed = base("plain").rows
    assert report["unassigned"] == sum(sum(rows.values()) for name, rows in committed.items() if not name.startswith("sqlite_"))
    kept = open_bytes(recover(bytes(4096) + data[4096:], CONFIGURATION, never)[1] or b"")
    assert [row[1] for row in kept.execute("PRAGMA table_info(lost_and_found)")][:5] == ["rootpgno", "pgno", "nfield", "id", "c0"]
    found = set(kept.execute("SELECT id, c1, c2 FROM lost_and_found WHERE nfield = 4 AND c0 IS NULL"))
    assert found == {(row[0], row[2], row[3]) for row in committed["people"]}


def test_where_not_a_row_can_be_read_the_old_file_stays():
    data = made("CREATE TABLE t(a); INSERT INTO t VALUES (1), (2); CREATE TABLE empty(a)")
    (leaf,) = pages_of(data, "t")
    report, new = recover(without_page(data, leaf), CONFIGURATION, never)
    assert (report["ok"], new) == (False, None)
    assert report["findings"][-1]["message"] == "not a row can be read"
    (leaf,) = pages_of(data, "empty")
    report, new = recover(without_page(data, leaf), CONFIGURATION, never)  # the control: two rows are kept
    assert report["ok"]
    assert new is not None


def test_D9_deleted_rows_stay_deleted_when_freelist_and_trees_are_damaged():
    name = "plain"
    data = case_of(name, "trunk-noise")
    for top in base(name).parts["interior"]:
        data = without_page(data, top)
    report, rows = recovered_rows(data)
    for table, found in rows.items():
        if is_held_to_account(table):
            assert not found - base(name).rows[table]
    assert report["unassigned"] == 0
    assert any("may have been deleted" in finding["message"] for finding in report["findings"])


def test_an_index_tells_exactly_how_many_rows_are_lost():
    script = TWO_TABLES + "CREATE INDEX a_t ON a(t);"
    data = made(script)
    gone = pages_of(data, "a")[3]
    left = Counter(row[0] for row in rows_of(open_bytes(data))["a"])
    report, rows = recovered_rows(without_page(data, gone))
    table = next(table for table in report["tables"] if table["name"] == "a")
    assert table == {"name": "a", "kept": len(rows["a"]), "lost": len(left) - len(rows["a"]), "lost_is_exact": True}
    assert table["lost"] > 0


def test_what_belongs_to_the_file_is_kept():
    script = """
        PRAGMA encoding = 'UTF-16be'; PRAGMA user_version = 42; PRAGMA application_id = -7;
        CREATE TABLE t(id INTEGER PRIMARY KEY AUTOINCREMENT, v TEXT);
        INSERT INTO t VALUES (5, 'é'), (90, CAST(x'd800' AS TEXT)); DELETE FROM t WHERE id = 90;
        INSERT INTO t VALUES (7, CAST(x'dfff0041' AS TEXT));
        CREATE TABLE old(a, b); INSERT INTO old VALUES (1, 2); ALTER TABLE old ADD COLUMN c DEFAULT 'later';
        CREATE UNIQUE INDEX old_a ON old(a); CREATE VIEW v AS SELECT * FROM t; ANALYZE;
        CREATE TRIGGER r AFTER INSERT ON t BEGIN DELETE FROM old; END;
    """
    data = made(script)
    report, new = recover(data[:21] + b"\0\0\0" + data[24:], CONFIGURATION, never)
    assert report["ok"]
    assert new is not None
    assert not report["objects_lost"]
    kept, was = open_bytes(new), open_bytes(data)
    for question in (
        "SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_stat4' ORDER BY name",
        "SELECT id, CAST(v AS BLOB) FROM t ORDER BY id",
        "SELECT * FROM old",
        "SELECT * FROM sqlite_sequence",
        "SELECT * FROM sqlite_stat1 ORDER BY tbl",
        "PRAGMA encoding",
        "PRAGMA user_version",
        "PRAGMA application_id",
    ):
        assert kept.execute(question).fetchall() == was.execute(question).fetchall(), question


def test_rows_that_break_a_constraint_are_counted():
    data = made(
        "CREATE TABLE t(a INT CHECK (a > 5), b TEXT); PRAGMA ignore_check_constraints = 1;"
        "INSERT INTO t VALUES (1, 'x'), (NULL, 'y');"
        "PRAGMA writable_schema = 1; UPDATE sqlite_schema SET sql = 'CREATE TABLE t(a INT NOT NULL CHECK (a > 5), b TEXT)'"
    )
    report, rows = recovered_rows(data)
    assert {finding["code"] for finding in report["findings"]} == {"constraint"}
    assert report["tables"] == [{"name": "t", "kept": 1, "lost": 1, "lost_is_exact": True}]
    assert list(rows["t"]) == [(1, 1, "x")]


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE t AS SELECT 1 AS a",
        "DROP TABLE keep",
        "DELETE FROM keep",
        "ATTACH '/tmp/x' AS x",
        "CREATE TABLE t(a); DELETE FROM keep",
        "CREATE TABLE temp.t(a)",
        "CREATE TRIGGER t AFTER INSERT ON keep BEGIN DELETE FROM keep; END",
        "PRAGMA user_version = 9",
    ],
)
def test_D10_a_schema_runs_nothing_but_what_it_may_hold(sql):
    healthy = made("CREATE TABLE keep(a); INSERT INTO keep VALUES (1); CREATE TABLE t(a); INSERT INTO t VALUES (2);")
    connection = open_bytes(healthy)
    connection.execute("PRAGMA writable_schema = 1")
    connection.execute("UPDATE sqlite_schema SET sql = ? WHERE name = 't'", (sql,))
    report, new = recover(connection.serialize("main"), CONFIGURATION, never)
    assert report["ok"]
    kept = open_bytes(new or b"")
    assert kept.execute("SELECT a FROM keep").fetchall() == [(1,)]
    assert kept.execute("PRAGMA user_version").fetchall() == [(0,)]
    assert kept.execute("SELECT name FROM sqlite_schema").fetchall() == [("keep",), ("lost_and_found",)]
    assert report["unassigned"] == 1
    assert {"type": "table", "name": "t"} in report["objects_lost"]


@pytest.mark.parametrize("part", ["content", "data", "idx", "docsize"])
def test_a_full_text_index_is_made_again(part):
    data = base("search").data
    report, new = recover(without_page(data, pages_of(data, f"words_{part}")[-1]), CONFIGURATION, never)
    assert report["ok"]
    assert not report["objects_lost"]
    kept = open_bytes(new or b"")
    found = kept.execute("SELECT rowid, title FROM words WHERE words MATCH 'some' ORDER BY rowid").fetchall()
    assert found == kept.execute("SELECT id, c0 FROM words_content ORDER BY id").fetchall()
    assert len(found) == 449 if part != "content" else 0 < len(found) < 449


@pytest.mark.parametrize("part", ["node", "parent", "rowid"])
def test_an_r_tree_is_made_again(part):
    data = base("search").data
    report, new = recover(without_page(data, pages_of(data, f"boxes_{part}")[-1]), CONFIGURATION, never)
    assert report["ok"]
    assert not report["objects_lost"]
    kept = Counter(open_bytes(new or b"").execute("SELECT * FROM boxes"))
    committed = Counter(row[1:] for row in base("search").rows["boxes"])
    assert not kept - committed
    assert kept == committed if part != "node" else kept


def test_a_virtual_table_that_keeps_no_rows_leaves_what_it_had():
    data = made("CREATE VIRTUAL TABLE f USING fts5(x, content=''); INSERT INTO f(rowid, x) VALUES (1, 'one'), (2, 'two');")
    report, new = recover(without_page(data, pages_of(data, "f_docsize")[0]), CONFIGURATION, never)
    assert report["ok"]
    assert report["objects_lost"] == [{"type": "table", "name": "f"}]
    assert (
        open_bytes(new or b"").execute("SELECT count(*) FROM f_data").fetchall()
        == open_bytes(data).execute("SELECT count(*) FROM f_data").fetchall()
    )


def test_a_list_of_sequences_without_its_tables_is_named_as_lost():
    data = made("CREATE TABLE t(id INTEGER PRIMARY KEY AUTOINCREMENT); INSERT INTO t VALUES (5); CREATE TABLE u(a);")
    connection = open_bytes(data)
    connection.execute("PRAGMA writable_schema = 1; UPDATE sqlite_schema SET sql = 'CREATE TABLE t(' WHERE name = 't'").fetchall()
    report, _ = recover(connection.serialize("main"), CONFIGURATION, never)
    assert report["ok"]
    assert report["objects_lost"] == [{"type": "table", "name": "t"}, {"type": "table", "name": "sqlite_sequence"}]
    assert report["unassigned"] == 1


# --- the file


def damage_of(tenant: TenantDatabase, data: bytes) -> bytes:
    tenant.path.write_bytes(data)
    return data


def test_the_file_is_replaced_and_can_be_served(tenant):
    damage_of(tenant, case_of("plain", "leaf-noise"))
    assert tenant.run("SELECT count(*) FROM people, notes, pairs")["verdict"] == "damaged"
    assert salvage(str(tenant.path), tenant.configuration, never)["ok"]
    assert tenant.journal.read_bytes() == b""
    assert tenant.rows("PRAGMA integrity_check") == [["ok"]]
    assert tenant.rows("INSERT INTO people(name) VALUES ('new') RETURNING name") == [["new"]]


def test_a_healthy_file_is_not_touched(tenant):
    damage_of(tenant, base("plain").data)
    before = tenant.path.stat()
    report = salvage(str(tenant.path), tenant.configuration, never)
    assert report["ok"]
    assert report["tables"] == report["findings"] == []
    assert tenant.path.stat().st_mtime_ns == before.st_mtime_ns
    assert tenant.path.read_bytes() == base("plain").data


def test_what_does_not_fit_leaves_the_old_bytes(tenant):
    tenant.limited(instance_bytes=1 << 20)
    data = made(f"CREATE TABLE t(a); {SERIES.format(400)} INSERT INTO t SELECT randomblob(3500) FROM s;")
    damaged_bytes = damage_of(tenant, without_page(data, 50))
    report = salvage(str(tenant.path), tenant.configuration, never)
    assert not report["ok"]
    assert "does not fit" in report["findings"][-1]["message"]
    assert tenant.path.read_bytes() == damaged_bytes


def test_when_the_time_is_over_the_old_bytes_are_there(tenant):
    data = damage_of(tenant, case_of("plain", "interior-noise"))
    asked = iter(range(10**9))
    for limit in (0, 3, 10, 30, 100):
        start = next(asked)
        with pytest.raises(VerdictError) as refused:
            salvage(str(tenant.path), tenant.configuration, lambda until=start + limit: next(asked) >= until)
        assert refused.value.verdict is Verdict.TIMEOUT
        assert tenant.path.read_bytes() == data
        assert tenant.journal.read_bytes() == b""


def hot_journal(tenant: TenantDatabase) -> bytes:
    """Leave the journal of a transaction that is not finished, and its pages in the file; what the file was before."""
    damage_of(tenant, base("plain").data)
    writer = apsw.Connection(str(tenant.path))
    writer.execute("PRAGMA journal_mode = PERSIST; PRAGMA cache_size = 1; PRAGMA synchronous = FULL; BEGIN").fetchall()
    writer.execute("UPDATE people SET name = hex(randomblob(40)); DELETE FROM notes")
    content, journal = tenant.path.read_bytes(), tenant.journal.read_bytes()
    writer.close(True)
    tenant.path.write_bytes(content)
    tenant.journal.write_bytes(journal)
    return content


def test_a_journal_is_rolled_back_as_sqlite_does_it(tenant):
    content = hot_journal(tenant)
    assert content != base("plain").data
    ours = rolled_back(content, tenant.journal.read_bytes())
    assert report_of(ours, CONFIGURATION, never)["ok"]
    assert salvage(str(tenant.path), tenant.configuration, never)["findings"] == []
    assert tenant.rows("SELECT count(*) FROM notes") == [[700]]  # SQLite has rolled it back now
    assert tenant.path.read_bytes() == ours


class _KilledError(BaseException):
    pass


@pytest.mark.parametrize("hot", [False, True], ids=["settled", "after another that was killed"])
def test_D9_killed_at_any_write_the_old_file_or_the_new_one_is_there(tenant, monkeypatch, hot):
    if hot:  # another salvage was killed here
        undo = subject.undoing(case_of("plain", "leaf-noise"), 10 << 20)
        assert undo is not None
        tenant.path.write_bytes(base("plain").data[:9000])
        tenant.journal.write_bytes(undo)
    else:
        damage_of(tenant, case_of("plain", "interior-noise"))
    start, start_journal = tenant.path.read_bytes(), tenant.journal.read_bytes()
    old = rolled_back(start, start_journal)
    assert not report_of(old, CONFIGURATION, never)["ok"]
    new = recover(old, CONFIGURATION, never)[1]
    assert new is not None
    outcomes = Counter()
    for stop in range(100):
        tenant.path.write_bytes(start)
        tenant.journal.write_bytes(start_journal)
        calls = iter(range(10**6))

        def dying(call, stop=stop, calls=calls):
            def die_or(*args):
                if next(calls) == stop:
                    raise _KilledError
                return call(*args)

            return die_or

        with monkeypatch.context() as patch:
            for name in ("write", "ftruncate", "fsync"):
                patch.setattr(subject.os, name, dying(getattr(subject.os, name)))
            try:
                salvage(str(tenant.path), tenant.configuration, never)
            except _KilledError:
                pass
            else:
                break
        found = rolled_back(tenant.path.read_bytes(), tenant.journal.read_bytes())
        assert found in (old, new)
        outcomes[found == new] += 1
    assert outcomes[False] > 8
    assert tenant.path.read_bytes() == new


def test_sqlite_rolls_back_the_journal_of_a_salvage(tenant):
    old = case_of("plain", "leaf-noise")
    undo = subject.undoing(old, 10 << 20)
    assert undo is not None
    tenant.path.write_bytes(b"half of something else" * 1000)
    tenant.journal.write_bytes(undo)
    connection = apsw.Connection(str(tenant.path))
    connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    connection.close()
    assert tenant.path.read_bytes() == old


# --- anything at all


def assert_never_lost(data: bytes) -> None:
    report, new = recover(data, CONFIGURATION, never)
    assert_documented(report)
    assert (report, new) == recover(data, CONFIGURATION, never)
    if new is not None:
        assert report["ok"]
        assert report_of(new, CONFIGURATION, never)["ok"]
    verified = report_of(data, CONFIGURATION, never)
    assert_documented(verified)
    assert verified == report_of(data, CONFIGURATION, never)
    assert verified["sha256"] == report["sha256"]


_FLIPS = st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(("keyed", "search", "small")), _FLIPS)
def test_whatever_bytes_are_changed_there_is_a_report_and_no_row_of_another_time(name, flips):
    data = bytearray(made("CREATE TABLE t(a PRIMARY KEY, b); INSERT INTO t VALUES (1, 2);") if name == "small" else base(name).data)
    for place, byte in flips:
        data[place % len(data)] = byte
    assert_never_lost(bytes(data))


@settings(max_examples=20, deadline=None)
@given(st.binary(max_size=3000), st.sampled_from((b"", base("keyed").data[:100], base("keyed").data[:4096])))
def test_whatever_a_file_holds_there_is_a_report(content, before):
    assert_never_lost(before + content)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_pages_in_the_place_of_others_bring_nothing_back(moves, dice):
    data = bytearray(base("keyed").data)
    pages = len(data) // 4096
    for source, target in moves:
        source, target = source % pages * 4096, target % pages * 4096
        data[target : target + 4096] = data[source : source + 4096] if dice.random() < 0.7 else dice.randbytes(4096)
    assert_never_lost(bytes(data))


CORPUS_PROGRAM = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (700 << 20, 700 << 20))
sys.path.insert(0, sys.argv[1])
from tests.test_runner_salvage import assert_never_lost
from tests import corpus
count = 0
for case in corpus._databases():
    assert_never_lost(case.database)
    count += 1
print(json.dumps({"count": count, "seconds": time.process_time(), "kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def test_every_malformed_database_of_the_corpus_has_its_report():
    corpus.require()
    environment = {**os.environ, "MAYFLY_CORPUS": str(corpus.FOLDER)}
    program = [sys.executable, "-c", CORPUS_PROGRAM, str(REPO)]
    done = subprocess.run(program, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    assert figures["count"] > 1000
