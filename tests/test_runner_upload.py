"""Uploads: which databases from outside are served, which are refused or reported, and that the same bytes get the same answer."""

from __future__ import annotations

import errno
import hashlib
import json
from collections import Counter
from pathlib import Path
from time import monotonic

import apsw
import pytest

from runner.database import open_database
from runner.upload import accept
from runner.wire import Verdict, VerdictError

from . import corpus
from .runner_database import TenantDatabase
from .sealed_process import run_sealed, seal

PAGE_SIZE, WRITE_VERSION, READ_VERSION, RESERVED, SCHEMA_FORMAT = 16, 18, 19, 20, 44
PAGES = 2539
"""As many as fit into the quota."""

ROWS = """
    CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT);
    WITH RECURSIVE i(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM i LIMIT 1000) INSERT INTO t SELECT i, 'naïve ' || i FROM i;
    CREATE INDEX x ON t(b);
    PRAGMA application_id = 77;
    PRAGMA user_version = 9;
"""
MANY_COLUMNS = f"CREATE TABLE w({','.join(f'c{number}' for number in range(101))})"


@pytest.fixture
def tenant(tmp_path):
    (tmp_path / "volume").mkdir()
    return TenantDatabase(tmp_path / "volume")


@pytest.fixture
def made(tmp_path):
    """Makes a database file outside, by SQLite without any of our settings."""

    def make(sql, reserved=0, **pragmas):
        path = tmp_path / "outside.db"
        connection = apsw.Connection(str(path))
        connection.reserve_bytes("main", reserved)
        for name, value in pragmas.items():
            connection.execute(f"PRAGMA {name} = {value}").fetchall()
        connection.execute(sql).fetchall()
        connection.close()
        content = path.read_bytes()
        path.unlink()
        return content

    return make


def put(tenant, upload, expired=lambda: False):
    try:
        return accept(str(tenant.path), upload, tenant.configuration, expired)
    finally:
        assert tenant.journal.stat().st_size == 0


def accepted(content, *converted):
    return {
        "verdict": "accepted",
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "converted": list(converted),
    }


def patched(content, **places):
    changed = bytearray(content)
    for name, value in places.items():
        changed[globals()[name]] = value
    return bytes(changed)


KEPT_AS_THEY_ARE = {
    "ours": {},
    "utf-16le": {"encoding": "'UTF-16le'"},
    "utf-16be": {"encoding": "'UTF-16be'"},
    "auto_vacuum": {"auto_vacuum": 1},
    "incremental vacuum": {"auto_vacuum": 2},
    "reserved bytes": {"reserved": 32},
    "legacy schema format": {"legacy_file_format": "on"},
}


@pytest.mark.parametrize("how", KEPT_AS_THEY_ARE)
def test_a_healthy_file_is_served_and_stays_the_same_to_the_byte(tenant, made, how):
    upload = made(ROWS, **KEPT_AS_THEY_ARE[how])
    assert put(tenant, upload) == accepted(upload)
    assert tenant.path.read_bytes() == upload
    assert tenant.rows("SELECT count(*), max(b), min(a) FROM t") == [[1000, "naïve 999", 1]]
    assert tenant.path.read_bytes() == upload
    assert tenant.rows("PRAGMA application_id") + tenant.rows("PRAGMA user_version") == [[77], [9]]
    assert tenant.run("DELETE FROM t WHERE a > 100; INSERT INTO t VALUES (5000, 'new'); VACUUM")["verdict"] == "ok"
    exported = tenant.path.read_bytes()
    assert put(tenant, exported) == accepted(exported)
    assert tenant.rows("SELECT count(*) FROM t") == [[101]]


def test_nothing_is_an_empty_database(tenant, made):
    put(tenant, made(ROWS))
    assert put(tenant, b"") == accepted(b"")
    assert tenant.rows("SELECT * FROM sqlite_schema") == []


def test_what_was_there_before_is_gone_its_journal_too(tenant, made):
    """A hot journal would be rolled back into the upload: the control lets it."""
    upload = made(ROWS)
    healthy = next(case for case in corpus.damaged_copies(7, 1) if case.journal)
    tenant.journal.write_bytes(healthy.journal)
    tenant.path.write_bytes(upload)
    assert tenant.run("SELECT 1")["verdict"] != "ok" or tenant.path.read_bytes() != upload
    tenant.journal.write_bytes(healthy.journal)
    assert put(tenant, upload) == accepted(upload)
    assert tenant.path.read_bytes() == upload


