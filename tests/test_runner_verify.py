"""Verify: what is wrong with a file is named, the same each time, and nothing is written."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import apsw
import pytest

from runner.image import rolled_back, undoing
from runner.verify import report, report_of
from runner.wire import Verdict, VerdictError

from .damage import BASES, KINDS, base, damaged, open_bytes, rows_of
from .runner_database import CONFIGURATION


def never() -> bool:
    return False


def codes(data: bytes) -> set[object]:
    return {finding["code"] for finding in report_of(data, CONFIGURATION, never)["findings"]}


def damage(name: str, kind: str, seed: int = 0) -> bytes:
    data = KINDS[kind](random.Random(seed), base(name))
    assert data is not None
    return data


@pytest.mark.parametrize("name", BASES)
def test_a_healthy_database_has_no_finding(name):
    data = base(name).data
    found = report_of(data, CONFIGURATION, never)
    assert found["ok"]
    assert found["findings"] == []
    assert (found["size"], found["page_size"], found["pages"]) == (
        len(data),
        base(name).page_size,
        len(data) // base(name).page_size,
    )


def test_an_empty_file_is_healthy(tmp_path):
    (tmp_path / "db").touch()
    found = report(str(tmp_path / "db"), CONFIGURATION, never)
    assert found["ok"]
    assert (found["size"], found["page_size"], found["pages"]) == (0, None, None)


def test_the_journal_mode_and_the_page_size_are_no_damage():
    data = base("deep").data
    assert report_of(data[:18] + b"\2\2" + data[20:], CONFIGURATION, never)["ok"]


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [
        ("plain", "header-magic", "header"),
        ("plain", "header-fractions", "header"),
        ("plain", "cut-half", "truncated"),
        ("plain", "append-noise", "appended"),
        ("plain", "leaf-noise", "page"),
        ("plain", "leaf-cell", "page"),
        ("plain", "interior-zero", "page"),
        ("long", "overflow-end", "overflow"),
        ("long", "overflow-beyond", "overflow"),
        ("plain", "trunk-count", "freelist"),
        ("plain", "trunk-loop", "freelist"),
        ("plain", "index-noise", "index"),
        ("plain", "header-freelist", "freelist"),
    ],
)
def test_each_kind_of_damage_has_its_code(name, kind, code):
    assert code in codes(damage(name, kind))


@pytest.mark.parametrize(
    ("script", "change", "code", "name"),
    [
        ("CREATE TABLE t(a)", "UPDATE sqlite_schema SET sql = 'CREATE TABLE t('", "schema", "t"),
        (
            "CREATE TABLE t(a); INSERT INTO t VALUES (NULL)",
            "UPDATE sqlite_schema SET sql = 'CREATE TABLE t(a NOT NULL)'",
            "constraint",
            "t",
        ),
        (
            "CREATE TABLE t(a); CREATE INDEX i ON t(a)",
            "UPDATE sqlite_schema SET sql = 'CREATE INDEX i ON t(-a)' WHERE name = 'i'",
            "index",
            "i",
        ),
        (
            "CREATE VIRTUAL TABLE f USING fts5(x); INSERT INTO f VALUES ('word')",
            "UPDATE f_content SET c0 = 'other'",
            "content",
            "f",
        ),
    ],
)
def test_what_only_sqlite_sees_names_the_object(script, change, code, name):
    connection = apsw.Connection(":memory:")
    connection.execute(script).fetchall()
    if code == "index":
        connection.execute("INSERT INTO t VALUES (5)")
    connection.execute("PRAGMA writable_schema = 1")
    connection.execute(change)
    found = report_of(connection.serialize("main"), CONFIGURATION, never)
    assert (code, name) in {(finding["code"], finding["object"]) for finding in found["findings"]}


def test_a_row_that_breaks_a_check_is_no_damage():
    connection = apsw.Connection(":memory:")
    connection.execute("CREATE TABLE t(a CHECK (a > 1)); PRAGMA ignore_check_constraints = 1; INSERT INTO t VALUES (0)")
    assert report_of(connection.serialize("main"), CONFIGURATION, never)["ok"]


def test_a_page_that_no_file_can_have_is_none_in_a_finding():
    connection = apsw.Connection(":memory:")
    connection.execute("CREATE TABLE t(a); PRAGMA writable_schema = 1; UPDATE sqlite_schema SET rootpage = -7")
    found = report_of(connection.serialize("main"), CONFIGURATION, never)["findings"]
    assert found
    assert all(finding["page"] is None or finding["page"] > 0 for finding in found)


def test_the_same_bytes_give_the_same_report_and_no_more_than_a_hundred_findings():
    for case in damaged("keyed", range(1)):
        found = report_of(case.data, CONFIGURATION, never)
        assert found["ok"] == (not found["findings"])
        assert found == report_of(case.data, CONFIGURATION, never)
    scattered = bytearray(base("deep").data)
    for page in base("deep").parts["leaf"]:
        scattered[base("deep").start(page)] = 7
    many = report_of(bytes(scattered), CONFIGURATION, never)
    assert len(many["findings"]) == 100
    assert many["more_findings"]


def test_nothing_is_written(tmp_path, monkeypatch):
    path, journal = tmp_path / "db", tmp_path / "db-journal"
    path.write_bytes(damage("plain", "leaf-noise"))
    journal.touch()
    opened = []
    really_open = os.open

    def watched(name, flags, *rest, **more):
        opened.append((Path(name).name, flags & os.O_ACCMODE))
        return really_open(name, flags, *rest, **more)

    monkeypatch.setattr(os, "open", watched)
    assert not report(str(path), CONFIGURATION, never)["ok"]
    assert opened == [("db", os.O_RDONLY), ("db-journal", os.O_RDONLY)]
    assert path.read_bytes() == damage("plain", "leaf-noise")
    assert {file.name for file in tmp_path.iterdir()} == {"db", "db-journal"}


def test_a_hot_journal_counts_as_rolled_back(tmp_path):
    path, journal = tmp_path / "db", tmp_path / "db-journal"
    undo = undoing(base("plain").data, 10 << 20)
    assert undo is not None
    path.write_bytes(b"something half written" * 300)
    assert not report(str(path), CONFIGURATION, never)["ok"]
    journal.write_bytes(undo)
    assert report(str(path), CONFIGURATION, never) == report_of(base("plain").data, CONFIGURATION, never)
    journal.write_bytes(bytes(8) + undo[8:])
    assert not report(str(path), CONFIGURATION, never)["ok"]


@pytest.mark.parametrize("change", ["none", "cut", "checksum", "count", "noise"])
def test_a_journal_is_read_as_sqlite_reads_it(tmp_path, change):
    """SQLite gets the same file and the same journal, and its file is compared afterwards."""
    path, journal = tmp_path / "db", tmp_path / "db-journal"
    data = base("plain").data
    writer = apsw.Connection(str(path))
    path.write_bytes(data)
    writer.execute("PRAGMA journal_mode = PERSIST; PRAGMA cache_size = 1; PRAGMA synchronous = FULL; BEGIN").fetchall()
    writer.execute("UPDATE people SET name = hex(randomblob(40)); DELETE FROM notes")
    content, hot = path.read_bytes(), bytearray(journal.read_bytes())
    writer.close(True)
    if change == "cut":
        del hot[len(hot) // 2 :]
    elif change == "checksum":
        hot[512 + 4 + 4096] ^= 1
    elif change == "count":
        hot[8:12] = b"\xff\xff\xff\xff"
    elif change == "noise":
        hot[512 + 20 * 4104 :] = random.Random(1).randbytes(len(hot) - 512 - 20 * 4104)
    path.write_bytes(content)
    journal.write_bytes(hot)
    ours = rolled_back(content, bytes(hot))
    reader = apsw.Connection(str(path))
    with contextlib.suppress(apsw.Error):
        reader.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    reader.close()
    assert path.read_bytes() == ours
    whole = report_of(ours, CONFIGURATION, never)["ok"] and rows_of(open_bytes(ours)) == base("plain").rows
    assert whole == (change == "none")  # of free pages SQLite keeps no copy, so the bytes may differ


def test_when_the_time_is_over_there_is_no_report():
    for limit in (0, 1, 5):
        asked = iter(range(10**9))
        with pytest.raises(VerdictError) as refused:
            report_of(damage("plain", "leaf-noise"), CONFIGURATION, lambda asked=asked, limit=limit: next(asked) >= limit)
        assert refused.value.verdict is Verdict.TIMEOUT
