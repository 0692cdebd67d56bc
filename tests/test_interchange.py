"""Files and tables that go from here to other programs and come back: the sqlite3 shell, Python, DuckDB and pandas."""

from __future__ import annotations

import base64
import csv
import io
import json
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from importlib import resources
from pathlib import Path

import duckdb
import duckdb_extension_sqlite_scanner
import pandas
import pytest
import requests
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

EXTENSION = (
    resources.files(duckdb_extension_sqlite_scanner) / "extensions" / f"v{duckdb.__version__}" / "sqlite_scanner.duckdb_extension"
)
TOKEN = "X-Walkin-Session"

ROWS = [
    (1, "plain", 1.5, None),
    (2, 'quoted "twice", and a comma', -0.25, "x"),
    (3, "two\nlines", 1e300, ""),
    (4, "naïve ☃ 𝄞", 0.1, "NULL"),
    (5, "", 2.0, "  spaces  "),
    (-(2**53), "O'Hara; --", -1e-300, "\ttab"),
]
NAMES = ("id", "label", "weight", "note")
SCHEMA = "CREATE TABLE things(id INTEGER PRIMARY KEY, label TEXT, weight REAL, note TEXT)"
ORDERED = f"SELECT {', '.join(NAMES)} FROM things ORDER BY id"
BY_ID = sorted(ROWS)


