"""What SQL may do, as tables, and the small function that applies them: SQLite's authorizer.

SQLite asks the authorizer by meaning, for every action of a statement while it compiles it, also for those of views, triggers
and of SQLite's own nested statements. Nothing here looks at the text of a statement.

A table-valued `pragma_x` is asked for as PRAGMA x. Virtual tables that are not in `MODULES` are taken out of the connection, so
there is no list of tables that may not be read. What SQLite makes on demand stays: json_each, json_tree, pragma_x, and carray,
which gives no rows without a pointer that only C code can make. TEMP objects are allowed: they live in bounded memory and for
one request.
"""

from __future__ import annotations

import apsw

PAGE_BYTES = 4096
"""Fixed when a database is made. `max_page_count` counts pages, so a larger page would raise the byte quota."""

LIMITS = frozenset(
    {
        "LENGTH",
        "SQL_LENGTH",
        "COLUMN",
        "EXPR_DEPTH",
        "PARSER_DEPTH",
        "COMPOUND_SELECT",
        "VDBE_OP",
        "FUNCTION_ARG",
        "ATTACHED",
        "LIKE_PATTERN_LENGTH",
        "VARIABLE_NUMBER",
        "TRIGGER_DEPTH",
        "WORKER_THREADS",
        "SCHEMA",
        "TRIGGER_STEPS",
    }
)
"""SQLite's run-time limits. One that the SQLite at hand is too old to have is reported, any other that fails is a refusal."""

OPTIONAL_LIMITS = frozenset({"SCHEMA", "TRIGGER_STEPS"})
"""May be left at SQLite's default: both are bounded by the size of the database already."""

LIMIT_NUMBERS = {name: number for name in LIMITS if (number := getattr(apsw, f"SQLITE_LIMIT_{name}", None)) is not None}
"""SQLite's numbers of those that the SQLite at hand has."""

CONFIG_FLAGS: tuple[tuple[int, int], ...] = (
    (apsw.SQLITE_DBCONFIG_DEFENSIVE, 1),  # no writes to shadow tables, no effect of writable_schema
    (apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0),
    (apsw.SQLITE_DBCONFIG_WRITABLE_SCHEMA, 0),
    (apsw.SQLITE_DBCONFIG_RESET_DATABASE, 0),
    (apsw.SQLITE_DBCONFIG_ENABLE_LOAD_EXTENSION, 0),
    (apsw.SQLITE_DBCONFIG_ENABLE_FTS3_TOKENIZER, 0),
    (apsw.SQLITE_DBCONFIG_ENABLE_ATTACH_CREATE, 0),
    (apsw.SQLITE_DBCONFIG_ENABLE_ATTACH_WRITE, 0),
    (apsw.SQLITE_DBCONFIG_DQS_DML, 0),
    (apsw.SQLITE_DBCONFIG_DQS_DDL, 0),
    (apsw.SQLITE_DBCONFIG_ENABLE_FKEY, 0),  # SQLite's default; a request may switch it on
    (apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 1),
    (apsw.SQLITE_DBCONFIG_ENABLE_VIEW, 1),
    (apsw.SQLITE_DBCONFIG_LEGACY_ALTER_TABLE, 0),
    (apsw.SQLITE_DBCONFIG_TRIGGER_EQP, 0),
)

MODULES = frozenset({"fts5", "fts5vocab", "rtree", "rtree_i32"})

READ_PRAGMAS = frozenset(
    {
        "application_id",
        "collation_list",
        "data_version",
        "encoding",
        "foreign_key_check",
        "foreign_key_list",
        "freelist_count",
        "index_info",
        "index_list",
        "index_xinfo",
        "integrity_check",
        "optimize",
        "page_count",
        "page_size",
        "quick_check",
        "table_info",
        "table_list",
        "table_xinfo",
        "user_version",
    }
)
"""Without a value, unless they are in one of the next two tables."""

ARGUMENT_PRAGMAS = frozenset(
    {
        "foreign_key_check",
        "foreign_key_list",
        "index_info",
        "index_list",
        "index_xinfo",
        "integrity_check",
        "optimize",  # a mask; it runs ANALYZE, within every limit
        "quick_check",
        "table_info",
        "table_list",
        "table_xinfo",
    }
)
"""Their value names what to look at; nothing is set."""

WRITE_PRAGMAS = frozenset(
    {
        "analysis_limit",
        "application_id",
        "case_sensitive_like",
        "defer_foreign_keys",
        "foreign_keys",
        "ignore_check_constraints",
        "recursive_triggers",
        "user_version",
    }
)
"""May be read and set: properties of the tenant's own data, or of this one request."""

