"""A new database in memory, made from what was read of a damaged one.

What a damaged file holds as SQL is hostile: each statement must be the one CREATE that its place calls for, SQLite may do nothing
else for it, and nothing of it runs but what SQLite runs for an insert: CHECK, DEFAULT, generated columns and the expressions of
indexes, under the deadline and the heap's limit. Triggers are made last, and fire for nothing.
"""

from __future__ import annotations

import struct

import apsw

from .image import PRAGMA_ENCODINGS, RawText
from .memory import LIMITS_OF_REQUESTS, in_memory
from .policy import Guard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from .configuration import Configuration
    from .image import Image, Value
    from .trees import Entry, Expired, Row

    Stray = tuple[Value, ...]
    """A row of no known table: the root of its tree, its page, how many values it has, its rowid, and the values."""

_PREFIXES: dict[str, tuple[str, ...]] = {
    "table": ("CREATE TABLE ", "CREATE VIRTUAL TABLE "),
    "index": ("CREATE INDEX ", "CREATE UNIQUE INDEX "),
}
_PREFIXES |= {"view": ("CREATE VIEW ",), "trigger": ("CREATE TRIGGER ",)}
_CREATIONS = frozenset(
    {
        apsw.SQLITE_CREATE_TABLE,
        apsw.SQLITE_CREATE_INDEX,
        apsw.SQLITE_CREATE_VIEW,
        apsw.SQLITE_CREATE_TRIGGER,
        apsw.SQLITE_CREATE_VTABLE,
    }
)
_ITS_OWN = frozenset({apsw.SQLITE_INSERT, apsw.SQLITE_UPDATE})
_HARMLESS = frozenset({apsw.SQLITE_READ, apsw.SQLITE_REINDEX})
_OF_THE_ROW = (
    apsw.ConstraintError,
    apsw.MismatchError,
    apsw.TooBigError,
    apsw.SQLError,
    apsw.RangeError,
)
"""What is wrong with one row and not with all that follows."""

_BATCH_ROWS = 2000
_ROWID_NAMES = ("rowid", "_rowid_", "oid")
_NORMAL, _HIDDEN, _VIRTUAL, _STORED = 0, 1, 2, 3
LOST_AND_FOUND = "lost_and_found"
_LOST_AND_FOUND_COLUMNS = ("rootpgno", "pgno", "nfield", "id")
_SHADOWS = {"fts5": ("data", "idx", "content", "docsize", "config"), "rtree": ("node", "parent", "rowid")}
_SHADOWS["rtree_i32"] = _SHADOWS["rtree"]


class Layout:
    """How the records of one table become rows of it."""

    __slots__ = ("columns", "fields", "name", "not_null", "rowid_field", "rowid_name", "strict", "types", "without_rowid")

    def __init__(self, name: str, without_rowid: bool, strict: bool) -> None:
        self.name = name
        self.without_rowid = without_rowid
        self.strict = strict
        self.columns: list[str | None] = []
        """By a record's field: its column; None for one that SQLite computes."""
        self.types: list[str] = []
        self.not_null: list[bool] = []
        self.rowid_field: int | None = None
        """The field of the INTEGER PRIMARY KEY, which is NULL in the record."""
        self.rowid_name: str | None = None
        """What the rowid can be called, if it is no column."""
        self.fields = 0

    def admits(self, values: list[Value]) -> bool:
        """Whether a record could be one of this table, by the number and the types of its fields."""
        if not 0 < len(values) <= self.fields:
            return False
        for place, value in enumerate(values):
            if place == self.rowid_field:
                if value is not None:
                    return False
            elif value is None:
                if self.not_null[place]:
                    return False
            elif not _suits(value, self.types[place], self.strict):
                return False
        return True

    def insertion(self, fields: int, raw: int) -> str:
        """The statement for records of so many fields, where the bits of `raw` are those of texts that are not well-formed."""
        names, marks = [], []
        if self.rowid_name is not None:
            names.append(self.rowid_name)
            marks.append("?")
        for place, column in enumerate(self.columns[:fields]):
            if column is not None:
                names.append(quoted(column))
                marks.append("CAST(? AS TEXT)" if raw >> place & 1 else "?")
        return f"INSERT OR IGNORE INTO {quoted(self.name)}({', '.join(names)}) VALUES ({', '.join(marks)})"  # noqa: S608

    def bindings(self, rowid: int, values: list[Value]) -> list[Value]:
        if len(values) > self.rowid_place:
            values[self.rowid_place] = rowid
        if None in self.columns:
            values = [value for column, value in zip(self.columns, values, strict=False) if column is not None]
        return values if self.rowid_name is None else [rowid, *values]

    @property
    def has_rowids(self) -> bool:
        """Whether there is a name to ask for them."""
        return self.rowid_name is not None or self.rowid_field is not None

    @property
    def rowid_place(self) -> int:
        return self.fields if self.rowid_field is None else self.rowid_field