@pytest.mark.parametrize("page_size", [512, 1024, 2048, 8192, 16384, 32768, 65536])
def test_pages_of_another_size_are_converted(tenant, made, page_size):
    longer_than_a_request_handles = """
        CREATE TABLE w(v); INSERT INTO w VALUES (zeroblob(400000));
        CREATE TABLE k(v PRIMARY KEY) WITHOUT ROWID; INSERT INTO k VALUES (zeroblob(400000));
    """
    upload = made(ROWS + longer_than_a_request_handles, page_size=page_size, encoding="'UTF-16be'")
    answer = put(tenant, upload)
    content = tenant.path.read_bytes()
    assert answer == accepted(content, "page_size")
    assert int.from_bytes(content[PAGE_SIZE : PAGE_SIZE + 2], "big") == 4096
    assert tenant.rows("PRAGMA application_id") + tenant.rows("PRAGMA user_version") + tenant.rows("PRAGMA encoding") == [
        [77],
        [9],
        ["UTF-16be"],
    ]
    assert tenant.rows("SELECT count(*), max(b) FROM t") == [[1000, "naïve 999"]]
    assert put(tenant, content) == accepted(content)
    assert put(tenant, upload) == answer


def test_a_database_that_fills_its_quota_can_be_converted(tenant, made):
    upload = made("CREATE TABLE t(a); INSERT INTO t VALUES (randomblob(10300000))", page_size=512)
    assert put(tenant, upload)["converted"] == ["page_size"]
    assert tenant.rows("SELECT count(*) FROM t") == [[1]]


@pytest.mark.parametrize("versions", [(2, 2), (1, 2), (2, 1)])
def test_a_file_in_wal_mode_is_written_in_rollback_mode(tenant, made, versions):
    write, read = versions
    upload = patched(made(ROWS, journal_mode="wal"), WRITE_VERSION=write, READ_VERSION=read)
    content = patched(upload, WRITE_VERSION=1, READ_VERSION=1)
    assert put(tenant, upload) == accepted(content, "journal_mode")
    assert tenant.path.read_bytes() == content
    assert tenant.rows("SELECT count(*) FROM t") == [[1000]]
    assert put(tenant, made(ROWS, page_size=8192, journal_mode="wal"))["converted"] == ["journal_mode", "page_size"]


@pytest.mark.parametrize(
    ("magic", "what"), [("377f0682", "write-ahead log"), ("377f0683", "write-ahead log"), ("d9d505f920a163d7", "rollback journal")]
)
def test_a_log_or_journal_is_refused_by_its_name_and_nothing_is_written(tenant, made, magic, what):
    before = made(ROWS)
    put(tenant, before)
    answer = put(tenant, bytes.fromhex(magic) + bytes(4000))
    assert answer["verdict"] == "file_refused"
    assert what in answer["message"]
    assert tenant.path.read_bytes() == before


def test_a_file_larger_than_the_quota_allows_is_refused_and_one_page_less_is_not(tenant, made):
    def filled(pages):
        content = made(f"CREATE TABLE t(a); INSERT INTO t VALUES (zeroblob({(pages - 4) * 4092}))")
        return content, len(content) // 4096

    upload, pages = filled(PAGES)
    upload, pages = filled(PAGES + PAGES - pages)
    assert pages == PAGES
    assert put(tenant, upload) == accepted(upload)
    upload, pages = filled(PAGES + 4)
    assert pages > PAGES
    assert put(tenant, upload) == {"verdict": "file_refused", "message": f"it takes more than {PAGES} pages of 4096 bytes"}


def test_a_file_that_outgrows_the_quota_in_pages_of_ours_is_refused(tenant, made):
    tables = "".join(f"CREATE TABLE t{number}(a);" for number in range(2600))
    upload = made(f"BEGIN; {tables} COMMIT", page_size=512)
    assert len(upload) < 2 << 20
    assert put(tenant, upload)["message"] == f"it takes more than {PAGES} pages of 4096 bytes"


BEYOND_A_LIMIT = {
    "too many columns on w": MANY_COLUMNS,
    "string or blob too big": f"CREATE TABLE w(a DEFAULT '{'x' * 110_000}')",
    "Expression tree is too large": f"CREATE TABLE w(a CHECK (a{'+1' * 101}))",
}