class Instance:
    """One database over HTTP."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self._url = url
        self._http = requests.Session()
        self.token = token

    def ask(self, method: str, path: str, expected: int, **more) -> requests.Response:
        headers = {**more.pop("headers", {}), **({TOKEN: self.token} if self.token else {})}
        answer = self._http.request(method, self._url + path, headers=headers, timeout=120, **more)
        assert answer.status_code == expected, answer.text
        self.token = answer.headers.get(TOKEN, self.token)
        return answer

    def sql(self, sql: str, args=None) -> list[tuple]:
        return [tuple(row) for row in self.ask("POST", "/sql", 200, json={"sql": sql, "args": args}).json().get("rows", [])]

    def export(self) -> bytes:
        answer = self.ask("GET", "/db", 200)
        assert answer.headers["Content-Type"] == "application/vnd.sqlite3"
        return answer.content

    def upload(self, content: bytes, expected: int = 201) -> dict:
        return self.ask("PUT", "/db", expected, data=content, headers={"Content-Type": "application/vnd.sqlite3"}).json()

    def load(self, content: bytes, form: str, media: str, **parameters: str) -> dict:
        parameters = {"table": "things", "format": form, **parameters}
        return self.ask("POST", "/import", 200, params=parameters, data=content, headers={"Content-Type": media}).json()

    def fork(self) -> Instance:
        answer = self.ask_without_keeping_the_token("POST", "/fork", 201)
        return Instance(self._url, answer.headers[TOKEN])

    def ask_without_keeping_the_token(self, method: str, path: str, expected: int) -> requests.Response:
        token = self.token
        answer = self.ask(method, path, expected)
        self.token = token
        return answer

    def close(self) -> None:
        self._http.close()


@pytest.fixture
def fresh(mayfly):
    """Makes instances that do not exist yet."""
    made: list[Instance] = []

    def make() -> Instance:
        made.append(Instance(mayfly.url))
        return made[-1]

    yield make
    for instance in made:
        instance.close()


def shell(path: Path, *commands: str) -> str:
    done = subprocess.run(["sqlite3", "-batch", "-bail", path], input="\n".join(commands), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def duck(path: Path, mode: str = "") -> duckdb.DuckDBPyConnection:
    """DuckDB with the file attached as `db`; it downloads nothing."""
    connection = duckdb.connect(config={"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"})
    connection.execute(f"LOAD '{EXTENSION}'")
    connection.execute(f"ATTACH '{path}' AS db (TYPE sqlite{mode})")
    return connection


# --- each program reads our file


def read_by_shell(path: Path) -> list[tuple]:
    assert shell(path, "PRAGMA integrity_check;") == "ok\n"
    rows = json.loads(shell(path, ".mode json", f"{ORDERED};"))
    return [tuple(row.values()) for row in rows]


def read_by_python(path: Path) -> list[tuple]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return connection.execute(ORDERED).fetchall()


def read_by_duckdb(path: Path) -> list[tuple]:
    with duck(path, ", READ_ONLY") as connection:
        return connection.execute(ORDERED.replace("things", "db.things")).fetchall()


def read_by_pandas(path: Path) -> list[tuple]:
    with closing(sqlite3.connect(path)) as connection:
        frame = pandas.read_sql_query(ORDERED, connection)
    return [tuple(None if pandas.isna(value) else value for value in row) for row in frame.itertuples(index=False, name=None)]


@pytest.mark.parametrize("read", [read_by_shell, read_by_python, read_by_duckdb, read_by_pandas])
def test_a_file_from_here_is_read_by_other_programs(fresh, tmp_path, read):
    instance = fresh()
    instance.sql(SCHEMA)
    for row in ROWS:
        instance.sql("INSERT INTO things VALUES (?,?,?,?)", row)
    path = tmp_path / "exported.db"
    path.write_bytes(instance.export())
    assert read(path) == BY_ID == instance.sql(ORDERED)


# --- each program makes a file for us


def make_by_shell(path: Path) -> None:
    table = path.with_suffix(".csv")
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([["NULL!" if value is None else value for value in row] for row in ROWS])
    shell(path, f"{SCHEMA};", ".mode csv", f".import {table} things", "UPDATE things SET note=NULL WHERE note='NULL!';")


def make_by_python(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")  # such files are turned back on the way in
        connection.execute(SCHEMA)
        connection.executemany("INSERT INTO things VALUES (?,?,?,?)", ROWS)
        connection.commit()


def make_by_duckdb(path: Path) -> None:
    with duck(path) as connection:
        connection.execute("CREATE TABLE db.things(id BIGINT, label VARCHAR, weight DOUBLE, note VARCHAR)")
        connection.executemany("INSERT INTO db.things VALUES (?,?,?,?)", ROWS)


def make_by_pandas(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        pandas.DataFrame(ROWS, columns=list(NAMES)).to_sql("things", connection, index=False)


@pytest.mark.parametrize("make", [make_by_shell, make_by_python, make_by_duckdb, make_by_pandas])
def test_a_file_of_another_program_is_served_here(fresh, tmp_path, make):
    path = tmp_path / "made.db"
    make(path)
    instance = fresh()
    assert instance.upload(path.read_bytes())["size"] > 0
    assert instance.sql(ORDERED) == BY_ID
    instance.sql("INSERT INTO things VALUES (6, 'more', 0.5, NULL)")
    path.write_bytes(instance.export())
    assert read_by_python(path) == sorted([*ROWS, (6, "more", 0.5, None)])


# --- each program writes a table as text for us


def csv_by_python(path: Path) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([NAMES, *(["NULL!" if value is None else value for value in row] for row in ROWS)])
    return text.getvalue().encode()


def csv_by_shell(path: Path) -> bytes:
    make_by_python(path)
    return shell(path, ".headers on", ".mode csv", ".nullvalue NULL!", "SELECT * FROM things;").encode()


def csv_by_duckdb(path: Path) -> bytes:
    make_by_python(path)
    out = path.with_suffix(".csv")
    with duck(path, ", READ_ONLY") as connection:
        connection.execute(f"COPY db.things TO '{out}' (FORMAT csv, HEADER, NULL 'NULL!')")
    return out.read_bytes()


def csv_by_pandas(path: Path) -> bytes:
    return pandas.DataFrame(ROWS, columns=list(NAMES)).to_csv(index=False, na_rep="NULL!").encode()


def json_by_shell(path: Path) -> bytes:
    make_by_python(path)
    return shell(path, ".mode json", "SELECT * FROM things;").encode()


def json_by_python(path: Path) -> bytes:
    return json.dumps([dict(zip(NAMES, row, strict=True)) for row in ROWS], ensure_ascii=False).encode()


def json_by_duckdb(path: Path) -> bytes:
    return _by_duckdb_as_json(path, "true")


def json_by_pandas(path: Path) -> bytes:
    return pandas.DataFrame(ROWS, columns=list(NAMES)).to_json(orient="records", double_precision=15).encode()


def ndjson_by_python(path: Path) -> bytes:
    return b"".join(json.dumps(dict(zip(NAMES, row, strict=True))).encode() + b"\n" for row in ROWS)


def ndjson_by_duckdb(path: Path) -> bytes:
    return _by_duckdb_as_json(path, "false")


def ndjson_by_pandas(path: Path) -> bytes:
    frame = pandas.DataFrame(ROWS, columns=list(NAMES))
    return frame.to_json(orient="records", lines=True, double_precision=15).encode()


def _by_duckdb_as_json(path: Path, as_array: str) -> bytes:
    make_by_python(path)
    out = path.with_suffix(".json")
    with duck(path, ", READ_ONLY") as connection:
        connection.execute(f"COPY db.things TO '{out}' (FORMAT json, ARRAY {as_array})")
    return out.read_bytes()


TABLES: list[tuple[str, str, Callable[[Path], bytes]]] = [
    *(("csv", "text/csv", make) for make in (csv_by_shell, csv_by_python, csv_by_duckdb, csv_by_pandas)),
    *(("json", "application/json", make) for make in (json_by_shell, json_by_python, json_by_duckdb, json_by_pandas)),
    *(("ndjson", "application/x-ndjson", make) for make in (ndjson_by_python, ndjson_by_duckdb, ndjson_by_pandas)),
]


@pytest.mark.parametrize(("form", "media", "make"), TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_table_that_another_program_wrote_as_text_is_loaded_here(fresh, tmp_path, form, media, make):
    instance = fresh()
    extra = {"header": "yes", "null": "NULL!"} if form == "csv" else {}
    loaded = instance.load(make(tmp_path / "source.db"), form, media, **extra)
    assert (loaded["table"], loaded["created"], loaded["rows"]) == ("things", True, len(ROWS))
    assert [name for name, _ in loaded["columns"]] == list(NAMES)
    assert dict(map(tuple, loaded["columns"]))["id"] == "INTEGER"
    assert instance.sql(ORDERED) == BY_ID


# --- out and in again


VALUES = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1).map(lambda number: {"$int": str(number)}),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.binary(max_size=6000).map(lambda data: {"$blob": base64.b64encode(data).decode()}),
)
COLUMNS = st.sampled_from(["INTEGER", "TEXT", "REAL", "BLOB", "", "INTEGER UNIQUE", "TEXT COLLATE NOCASE DEFAULT 'd'"])
TABLES_OF_ANY_KIND = st.fixed_dictionaries(
    {
        "columns": st.lists(COLUMNS, min_size=1, max_size=6),
        "options": st.sampled_from(["", "WITHOUT ROWID", "STRICT"]),
        "index": st.booleans(),
        "rows": st.lists(st.lists(VALUES, min_size=6, max_size=6), max_size=12),
        "deleted": st.integers(0, 12),
    }
)


def build(instance: Instance, tables) -> None:
    """Whatever of it SQLite takes: what it refuses, it refuses before and after alike."""
    statements = [{"sql": "SELECT 1"}]
    for number, table in enumerate(tables):
        kinds = [kind or "ANY" if table["options"] == "STRICT" else kind for kind in table["columns"]]
        columns = ", ".join(f"c{place} {kind}" for place, kind in enumerate(kinds))
        statements.append({"sql": f"CREATE TABLE t{number}(k INTEGER PRIMARY KEY, {columns}) {table['options']}"})
        if table["index"]:
            statements.append({"sql": f"CREATE INDEX i{number} ON t{number}(c0)"})
        for key, row in enumerate(table["rows"]):
            marks = ", ".join("?" * len(kinds))
            sql = f"INSERT OR IGNORE INTO t{number} VALUES ({key}, {marks})"
            if table["options"] != "STRICT":
                statements.append({"sql": sql, "args": row[: len(kinds)]})
        statements.append({"sql": f"DELETE FROM t{number} WHERE k < {table['deleted']}"})
    instance.ask("POST", "/batch", 200, json={"statements": statements})


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables=st.lists(TABLES_OF_ANY_KIND, max_size=3))
@example(tables=[])
def test_M14_a_file_that_goes_out_and_comes_in_goes_out_the_same_byte_for_byte_and_so_does_a_forks(fresh, tables):
    instance = fresh()
    build(instance, tables)
    exported = instance.export()
    assert exported == instance.export()
    fork = instance.fork()
    assert fork.export() == exported
    other = fresh()
    assert other.upload(exported)["converted"] == []
    assert other.export() == exported
    fork.sql("CREATE TABLE of_the_fork_alone(a)")
    assert instance.export() == exported != fork.export()
    assert fork.upload(exported, expected=200)["size"] == len(exported)
    assert fork.export() == exported
    fork.close()


def test_M14_a_file_comes_out_the_same_in_pieces(fresh):
    instance = fresh()
    instance.sql("CREATE TABLE t(a); INSERT INTO t VALUES (zeroblob(100000))")
    whole = instance.ask("GET", "/db", 200)
    tag = whole.headers["ETag"]
    pieces = [
        instance.ask("GET", "/db", 206, headers={"Range": f"bytes={start}-{start + 49_999}", "If-Range": tag})
        for start in range(0, len(whole.content), 50_000)
    ]
    assert b"".join(piece.content for piece in pieces) == whole.content
    assert instance.ask("GET", "/db", 304, headers={"If-None-Match": tag}).content == b""
