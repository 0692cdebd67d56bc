"""How a script runs: statements, arguments, counts, cuts, time, and what each failure is called."""

from __future__ import annotations

import json
import sys
import threading
from time import monotonic

import apsw
import pytest

from runner.database import open_database
from runner.execute import execute
from runner.wire import Request, VerdictError

from .runner_database import TenantDatabase

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
COUNT = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT {})"


@pytest.fixture
def tenant(tmp_path) -> TenantDatabase:
    database = TenantDatabase(tmp_path)
    assert database.run("CREATE TABLE t(a)")["verdict"] == "ok"
    return database


def ok(columns, rows, rows_affected=0, truncated=False):
    return {"verdict": "ok", "columns": columns, "rows": rows, "rows_affected": rows_affected, "truncated": truncated}


@pytest.mark.parametrize("sql", ["", " \n;;; ", "-- comment", "/* comment */", "/* open", ";-- a\n;"])
def test_an_empty_script_is_no_error(tenant, sql):
    assert tenant.run(sql) == ok(None, [])


def test_an_alter_table_that_looks_at_the_rows_has_no_result_of_its_own(tenant):
    assert tenant.run("CREATE TABLE u(v); ALTER TABLE u ADD COLUMN w CHECK (w > 0); ALTER TABLE u DROP COLUMN v") == ok(None, [])
    if apsw.sqlite_lib_version() >= "3.53":
        assert tenant.run("ALTER TABLE u ALTER COLUMN w SET NOT NULL") == ok(None, [])
    assert tenant.run("EXPLAIN ALTER TABLE u RENAME TO x")["columns"][:2] == ["addr", "opcode"]


def test_the_last_statement_with_a_row_set_is_the_result_even_if_it_is_empty(tenant):
    assert tenant.run("SELECT 1; SELECT 2 AS x WHERE 0; INSERT INTO t VALUES (1)") == ok(["x"], [], 1)
    assert tenant.run("SELECT 1 AS a, 2 AS a; CREATE TABLE u(x); -- end") == ok(["a", "a"], [[1, 2]])


@pytest.mark.parametrize(
    ("sql", "affected"),
    [
        ("INSERT INTO t VALUES (1),(2),(3)", 3),
        ("INSERT INTO t VALUES (1); INSERT INTO t VALUES (2); SELECT 1", 2),
        ("INSERT INTO t VALUES (1),(2); UPDATE t SET a = 0; DELETE FROM t", 6),
        ("INSERT INTO t VALUES (1),(2); DELETE FROM t WHERE a = 3; SELECT changes()", 2),
        ("INSERT INTO t VALUES (1); EXPLAIN DELETE FROM t", 1),
        ("INSERT INTO t VALUES (1) RETURNING a", 1),
        ("CREATE TABLE u AS SELECT 1; ALTER TABLE u ADD COLUMN b; ANALYZE; DROP TABLE u", 0),
        ("INSERT INTO t VALUES (1); VACUUM; SELECT * FROM t", 1),
        ("CREATE TRIGGER x AFTER INSERT ON t BEGIN DELETE FROM t WHERE a = 9; END; INSERT INTO t VALUES (9),(9),(9)", 3),
        ("CREATE VIRTUAL TABLE f USING fts5(a); DROP TABLE f", 0),
        ("CREATE VIRTUAL TABLE f USING fts5(a); BEGIN; INSERT INTO f VALUES ('x'),('y'); COMMIT", 2),
        ("CREATE VIEW v AS SELECT a FROM t", 0),
        ("PRAGMA user_version = 3", 0),
    ],
)
def test_rows_affected_are_those_of_the_scripts_own_writes(tenant, sql, affected):
    assert tenant.run(sql)["rows_affected"] == affected


def test_each_statement_commits_by_itself_and_what_ran_before_an_error_stays(tenant):
    reply = tenant.run("INSERT INTO t VALUES (1); INSERT INTO nowhere VALUES (1); INSERT INTO t VALUES (2)")
    assert reply == {"verdict": "sql_error", "message": "no such table: nowhere"}
    assert tenant.rows("SELECT a FROM t") == [[1]]


@pytest.mark.parametrize("sql", ["BEGIN; INSERT INTO t VALUES (1)", "SAVEPOINT s; INSERT INTO t VALUES (1)", "BEGIN"])
def test_a_transaction_left_open_is_rolled_back_and_said_so(tenant, sql):
    assert tenant.run(sql) == {"verdict": "sql_error", "message": "transaction left open; it was rolled back"}
    assert tenant.rows("SELECT count(*) FROM t") == [[0]]


