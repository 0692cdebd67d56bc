"""Opening: every switch holds, damage is named, and a killed runner leaves the state before or after."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from runner.database import hold, open_database, prepare
from runner.execute import run_prepared
from runner.failures import verdict_of
from runner.policy import CONFIG_FLAGS, LIMITS, MODULES
from runner.wire import Request, Verdict, VerdictError

from .runner_database import TenantDatabase


@pytest.fixture
def tenant(tmp_path) -> TenantDatabase:
    return TenantDatabase(tmp_path)


@pytest.fixture
def opened(tenant):
    database = open_database(tenant.configuration, lambda: False, str(tenant.path))
    yield database
    database.close()


PRAGMAS = {
    "page_size": 4096,
    "journal_mode": "truncate",
    "max_page_count": 2539,
    "temp_store": 2,
    "synchronous": 2,
    "mmap_size": 0,
    "cell_size_check": 1,
    "trusted_schema": 0,
    "foreign_keys": 0,
    "recursive_triggers": 0,
    "locking_mode": "exclusive",
}


def test_every_switch_holds(opened):
    connection = opened.connection
    for flag, value in CONFIG_FLAGS:
        assert connection.config(flag, -1) == value, apsw.mapping_db_config[flag]
    for name, value in opened.configuration.sqlite_limits.items():
        if hasattr(apsw, f"SQLITE_LIMIT_{name}"):
            assert connection.limit(getattr(apsw, f"SQLITE_LIMIT_{name}")) == value, name
    assert apsw.hard_heap_limit(-1) == opened.configuration.heap_bytes
    connection.authorizer = None
    assert {name: connection.pragma(name) for name in PRAGMAS} == PRAGMAS
    modules = {name for (name,) in connection.execute("SELECT name FROM pragma_module_list")}
    assert {name for name in modules if not name.startswith(("pragma_", "json"))} == MODULES


def test_what_sqlite_would_do_by_itself_makes_no_difference(tenant, monkeypatch):
    """With other defaults than this SQLite was compiled with, each pragma is still what is asked for."""

    def others(connection: apsw.Connection) -> None:
        for name, value in {"synchronous": "OFF", "mmap_size": 1 << 20, "temp_store": "FILE", "cell_size_check": 0}.items():
            connection.execute(f"PRAGMA {name}={value}").fetchall()

    monkeypatch.setattr(apsw, "connection_hooks", [others])
    database = open_database(tenant.configuration, lambda: False, str(tenant.path))
    database.connection.authorizer = None
    assert {name: database.connection.pragma(name) for name in PRAGMAS} == PRAGMAS
    database.close()


def test_the_table_of_limits_knows_every_limit_of_sqlite():
    assert {name.removeprefix("SQLITE_LIMIT_") for name in apsw.mapping_limits if isinstance(name, str)} <= LIMITS


def test_W3_a_limit_that_does_not_hold_is_a_refusal(tenant):
    tenant.limited(sqlite_limits={**tenant.configuration.sqlite_limits, "TRIGGER_DEPTH": 2**31 - 1})
    assert tenant.run("SELECT 1")["verdict"] == "unconfined"


def test_a_missing_file_is_not_made(tenant):
    tenant.path.unlink()
    with pytest.raises(apsw.CantOpenError):
        open_database(tenant.configuration, lambda: False, str(tenant.path))
    assert not tenant.path.exists()


def test_a_link_in_place_of_the_file_is_not_followed(tenant, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "db.sqlite"
    elsewhere.touch()
    tenant.path.unlink()
    tenant.path.symlink_to(elsewhere)
    assert tenant.run("CREATE TABLE t(a)")["verdict"] == "internal"
    assert elsewhere.stat().st_size == 0


def test_a_file_that_is_no_database_is_damaged(tenant):
    tenant.path.write_bytes(b"not a database\n" * 1000)
    assert tenant.run("SELECT 1") == {"verdict": "damaged", "message": "file is not a database"}


def test_M12_a_broken_page_is_damaged(tenant):
    tenant.run("CREATE TABLE t(a); INSERT INTO t SELECT randomblob(300000)")
    with tenant.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)
    assert tenant.run("SELECT * FROM t")["verdict"] == "damaged"


def test_a_file_with_another_page_size_is_damaged(tenant):
    connection = apsw.Connection(str(tenant.path))
    connection.pragma("page_size", 65536)
    connection.execute("CREATE TABLE t(a)")
    connection.close()
    tenant.journal.touch()
    assert tenant.run("SELECT 1") == {"verdict": "damaged", "message": "page_size is 65536, not 4096"}


def test_a_file_in_wal_mode_goes_back_to_a_mode_that_makes_no_files_or_is_refused(tenant):
    connection = apsw.Connection(str(tenant.path))
    connection.execute("CREATE TABLE t(a); PRAGMA journal_mode=WAL; INSERT INTO t VALUES (1)")
    connection.close()
    tenant.journal.touch()
    reply = tenant.run("SELECT a FROM t")
    assert reply["verdict"] in {"ok", "damaged"}, reply


def ordinary(tenant):
    tenant.run("CREATE TABLE t(a); INSERT INTO t VALUES (1)")


def no_database(tenant):
    tenant.path.write_bytes(b"not a database\n" * 1000)


def newer_format(tenant):
    ordinary(tenant)
    overwrite(tenant, 18, b"\x03")


def wal_mode(tenant):
    ordinary(tenant)
    overwrite(tenant, 18, b"\x02\x02")


def other_page_size(tenant):
    connection = apsw.Connection(str(tenant.path))
    connection.execute("PRAGMA page_size=512; CREATE TABLE t(a)").fetchall()
    connection.close()
    tenant.journal.touch()


def reserved_bytes(tenant):
    connection = apsw.Connection(str(tenant.path))
    connection.reserve_bytes(reserve=32)
    connection.execute("CREATE TABLE t(a); VACUUM").fetchall()
    connection.close()
    tenant.journal.touch()


def utf_16(tenant):
    connection = apsw.Connection(str(tenant.path))
    connection.execute("PRAGMA encoding='UTF-16le'; PRAGMA auto_vacuum=FULL; CREATE TABLE t(a)").fetchall()
    connection.close()
    tenant.journal.touch()


def too_many_pages(tenant):
    ordinary(tenant)
    overwrite(tenant, 11 << 20, b"x" * 4096)
    overwrite(tenant, 28, (tenant.path.stat().st_size // 4096).to_bytes(4, "big"))


def as_if_never_changed(tenant):
    """Change counter, size, freelist and schema cookie are what an empty file's are."""
    ordinary(tenant)
    overwrite(tenant, 24, bytes(20))


