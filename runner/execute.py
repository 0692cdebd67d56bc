"""Running a script, one statement at a time, and building the reply.

apsw compiles a statement, calls the tracer below, and then runs it, on and on to the end of the text. Here every statement but
the last is run alone: the tracer stops the first attempt when more text follows, which tells where the statement ends, and that
part is run by itself. So there is a moment before each statement and one after it, in which rows, changes and the authorizer's
notes belong to this statement alone; and a result that is cut does not take the statements after it along.

Each statement commits by itself unless the script says BEGIN, as SQLite does. What ran before an error stays.
"""

from __future__ import annotations

import re

import apsw

from .database import PATH, open_database
from .failures import verdict_of
from .policy import ROW_ACTIONS
from .wire import ResultFullError, RowEncoder, Verdict, VerdictError, encode_columns, encode_result

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from .configuration import Configuration
    from .database import Database, Expired
    from .wire import Arguments, Request

    Asked = TypeVar("Asked")
    Reply = TypeVar("Reply")
    Act = Callable[[Database, Asked, Expired], Reply]
    """What to do with a database that has been read. Raises VerdictError alone; what caused it is its `__cause__`."""
    Watch = Callable[[apsw.Connection | None], None]
    """Told which connection to interrupt at the deadline, and None before it closes."""

# What SQLite sees as nothing: white space, semicolons, comments. Atomic groups, so that it takes linear time on any text.
_BLANK = re.compile(r"(?>[ \t\r\n\f;]++|--[^\n]*+|/\*(?s:(?>.*?\*/|.*)))*+")

_CHANGES = frozenset({apsw.SQLITE_INSERT, apsw.SQLITE_UPDATE, apsw.SQLITE_DELETE})
LEFT_OPEN = "transaction left open; it was rolled back"
NAMES_TOO_LONG = "the names of the columns are too long"
_ALTER_TABLE = apsw.SQLITE_ALTER_TABLE


def run_request(
    request: Request, configuration: Configuration, expired: Expired, watch: Watch, path: str = PATH, read_only: bool = False
) -> bytes:
    """Open, execute, close: the inside of the `ok` reply. Raises VerdictError for every other, apsw.Error when opening fails.

    `expired` tells whether the deadline has passed.
    """
    return in_opened(execute, request, configuration, expired, watch, path, read_only)


def in_opened(
    act: Act[Asked, Reply],
    asked: Asked,
    configuration: Configuration,
    expired: Expired,
    watch: Watch,
    path: str = PATH,
    read_only: bool = False,
) -> Reply:
    """As `run_request`, for whatever is to be done."""
    database = open_database(configuration, expired, path, read_only)
    watch(database.connection)
    try:
        return _or_close(act, asked, database, expired, watch)
    finally:
        watch(None)
        database.close()


def run_prepared(request: Request, database: Database, expired: Expired) -> bytes:
    """As `run_request`, on a database that is prepared and held, and that nobody watches.

    It is not closed after an `ok`. Every statement has committed, the process ends next, and closing would write to 40 more pages.
    """
    database.read(expired)
    return _or_close(execute, request, database, expired, _nobody_watches)


def in_prepared(act: Act[Asked, Reply], asked: Asked, database: Database, expired: Expired) -> Reply:
    """As `run_prepared`, for whatever is to be done."""
    database.read(expired)
    return _or_close(act, asked, database, expired, _nobody_watches)


def _nobody_watches(_: apsw.Connection | None) -> None:
    """A zygote's child has no second thread."""


def _or_close(act: Act[Asked, Reply], asked: Asked, database: Database, expired: Expired, watch: Watch) -> Reply:
    try:
        return act(database, asked, expired)
    except VerdictError as verdict:
        watch(None)
        database.close()
        if isinstance(verdict.__cause__, apsw.FullError) and database.host_is_full():
            raise VerdictError(Verdict.HOST_FULL) from verdict
        raise