def test_an_error_inside_a_transaction_rolls_it_back(tenant):
    assert tenant.run("BEGIN; INSERT INTO t VALUES (1); SELEC 1; COMMIT")["verdict"] == "sql_error"
    assert tenant.rows("SELECT count(*) FROM t") == [[0]]


def test_where_a_statement_ends_is_decided_by_sqlite(tenant):
    script = (
        "INSERT INTO t VALUES ('a;b'), (\";\"); /* ; */ CREATE TRIGGER x AFTER INSERT ON t BEGIN SELECT 1; SELECT 2; END;\n"
        "-- ; it's\nINSERT INTO t VALUES ('é;') ; SELECT a FROM t ;"
    ).replace('(";")', "(';')")
    assert tenant.rows(script) == [["a;b"], [";"], ["é;"]]


# Arguments


def test_a_list_is_used_up_across_statements(tenant):
    assert tenant.rows("INSERT INTO t VALUES (?), (?); DELETE FROM t WHERE a = ?; SELECT a, ? FROM t", [1, 2, 1, "x"]) == [[2, "x"]]


def test_an_object_is_offered_to_every_statement(tenant):
    assert tenant.rows("INSERT INTO t VALUES (:a), (@b); SELECT a, $a FROM t; -- end", {"a": 1, "b": 2}) == [[1, 1], [2, 1]]


def test_numbered_parameters_take_a_list(tenant):
    assert tenant.rows("SELECT ?2, ?1, ?2", [1, 2]) == [[2, 1, 2]]


