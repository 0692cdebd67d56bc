"""SQLite databases in memory, fortified like the one on the volume: a hostile file is looked at there, and made anew."""

from __future__ import annotations

import apsw

from .database import PREPARING, Database, limit_heap, watch_the_clock
from .policy import LIMIT_NUMBERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .configuration import Configuration

_FLAGS = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_NOMUTEX | apsw.SQLITE_OPEN_EXRESCODE
_UNLIMITED = 0x7FFFFFFF

LIMITS_OF_REQUESTS = frozenset({"LENGTH", "VDBE_OP", "VARIABLE_NUMBER"})
"""What they bound is a request's work. The others bound what a schema may be."""


def in_memory(configuration: Configuration, expired: Callable[[], bool], unlimited: frozenset[str]) -> apsw.Connection:
    """An empty database with every switch set; of the limits, those named are left to SQLite and to the heap's."""
    limit_heap(configuration.heap_bytes)
    connection = apsw.Connection(":memory:", _FLAGS, "unix-none", 0)
    database = Database(connection, ":memory:", configuration)
    try:
        for name, step in PREPARING:
            if name != "settings":  # those of a file
                step(database)
        for name in unlimited & LIMIT_NUMBERS.keys():
            connection.limit(LIMIT_NUMBERS[name], _UNLIMITED)
        # A CHECK is its owner's rule, which a request may suspend: a row that breaks one is no damage, and no reason to lose it.
        connection.execute(
            "PRAGMA temp_store=MEMORY; PRAGMA cell_size_check=1; PRAGMA cache_size=-2000; PRAGMA ignore_check_constraints=1"
        )
        watch_the_clock(database, expired)
    except BaseException:
        connection.close(True)
        raise
    return connection
