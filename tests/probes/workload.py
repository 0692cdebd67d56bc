"""A broad piece of honest work, done under the full confinement: a system call that it needs and does not have ends it."""

from __future__ import annotations

import ast  # noqa: F401 -- a traceback's formatting imports these two when no file can be opened any more
import json
import os
import time
import tokenize  # noqa: F401
import traceback
from typing import TYPE_CHECKING

import apsw

if TYPE_CHECKING:
    from attempts import Scene

NUMBERS = "with recursive n(i) as (select 1 union all select i + 1 from n where i < 20000) "
WITHOUT_END = "with recursive n(i) as (select 1 union all select i + 1 from n) "


def connect() -> apsw.Connection:
    connection = apsw.Connection("/data/db.sqlite", flags=apsw.SQLITE_OPEN_READWRITE, vfs="unix-none")
    # Exclusive locking makes SQLite clear a journal that a killed process left behind where it would otherwise remove it.
    for pragma in ("locking_mode=exclusive", "journal_mode=truncate", "synchronous=full", "temp_store=memory", "cache_size=-2000"):
        connection.execute(f"pragma {pragma}").fetchall()
    return connection


def expect(error: type[BaseException], connection: apsw.Connection, sql: str) -> None:
    try:
        connection.execute(sql).fetchall()
    except error:
        return
    raise OSError(95, f"{error.__name__} did not come: {sql}")


def run_the_workload(scene: Scene) -> None:
    apsw.hard_heap_limit(48 << 20)
    connection = connect()
    connection.execute("create table t(a integer primary key, b, c); create index i on t(b); create virtual table f using fts5(x)")
    connection.execute(NUMBERS + "insert into t select i, hex(randomblob(8)), random() from n")
    connection.execute("insert into f select b from t limit 5000; insert into f(f) values ('optimize')")
    connection.execute("select * from f where x match 'a*' order by rank").fetchall()
    connection.execute("create virtual table r using rtree(id, a, b); insert into r values (1, 2, 3)")
    connection.execute("update t set c = b where a % 3 = 0; delete from t where a % 5 = 0")
    connection.execute("begin; insert into t(b) values (1); savepoint s; delete from t; rollback to s; rollback")
    connection.execute("vacuum; analyze; reindex; pragma integrity_check").fetchall()
    connection.execute("select * from t order by c, b desc").fetchall()
    connection.execute("create temp table z as select * from t; create index temp.zi on z(b); drop table z")
    connection.execute("select datetime('now', 'localtime'), current_timestamp, sqlite_version()").fetchall()
    connection.execute("alter table t add column d default 7; alter table t rename column d to e; alter table t drop column e")
    connection.execute(
        "with w as (select a, sum(a) over (order by b) from t) select count(*), json_group_array(a) from w"
    ).fetchall()
    expect(apsw.NoMemError, connection, WITHOUT_END + "select count(*) from (select i, randomblob(1000) b from n order by b)")
    expect(apsw.Error, connection, "attach '/etc/passwd' as q; select * from q.sqlite_master")
    expect(apsw.Error, connection, "vacuum into '/data/copy'")
    expect(apsw.SQLError, connection, "select nothing from nowhere")
    expect(apsw.FullError, connection, "pragma max_page_count=1000; " + NUMBERS + "insert into t(b) select randomblob(9000) from n")
    connection.execute("pragma max_page_count=100000").fetchall()
    expect(apsw.IOError, connection, NUMBERS + "insert into t(b) select randomblob(9000) from n")  # RLIMIT_FSIZE
    deadline = time.monotonic() + 0.1
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
    expect(apsw.InterruptError, connection, WITHOUT_END + "select max(i) from n")
    connection.set_progress_handler(None)
    try:
        bytearray(1 << 46)
    except MemoryError:
        traceback.format_exc()
    connection.close()

    connection = connect()  # the files are as a second request finds them
    held = [" " * 100_000 for _ in range(300)]
    scene.told["rows"] = connection.execute("select count(*) from t").fetchall()[0][0]
    scene.told["random"] = connection.execute("select hex(randomblob(16))").fetchall()[0][0]
    scene.told["health"] = connection.execute("pragma integrity_check").fetchall()[0][0]
    connection.close()
    del held
    reply = json.dumps(["x" * 1000] * 1000).encode()
    scene.told["padding"] = len(reply)
    written = 0
    while written < len(reply):
        written += os.write(1, b" " * (len(reply) - written))  # blanks before the report, as long as the largest reply