DENIED_FUNCTIONS = frozenset(
    {
        "edit",
        "fts3_tokenizer",
        "fts5",
        "fts5_insttoken",
        "fts5_locale",
        "fts5_source_id",
        "geopoly_debug",
        "load_extension",
        "readfile",
        "rtreecheck",
        "rtreedepth",
        "rtreenode",
        "sqlite_compileoption_get",
        "sqlite_compileoption_used",
        "sqlite_log",
        "sqlite_source_id",
        "writefile",
    }
)
"""Each is made known to SQLite where the build lacks it, so that the answer is `forbidden` everywhere, not `no such function`."""

FREE_ACTIONS = frozenset(
    {
        apsw.SQLITE_ALTER_TABLE,
        apsw.SQLITE_ANALYZE,
        apsw.SQLITE_CREATE_INDEX,
        apsw.SQLITE_CREATE_TABLE,
        apsw.SQLITE_CREATE_TEMP_INDEX,
        apsw.SQLITE_CREATE_TEMP_TABLE,
        apsw.SQLITE_CREATE_TEMP_TRIGGER,
        apsw.SQLITE_CREATE_TEMP_VIEW,
        apsw.SQLITE_CREATE_TRIGGER,
        apsw.SQLITE_CREATE_VIEW,
        apsw.SQLITE_DELETE,
        apsw.SQLITE_DROP_INDEX,
        apsw.SQLITE_DROP_TABLE,
        apsw.SQLITE_DROP_TEMP_INDEX,
        apsw.SQLITE_DROP_TEMP_TABLE,
        apsw.SQLITE_DROP_TEMP_TRIGGER,
        apsw.SQLITE_DROP_TEMP_VIEW,
        apsw.SQLITE_DROP_TRIGGER,
        apsw.SQLITE_DROP_VIEW,
        apsw.SQLITE_DROP_VTABLE,
        apsw.SQLITE_INSERT,
        apsw.SQLITE_READ,
        apsw.SQLITE_RECURSIVE,
        apsw.SQLITE_REINDEX,
        apsw.SQLITE_SAVEPOINT,
        apsw.SQLITE_SELECT,
        apsw.SQLITE_TRANSACTION,
        apsw.SQLITE_UPDATE,
    }
)
"""Whatever they are about. `FUNCTION`, `PRAGMA`, `CREATE_VTABLE` and `ATTACH` are looked at; anything else is refused."""

ROW_ACTIONS = frozenset(
    {
        apsw.SQLITE_DELETE,
        apsw.SQLITE_FUNCTION,
        apsw.SQLITE_INSERT,
        apsw.SQLITE_READ,
        apsw.SQLITE_RECURSIVE,
        apsw.SQLITE_SELECT,
        apsw.SQLITE_UPDATE,
    }
)
"""A statement that needs no others and wrote is an INSERT, UPDATE, DELETE or REPLACE, and its rows count as affected."""

_MAX_NAME_CHARACTERS = 100
_OK, _DENY = apsw.SQLITE_OK, apsw.SQLITE_DENY


class Guard:
    """The authorizer of one connection, and what it was asked."""

    __slots__ = ("actions", "refused", "vacuums")

    def __init__(self) -> None:
        self.actions: set[int] = set()
        """Every action since `begin`."""
        self.refused: str | None = None
        """What was refused since `begin`, in the words of the reply."""
        self.vacuums = False
        """A plain VACUUM is running: it attaches a database without a name, in memory."""

    def begin(self) -> None:
        """A statement is about to be compiled."""
        self.actions.clear()
        self.refused = None
        self.vacuums = False

    def authorize(self, action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
        self.actions.add(action)
        if action in FREE_ACTIONS:
            return _OK
        refusal = self._refusal(action, first, second)
        if refusal is None:
            return _OK
        self.refused = refusal
        return _DENY

    def _refusal(self, action: int, first: str | None, second: str | None) -> str | None:
        """What to call the action when it is refused, or None when it is allowed."""
        if action == apsw.SQLITE_FUNCTION:
            function = (second or "").lower()
            return function if function in DENIED_FUNCTIONS else None
        if action == apsw.SQLITE_PRAGMA:
            pragma = (first or "").lower()
            readable = pragma in READ_PRAGMAS if second is None else pragma in ARGUMENT_PRAGMAS
            return None if readable or pragma in WRITE_PRAGMAS else f"PRAGMA {pragma[:_MAX_NAME_CHARACTERS]}"
        if action == apsw.SQLITE_CREATE_VTABLE:
            module = (second or "").lower()
            return None if module in MODULES else f"CREATE VIRTUAL TABLE USING {module[:_MAX_NAME_CHARACTERS]}"
        if action == apsw.SQLITE_ATTACH:
            return None if self.vacuums and first == "" else "ATTACH"
        if action == apsw.SQLITE_DETACH:
            return None if self.vacuums else "DETACH"
        return "an unknown action"