def hot_journal(tenant):
    ordinary(tenant)
    connection = apsw.Connection(str(tenant.path))
    connection.execute("PRAGMA journal_mode=TRUNCATE; PRAGMA cache_size=1; PRAGMA cache_spill=1; BEGIN").fetchall()
    connection.execute(
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 90) INSERT INTO t SELECT zeroblob(4000) FROM c"
    )
    content = tenant.path.read_bytes(), tenant.journal.read_bytes()
    connection.close(True)
    tenant.path.write_bytes(content[0])
    tenant.journal.write_bytes(content[1])
    assert len(content[0]) > 1 << 16
    assert content[1][0]


def overwrite(tenant, offset, content):
    with tenant.path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize(
    "lay_out",
    [lambda _: None, ordinary, no_database, newer_format, wal_mode, other_page_size, reserved_bytes, utf_16, too_many_pages,
     as_if_never_changed, hot_journal],
)  # fmt: skip
def test_a_connection_that_was_prepared_on_an_empty_file_meets_the_tenants_as_if_it_had_opened_it(tmp_path, lay_out):
    outcomes = []
    for run in (TenantDatabase.run, run_on_a_prepared_connection):
        folder = tmp_path / run.__name__
        folder.mkdir()
        tenant = TenantDatabase(folder)
        lay_out(tenant)
        replies = [run(tenant, sql) for sql in ("SELECT * FROM t", "CREATE TABLE u(b); INSERT INTO u VALUES (2)", "VACUUM")]
        outcomes.append((replies, tenant.path.read_bytes(), tenant.journal.read_bytes()))
    assert outcomes[0] == outcomes[1]


