"""Damaged database files, each damaged in one part on purpose, and what was committed before.

The parts are found with SQLite's own `dbstat`, so that what reads the damaged file does not also say what it should find there.
Everything comes from seeds.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import apsw

Rows = dict[str, Counter[tuple[Any, ...]]]
"""By table its rows, each with what its rowid is if it has one."""


@dataclass(frozen=True)
class Base:
    """A healthy database, and where its parts are."""

    name: str
    data: bytes
    page_size: int
    rows: Rows
    parts: dict[str, list[int]]
    """By a kind of page: `interior`, `leaf`, `overflow`, `index`, `trunk`, `free`, `map` their numbers."""

    def start(self, page: int) -> int:
        return (page - 1) * self.page_size


@dataclass(frozen=True)
class Damaged:
    base: Base
    kind: str
    seed: int
    data: bytes

    @property
    def name(self) -> str:
        return f"{self.base.name}-{self.kind}-{self.seed}"


_PLAIN = """
    CREATE TABLE people(id INTEGER PRIMARY KEY, name TEXT NOT NULL, age INT, score REAL);
    CREATE INDEX people_name ON people(name);
    CREATE TABLE notes(title TEXT, body TEXT);
    CREATE TABLE pairs(a INT, b INT, c TEXT, d BLOB);
    CREATE INDEX pairs_b ON pairs(b, c) WHERE b > 10;
    CREATE VIEW adults AS SELECT name FROM people WHERE age > 17;
    INSERT INTO people SELECT value, 'person ' || value || printf('%.*c', value % 40, 'x'), value % 90, value / 7.0
        FROM generate_series(1, 1500);
    INSERT INTO notes SELECT 'note ' || value, printf('%.*c', value % 200, 'n') || value FROM generate_series(1, 900);
    INSERT INTO pairs SELECT value, value * 3, 'pair ' || value, zeroblob(value % 30) FROM generate_series(1, 1500);
    DELETE FROM people WHERE id BETWEEN 500 AND 900 OR id % 17 = 0;
    DELETE FROM pairs WHERE a BETWEEN 300 AND 800;
    DELETE FROM notes WHERE rowid > 700;
    PRAGMA user_version = 7; PRAGMA application_id = 12345;
"""
_LONG = """
    CREATE TABLE long(id INTEGER PRIMARY KEY, t TEXT, b BLOB);
    CREATE TABLE short(k TEXT UNIQUE, v INT);
    INSERT INTO long SELECT value, printf('%.*c', 3000 + value * 211 % 9000, char(97 + value % 26)) || value, NULL
        FROM generate_series(1, 60);
    INSERT INTO short SELECT 'key ' || value, value FROM generate_series(1, 1200);
    DELETE FROM long WHERE id % 5 = 0;
    DELETE FROM short WHERE v BETWEEN 200 AND 600;
"""
_KEYED = """
    CREATE TABLE wide(k TEXT, n INT, v TEXT, g AS (n * 2), s AS (v || '!') STORED, PRIMARY KEY(k, n)) WITHOUT ROWID;
    CREATE INDEX wide_v ON wide(v);
    CREATE TABLE log(id INTEGER PRIMARY KEY AUTOINCREMENT, t TEXT);
    CREATE TABLE typed(a INTEGER PRIMARY KEY, b TEXT NOT NULL CHECK (length(b) > 1), c ANY, d REAL) STRICT;
    CREATE TRIGGER logged AFTER INSERT ON typed BEGIN INSERT INTO log(t) VALUES (new.b); END;
    CREATE VIEW both AS SELECT * FROM typed JOIN log USING (a);
    INSERT INTO wide(k, n, v) SELECT 'key' || (value % 97), value, 'value ' || value FROM generate_series(1, 1500);
    INSERT INTO typed SELECT value, 'text ' || value, CASE value % 3 WHEN 0 THEN value WHEN 1 THEN 'x' ELSE NULL END, value
        FROM generate_series(1, 1000);
    DELETE FROM typed WHERE a BETWEEN 100 AND 500;
    DELETE FROM wide WHERE n BETWEEN 100 AND 300;
    DELETE FROM log WHERE id > 800;
    ALTER TABLE log ADD COLUMN kind TEXT DEFAULT 'plain';
    INSERT INTO log(t, kind) SELECT 'late', 'other' FROM generate_series(1, 50);
