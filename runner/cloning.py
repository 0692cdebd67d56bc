"""What makes a process cheap to clone: done once by the zygote, so that none of its children has to do it.

A child pays for each page of memory that it is the first to write (1.8 µs on the development machine). Warm code writes less, and
objects that nobody counts are not written to by who looks at them: 90 pages for SELECT 1, and 236 where they are counted.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import types

import apsw

from . import confine
from .answer import IN
from .child import HEADER, Inbox, Life, child
from .configuration import PLAIN
from .database import prepare
from .frames import framed, read_frame, write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .configuration import Configuration

_STANDARD_ERROR = 2
# More often than the interpreter waits before it specialises a function.
_ROUNDS = 30
_SCRIPTS: tuple[tuple[str, Any], ...] = (
    ("CREATE TABLE warm(a INTEGER PRIMARY KEY, b)", None),
    ("INSERT INTO warm(b) VALUES (?)", ["text"]),
    ("SELECT 1", None),
    ("SELECT a, b, 1.5, NULL, x'00' FROM warm WHERE a > :least", {"least": 0}),
    ("UPDATE warm SET b = 2 WHERE a = 1; SELECT count(*) FROM warm", None),
    ("SELEC", None),
    ("ATTACH 'x' AS y", None),
    ("DROP TABLE warm", None),
)


def warm_up(configuration: Configuration, path: str) -> None:
    """Answer ordinary requests as a child does, on a database of its own, made at the path and removed again. Raises OSError.

    Needs `DATABASE` of child.py to be the lowest descriptor that is free. The standard input is then what the standard error is.
    """
    files = (path, f"{path}-journal")
    for name in files:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    inbox, steps = Inbox(-1), ((_nothing, 0, "nothing"),) * 2
    HEADER.pack_into(inbox.packet, 0, 0, 0, 0)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.dup2(reading, IN)
    os.close(reading)
    for _ in range(_ROUNDS):
        for sql, args in _SCRIPTS:
            life = Life(steps, prepare(configuration, path), confine.Facts(), PLAIN)
            write_all(writing, framed(json.dumps({"v": 1, "sql": sql, "args": args, "int64": "number"}).encode()))
            write_all(writing, framed(child(inbox, steps, {0: life}, None)() or b""))
            read_frame(IN, configuration.max_reply_bytes)
            life.database.close()
    os.close(writing)
    os.dup2(_STANDARD_ERROR, IN)
    for name in files:
        os.unlink(name)


def _nothing() -> int:
    return 0


class Entropy(apsw.VFS):
    """SQLite's source of random numbers: the system call, where `unix` would open /dev/urandom, of which a child's root has none.

    SQLite asks its default file system for a seed, whichever opens the database, and keeps it for the process. The default is this
    one as long as the object lives; databases are opened by `unix`, by name, and never come here. With the seed thrown away last of
    all, each clone takes one of its own when it first needs one.
    """

    def __init__(self) -> None:
        super().__init__("entropy", "unix", makedefault=True)

    def xRandomness(self, numbytes: int) -> bytes:
        return os.urandom(numbytes)

    def forget_the_seed(self) -> None:
        """To be called after the last SQL of this process."""
        apsw.randomness(0)


def make_immortal() -> int:
    """Take the counting of references, for good, from all objects that there are; returns how many those were.

    To look at an object is to count, which is to write: a child would pay a page for each that it looks at. None,
    True and their like have had a count that nobody changes since CPython 3.12 (PEP 683); here all get theirs, where there is one.
    """
    forever, pattern = sys.getrefcount(None), id(None)
    if forever < _LEAST_OF_THE_IMMORTAL:
        return 0
    made = 0
    for tracked in gc.get_objects():
        reached = [] if isinstance(tracked, types.FrameType) else [tracked]
        while reached:
            one = reached.pop()
            ctypes.memmove(id(one), pattern, _COUNT_BYTES)
            made += 1
            reached += [other for other in _looked_at_with(one) if sys.getrefcount(other) != forever]
    return made


_COUNT_BYTES = 4
"""Of a count, those that tell."""
_LEAST_OF_THE_IMMORTAL = 1 << 30


def _looked_at_with(one: object) -> Iterable[object]:
    if isinstance(one, types.CodeType):
        return one.co_consts, one.co_names, one.co_name, one.co_qualname, one.co_filename
    return gc.get_referents(one)