@pytest.mark.parametrize("page_size", [4096, 512])
@pytest.mark.parametrize("words", BEYOND_A_LIMIT)
def test_a_schema_beyond_the_limits_is_refused_in_the_words_of_sqlite_and_is_no_damage(tenant, made, words, page_size):
    answer = put(tenant, made(BEYOND_A_LIMIT[words], page_size=page_size))
    assert answer["verdict"] == "file_refused"
    assert words in answer["message"]
    tenant.limited(sqlite_limits={**tenant.configuration.sqlite_limits, "COLUMN": 101, "SQL_LENGTH": 120_000, "EXPR_DEPTH": 110})
    assert put(tenant, made(BEYOND_A_LIMIT[words], page_size=page_size))["verdict"] == "accepted"


SERVED_BUT_FOR = {
    "CREATE VIEW v AS SELECT load_extension('x') FROM t": ("SELECT * FROM v", "sql_error"),  # unsafe use
    "CREATE TRIGGER r AFTER INSERT ON t BEGIN SELECT load_extension('x'); END": ("INSERT INTO t(b) VALUES (1)", "forbidden"),
    "CREATE VIEW v AS SELECT nowhere(a) FROM t": ("SELECT * FROM v", "sql_error"),
    "CREATE TRIGGER r AFTER INSERT ON t BEGIN DELETE FROM nowhere; END": ("INSERT INTO t(b) VALUES (1)", "sql_error"),
    "PRAGMA writable_schema = on;"
    "INSERT INTO sqlite_schema VALUES ('table', 'u', 'u', 0, 'CREATE VIRTUAL TABLE u USING nowhere(a)')": (
        "SELECT * FROM u",
        "sql_error",
    ),
    "CREATE VIRTUAL TABLE u USING fts4(a); INSERT INTO u VALUES ('one two')": ("SELECT * FROM u", "sql_error"),
    "CREATE TABLE u(a); INSERT INTO u VALUES (zeroblob(300001))": ("SELECT a FROM u", "sql_error"),
}


@pytest.mark.parametrize("page_size", [4096, 1024])
@pytest.mark.parametrize("sql", SERVED_BUT_FOR)
def test_what_cannot_be_used_here_is_no_reason_to_refuse_the_rest(tenant, made, sql, page_size):
    assert put(tenant, made(ROWS + sql, page_size=page_size))["verdict"] == "accepted"
    use, verdict = SERVED_BUT_FOR[sql]
    assert tenant.run(use)["verdict"] == verdict
    assert tenant.rows("SELECT count(*) FROM t") == [[1000]]


@pytest.mark.parametrize("page_size", [4096, 1024])
def test_the_virtual_tables_that_are_here_are_served(tenant, made, page_size):
    sql = """
        CREATE VIRTUAL TABLE f USING fts5(x); INSERT INTO f VALUES ('one two'), ('three');
        CREATE VIRTUAL TABLE r USING rtree(id, x0, x1); INSERT INTO r VALUES (1, 2, 3);
    """
    assert put(tenant, made(sql, page_size=page_size))["verdict"] == "accepted"
    assert tenant.rows("SELECT x FROM f('two')") == [["one two"]]
    assert tenant.rows("SELECT id FROM r WHERE x0 > 1") == [[1]]