"""
_SEARCH = """
    CREATE VIRTUAL TABLE words USING fts5(title, body);
    CREATE VIRTUAL TABLE boxes USING rtree(id, x0, x1);
    CREATE TABLE plain(a, b);
    INSERT INTO words SELECT 'title ' || value, 'some words ' || (value * 7 % 101) || ' here' FROM generate_series(1, 600);
    INSERT INTO boxes SELECT value, value * 1.5, value * 1.5 + 2 FROM generate_series(1, 500);
    INSERT INTO plain SELECT value, 'plain ' || value FROM generate_series(1, 900);
    DELETE FROM words WHERE rowid BETWEEN 100 AND 250;
    DELETE FROM plain WHERE a < 300;
"""
_SCRIPTS = {
    "plain": ("PRAGMA page_size = 4096", _PLAIN),
    "long": ("PRAGMA page_size = 4096", _LONG),
    "keyed": ("PRAGMA page_size = 4096", _KEYED),
    "search": ("PRAGMA page_size = 4096", _SEARCH),
    "utf16": ("PRAGMA page_size = 4096; PRAGMA encoding = 'UTF-16le'", _PLAIN),
    "vacuuming": ("PRAGMA page_size = 4096; PRAGMA auto_vacuum = 2", _PLAIN),
    "deep": ("PRAGMA page_size = 512", _PLAIN),
}
BASES = tuple(_SCRIPTS)


@cache
def base(name: str) -> Base:
    first, script = _SCRIPTS[name]
    connection = apsw.Connection(":memory:")
    series = "WITH RECURSIVE s(value) AS (SELECT {0} UNION ALL SELECT value + 1 FROM s WHERE value < {1}) "
    connection.execute(first).fetchall()
    for statement in script.split(";\n"):
        connection.execute(_with_series(statement.replace("\n", " "), series))
    data = connection.serialize("main")
    size = connection.pragma("page_size")
    parts: dict[str, list[int]] = {"interior": [], "leaf": [], "overflow": [], "index": [], "trunk": [], "free": [], "map": []}
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    for owner, page, kind in connection.execute("SELECT name, pageno, pagetype FROM dbstat ORDER BY pageno"):
        if page > 1:
            tree = "index" if owner not in tables else {"internal": "interior"}.get(kind, kind)
            parts[tree].append(page)
    trunk = struct.unpack_from(">I", data, 32)[0]
    while trunk:
        following, count = struct.unpack_from(">II", data, (trunk - 1) * size)
        parts["trunk"].append(trunk)
        parts["free"] += struct.unpack_from(f">{count}I", data, (trunk - 1) * size + 8)
        trunk = following
    if connection.pragma("auto_vacuum"):
        parts["map"].append(2)
    found = Base(name, data, size, rows_of(connection), parts)
    connection.close()
    return found


def _with_series(statement: str, series: str) -> str:
    before, call, after = statement.partition("FROM generate_series(")
    if not call:
        return statement
    bounds, _, rest = after.partition(")")
    first, last = bounds.split(", ")
    begin = before.index("SELECT")
    return before[:begin] + series.format(first, last) + before[begin:] + "FROM s" + rest


def rows_of(connection: apsw.Connection) -> Rows:
    """Everything in the tables of a database, as far as it can be asked for."""
    rows: Rows = {}
    tables = connection.execute(
        "SELECT name, wr, type FROM pragma_table_list WHERE schema = 'main' AND type <> 'view' AND name NOT LIKE 'sqlite_schema'"
    ).fetchall()
    for name, without_rowid, _ in tables:
        rowid = "" if without_rowid else "rowid, "
        rows[name] = Counter(readable(connection, f'SELECT {rowid}* FROM "{name}"'))
    return rows


def readable(connection: apsw.Connection, sql: str) -> Iterator[tuple[Any, ...]]:
    """The rows up to an error, without those whose texts are not UTF-8."""
    try:
        cursor = connection.execute(sql)
    except apsw.Error:
        return
    while True:
        try:
            yield next(cursor)
        except UnicodeDecodeError:
            continue
        except (StopIteration, apsw.Error):
            return


def open_bytes(data: bytes) -> apsw.Connection:
    connection = apsw.Connection(":memory:")
    connection.deserialize("main", data)
    return connection


# --- kinds of damage: each gives the damaged bytes, or None where the base has no such part

_Kind = Callable[[random.Random, Base], bytes | None]


def _overwrite(data: bytes, at: int, content: bytes) -> bytes:
    return data[:at] + content + data[at + len(content) :]


def _whole_page(part: str, fill: Callable[[random.Random, int], bytes]) -> _Kind:
    def damage(dice: random.Random, base: Base) -> bytes | None:
        if not base.parts[part]:
            return None
        return _overwrite(base.data, base.start(dice.choice(base.parts[part])), fill(dice, base.page_size))

    return damage


def _zeros(dice: random.Random, size: int) -> bytes:
    return bytes(size)


def _noise(dice: random.Random, size: int) -> bytes:
    return dice.randbytes(size)


def _field(part: str, offset: int, size: int) -> _Kind:
    """A number within a page's header becomes another."""

    def damage(dice: random.Random, base: Base) -> bytes | None:
        if not base.parts[part]:
            return None
        return _overwrite(base.data, base.start(dice.choice(base.parts[part])) + offset, dice.randbytes(size))

    return damage


