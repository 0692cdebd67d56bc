"""Ordinary SQL by the thousand, from a seed: what people and programs write, in the manner of SQLite's own sqllogictest.

A session is a list of records, each one request: first the tables, then queries and changes in any order. Nothing depends on the
clock or on chance, so a record has one right answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

_COLUMNS = ("pk", "col0", "col1", "col2", "col3", "col4")
_WORDS = ("alpha", "beta", "o''clock", "mixed Case", "größe", "50%", "a_b", "")
_PATTERNS = ("'%a%'", "'_e*'", "'50%'")
_BINARY = ("+", "-", "*", "/", "%", "||", "&", "|", "<<", "=", "<>", "<", ">=", "IS", "IS NOT")


class OrdinarySql:
    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._made = 0
        self._tables: list[str] = []
        self._views: list[str] = []

    def session(self, records: int) -> Iterator[str]:
        self._tables, self._views = [], []
        for _ in range(3):
            yield self._create_table()
            yield from (self._insert() for _ in range(10))
        kinds: dict[Callable[[], str], int] = {
            self._select: 40,
            self._aggregate: 15,
            self._compound: 6,
            self._insert: 6,
            self._many_rows: 1,
            self._change: 8,
            self._window: 4,
            self._recursive: 2,
            self._json: 2,
            self._long_list: 2,
            self._long_condition: 2,
            self._wide_case: 1,
            self._many_joins: 1,
            self._transaction: 3,
            self._schema: 4,
            self._look: 3,
            self._create_table: 1,
        }
        yield from (self._pick(*self._dice.choices([*kinds], [*kinds.values()]))() for _ in range(records))

    def _pick(self, *options):
        return self._dice.choice(options)

    def _name(self, prefix: str) -> str:
        self._made += 1
        return f"{prefix}{self._made}"

    def _table(self) -> str:
        return self._dice.choice(self._tables)

    def _literal(self) -> str:
        return self._pick(
            str(self._dice.randint(-99, 99)),
            f"{self._dice.uniform(-99, 99):.2f}",
            f"'{self._pick(*_WORDS)}'",
            "NULL",
            "1e3",
            "x'4a0a'",
        )

    def _expression(self, depth: int = 3, alias: str = "") -> str:
        if depth == 0 or self._dice.random() < 0.2:
            return f"{alias}{self._pick(*_COLUMNS)}" if self._dice.random() < 0.6 else self._literal()
        a, b, c = (self._expression(depth - 1, alias) for _ in range(3))
        plain = self._expression(
            0, alias
        )  # within a subquery no further one: the work would grow with the fourth power of the rows
        one = self._pick(
            f"{a} {self._pick(*_BINARY)} {b}",
            f"{self._pick('-', '+', 'NOT ', '~')}{a}",
            f"CASE {a} WHEN {b} THEN {c} ELSE {self._literal()} END",
            f"CASE WHEN {a} > {b} THEN {c} END",
            f"COALESCE({a}, {b}, {c})",
            f"{self._pick('NULLIF', 'IFNULL', 'min', 'max')}({a}, {b})",
            f"CAST({a} AS {self._pick('INTEGER', 'REAL', 'TEXT', 'NUMERIC')})",
            f"{self._pick('abs', 'typeof', 'length', 'upper', 'lower', 'trim', 'hex', 'quote', 'round')}({a})",
            f"substr({a}, 2, 3)",
            f"replace({a}, 'a', {b})",
            f"iif({a}, {b}, {c})",
            f"printf('%s-%d', {a}, {b})",
            f"{a} {self._pick('', 'NOT ')}BETWEEN {b} AND {c}",
            f"{a} {self._pick('', 'NOT ')}IN ({b}, {c}, {self._literal()})",
            f"{a} {self._pick('LIKE', 'GLOB', 'NOT LIKE')} {self._pick(*_PATTERNS, b)}",
            f"{a} IN (SELECT {self._pick(*_COLUMNS)} FROM {self._table()} WHERE {plain} > 3)",
            f"EXISTS (SELECT 1 FROM {self._table()} AS x WHERE x.col0 = {plain})",
            f"(SELECT count(*) FROM {self._table()} AS x WHERE x.col1 < {plain})",
            f"{a} COLLATE NOCASE = {b}",
        )
        return f"({one})"

    def _source(self) -> tuple[str, str]:
        """A FROM clause, and the prefix under which its columns are known."""
        if self._dice.random() < 0.6:
            return self._dice.choice(self._tables + self._views), ""
        kind = self._pick("JOIN", "LEFT JOIN", "CROSS JOIN", "INNER JOIN", "FULL JOIN", ",")
        on = "" if kind in (",", "CROSS JOIN") else f" ON a.{self._pick(*_COLUMNS)} = b.{self._pick(*_COLUMNS)}"
        return f"{self._table()} AS a {kind} {self._table()} AS b{on}", "a."

    def _select(self) -> str:
        source, alias = self._source()
        columns = ", ".join(self._expression(3, alias) + self._pick("", f" AS c{n}") for n in range(self._dice.randint(1, 5)))
        where = self._pick("", f" WHERE {self._expression(4, alias)}")
        order = self._pick("", " ORDER BY 1", f" ORDER BY {self._expression(1, alias)} DESC, 1")
        limit = self._pick("", "", f" LIMIT {self._dice.randint(0, 20)} OFFSET {self._dice.randint(0, 3)}")
        return f"SELECT {self._pick('', 'DISTINCT ', 'ALL ')}{columns} FROM {source}{where}{order}{limit}"

    def _aggregate(self) -> str:
        source, alias = self._source()
        function = self._pick("count", "sum", "total", "avg", "min", "max", "group_concat")
        group = self._expression(1, alias)
        having = self._pick("", f" HAVING count(*) > {self._dice.randint(0, 3)}")
        return (
            f"SELECT {group}, {function}({self._pick('', 'DISTINCT ')}{self._expression(2, alias)}), count(*) FROM {source} "
            f"WHERE {self._expression(2, alias)} GROUP BY {group}{having} ORDER BY 1"
        )

    def _compound(self) -> str:
        parts = [
            f"SELECT {self._expression(2)}, {self._expression(1)} FROM {self._table()}" for _ in range(self._dice.randint(2, 12))
        ]
        text = parts[0]
        for part in parts[1:]:
            text += f" {self._pick('UNION', 'UNION ALL', 'EXCEPT', 'INTERSECT')} {part}"
        return f"{text} ORDER BY 1, 2"

    def _row(self) -> str:
        return f"({', '.join(self._literal() for _ in _COLUMNS[1:])})"

    def _insert(self) -> str:
        columns, pk = ", ".join(_COLUMNS[1:]), self._dice.randint(1, 20)
        return self._pick(
            f"INSERT INTO {self._table()}({columns}) VALUES {self._row()}",
            f"INSERT OR REPLACE INTO {self._table()}(pk, {columns}) SELECT {pk}, * FROM (VALUES {self._row()})",
            f"INSERT INTO {self._table()}({columns}) VALUES {self._row()}, {self._row()} RETURNING pk, col0",
            f"INSERT OR IGNORE INTO {self._table()}({columns}) SELECT {columns} FROM {self._table()} LIMIT 2",
            f"INSERT INTO {self._table()}(pk, col0) VALUES ({pk}, 5) ON CONFLICT(pk) DO UPDATE SET col0 = excluded.col0",
        )

    def _many_rows(self) -> str:
        name = self._name("bulk")
        rows = ", ".join(self._row() for _ in range(self._dice.randint(10, 500)))
        return f"CREATE TABLE {name}(a, b, c, d, e); INSERT INTO {name} VALUES {rows}; SELECT sum(a) FROM {name}; DROP TABLE {name}"

    def _change(self) -> str:
        return self._pick(
            f"UPDATE {self._table()} SET col0 = {self._expression(2)} WHERE {self._expression(2)}",
            f"UPDATE {self._table()} SET col1 = {self._literal()}, col2 = col2 WHERE pk = {self._dice.randint(1, 20)} RETURNING *",
            f"DELETE FROM {self._table()} WHERE pk = {self._dice.randint(1, 40)}",
            f"DELETE FROM {self._table()} WHERE {self._expression(2)} AND pk > 30",
            f"REPLACE INTO {self._table()}(pk, col3) VALUES ({self._dice.randint(1, 20)}, {self._literal()})",
        )

    def _window(self) -> str:
        function = self._pick("row_number()", "rank()", "dense_rank()", "lag(col0)", "sum(col1)", "ntile(3)", "first_value(col2)")
        frame = self._pick("", " ROWS BETWEEN 2 PRECEDING AND CURRENT ROW", " RANGE UNBOUNDED PRECEDING")
        return (
            f"SELECT pk, {function} OVER (PARTITION BY {self._expression(1)} ORDER BY pk{frame}) FROM {self._table()} "
            f"WHERE {self._expression(2)} ORDER BY pk"
        )

    def _recursive(self) -> str:
        most = self._dice.randint(5, 900)
        return self._pick(
            f"WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < {most}) SELECT sum(i) FROM n",
            f"WITH x AS (SELECT pk, col0 FROM {self._table()}), y AS (SELECT count(*) AS n FROM x) SELECT * FROM x, y WHERE pk < n",
        )

    def _json(self) -> str:
        return self._pick(
            f"SELECT json_object('k', pk, 'v', quote(col0)) ->> '$.v' FROM {self._table()}",
            f"SELECT key, value FROM json_each('[1, 2.5, \"x\", null, {self._dice.randint(1, 9)}]')",
            f"SELECT json_group_array(pk) FROM {self._table()}",
            "SELECT strftime('%Y-%m', '2024-02-29', '+1 month'), date('2024-01-31', 'start of month'), julianday('2000-01-01')",
        )

    def _long_list(self) -> str:
        values = ", ".join(str(self._dice.randint(0, 999)) for _ in range(self._dice.randint(20, 400)))
        column, sense = self._pick("pk", "col0", "col1"), self._pick("", "NOT ")
        return f"SELECT pk FROM {self._table()} WHERE {column} {sense}IN ({values}) ORDER BY 1"

    def _long_condition(self) -> str:
        terms = [
            f"col{self._dice.randint(0, 4)} {self._pick('=', '<', '>')} {self._literal()}"
            for _ in range(self._dice.randint(10, 60))
        ]
        depth = self._dice.randint(0, 25)
        where = f" {self._pick('AND', 'OR')} ".join(terms)
        return f"SELECT pk FROM {self._table()} WHERE {'(' * depth}{where}{')' * depth} ORDER BY pk"

    def _wide_case(self) -> str:
        arms = " ".join(f"WHEN {n} THEN {self._literal()}" for n in range(self._dice.randint(5, 60)))
        columns = ", ".join(f"col0 + {n}" for n in range(self._dice.randint(5, 60)))
        return f"SELECT CASE pk {arms} ELSE 'other' END, {columns} FROM {self._table()}"

    def _many_joins(self) -> str:
        count = self._dice.randint(3, 30)
        sources = ", ".join(f"{self._table()} AS x{n}" for n in range(count))
        chain = " AND ".join(f"x{n}.pk = x{n + 1}.pk" for n in range(count - 1))
        return f"SELECT {', '.join(f'x{n}.col1' for n in range(count))} FROM {sources} WHERE {chain} AND x0.pk < 9 ORDER BY x0.pk"

    def _transaction(self) -> str:
        body = "; ".join(self._insert() for _ in range(self._dice.randint(1, 40)))
        end = self._pick("COMMIT", "END TRANSACTION", "ROLLBACK")
        return f"BEGIN{self._pick('', ' IMMEDIATE')}; {body}; {end}; SELECT count(*) FROM {self._tables[0]};"

    def _schema(self) -> str:
        name, table = self._name("thing"), self._table()
        if self._dice.random() < 0.3:
            self._views.append(name)
            return f"CREATE VIEW {name} AS SELECT {', '.join(_COLUMNS)} FROM {table} WHERE {self._expression(2)}"
        trigger = f"CREATE TRIGGER {name} AFTER UPDATE ON {table} WHEN new.pk > 90"
        search = f"CREATE VIRTUAL TABLE {name} USING fts5(a); INSERT INTO {name} VALUES ('x y'); SELECT * FROM {name}('y')"
        return self._pick(
            f"CREATE INDEX {name} ON {table}({self._pick(*_COLUMNS)} DESC, col0)",
            f"CREATE INDEX {name} ON {table}(lower(col2)) WHERE col1 > 3; DROP INDEX {name}",
            f"{trigger} BEGIN UPDATE {table} SET col4 = 1 WHERE pk = new.pk; END",
            f"CREATE TABLE {name} AS {self._select()}; ALTER TABLE {name} RENAME TO {name}x; DROP TABLE {name}x",
            f"CREATE TABLE {name}(a); ALTER TABLE {name} ADD COLUMN b DEFAULT 7; SELECT * FROM {name}; DROP TABLE {name}",
            f"CREATE TABLE {name}(k TEXT PRIMARY KEY, v) WITHOUT ROWID; INSERT INTO {name} VALUES ('a', 1); DROP TABLE {name}",
            f"CREATE TEMP TABLE {name}(a); INSERT INTO {name} VALUES (1); SELECT * FROM {name}; DROP TABLE {name}",
            f"{search}; DROP TABLE {name}",
            "ANALYZE",
            "REINDEX",
            "VACUUM",
        )

    def _look(self) -> str:
        return self._pick(
            "SELECT type, name, sql FROM sqlite_master ORDER BY name",
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
            f"PRAGMA table_info({self._table()})",
            f"SELECT name, type FROM pragma_table_info('{self._table()}')",
            f"EXPLAIN QUERY PLAN {self._select()}",
            f"PRAGMA index_list('{self._table()}')",
            "PRAGMA integrity_check",
            "PRAGMA foreign_key_check",
        )

    def _create_table(self) -> str:
        name = self._name("tab")
        kinds = [self._pick("INTEGER", "REAL", "TEXT", "NUMERIC", "VARCHAR(30)", "FLOAT DEFAULT 1.5", "") for _ in _COLUMNS[1:]]
        columns = ", ".join(f"{column} {kind}".strip() for column, kind in zip(_COLUMNS[1:], kinds, strict=True))
        owner = f", FOREIGN KEY (col0) REFERENCES {self._table()}(pk)" if self._tables and self._dice.random() < 0.3 else ""
        self._tables.append(name)
        return f"CREATE TABLE {self._pick('', 'IF NOT EXISTS ')}{name}(pk INTEGER PRIMARY KEY, {columns}{owner})"
