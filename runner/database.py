"""Opening the one database: every switch is set and read back, and what does not hold is a refusal.

TRUNCATE is the journal mode because then no file is ever created, removed or renamed; WAL costs three times as much when a
database is opened for each request (184 µs against 63 µs). The cache can hold the whole database, so a transaction reaches
the disk once, at its end; its memory, like that of temporary tables and sorts, counts against the heap limit.

This runs once for each request, where a cloned runner pays for every page of memory that it is the first to touch (1.8 µs). So
whatever can be known before is, and each step is one loop over a table.
"""

from __future__ import annotations

import errno
import os

import apsw

from .failures import verdict_of
from .policy import CONFIG_FLAGS, DENIED_FUNCTIONS, LIMIT_NUMBERS, MODULES, PAGE_BYTES, Guard
from .wire import Verdict, VerdictError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .configuration import Configuration

    Expired = Callable[[], bool]
    """Whether the deadline has passed."""

PATH = "/data/db.sqlite"

# SQLITE_OPEN_NOMUTEX: the watchdog's interrupt is the one call from another thread, and may be made at any time.
_FLAGS = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_NOMUTEX | apsw.SQLITE_OPEN_EXRESCODE | apsw.SQLITE_OPEN_NOFOLLOW

# By name, because the default may be the one that only has random numbers (cloning.py).
_VFS = "unix"

# The lease keeps other runners away; one that was killed may still be closing its files.
_BUSY_TIMEOUT_MS = 100

# 1,000 instructions: no measurable cost, against 25 % for 100. It is the second timer; the watchdog's interrupt is the first,
# and stops a query of slow instructions sooner than a handler at any setting (1.2 s against 2.7 s at 100, deadline 1 s).
_PROGRESS_INSTRUCTIONS = 1000

_ZEROS = bytes(1 << 16)