def run_on_a_prepared_connection(tenant, sql):
    aside = tenant.path.rename(tenant.path.with_name("aside"))
    tenant.path.touch()
    database = prepare(tenant.configuration, str(tenant.path))
    links = {path.name: path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    (descriptor,) = (int(name) for name, link in links.items() if link == tenant.path)
    aside.rename(tenant.path)
    opened = os.open(tenant.path, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(opened, descriptor, inheritable=False)
    os.close(opened)
    hold(descriptor)
    try:
        reply = run_prepared(Request(sql, None, False), database, lambda: False)
    except Exception as error:
        verdict = verdict_of(error, None, 0)
        return {"verdict": verdict.verdict, **({"message": verdict.message} if verdict.message else {})}
    finally:
        database.close()
    return {name: value for name, value in json.loads(reply).items() if name != "v"}


def test_M13_a_file_that_is_held_is_kept_from_every_other_runner_until_it_is_closed(tenant):
    first = prepare(tenant.configuration, str(tenant.path))
    first.hold_the_file()
    second = prepare(tenant.configuration, str(tenant.path))
    with pytest.raises(BlockingIOError):
        second.hold_the_file()
    first.close()
    second.hold_the_file()
    second.close()


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from tests.runner_database import TenantDatabase
tenant = TenantDatabase(Path({folder!r}))
tenant.limited(instance_bytes=10 << 20)
import runner.database
def small_cache(database, expired):  # pages reach the file before the commit, so the journal is hot
    database.connection.pragma("cache_size", 10)
runner.database.READING = (*runner.database.READING[:-1], ("small cache", small_cache), runner.database.READING[-1])
steps = 0
import runner.execute
def expired():
    global steps
    steps += 1
    if steps == {at}:
        os.write(1, str(os.path.getsize({folder!r} + "/db.sqlite-journal")).encode())
        os.kill(os.getpid(), 9)
    return False
from runner.wire import Request
runner.execute.run_request(
    Request("UPDATE t SET a = randomblob(4000)", None, False), tenant.configuration, expired, lambda _: None, str(tenant.path)
)
"""


@pytest.mark.parametrize("at", [4, 6, 8])
def test_M7_a_runner_killed_in_the_middle_of_a_write_leaves_the_state_before_it(tenant, at):
    count = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 2000)"
    assert tenant.run(f"CREATE TABLE t(a); {count} INSERT INTO t SELECT zeroblob(4000) FROM c")["verdict"] == "ok"
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = KILLED.format(here=here, folder=str(tenant.path.parent), at=at)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert int(done.stdout) > 4096
    assert tenant.journal.stat().st_size > 4096
    assert tenant.rows("PRAGMA integrity_check; SELECT count(*), total(a = zeroblob(4000)) FROM t") == [[2000, 2000.0]]
    assert tenant.run("INSERT INTO t VALUES (1)")["verdict"] == "ok"
    assert tenant.journal.stat().st_size == 0


FILE_SIZE = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from tests.runner_database import TenantDatabase
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
tenant = TenantDatabase(Path({folder!r}))
count = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 1000)"
print(tenant.run(f"CREATE TABLE t(a); {{count}} INSERT INTO t SELECT randomblob(4000) FROM c")["verdict"])
print(tenant.rows("PRAGMA integrity_check; SELECT count(*) FROM t"))
"""


def test_the_kernels_cap_on_a_file_is_the_same_verdict_as_sqlites_own(tenant):
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = FILE_SIZE.format(here=here, folder=str(tenant.path.parent))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["storage_full", "[[0]]"]


FULL_HOST = """
import sys, subprocess
from pathlib import Path
sys.path.insert(0, {here!r})
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", {folder!r}], check=True)
from tests.runner_database import TenantDatabase
tenant = TenantDatabase(Path({folder!r}))
count = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 2000)"
print(tenant.run(f"CREATE TABLE t(a); {{count}} INSERT INTO t SELECT randomblob(4000) FROM c")["verdict"])
print(tenant.rows("PRAGMA integrity_check; SELECT count(*) FROM t"), tenant.journal.stat().st_size)
"""


def test_a_host_without_room_is_told_from_a_full_instance(tenant):
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = FULL_HOST.format(here=here, folder=str(tenant.path.parent))
    unshare = shutil.which("unshare")
    assert unshare
    command = [unshare, "--mount", "--map-root-user", "--", sys.executable, "-c", program]  # the mount ends with the process
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["host_full", "[[0]] 0"]


def test_asking_whether_the_host_is_full_leaves_a_wanted_journal_alone(tenant):
    database = open_database(tenant.configuration, lambda: False, str(tenant.path))
    database.close()
    tenant.journal.write_bytes(b"wanted")
    assert not database.host_is_full()
    assert tenant.journal.read_bytes() == b"wanted"


def test_a_database_that_another_process_holds_is_a_defect_of_ours(tenant):
    tenant.run("CREATE TABLE t(a)")
    connection = apsw.Connection(str(tenant.path))
    connection.execute("BEGIN EXCLUSIVE")
    assert tenant.run("SELECT * FROM t") == {"verdict": "internal", "message": "BlockingIOError"}
    connection.close()


def test_opening_refuses_with_a_verdict_of_the_closed_set(tenant):
    tenant.limited(sqlite_limits={**tenant.configuration.sqlite_limits, "COLUMN": 2**31 - 1})
    with pytest.raises(VerdictError) as refusal:
        open_database(tenant.configuration, lambda: False, str(tenant.path))
    assert refusal.value.verdict is Verdict.UNCONFINED
    assert "SQLITE_LIMIT_COLUMN" in refusal.value.message
