"""What a database has: tables, indexes, views, triggers, and how much room is left. Asked by SQL, under the authorizer."""

from __future__ import annotations

from .execute import explained
from .policy import PAGE_BYTES
from .wire import Verdict, VerdictError, encode_reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from .database import Database, Expired

_TABLES = """
    SELECT name, type, strict, wr FROM pragma_table_list
    WHERE schema = 'main' AND type <> 'view' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name
"""
_COLUMNS = 'SELECT name, type, "notnull", dflt_value, pk, hidden FROM pragma_table_xinfo(?) ORDER BY cid'
_INDEXES = 'SELECT name, "unique", origin, partial FROM pragma_index_list(?)'
_INDEX_COLUMNS = "SELECT name FROM pragma_index_xinfo(?) WHERE key ORDER BY seqno"
_TOO_LONG = "the schema is longer than an answer may be"
_OBJECTS = "SELECT name, tbl_name FROM sqlite_schema WHERE type = ? ORDER BY name"


def describe(database: Database, expired: Expired) -> bytes:
    """The inside of the `schema` reply. Raises VerdictError; what caused it is its `__cause__`."""
    try:
        return _Description(database, expired).reply()
    except Exception as error:
        raise explained(database, error) from error


class _Description:
    __slots__ = ("_database", "_expired", "_room")

    def __init__(self, database: Database, expired: Expired) -> None:
        self._database = database
        self._expired = expired
        self._room = database.configuration.max_reply_bytes

    def reply(self) -> bytes:
        tables = [self._table(*row) for row in self._rows(_TABLES)]
        indexes = [index for table in tables for index in self._indexes(table["name"])]
        ((pages,),), ((free_pages,),) = self._rows("PRAGMA page_count"), self._rows("PRAGMA freelist_count")
        used_pages = pages - free_pages
        reply = encode_reply(
            Verdict.SCHEMA,
            {
                "tables": tables,
                "indexes": sorted(indexes, key=lambda index: index["name"]),
                "views": [{"name": name} for name, _ in self._rows(_OBJECTS, "view")],
                "triggers": [{"name": name, "table": table} for name, table in self._rows(_OBJECTS, "trigger")],
                "page_bytes": PAGE_BYTES,
                "used_bytes": used_pages * PAGE_BYTES,
                "free_bytes": (self._database.configuration.max_pages - used_pages) * PAGE_BYTES,
            },
        )
        if len(reply) > self._database.configuration.max_reply_bytes:
            raise VerdictError(Verdict.TOO_COMPLEX, _TOO_LONG)
        return reply

    def _table(self, name: str, kind: str, strict: int, without_rowid: int) -> dict[str, Any]:
        columns = [
            {
                "name": column,
                "type": type_name,
                "not_null": bool(not_null),
                "default": default,
                "primary_key": place,
                "hidden": hidden != 0,
            }
            for column, type_name, not_null, default, place, hidden in self._rows_or_none(_COLUMNS, name) or ()
        ]
        quoted = name.replace('"', '""')
        counted = self._rows_or_none(f'SELECT count(*) FROM main."{quoted}"')  # noqa: S608 -- a name cannot be a parameter
        return {
            "name": name,
            "kind": kind,
            "strict": bool(strict),
            "without_rowid": bool(without_rowid),
            "rows": None if counted is None else counted[0][0],
            "columns": columns,
        }

    def _indexes(self, table: str) -> Iterator[dict[str, Any]]:
        for name, unique, origin, partial in self._rows_or_none(_INDEXES, table) or ():
            columns = [column for (column,) in self._rows(_INDEX_COLUMNS, name)]
            yield {
                "name": name,
                "table": table,
                "unique": bool(unique),
                "origin": origin,
                "partial": bool(partial),
                "columns": columns,
            }

    def _rows_or_none(self, sql: str, *arguments: str) -> list[tuple[Any, ...]] | None:
        """None where the table alone is to blame: a virtual one whose module is not there, or a name that is not UTF-8."""
        try:
            return self._rows(sql, *arguments)
        except Exception as error:
            if explained(self._database, error).verdict not in (Verdict.SQL_ERROR, Verdict.ARGS_INVALID):
                raise
            return None

    def _rows(self, sql: str, *arguments: str) -> list[tuple[Any, ...]]:
        """Raises VerdictError as soon as there is more of it than fits into a reply."""
        if self._expired():
            raise VerdictError(Verdict.TIMEOUT)
        self._database.guard.begin()
        rows = []
        for row in self._database.connection.execute(sql, arguments):
            self._take(sum(len(value) for value in row if isinstance(value, str)))
            rows.append(row)
        return rows

    def _take(self, length: int) -> None:
        self._room -= length
        if self._room < 0:
            raise VerdictError(Verdict.TOO_COMPLEX, _TOO_LONG)