class Database:
    """The one connection, and what its steps and its end need to know."""

    __slots__ = ("configuration", "connection", "guard", "path")

    def __init__(self, connection: apsw.Connection, path: str, configuration: Configuration) -> None:
        self.connection = connection
        self.guard = Guard()
        self.path = path
        self.configuration = configuration

    def close(self) -> None:
        """Roll back what is open and close. Whatever fails here is put right by the journal at the next opening."""
        self.connection.close(True)

    def host_is_full(self) -> bool:
        """Whether the host has no room for a journal of full size. Only after `close`.

        SQLite reports ENOSPC as SQLITE_FULL, like its own quota, and keeps no errno; statfs would be one more system call for
        an error's sake. The journal is empty after the rollback, and one that begins with a zero byte is none to SQLite.
        """
        descriptor = os.open(f"{self.path}-journal", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if os.fstat(descriptor).st_size:
                return False  # still wanted for a rollback
            try:
                for _ in range(self.configuration.instance_bytes // len(_ZEROS)):
                    if os.write(descriptor, _ZEROS) < len(_ZEROS):
                        return True
            except OSError as error:
                return error.errno in (errno.ENOSPC, errno.EDQUOT)
            finally:
                os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)
        return False


def open_database(configuration: Configuration, expired: Expired, path: str = PATH) -> Database:
    """Open and fortify. Raises VerdictError, or apsw.Error for what its class alone explains.

    `expired` tells whether the deadline has passed.
    """
    _limit_heap(configuration.heap_bytes)
    # No statement cache: each statement is compiled when it runs, and what the authorizer hears belongs to it alone.
    connection = apsw.Connection(path, _FLAGS, _VFS, 0)
    try:
        connection.set_busy_timeout(_BUSY_TIMEOUT_MS)
        database = Database(connection, path, configuration)
        for _, step in STEPS:
            step(database, expired)
    except apsw.IOError as error:  # a journal whose rollback finds no room; the errno goes with the connection
        verdict = verdict_of(error, None, connection.system_errno)
        connection.close(True)
        raise verdict from error
    except BaseException:
        connection.close(True)
        raise
    return database


def _limit_heap(heap_bytes: int) -> None:
    apsw.hard_heap_limit(heap_bytes)
    if apsw.hard_heap_limit(-1) != heap_bytes:
        raise _unconfined("SQLite's heap limit does not hold")


def _watch_the_clock(database: Database, expired: Expired) -> None:
    database.connection.set_progress_handler(expired, _PROGRESS_INSTRUCTIONS)


def _set_switches(database: Database, expired: Expired) -> None:
    config = database.connection.config
    for flag, value in CONFIG_FLAGS:
        if config(flag, value) != value:  # answers with what holds then
            raise _unconfined(f"{apsw.mapping_db_config[flag]} is not {value}")


def _set_pragmas(database: Database, expired: Expired) -> None:
    pragmas = _pragmas_of(database.configuration)
    answers = database.connection.execute(pragmas.script).fetchall()
    if answers != pragmas.answers:
        for (name, verdict), (found,), (expected,) in zip(pragmas.meanings, answers, pragmas.answers, strict=False):
            if found != expected:
                raise VerdictError(verdict, f"{name} is {found}, not {expected}")
        raise _unconfined(f"{len(answers)} pragmas answer, not {len(pragmas.answers)}")


class _Pragmas:
    """What `_set_pragmas` sets, as one script, and what SQLite answers when all of it holds."""

    __slots__ = ("answers", "meanings", "script")

    def __init__(self, configuration: Configuration) -> None:
        max_pages, cache_kib = configuration.max_pages, configuration.instance_bytes // 1024
        table: tuple[tuple[str, str | int, str | int, Verdict], ...] = (
            # First of all, because the next one reads the file: a killed runner's journal is then emptied after the rollback and
            # not removed, which it could not be here. The lease has made us the only one already.
            ("locking_mode", "EXCLUSIVE", "exclusive", Verdict.UNCONFINED),
            ("page_size", PAGE_BYTES, PAGE_BYTES, Verdict.DAMAGED),  # has an effect on an empty file only
            ("journal_mode", "TRUNCATE", "truncate", Verdict.DAMAGED),
            ("max_page_count", max_pages, max_pages, Verdict.DAMAGED),  # larger, when the file is
            ("temp_store", "MEMORY", 2, Verdict.UNCONFINED),
            ("synchronous", "FULL", 2, Verdict.UNCONFINED),
            ("cache_size", -cache_kib, -cache_kib, Verdict.UNCONFINED),
            ("mmap_size", 0, 0, Verdict.UNCONFINED),
            ("cell_size_check", 1, 1, Verdict.UNCONFINED),
        )
        self.script = ";".join(
            f"PRAGMA {name}={value}" + ("" if name in _ANSWERING else f";PRAGMA {name}") for name, value, _, _ in table
        )
        self.answers = [(answer,) for _, _, answer, _ in table]
        self.meanings = [(name, verdict) for name, _, _, verdict in table]


# Answer with their value when they are set; the others are read.
_ANSWERING = frozenset({"locking_mode", "journal_mode", "max_page_count", "mmap_size"})

_pragmas: dict[Configuration, _Pragmas] = {}
"""Of the configuration at hand: a process has one."""


def _pragmas_of(configuration: Configuration) -> _Pragmas:
    found = _pragmas.get(configuration)
    if found is None:
        _pragmas.clear()
        found = _pragmas[configuration] = _Pragmas(configuration)
    return found


def _reduce_the_catalogue(database: Database, expired: Expired) -> None:
    database.connection.drop_modules(MODULES)
    overload = database.connection.overload_function
    for name in DENIED_FUNCTIONS:
        overload(name, -1)


def _set_limits(database: Database, expired: Expired) -> None:
    limit = database.connection.limit
    for name, value in database.configuration.sqlite_limits.items():
        number = LIMIT_NUMBERS.get(name)
        if number is None:
            continue  # `absent_limits` reports it
        limit(number, value)
        if limit(number) != value:
            raise _unconfined(f"SQLITE_LIMIT_{name} is {limit(number)}, not {value}")


def _install_the_authorizer(database: Database, expired: Expired) -> None:
    database.connection.authorizer = database.guard.authorize


def absent_limits(configuration: Configuration) -> tuple[str, ...]:
    """Which of the limits this SQLite is too old to have."""
    return tuple(name for name in configuration.sqlite_limits if name not in LIMIT_NUMBERS)


def _unconfined(message: str) -> VerdictError:
    return VerdictError(Verdict.UNCONFINED, message)


STEPS: tuple[tuple[str, Callable[[Database, Expired], None]], ...] = (
    ("clock", _watch_the_clock),
    ("switches", _set_switches),
    ("pragmas", _set_pragmas),
    ("catalogue", _reduce_the_catalogue),
    ("limits", _set_limits),
    ("authorizer", _install_the_authorizer),
)
"""What opening does, in order. The authorizer is last, as it would refuse the pragmas."""
