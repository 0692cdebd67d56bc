"""Opening the one database: every switch is set and read back, and what does not hold is a refusal.

TRUNCATE is the journal mode because then no file is ever created, removed or renamed; WAL costs three times as much when a
database is opened for each request (184 µs against 63 µs). The cache can hold the whole database, so a transaction reaches
the disk once, at its end; its memory, like that of temporary tables and sorts, counts against the heap limit.

A cloned runner pays for every page of memory that it is the first to touch (1.8 µs). So all that needs no tenant's file is done
before, once, by `prepare`: PREPARING. For SQLite the first read comes with the first transaction, under whose lock it looks at the
journal, the header, page size and reserved bytes, and at the schema, whatever it believed before; what belongs to the file is set
and compared then: READING. Of the opening it keeps the path, the descriptor's number, and that the file can be written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

import apsw

from .failures import verdict_of
from .policy import CONFIG_FLAGS, DENIED_FUNCTIONS, LIMIT_NUMBERS, MODULES, PAGE_BYTES, Guard
from .wire import Verdict, VerdictError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .configuration import Configuration

    Expired = Callable[[], bool]
    """Whether the deadline has passed."""
    _Pragma = tuple[str, str | int | None, str | int, Verdict]
    """Its name, what to set if anything, what it must answer, and what it means when it does not."""

PATH = "/data/db.sqlite"

# SQLITE_OPEN_NOMUTEX: the watchdog's interrupt is the one call from another thread, and may be made at any time.
_FLAGS = apsw.SQLITE_OPEN_NOMUTEX | apsw.SQLITE_OPEN_EXRESCODE | apsw.SQLITE_OPEN_NOFOLLOW
_WRITING, _READING = _FLAGS | apsw.SQLITE_OPEN_READWRITE, _FLAGS | apsw.SQLITE_OPEN_READONLY

# "unix" without SQLite's own locks, in whose place stands that of `hold`: they know a file by the number that it had when it was
# opened, and a zygote's child has another one (zygote.py). By name, because the default may be the one of cloning.py.
_VFS = "unix-none"

_F_OFD_SETLK = 37
_WHOLE_FILE = struct.pack("@hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock
_WHOLE_FILE_SHARED = struct.pack("@hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)

# 1,000 instructions: no measurable cost, against 25 % for 100. It is the second timer; the watchdog's interrupt is the first,
# and stops a query of slow instructions sooner than a handler at any setting (1.2 s against 2.7 s at 100, deadline 1 s).
_PROGRESS_INSTRUCTIONS = 1000

_ZEROS = bytes(1 << 16)


class Database:
    """The one connection, and what its steps and its end need to know."""

    __slots__ = ("_held", "configuration", "connection", "guard", "path", "read_only")

    def __init__(self, connection: apsw.Connection, path: str, configuration: Configuration, read_only: bool = False) -> None:
        self.connection = connection
        self.guard = Guard()
        self.path = path
        self.configuration = configuration
        self.read_only = read_only
        self._held: int | None = None

    def hold_the_file(self) -> None:
        """As `hold`, by a descriptor of its own."""
        self._held = held(self.path, self.read_only)

    def read(self, expired: Expired) -> None:
        """Look at the file for the first time. Raises VerdictError, or apsw.Error for what its class alone explains.

        `expired` tells whether the deadline has passed.
        """
        try:
            for _, step in READING:
                step(self, expired)
        except apsw.IOError as error:  # a journal whose rollback finds no room; the errno goes with the connection
            verdict = verdict_of(error, None, self.connection.system_errno)
            self.close()
            raise verdict from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Roll back what is open and close. Whatever fails here is put right by the journal at the next opening."""
        self.connection.close(True)
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def host_is_full(self) -> bool:
        """Whether the host has no room for a journal of full size. Only after `close`.

        SQLite reports ENOSPC as SQLITE_FULL, like its own quota, and keeps no errno; statfs would be one more system call for
        an error's sake. The journal is empty after the rollback, and one that begins with a zero byte is none to SQLite.
        """
        if self.read_only:
            return False
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


def open_database(configuration: Configuration, expired: Expired, path: str = PATH, read_only: bool = False) -> Database:
    """Prepare, hold the file and read it, in one go."""
    database = prepare(configuration, path, read_only)
    try:
        database.hold_the_file()
    except BaseException:
        database.close()
        raise
    database.read(expired)
    return database


def prepare(configuration: Configuration, path: str = PATH, read_only: bool = False) -> Database:
    """Open and fortify, without a look at the file. Raises VerdictError, or apsw.Error for what its class alone explains."""
    limit_heap(configuration.heap_bytes)
    # No statement cache: each statement is compiled when it runs, and what the authorizer hears belongs to it alone.
    connection = apsw.Connection(path, _READING if read_only else _WRITING, _VFS, 0)
    database = Database(connection, path, configuration, read_only)
    try:
        for _, step in PREPARING:
            step(database)
    except BaseException:
        connection.close(True)
        raise
    return database