def _suits(value: Value, declared: str, strict: bool) -> bool:
    """Whether a column of that type can hold the value: SQLite converts before it stores."""
    kind = declared.upper()
    number = isinstance(value, (int, float))
    if strict:
        text = isinstance(value, str) or type(value) is RawText
        wanted = {"INT": number, "INTEGER": number, "REAL": number, "TEXT": text, "BLOB": type(value) is bytes}
        return wanted.get(kind, True)
    if "INT" in kind:
        return True
    if any(part in kind for part in ("CHAR", "CLOB", "TEXT")):
        return not number
    return True


class Rebuild:
    """The new database, while it is made."""

    __slots__ = ("_created", "_expired", "_guard", "_virtual", "connection", "layouts")

    def __init__(self, image: Image, configuration: Configuration, expired: Expired) -> None:
        self._expired = expired
        self._guard = Guard()
        self._created: list[str] = []
        self._virtual = False
        self.layouts: dict[str, Layout] = {}
        """By the name of the table, in lower case."""
        self.connection = in_memory(configuration, expired, LIMITS_OF_REQUESTS)
        header = image.header
        pragmas = [
            f"encoding='{PRAGMA_ENCODINGS[image.encoding]}'",
            f"auto_vacuum={header.auto_vacuum}",
            f"max_page_count={configuration.max_pages}",
            f"user_version={header.user_version or 0}",
            f"application_id={header.application_id or 0}",
        ]
        self.connection.execute("PRAGMA page_size=4096;" + ";".join(f"PRAGMA {pragma}" for pragma in pragmas)).fetchall()
        self.connection.execute("BEGIN")

    def close(self) -> None:
        self.connection.close(True)

    def finish(self) -> bytes:
        """The database file."""
        self.connection.execute("COMMIT")
        return self.connection.serialize("main")

    # --- objects

    def create(self, entry: Entry) -> str | None:
        """Make an object of the schema; its name, or None where SQLite refuses."""
        if entry.sql is None or not entry.sql.startswith(_PREFIXES[entry.kind]) or "\0" in entry.sql:
            return None
        self._created.clear()
        self._virtual = is_virtual(entry)
        connection = self.connection
        connection.execute("SAVEPOINT creation")
        connection.authorizer = self._authorize
        try:
            connection.execute(entry.sql).fetchall()
        except (apsw.InterruptError, apsw.FullError, apsw.NoMemError):
            raise
        except (apsw.Error, UnicodeError):
            connection.authorizer = None
            connection.execute("ROLLBACK TO creation; RELEASE creation")
            return None
        finally:
            connection.authorizer = None
        connection.execute("RELEASE creation")
        return self._created[0] if self._created else None

    def _authorize(self, action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
        if action in _CREATIONS and database == "main":
            self._created.append(first or "")
        if self._virtual:  # a module makes its tables with statements of its own
            return self._guard.authorize(action, first, second, database, trigger)
        if action in _CREATIONS and action != apsw.SQLITE_CREATE_VTABLE:
            its_own = action == apsw.SQLITE_CREATE_INDEX or first in ("sqlite_sequence", *self._created[:1])
            return apsw.SQLITE_OK if its_own else apsw.SQLITE_DENY
        if action in _HARMLESS or (action in _ITS_OWN and (first or "").lower() in ("sqlite_master", "sqlite_schema")):
            return apsw.SQLITE_OK
        if action == apsw.SQLITE_FUNCTION:
            return self._guard.authorize(action, first, second, database, trigger)
        return apsw.SQLITE_DENY

    def has_table(self, name: str) -> bool:
        return bool(self._query("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ? COLLATE NOCASE", name))

    def columns_of(self, name: str) -> list[str]:
        return [str(row[0]) for row in self._query("SELECT name FROM pragma_table_xinfo(?) WHERE hidden = 0", name)]

    def layout(self, name: str) -> Layout:
        """How to insert into a table that has been made."""
        ((without_rowid, strict),) = self._query("SELECT wr, strict FROM pragma_table_list(?) WHERE schema = 'main'", name)
        layout = self.layouts[name.lower()] = Layout(name, bool(without_rowid), bool(strict))
        found = self._query('SELECT cid, name, type, "notnull", pk, hidden FROM pragma_table_xinfo(?)', name)
        by_number = {
            cid: (str(column), str(kind or ""), bool(needed), pk, hidden) for cid, column, kind, needed, pk, hidden in found
        }
        order = self._key_order(name) if without_rowid else list(by_number)
        for cid in order:
            column, kind, needed, _, hidden = by_number[cid]
            if hidden != _VIRTUAL:
                layout.columns.append(None if hidden == _STORED else column)
                layout.types.append(kind)
                layout.not_null.append(needed)
        layout.fields = len(layout.columns)
        if not without_rowid:
            keys = [column for column, _, _, pk, _ in by_number.values() if pk]
            if len(keys) == 1 and not self._query("SELECT 1 FROM pragma_index_list(?) WHERE origin = 'pk'", name):
                layout.rowid_field = layout.columns.index(keys[0])
            else:
                names = {column.lower() for column, *_ in by_number.values()}
                layout.rowid_name = next((each for each in _ROWID_NAMES if each not in names), None)
        return layout

    def _key_order(self, name: str) -> list[int]:
        ((index,),) = self._query("SELECT name FROM pragma_index_list(?) WHERE origin = 'pk'", name)
        return [int(row[0]) for row in self._query("SELECT cid FROM pragma_index_xinfo(?) ORDER BY seqno", index)]

    def rowids(self, layout: Layout) -> Iterator[int]:
        name = layout.rowid_name or quoted(str(layout.columns[layout.rowid_place]))
        for (rowid,) in self.connection.execute(f"SELECT {name} FROM {quoted(layout.name)}"):  # noqa: S608
            yield rowid

    def drop(self, name: str) -> None:
        self.connection.execute(f"DROP TABLE IF EXISTS {quoted(name)}")

    def _query(self, sql: str, *values: str) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, values).fetchall()

    # --- rows

    def insert(self, layout: Layout, rows: Iterable[Row]) -> tuple[int, int]:
        """How many rows came, and how many of them are in the table now."""
        came, before = 0, self.connection.total_changes()
        batch: list[list[Value]] = []
        shape = (layout.fields, 0)
        for rowid, values in rows:
            came += 1
            raw = sum(1 << place for place, value in enumerate(values) if type(value) is RawText)
            if (len(values), raw) != shape or len(batch) >= _BATCH_ROWS:
                self._run(layout.insertion(*shape), batch)
                batch, shape = [], (len(values), raw)
            if 0 < len(values) <= layout.fields:
                batch.append(layout.bindings(rowid, values))
        self._run(layout.insertion(*shape), batch)
        return came, self.connection.total_changes() - before

    def _run(self, sql: str, batch: list[list[Value]]) -> None:
        """Insert what can be inserted; a row that SQLite refuses is left out."""
        rows = _Taken(batch)
        begun = -1
        while begun < rows.taken < len(batch):  # SQLite refuses the statement, if it took no row since
            begun = rows.taken
            try:
                self.connection.executemany(sql, rows)
            except _OF_THE_ROW:
                continue

    def replace_shadow(self, layout: Layout, rows: Iterable[Row]) -> tuple[int, int]:
        """As `insert`, into a table of a virtual table, in the place of what that made for itself."""
        self.connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 0)
        try:
            self.connection.execute(f"DELETE FROM {quoted(layout.name)}")  # noqa: S608
            return self.insert(layout, rows)
        finally:
            self.connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)

    def keep_apart(self, rows: Callable[[], Iterator[Stray]], most_columns: int, taken: set[str]) -> int:
        """Put rows of no known table into one of their own, with columns as the sqlite3 shell's has. Gone through twice."""
        width = max((len(stray) for stray in rows()), default=0)
        if not width:
            return 0
        name, number = LOST_AND_FOUND, 0
        while name in taken or self.has_table(name):
            name, number = f"{LOST_AND_FOUND}_{number}", number + 1
        width = min(width, most_columns)
        columns = [*_LOST_AND_FOUND_COLUMNS, *(f"c{place}" for place in range(width - len(_LOST_AND_FOUND_COLUMNS)))]
        self.connection.execute(f"CREATE TABLE {quoted(name)}({', '.join(columns)})")
        layout = self.layout(name)
        return self.insert(layout, ((place, list(stray[:width])) for place, stray in enumerate(rows(), 1)))[1]

    def set_sequences(self, rows: Iterable[Row]) -> int | None:
        """Never reuse the rowids that AUTOINCREMENT has given out; None if no table has it."""
        kept = 0
        if not self.has_table("sqlite_sequence"):
            return None
        for _, values in rows:
            if len(values) == 2 and type(values[0]) is str and type(values[1]) is int and self.has_table(values[0]):
                name, number = values
                self.connection.execute(
                    "INSERT INTO sqlite_sequence SELECT ?1, 0 WHERE ?1 NOT IN (SELECT name FROM sqlite_sequence)", (name,)
                )
                self.connection.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?", (number, name))
                kept += 1
        return kept

    def set_statistics(self, name: str, rows: Iterable[Row]) -> int | None:
        """What ANALYZE had found; None for a table that this SQLite does not make."""
        self.connection.execute("ANALYZE sqlite_schema")
        if not self.has_table(name):
            return None
        self.connection.execute(f"DELETE FROM {quoted(name)}")  # noqa: S608
        return self.insert(self.layout(name), rows)[1]

    # --- virtual tables whose own tables were not read whole

    def refill(self, entry: Entry, content: Iterable[Row]) -> bool:
        """Index anew what an FTS5 or R-tree table holds, from its rows; False where it keeps none or SQLite refuses."""
        name, module = entry.name, module_of(entry)
        table = quoted(name)
        if module != "fts5" and "+" in (entry.sql or ""):
            return False  # columns that are not in its nodes
        try:
            if module != "fts5":
                marks = ", ".join("?" * len(self.columns_of(name)))
                for row in rtree_rows(content, len(self.columns_of(name)), module == "rtree_i32"):
                    self._run(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", [row])  # noqa: S608
            elif not self.has_table(f"{name}_content"):
                self.connection.execute(f"INSERT INTO {table}({table}) VALUES ('rebuild')")  # noqa: S608
            else:
                columns = self.columns_of(name)
                for rowid, values in content:
                    row = [rowid, *values[1 : len(columns) + 1]]
                    row += [None] * (len(columns) + 1 - len(row))
                    marks = ", ".join("CAST(? AS TEXT)" if type(value) is RawText else "?" for value in row)
                    names = ", ".join(map(quoted, columns))
                    self._run(f"INSERT OR IGNORE INTO {table}(rowid, {names}) VALUES ({marks})", [row])  # noqa: S608
        except _OF_THE_ROW:
            return False
        return True


class _Taken:
    """An iterator that knows how many it gave."""

    __slots__ = ("_rows", "taken")

    def __init__(self, rows: list[list[Value]]) -> None:
        self._rows = rows
        self.taken = 0

    def __iter__(self) -> Iterator[list[Value]]:
        return self

    def __next__(self) -> list[Value]:
        if self.taken == len(self._rows):
            raise StopIteration
        self.taken += 1
        return self._rows[self.taken - 1]


def rtree_rows(nodes: Iterable[Row], columns: int, integers: bool) -> Iterator[list[Value]]:
    """The rows in the leaves of an R-tree, from its table of nodes. Columns that are not coordinates are not in there."""
    blobs = {rowid: values[1] for rowid, values in nodes if len(values) > 1 and type(values[1]) is bytes}
    root = blobs.get(1)
    sizes = {len(blob) for blob in blobs.values()}
    if root is None or len(root) < 4 or not columns or len(sizes) != 1:
        return
    coordinates = columns - 1
    cell = struct.Struct(">q" + ("i" if integers else "f") * coordinates)
    level, depth = [1], int.from_bytes(root[:2], "big")
    seen = {1}
    for height in range(depth, -1, -1):
        below = []
        for number in level:
            blob = blobs.get(number, b"")
            for place in range(min(int.from_bytes(blob[2:4], "big"), (len(blob) - 4) // cell.size if blob else 0)):
                first, *rest = cell.unpack_from(blob, 4 + place * cell.size)
                if height:
                    if first not in seen:
                        seen.add(first)
                        below.append(first)
                else:
                    yield [first, *rest]
        level = below


def is_virtual(entry: Entry) -> bool:
    return entry.kind == "table" and (entry.sql or "").startswith("CREATE VIRTUAL TABLE ")


def module_of(entry: Entry) -> str:
    """The module of a virtual table, of those that exist here; empty for another."""
    words = (entry.sql or "").lower().replace("(", " ").split()
    return next(
        (words[place + 1] for place in range(len(words) - 1) if words[place] == "using" and words[place + 1] in _SHADOWS), ""
    )


def shadows(entry: Entry) -> list[str]:
    """The names of the tables that a virtual table keeps its data in, in lower case."""
    return [f"{entry.name}_{part}".lower() for part in _SHADOWS.get(module_of(entry), ())]


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
