"""The hostile corpora, read from a folder outside the repository, as cases: a database's bytes and the requests made on it in turn.

    hostile_sql.jsonl.gz   {"src", "id", "sql"} a line, or "sql_b64" where the script is not UTF-8: a request is JSON, so such
                           bytes arrive as U+FFFD, as from any client; each runs on an empty database
    hostile_db.tar.gz      db/….db: malformed databases, each asked the same handful of requests
                           pair/….db with pair/….sql: a database with the script that was found to hurt with it

Those databases have small pages, so nearly all are turned away at the door. `damaged_copies` are of this system's own page size,
with a few bytes changed, and get deeper.

MAYFLY_CORPUS names the folder; MAYFLY_CORPUS_FULL=1 asks for a container of its own for every request; MAYFLY_ORDINARY_RECORDS is
how much of tests/ordinary_sql.py is run. Settings refuse a MAYFLY_ variable that is not theirs, so these are taken out of the
environment when this is imported, which conftest does first.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import random
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import apsw
import pytest

CHOSEN = os.environ.pop("MAYFLY_CORPUS", None)
FULL = os.environ.pop("MAYFLY_CORPUS_FULL", "") == "1"
ORDINARY_RECORDS = int(os.environ.pop("MAYFLY_ORDINARY_RECORDS", "4000"))
FOLDER = Path(CHOSEN) if CHOSEN else Path(__file__).resolve().parents[2] / "shared" / "corpus"

SCRIPTS, DATABASES = "hostile_sql.jsonl.gz", "hostile_db.tar.gz"
MAX_TABLES = 2

# Read off the raw bytes: the file may be beyond SQLite, and no process outside a container ever opens it with SQLite.
_TABLE = re.compile(rb"CREATE\s+(?:VIRTUAL\s+)?TABLE\s+([A-Za-z_][A-Za-z_0-9]{0,40})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    database: bytes
    requests: tuple[str, ...]
    journal: bytes = b""


def require() -> None:
    """Ends the test where the corpora are not: as a failure if somebody wants them, otherwise it is skipped."""
    if missing := [path for path in (FOLDER / SCRIPTS, FOLDER / DATABASES) if not path.is_file()]:
        reason = f"the hostile corpora are not there: {', '.join(map(str, missing))}; MAYFLY_CORPUS names their folder"
        if CHOSEN or os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


def cases() -> Iterator[Case]:
    yield from _scripts()
    yield from _databases()


def _scripts() -> Iterator[Case]:
    with gzip.open(FOLDER / SCRIPTS, "rt", encoding="utf-8") as lines:
        for line in lines:
            item = json.loads(line)
            sql = item["sql"] if "sql" in item else base64.b64decode(item["sql_b64"]).decode("utf-8", "replace")
            yield Case(f"sql/{item['src']}/{item['id']}", b"", (sql,))


def _databases() -> Iterator[Case]:
    with tarfile.open(FOLDER / DATABASES) as archive:
        files = {member.name: file.read() for member in archive if (file := archive.extractfile(member)) is not None}
    for name, content in files.items():
        stem, _, kind = name.rpartition(".")
        if kind == "db":
            script = files.get(f"{stem}.sql")
            yield Case(stem, content, _questions(content) if script is None else (script.decode("utf-8", "replace"),))


def _questions(database: bytes) -> tuple[str, ...]:
    tables = [name.decode() for name in dict.fromkeys(_TABLE.findall(database))][:MAX_TABLES]
    return (
        "SELECT * FROM sqlite_schema",
        *(f'SELECT * FROM "{table}" LIMIT 1000' for table in tables),
        "PRAGMA integrity_check",
        *(f'INSERT INTO "{table}" DEFAULT VALUES' for table in tables),
        "VACUUM",
    )


_PAGE = 4096
_HEALTHY = """
    CREATE TABLE a(id INTEGER PRIMARY KEY, t TEXT UNIQUE, n INT DEFAULT 7, CHECK (n < 1000000));
    CREATE INDEX a_n ON a(n, lower(t)) WHERE n > 3;
    CREATE TABLE b(k PRIMARY KEY, v, g AS (v * 2)) WITHOUT ROWID;
    CREATE TABLE c(id INTEGER PRIMARY KEY AUTOINCREMENT, a REFERENCES a(id) ON DELETE CASCADE, blob BLOB);
    CREATE VIEW w AS SELECT a.t, b.v FROM a JOIN b ON a.id = b.k;
    CREATE TRIGGER r AFTER INSERT ON a BEGIN INSERT INTO c(a, blob) VALUES (new.id, zeroblob(10)); END;
    CREATE VIRTUAL TABLE f USING fts5(x, y);
    CREATE VIRTUAL TABLE s USING rtree(id, x0, x1);
    WITH RECURSIVE i(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM i LIMIT 200) INSERT INTO a(t, n) SELECT 'text ' || i, i FROM i;
    INSERT INTO b SELECT id, n FROM a;
    INSERT INTO c(a, blob) SELECT id, zeroblob(9000) FROM a LIMIT 5;
    INSERT INTO f SELECT t, 'word' || n FROM a;
    INSERT INTO s SELECT id, n, n + 2 FROM a;
    ANALYZE;
    DELETE FROM c WHERE id % 3 = 0;