def held(path: str, read_only: bool) -> int:
    """A new descriptor of the file, by which it is held."""
    descriptor = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        hold(descriptor, read_only)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def hold(descriptor: int, read_only: bool = False) -> None:
    """Keep everybody else from the file, other runners and SQLite's own locks too, until it is closed. Raises BlockingIOError.

    By a descriptor that cannot write there is a shared lock to be had alone: it keeps from the file whoever would write.
    """
    fcntl.fcntl(descriptor, _F_OFD_SETLK, _WHOLE_FILE_SHARED if read_only else _WHOLE_FILE)


def limit_heap(heap_bytes: int) -> None:
    """Of everything that this process has of SQLite. Raises VerdictError."""
    apsw.hard_heap_limit(heap_bytes)
    if apsw.hard_heap_limit(-1) != heap_bytes:
        raise _unconfined("SQLite's heap limit does not hold")


def watch_the_clock(database: Database, expired: Expired) -> None:
    database.connection.set_progress_handler(expired, _PROGRESS_INSTRUCTIONS)


def _set_switches(database: Database) -> None:
    config = database.connection.config
    for flag, value in CONFIG_FLAGS:
        if config(flag, value) != value:  # answers with what holds then
            raise _unconfined(f"{apsw.mapping_db_config[flag]} is not {value}")


def _set_pragmas(database: Database) -> None:
    # Has an effect on an empty file only. What the file's is, is looked at when it has been found to be a database.
    database.connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
    _Pragmas(_PREPARING).set(database.connection)


def _set_pragmas_of_the_file(database: Database, expired: Expired) -> None:
    _pragmas_of(database.configuration).set(database.connection)


class _Pragmas:
    """What to set, as one script, and what SQLite answers when all of it holds."""

    __slots__ = ("_answers", "_meanings", "_script")

    def __init__(self, table: Sequence[_Pragma]) -> None:
        self._script = ";".join(statement for name, value, _, _ in table for statement in _statements(name, value))
        self._answers = [(answer,) for _, _, answer, _ in table]
        self._meanings = [(name, verdict) for name, _, _, verdict in table]

    def set(self, connection: apsw.Connection) -> None:
        answers = connection.execute(self._script).fetchall()
        if answers != self._answers:
            for (name, verdict), (found,), (expected,) in zip(self._meanings, answers, self._answers, strict=False):
                if found != expected:
                    raise VerdictError(verdict, f"{name} is {found}, not {expected}")
            raise _unconfined(f"{len(answers)} pragmas answer, not {len(self._answers)}")


def _statements(name: str, value: str | int | None) -> Iterator[str]:
    if value is not None:
        yield f"PRAGMA {name}={value}"
    if value is None or name not in _ANSWERING:
        yield f"PRAGMA {name}"


_ANSWERING = frozenset({"locking_mode", "journal_mode", "max_page_count", "mmap_size"})
"""Answer with their value when they are set; the others are read."""

_PREPARING: tuple[_Pragma, ...] = (
    # Before the file is read: a killed runner's journal is then emptied after the rollback and not removed, which it could not be
    # here. The lease has made us the only one already.
    ("locking_mode", "EXCLUSIVE", "exclusive", Verdict.UNCONFINED),
    ("temp_store", "MEMORY", 2, Verdict.UNCONFINED),
    ("mmap_size", 0, 0, Verdict.UNCONFINED),
    ("cell_size_check", 1, 1, Verdict.UNCONFINED),
)
"""Those that SQLite sets without a look at the file."""


def _of_the_file(configuration: Configuration) -> tuple[_Pragma, ...]:
    max_pages, cache_kib = configuration.max_pages, configuration.instance_bytes // 1024
    return (
        ("cache_size", -cache_kib, -cache_kib, Verdict.UNCONFINED),  # reads the file, the first that does
        ("page_size", None, PAGE_BYTES, Verdict.DAMAGED),
        ("journal_mode", "TRUNCATE", "truncate", Verdict.DAMAGED),
        ("max_page_count", max_pages, max_pages, Verdict.DAMAGED),  # larger, when the file is
        ("synchronous", "FULL", 2, Verdict.UNCONFINED),
    )


_pragmas: dict[Configuration, _Pragmas] = {}
"""Of the configuration at hand: a process has one."""


def _pragmas_of(configuration: Configuration) -> _Pragmas:
    found = _pragmas.get(configuration)
    if found is None:
        _pragmas.clear()
        found = _pragmas[configuration] = _Pragmas(_of_the_file(configuration))
    return found


def _reduce_the_catalogue(database: Database) -> None:
    database.connection.drop_modules(MODULES)
    overload = database.connection.overload_function
    for name in DENIED_FUNCTIONS:
        overload(name, -1)


def _set_limits(database: Database) -> None:
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


PREPARING: tuple[tuple[str, Callable[[Database], None]], ...] = (
    ("switches", _set_switches),
    ("settings", _set_pragmas),
    ("catalogue", _reduce_the_catalogue),
    ("limits", _set_limits),
)
"""What is done to a connection that has not read its file."""

READING: tuple[tuple[str, Callable[[Database, Expired], None]], ...] = (
    ("clock", watch_the_clock),
    ("pragmas", _set_pragmas_of_the_file),
    ("authorizer", _install_the_authorizer),
)
"""What opening does then, in order. The authorizer is last, as it would refuse the pragmas."""