@pytest.mark.parametrize(
    ("sql", "args"),
    [
        ("INSERT INTO t VALUES (?)", None),
        ("INSERT INTO t VALUES (?)", []),
        ("INSERT INTO t VALUES (?)", [1, 2]),
        ("INSERT INTO t VALUES (?); -- end", [1, 2]),
        ("INSERT INTO t VALUES (?); /* end", [1, 2]),
        ("INSERT INTO t VALUES (?)", {"a": 1}),
        ("INSERT INTO t VALUES (:a)", {"b": 1}),
        ("INSERT INTO t VALUES (:a)", {"a": 1, "b": 1}),
        ("INSERT INTO t VALUES (:a); ;; -- end", {"a": 1, "b": 1}),
        ("INSERT INTO t VALUES (1)", [1]),
        ("INSERT INTO t VALUES (1)", {"a": 1}),
        ("", [1]),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_the_statement_runs(tenant, sql, args):
    reply = tenant.run(sql, args)
    assert reply["verdict"] == "args_invalid"
    assert reply["message"]
    assert tenant.rows("SELECT count(*) FROM t") == [[0]]


def test_missing_values_of_a_later_statement_are_found_when_it_comes(tenant):
    assert tenant.run("INSERT INTO t VALUES (?); INSERT INTO t VALUES (?)", [1])["verdict"] == "args_invalid"
    assert tenant.rows("SELECT a FROM t") == [[1]]


# Cuts


def test_an_endless_query_is_cut_at_once(tenant):
    begun = monotonic()
    reply = tenant.run(f"{ENDLESS} SELECT x FROM c; INSERT INTO t VALUES (99)")
    assert (len(reply["rows"]), reply["truncated"], reply["rows_affected"]) == (10_000, True, 1)
    assert monotonic() - begun < 1
    assert tenant.rows("SELECT a FROM t") == [[99]]


def test_exactly_as_many_rows_as_allowed_are_not_truncated(tenant):
    reply = tenant.run(f"{COUNT.format(10_000)} SELECT x FROM c")
    assert (len(reply["rows"]), reply["truncated"]) == (10_000, False)


def test_a_result_is_cut_by_its_bytes(tenant):
    tenant.limited(max_result_bytes=4096)
    reply = tenant.run(f"{ENDLESS} SELECT x, 'text' FROM c")
    size = len(json.dumps(reply["rows"], separators=(",", ":")))
    assert reply["truncated"]
    assert 4096 - 30 < size <= 4096 + 2


def test_a_row_larger_than_the_result_leaves_none(tenant):
    assert tenant.run("SELECT printf('%.*c', 290000, 'x') AS a, zeroblob(300000), zeroblob(300000), zeroblob(300000)") == {
        **ok(None, [], truncated=True),
        "columns": ["a", "zeroblob(300000)", "zeroblob(300000)", "zeroblob(300000)"],
    }


def test_writes_of_a_returning_that_is_cut_are_complete_and_committed(tenant):
    reply = tenant.run(f"{COUNT.format(20_000)} INSERT INTO t SELECT x FROM c RETURNING a")
    assert (len(reply["rows"]), reply["truncated"], reply["rows_affected"]) == (10_000, True, 20_000)
    assert tenant.rows("SELECT count(*) FROM t") == [[20_000]]


def test_only_the_cut_of_the_last_row_set_is_told(tenant):
    assert tenant.run(f"{ENDLESS} SELECT x FROM c; SELECT 1 AS a") == ok(["a"], [[1]])


def test_columns_that_do_not_fit_into_a_reply_are_an_error(tenant):
    tenant.limited(max_result_bytes=1024)
    reply = tenant.run(f'SELECT 1 AS "{"x" * 90_000}"')
    assert reply == {"verdict": "sql_error", "message": "the names of the columns are too long"}


# Time


def test_the_deadline_stops_a_query_that_gives_no_rows(tenant):
    begun = monotonic()
    assert tenant.run(f"INSERT INTO t VALUES (1); {ENDLESS} SELECT count(*) FROM c", seconds=0.2) == {"verdict": "timeout"}
    assert monotonic() - begun < 2
    assert tenant.rows("SELECT a FROM t") == [[1]]


def test_an_interrupt_from_another_thread_is_a_timeout(tenant):
    interrupted = threading.Event()

    def watch(connection):
        if connection is not None:
            threading.Thread(target=lambda: [connection.interrupt() for _ in iter(lambda: interrupted.wait(0.01), True)]).start()

    try:
        assert tenant.run(f"{ENDLESS} SELECT count(*) FROM c", watch=watch) == {"verdict": "timeout"}
    finally:
        interrupted.set()


def test_a_deadline_that_has_passed_already_runs_nothing(tenant):
    assert tenant.run("INSERT INTO t VALUES (1)", seconds=-1) == {"verdict": "timeout"}
    assert tenant.rows("SELECT count(*) FROM t") == [[0]]


# Limits and failures


def test_the_quota_is_a_verdict_and_the_full_database_can_be_emptied(tenant):
    filling = f"{COUNT.format(2400)} INSERT INTO t SELECT randomblob(4000) FROM c"
    assert tenant.run(filling)["verdict"] == "ok"
    assert tenant.run(filling) == {"verdict": "storage_full"}
    assert tenant.rows("PRAGMA integrity_check; SELECT count(*) FROM t") == [[2400]]
    assert tenant.path.stat().st_size <= tenant.configuration.instance_bytes
    assert tenant.run("VACUUM")["verdict"] == "ok"
    assert tenant.run("DELETE FROM t")["rows_affected"] == 2400
    assert tenant.run("VACUUM")["verdict"] == "ok"
    assert tenant.path.stat().st_size < 64 * 1024


def test_memory_is_a_verdict(tenant):
    reply = tenant.run(f"{COUNT.format(100_000)} SELECT x FROM c ORDER BY x || zeroblob(1000)")
    assert reply == {"verdict": "memory_limit"}
    reply = tenant.run(f"CREATE TEMP TABLE x(a); {COUNT.format(100_000)} INSERT INTO x SELECT randomblob(1000) FROM c")
    assert reply == {"verdict": "memory_limit"}


def test_a_statement_with_too_long_a_program_is_told_from_want_of_memory(tenant):
    tenant.limited(sqlite_limits={**tenant.configuration.sqlite_limits, "VDBE_OP": 1000})
    rows = ",".join("(1,2,3,4,5)" for _ in range(1000))
    assert tenant.run(f"SELECT 1; VALUES {rows}; SELECT 2") == {
        "verdict": "too_complex",
        "message": "the program of a statement is too long",
    }
    assert (
        tenant.run("VALUES (?)" + ",(1,2)" * 0 + f" UNION ALL SELECT column1 FROM (VALUES {rows})", [1])["verdict"] == "too_complex"
    )


def test_long_sql_is_too_complex(tenant):
    assert tenant.run("SELECT '" + "x" * 100_000 + "'")["verdict"] == "too_complex"


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELEC 1", 'near "SELEC": syntax error'),
        ("SELECT " + "+".join("1" * 200), "Expression tree is too large (maximum depth 100)"),
        ("SELECT zeroblob(300001)", "string or blob too big"),
        ("SELECT 'a' LIKE '" + "a" * 101 + "'", "LIKE or GLOB pattern too complex"),
        (" UNION ALL ".join(["SELECT 1"] * 51), "too many terms in compound SELECT"),
        ("SELECT max(" + ",".join("1" * 33) + ")", "too many arguments on function max"),
        ("CREATE TABLE w(" + ",".join(f"c{i}" for i in range(101)) + ")", "too many columns on w"),
        ("SELECT ?251", "variable number must be between ?1 and ?250"),
        ("CREATE TABLE s(a INTEGER) STRICT; INSERT INTO s VALUES ('x')", "cannot store TEXT value in INTEGER column s.a"),
        ("CREATE TABLE u(a UNIQUE); INSERT INTO u VALUES (1),(1)", "UNIQUE constraint failed: u.a"),
        ("INSERT INTO t(rowid) VALUES ('x')", "datatype mismatch"),
        ("COMMIT", "cannot commit - no transaction is active"),
        ("SELECT readonly()", "no such function: readonly"),
        ("SELECT \0", None),
    ],
)
def test_sqlites_own_words_reach_the_caller(tenant, sql, message):
    reply = tenant.run(sql)
    if message is None:
        assert reply["verdict"] == "sql_error"
    else:
        assert reply == {"verdict": "sql_error", "message": message}