def _cell_pointer(part: str) -> _Kind:
    def damage(dice: random.Random, base: Base) -> bytes | None:
        if not base.parts[part]:
            return None
        page = base.start(dice.choice(base.parts[part]))
        first = 12 if base.data[page] in (2, 5) else 8
        count = struct.unpack_from(">H", base.data, page + 3)[0]
        if not count:
            return None
        return _overwrite(base.data, page + first + 2 * dice.randrange(count), dice.randrange(base.page_size).to_bytes(2, "big"))

    return damage


def _child(dice: random.Random, base: Base) -> bytes | None:
    """A child's number in an interior page becomes that of another page."""
    if not base.parts["interior"]:
        return None
    page = base.start(dice.choice(base.parts["interior"]))
    count = struct.unpack_from(">H", base.data, page + 3)[0]
    at = page + struct.unpack_from(">H", base.data, page + 12 + 2 * dice.randrange(count))[0]
    return _overwrite(base.data, at, dice.randint(1, len(base.data) // base.page_size).to_bytes(4, "big"))


def _child_is_free(dice: random.Random, base: Base) -> bytes | None:
    """A child's number becomes that of a free page, where deleted rows still are."""
    if not base.parts["interior"] or not base.parts["free"]:
        return None
    page = base.start(dice.choice(base.parts["interior"]))
    count = struct.unpack_from(">H", base.data, page + 3)[0]
    at = page + struct.unpack_from(">H", base.data, page + 12 + 2 * dice.randrange(count))[0]
    return _overwrite(base.data, at, dice.choice(base.parts["free"]).to_bytes(4, "big"))


def _header(offset: int, content: bytes | int) -> _Kind:
    def damage(dice: random.Random, base: Base) -> bytes:
        return _overwrite(base.data, offset, content if isinstance(content, bytes) else dice.randbytes(content))

    return damage


def _first_page(fill: Callable[[random.Random, int], bytes]) -> _Kind:
    def damage(dice: random.Random, base: Base) -> bytes:
        return _overwrite(base.data, 0, fill(dice, base.page_size))

    return damage


def _first_tree(dice: random.Random, base: Base) -> bytes:
    return _overwrite(base.data, 100 + dice.randrange(20), dice.randbytes(2))


def _overflow(number: int | None) -> _Kind:
    """The number of a chain's next page becomes another: 0, one too large, or any."""

    def damage(dice: random.Random, base: Base) -> bytes | None:
        if not base.parts["overflow"]:
            return None
        page = dice.choice(base.parts["overflow"])
        following = dice.randint(2, len(base.data) // base.page_size) if number is None else number
        if following == struct.unpack_from(">I", base.data, base.start(page))[0]:
            return None
        return _overwrite(base.data, base.start(page), following.to_bytes(4, "big"))

    return damage


def _trunk_loop(dice: random.Random, base: Base) -> bytes | None:
    if not base.parts["trunk"]:
        return None
    return _overwrite(base.data, base.start(base.parts["trunk"][-1]), base.parts["trunk"][0].to_bytes(4, "big"))


def _free_leaf(dice: random.Random, base: Base) -> bytes | None:
    """A live page is said to be free."""
    if not base.parts["free"]:
        return None
    at = base.start(base.parts["trunk"][0]) + 8
    if not struct.unpack_from(">I", base.data, at - 4)[0]:
        return None
    return _overwrite(base.data, at, dice.choice(base.parts["leaf"]).to_bytes(4, "big"))


def _cut(share: float, more: int = 0) -> _Kind:
    def damage(dice: random.Random, base: Base) -> bytes:
        pages = max(1, int(len(base.data) // base.page_size * share))
        return base.data[: pages * base.page_size + (dice.randrange(1, base.page_size) if more else 0)]

    return damage


def _last_page(dice: random.Random, base: Base) -> bytes:
    return base.data[: -base.page_size]


def _append(fill: Callable[[random.Random, int], bytes]) -> _Kind:
    def damage(dice: random.Random, base: Base) -> bytes:
        return base.data + fill(dice, dice.choice((1, 100, base.page_size, 5 * base.page_size)))

    return damage


def _append_old_pages(dice: random.Random, base: Base) -> bytes:
    """Copies of pages, behind the end."""
    return base.data + b"".join(base.data[base.start(page) :][: base.page_size] for page in dice.sample(base.parts["leaf"], 3))


def _swap(dice: random.Random, base: Base) -> bytes:
    """One page in the place of another."""
    source, target = dice.sample(base.parts["leaf"] + base.parts["index"], 2)
    return _overwrite(base.data, base.start(target), base.data[base.start(source) :][: base.page_size])


KINDS: dict[str, _Kind] = {
    "header-magic": _header(0, 16),
    "header-page-size": _header(16, 2),
    "header-reserved": _header(20, b"\x28"),
    "header-fractions": _header(21, 3),
    "header-pages": _header(28, 4),
    "header-freelist": _header(32, 8),
    "header-freelist-gone": _header(32, bytes(8)),
    "header-encoding": _header(56, 4),
    "header-wrong-encoding": _header(56, b"\0\0\0\3"),
    "header-whole": _header(0, 100),
    "header-zero": _header(0, bytes(100)),
    "first-page-zero": _first_page(_zeros),
    "first-page-noise": _first_page(_noise),
    "first-tree": _first_tree,
    "interior-zero": _whole_page("interior", _zeros),
    "interior-noise": _whole_page("interior", _noise),
    "interior-cell": _cell_pointer("interior"),
    "interior-right": _field("interior", 8, 4),
    "interior-child": _child,
    "interior-child-free": _child_is_free,
    "leaf-zero": _whole_page("leaf", _zeros),
    "leaf-noise": _whole_page("leaf", _noise),
    "leaf-kind": _field("leaf", 0, 1),
    "leaf-freeblock": _field("leaf", 1, 2),
    "leaf-count": _field("leaf", 3, 2),
    "leaf-count-low": _field("leaf", 4, 1),
    "leaf-content": _field("leaf", 5, 2),
    "leaf-fragments": _field("leaf", 7, 1),
    "leaf-cell": _cell_pointer("leaf"),
    "overflow-noise": _whole_page("overflow", _noise),
    "overflow-end": _overflow(0),
    "overflow-beyond": _overflow(0x7FFFFFFF),
    "overflow-next": _overflow(None),
    "trunk-zero": _whole_page("trunk", _zeros),
    "trunk-noise": _whole_page("trunk", _noise),
    "trunk-count": _field("trunk", 4, 4),
    "trunk-entry": _field("trunk", 8, 4),
    "trunk-loop": _trunk_loop,
    "free-leaf-live": _free_leaf,
    "index-zero": _whole_page("index", _zeros),
    "index-noise": _whole_page("index", _noise),
    "index-cell": _cell_pointer("index"),
    "map-noise": _whole_page("map", _noise),
    "cut-quarter": _cut(0.25),
    "cut-half": _cut(0.5, 1),
    "cut-most": _cut(0.9),
    "cut-last": _last_page,
    "append-noise": _append(_noise),
    "append-zeros": _append(_zeros),
    "append-old": _append_old_pages,
    "swapped": _swap,
}


_VARIANTS = {
    "utf16": ("header", "first", "cut", "leaf-noise", "leaf-cell"),
    "vacuuming": ("header", "first", "cut", "map", "trunk", "free"),
}
"""Bases that differ from another in one thing, and the kinds of damage to which that makes a difference."""


def damaged(base_name: str, seeds: range) -> Iterator[Damaged]:
    """One part of a base damaged, in each way, from each seed; and two ways at once."""
    found = base(base_name)
    telling = _VARIANTS.get(base_name, ("",))
    for seed in seeds:
        for kind, damage in KINDS.items():
            if not kind.startswith(telling):
                continue
            data = damage(random.Random(f"{base_name} {kind} {seed}"), found)
            if data is not None and data != found.data:
                yield Damaged(found, kind, seed, data)
        dice = random.Random(f"{base_name} twice {seed}")
        first, second = dice.sample(sorted(KINDS), 2)
        once = KINDS[first](dice, found)
        if once is not None and len(once) == len(found.data):
            again = KINDS[second](dice, Base(found.name, once, found.page_size, found.rows, found.parts))
            if again is not None:
                yield Damaged(found, f"{first}+{second}", seed, again)