DAMAGED = {
    "no database": lambda content: b"hello" * 1000,
    "an image": lambda content: b"\x89PNG\r\n\x1a\n" + bytes(5000),
    "the magic alone": lambda content: content[:16],
    "the header alone": lambda content: content[:100],
    "half of it": lambda content: content[: len(content) // 2],
    "a byte less": lambda content: content[:-1],
    "a byte more": lambda content: content + b"\0",
    "no page size": lambda content: patched(content, PAGE_SIZE=3),
    "a later write format": lambda content: patched(content, WRITE_VERSION=3),
    "a later read format": lambda content: patched(content, READ_VERSION=3),
    "a later schema format": lambda content: patched(content, SCHEMA_FORMAT=1),
    "a page of the table": lambda content: content[:8192] + b"\x55" * 4096 + content[12288:],
    "nothing but the first page": lambda content: content[:4096] + bytes(len(content) - 4096),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_D1_damage_is_a_report_and_the_file_stays_for_a_salvage(tenant, made, how):
    upload = DAMAGED[how](made(ROWS))
    answer = put(tenant, upload)
    assert (answer["verdict"], answer["report"]["ok"]) == ("report", False)
    assert answer["report"]["sha256"] == hashlib.sha256(upload).hexdigest()
    assert answer["report"]["findings"]
    assert tenant.path.read_bytes() == upload
    assert put(tenant, upload) == answer


def test_a_file_in_wal_mode_without_half_of_its_checkpoint_is_damaged(tenant, made):
    upload = patched(made(ROWS)[: 4096 * 3], WRITE_VERSION=2, READ_VERSION=2)
    assert put(tenant, upload)["verdict"] == "report"


@pytest.mark.parametrize("page_size", [4096, 512])
def test_a_deadline_that_passes_is_a_timeout(tenant, made, page_size):
    with pytest.raises(VerdictError) as timeout:
        put(tenant, made(ROWS, page_size=page_size), lambda: True)
    assert timeout.value.verdict is Verdict.TIMEOUT


@pytest.mark.parametrize(
    ("code", "verdict"), [(errno.ENOSPC, "host_full"), (errno.EDQUOT, "host_full"), (errno.EFBIG, "storage_full")]
)
def test_a_disk_without_room_for_the_upload_is_named(tenant, made, monkeypatch, code, verdict):
    def fail(descriptor, data):
        raise OSError(code, "")

    upload = made(ROWS)
    monkeypatch.setattr("runner.upload.os.write", fail)
    with pytest.raises(VerdictError) as full:
        put(tenant, upload)
    assert full.value.verdict == verdict


def test_a_deadline_that_passes_during_a_conversion_is_a_timeout(tenant, made, monkeypatch):
    upload = made(ROWS, page_size=512)
    monkeypatch.setattr("runner.upload.report", lambda *_: {"ok": True})
    with pytest.raises(VerdictError) as timeout:
        put(tenant, upload, lambda: True)
    assert timeout.value.verdict is Verdict.TIMEOUT
    assert tenant.path.read_bytes() == upload


def test_nothing_is_written_while_somebody_else_holds_the_file(tenant, made):
    put(tenant, made(ROWS))
    database = open_database(tenant.configuration, lambda: False, str(tenant.path))
    with pytest.raises(BlockingIOError):
        put(tenant, b"")
    database.close()
    assert tenant.rows("SELECT count(*) FROM t") == [[1000]]


# ── The corpus ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def larger_than_a_file_may_be():
    """In pages of ours."""
    connection = apsw.Connection(":memory:")
    connection.execute("PRAGMA page_size = 1024")
    connection.execute("".join(f"CREATE TABLE t{number}(a);" for number in range(3000)))
    return corpus.Case("larger", connection.serialize("main"), ())


def answer_the_corpus(folder):
    """In a process of its own, sealed like a runner, because it may die: for each case a line with its name, then its answer."""
    cases = [case for case in (*corpus.cases(), *corpus.damaged_copies(200, 1), larger_than_a_file_may_be()) if case.database]
    tenant = TenantDatabase(Path(folder))
    seal(tenant)
    for case in cases:
        print(case.name, flush=True)
        deadline = monotonic() + 60
        try:
            answer = put(tenant, case.database, lambda deadline=deadline: monotonic() > deadline)
        except VerdictError as error:
            answer = {"verdict": error.verdict.value, "message": error.message}
        if answer["verdict"] == "accepted":
            database = open_database(tenant.configuration, lambda: False, str(tenant.path))
            answer["objects"] = database.connection.execute("SELECT count(*) FROM sqlite_schema").get
            database.close()
        print(json.dumps(answer), flush=True)


def test_D1_each_hostile_database_gets_a_documented_answer_in_a_sealed_process_and_the_same_twice(tmp_path):
    corpus.require()
    told = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        told.append(run_sealed(__name__, "answer_the_corpus", folder, MAYFLY_CORPUS=str(corpus.FOLDER)))
    assert told[0] == told[1]
    answers = {name: json.loads(answer) for name, answer in zip(told[0][::2], told[0][1::2], strict=True)}
    assert len(answers) > 1000
    assert answers["larger"] == {"verdict": "file_refused", "message": f"it takes more than {PAGES} pages of 4096 bytes"}
    verdicts = Counter(answer["verdict"] for answer in answers.values())
    assert verdicts.keys() <= {"accepted", "file_refused", "report"}, verdicts
    for name, answer in answers.items():
        if answer["verdict"] == "report":
            assert not answer["report"]["ok"], name
            assert answer["report"]["findings"], name