def execute(database: Database, request: Request, expired: Expired) -> bytes:
    """The inside of the `ok` reply. Raises VerdictError for any other; what caused it is its `__cause__`."""
    script = Script(database, request, expired)
    try:
        script.run()
        if database.connection.in_transaction:
            raise VerdictError(Verdict.SQL_ERROR, LEFT_OPEN)
        reply = encode_result(script.columns, script.rows, script.rows_affected, script.truncated)
        script.check_time()
        if len(reply) > database.configuration.max_reply_bytes:
            raise VerdictError(Verdict.SQL_ERROR, NAMES_TOO_LONG)
        return reply
    except Exception as error:
        raise script.explain(error) from error


def explained(database: Database, error: Exception) -> VerdictError:
    """What an exception of the statement at hand means."""
    return verdict_of(error, database.guard.refused, database.connection.system_errno, database.read_only)


class Script:
    """One text, and what has become of it. After `run` its result is that of the last statement that returned a row set."""

    __slots__ = (
        "_args_used",
        "_args_wanted",
        "_configuration",
        "_connection",
        "_counts",
        "_database",
        "_end",
        "_expired",
        "_guard",
        "_has_rows",
        "_is_last",
        "_most",
        "_names_used",
        "_request",
        "_room",
        "_started",
        "_text",
        "columns",
        "rows",
        "rows_affected",
        "truncated",
    )

    def __init__(
        self, database: Database, request: Request, expired: Expired, room: int | None = None, most: int | None = None
    ) -> None:
        """At most `room` bytes of rows, and `most` of them: otherwise as the configuration says."""
        self._connection = database.connection
        self._guard = database.guard
        self._configuration = configuration = database.configuration
        self._database = database
        self._room = configuration.max_result_bytes if room is None else room
        self._most = configuration.max_rows if most is None else most
        self._request = request
        self._expired = expired
        self._args_used = 0
        self._args_wanted: int | None = None
        """How many values the statement takes, where a first attempt has told."""
        self._names_used: set[str] = set()
        self.columns: bytes | None = None
        """As JSON, like each of `rows`."""
        self.rows: list[bytes] = []
        self.truncated = False
        self.rows_affected = 0
        # Of the statement at hand:
        self._text = ""
        self._is_last = True
        self._started = False
        self._end: int | None = None
        self._has_rows = False
        self._counts = False

    def run(self) -> None:
        """Every statement, one after the other. Raises what `explain` takes."""
        self._check_text()
        rest, end = self._request.sql, self._attempt(self._request.sql, is_last=True)
        while end is not None:
            self._attempt(rest[:end], is_last=False)
            rest, self._args_wanted = rest[end:], None
            end = self._attempt(rest, is_last=True)

    def explain(self, error: Exception) -> VerdictError:
        """What ended the script."""
        verdict = explained(self._database, error)
        if verdict.verdict is Verdict.MEMORY_LIMIT and self._too_complex():
            return VerdictError(Verdict.TOO_COMPLEX, "the program of a statement is too long")
        return verdict

    def _too_complex(self) -> bool:
        """Whether the statement that ran out of memory while it was compiled does compile without the limit on its program.

        SQLite reports VDBE_OP as "out of memory". Only compiles, and the heap limit stays.
        """
        if self._started:
            return False
        self._connection.limit(apsw.SQLITE_LIMIT_VDBE_OP, 0x7FFFFFFF)
        cursor = self._connection.cursor()
        cursor.exec_trace = lambda *_: False
        try:
            cursor.execute(self._text, self._bindings())
        except apsw.ExecTraceAbort:
            return True
        except Exception:
            return False
        return False

    def _attempt(self, text: str, is_last: bool) -> int | None:
        """Run the statement in `text`, or, where more than it is in there, return where it ends."""
        self._text, self._is_last = text, is_last
        self._started, self._end, self._has_rows, self._counts = False, None, False, False
        before = self._connection.total_changes()
        self._guard.begin()
        cursor = self._connection.cursor()
        cursor.exec_trace = self._trace
        try:
            self._fetch(cursor.execute(text, self._bindings()))
        except apsw.ExecTraceAbort:
            return self._end
        except (apsw.BindingsError, KeyError) as error:
            if self._started:
                raise
            raise VerdictError(Verdict.ARGS_INVALID, _misfit(error, self._request.args)) from None
        finally:
            if self._guard.vacuums:
                self._attach_limit(self._configuration.sqlite_limits["ATTACHED"])
        if self._counts and self._connection.total_changes() > before:
            self.rows_affected += self._connection.changes()
        return None

    def _trace(self, cursor: apsw.Cursor, statement: str, bindings: Any) -> bool:
        """Between compiling and running: False stops the attempt."""
        if self._started:
            return True  # the blank end of the text
        self.check_time()
        if len(statement) != len(self._text) and not _BLANK.fullmatch(self._text, len(statement)):
            self._end, self._args_wanted = len(statement), cursor.bindings_count
            return False
        if self._request.args:
            self._account(cursor)
        self._started = True
        if not cursor.has_vdbe:
            return True
        actions = self._guard.actions
        self._counts = not actions.isdisjoint(_CHANGES) and actions <= ROW_ACTIONS and not cursor.is_explain
        if not actions and not cursor.is_readonly and not cursor.is_explain:
            # It writes and asked for nothing: VACUUM, or a REINDEX of nothing. VACUUM attaches while it runs, and what is
            # compiled meanwhile is SQLite's own. VACUUM INTO attaches too, but by the name of a file.
            self._guard.vacuums = True
            self._attach_limit(max(1, self._configuration.sqlite_limits["ATTACHED"]))
        # An ALTER TABLE that checks the rows it finds shows SQLite's own query as its columns.
        is_alter = _ALTER_TABLE in actions and not cursor.is_explain
        if not is_alter and (names := [column[0] for column in cursor.get_description()]):
            self._has_rows = True
            self.columns, self.rows, self.truncated = encode_columns(names), [], False
        return True

    def _fetch(self, cursor: apsw.Cursor) -> None:
        if not self._has_rows:
            for _ in cursor:  # steps over the blank end of the text
                pass
            return
        rows, room, most = self.rows, self._room, self._most
        encode = RowEncoder(room, self._request.int64_as_string).encode
        try:
            for row in cursor:
                if len(rows) == most:
                    raise ResultFullError
                line = encode(row)
                room -= len(line) + 1
                if room < 0:
                    raise ResultFullError
                rows.append(line)
        except ResultFullError:
            # The changes of INSERT … RETURNING are complete before its first row, and are committed by the close.
            self.truncated = True
            cursor.close(True)

    def _bindings(self) -> Arguments:
        args = self._request.args
        if not isinstance(args, list):
            return args
        return args[self._args_used :] if self._args_wanted is None else args[self._args_used : self._args_used + self._args_wanted]

    def _account(self, cursor: apsw.Cursor) -> None:
        args = self._request.args
        if isinstance(args, list):
            self._args_used += cursor.bindings_count
            if self._is_last and self._args_used < len(args):
                raise VerdictError(Verdict.ARGS_INVALID, f"{len(args)} values given, the statements take {self._args_used}")
        elif args:
            self._names_used.update(name for name in cursor.bindings_names if name is not None)
            if self._is_last and (unused := args.keys() - self._names_used):
                raise VerdictError(Verdict.ARGS_INVALID, f"no statement takes {', '.join(sorted(unused))}")

    def _attach_limit(self, value: int) -> None:
        self._connection.limit(apsw.SQLITE_LIMIT_ATTACHED, value)

    def _check_text(self) -> None:
        sql, most = self._request.sql, self._configuration.sqlite_limits["SQL_LENGTH"]
        if (len(sql) if sql.isascii() else len(sql.encode("utf-8"))) > most:
            raise VerdictError(Verdict.TOO_COMPLEX, f"sql is longer than {most} bytes")
        if "\0" in sql:  # a text ends there for SQLite, so what follows would be dropped unread
            raise VerdictError(Verdict.SQL_ERROR, "sql holds a NUL character")

    def check_time(self) -> None:
        if self._expired():
            raise VerdictError(Verdict.TIMEOUT)


def _misfit(error: Exception, args: Arguments) -> str:
    if isinstance(error, KeyError):
        return f"args has no value for {error.args[0]}"
    if isinstance(args, list):
        return f"{len(args)} values given, the statements take another number"
    return "a statement takes values, and there are no args" if args is None else "a parameter has no name, and args is an object"