def test_a_trigger_that_calls_itself_ends(tenant):
    trigger = "CREATE TRIGGER x AFTER INSERT ON t BEGIN INSERT INTO t VALUES (1); END"
    reply = tenant.run(f"PRAGMA recursive_triggers = ON; {trigger}; INSERT INTO t VALUES (1)")
    assert reply["verdict"] == "sql_error"
    assert tenant.rows("SELECT count(*) FROM t") == [[0]]


def test_an_index_that_does_not_fit_its_content_is_the_tenants_error_and_no_damage(tenant):
    tenant.run("CREATE VIRTUAL TABLE f USING fts5(a, content='t'); INSERT INTO f(rowid, a) VALUES (1, 'x')")
    assert tenant.run("INSERT INTO f(f, rank) VALUES ('integrity-check', 1)")["verdict"] == "sql_error"


def test_text_that_is_not_utf8_is_handed_on_or_refused_but_never_a_defect(tenant):
    """The image's apsw hands it on; the released one cannot."""
    for sql, data in (("SELECT CAST(x'ff' AS TEXT)", "/w=="), ("SELECT char(55296)", "7aCA")):
        reply = tenant.run(sql)
        assert reply["verdict"] == "sql_error" or reply["rows"] == [[{"$text": data}]]
    reply = tenant.run("SELECT ?", ["\udcff"])
    assert reply["verdict"] == "args_invalid" or reply["rows"] == [[{"$text": "/w=="}]]


def test_integers_can_be_asked_for_as_strings(tenant):
    assert tenant.run("SELECT 9007199254740993, 1.0, '1', NULL", int64="string")["rows"] == [["9007199254740993", 1.0, "1", None]]


def test_an_exception_nobody_thought_of_is_internal_and_says_its_class_alone(tenant):
    database = open_database(tenant.configuration, lambda: False, str(tenant.path))

    def expired():
        raise LookupError("tenant's secret")

    with pytest.raises(VerdictError) as failure:
        execute(database, Request("SELECT 'tenant''s secret'", None, False), expired)
    database.close()
    assert (failure.value.verdict, failure.value.message) == ("internal", "LookupError")


def test_nothing_is_imported_or_opened_by_python_after_the_start_but_the_database(tmp_path):
    """After the confinement no file can be opened; an import that waits until it is needed would fail there."""
    import subprocess

    program = """
import sys, runner.main
from runner.execute import run_request
from runner.wire import Request, decode_request, encode_failure
from tests.runner_database import TenantDatabase
from pathlib import Path
tenant = TenantDatabase(Path(sys.argv[1]))
seen = []
def hear(event, args):
    if event == "import" or (event == "open" and args[0] != str(tenant.path)):
        seen.append((event, args))
sys.addaudithook(hear)
for sql, args in (("SELECT 1", None), ("SELEC", None), ("CREATE TABLE t(a); INSERT INTO t VALUES (?)", [1]), ("SELECT ?", None),
                  ("ATTACH 'x' AS y", None), ("VACUUM", None), ("SELECT cast(x'ff' as text), 1e999, x'00'", None), ("BEGIN", None),
                  ("SELECT :a", {"b": 1}), ("CREATE TABLE t(a)", None), ("SELECT zeroblob(400000)", None)):
    try:
        run_request(Request(sql, args, False), tenant.configuration, lambda: False, lambda _: None, str(tenant.path))
    except Exception as error:
        encode_failure(error.verdict, error.message)
try:
    decode_request(b'{"a":')
except Exception:
    pass
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