"""
_QUESTIONS = (
    "SELECT * FROM sqlite_schema",
    "SELECT * FROM a; SELECT * FROM a WHERE n > 5 ORDER BY lower(t); SELECT t FROM a WHERE t > 'text 2'",
    "SELECT * FROM w; SELECT sum(g) FROM b",
    "SELECT id, a, length(blob) FROM c",
    "SELECT * FROM f WHERE f MATCH 'text' ORDER BY rank; SELECT * FROM s WHERE x0 > 10 AND x1 < 90",
    "PRAGMA integrity_check",
    "INSERT INTO a(t, n) VALUES (hex(randomblob(3000)), 9); UPDATE a SET n = n + 1; DELETE FROM a WHERE id < 100",
    "INSERT INTO f VALUES ('one', 'two'); DELETE FROM f WHERE rowid < 9; INSERT INTO f(f) VALUES ('optimize')",
    "DELETE FROM s WHERE id > 9; INSERT INTO s VALUES (1000, 5, 6)",
    "ALTER TABLE b RENAME TO d; REINDEX; ANALYZE",
    "VACUUM",
)


def damaged_copies(count: int, seed: int) -> Iterator[Case]:
    """One healthy database, each time damaged in another way; some with a journal that has to be rolled back."""
    connection = apsw.Connection(":memory:")
    connection.execute(f"PRAGMA page_size = {_PAGE}; {_HEALTHY}")
    healthy = connection.serialize("main")
    connection.close()
    dice = random.Random(seed)
    for number in range(count):
        content, journal = bytearray(healthy), b""
        pages = len(content) // _PAGE
        match number % 7:
            case 0:  # anywhere
                for _ in range(dice.randint(1, 8)):
                    content[dice.randrange(len(content))] = dice.randrange(256)
            case 1:  # the file's header, but for the magic and the page size
                content[dice.randrange(18, 100)] = dice.choice((0, 1, 2, 127, 255))
            case 2:  # the headers of b-tree pages and their first cell pointers
                for _ in range(3):
                    content[dice.randrange(pages) * _PAGE + dice.randrange(20)] = dice.randrange(256)
            case 3:  # one page in the place of another
                source, target = dice.randrange(pages) * _PAGE, dice.randrange(1, pages) * _PAGE
                content[target : target + _PAGE] = content[source : source + _PAGE]
            case 4:
                del content[dice.randrange(len(content)) :]
            case 5:  # the schema's text: another letter, or a root page that is not the table's own
                content[dice.randrange(100, _PAGE)] ^= 1 << dice.randrange(8)
            case 6:
                journal = _journal(dice, content, pages)
        yield Case(f"damaged/{seed}/{number}", bytes(content), _QUESTIONS, journal)


def _journal(dice: random.Random, content: bytearray, pages: int) -> bytes:
    """A hot journal in good form that puts wrong pages back. Its header: magic, records, nonce, pages, sector, page size."""
    nonce = dice.randrange(1 << 32)
    head = bytes.fromhex("d9d505f920a163d7") + b"".join(
        n.to_bytes(4, "big") for n in (3, nonce, dice.choice((1, pages, 5000)), 512, _PAGE)
    )
    records = b""
    for _ in range(3):
        source = dice.randrange(pages) * _PAGE
        page = bytearray(content[source : source + _PAGE])
        page[dice.randrange(_PAGE)] ^= 255
        total = (nonce + sum(page[_PAGE - 200 : 0 : -200])) % (1 << 32)
        records += dice.randint(1, pages + 2).to_bytes(4, "big") + page + total.to_bytes(4, "big")
    return head.ljust(512, b"\0") + records
