"""What makes a process cheap to clone: done once by the zygote, so that none of its children has to do it.

A child pays for each page of memory that it is the first to write (1.8 µs on the development machine, 350 pages for SELECT 1 before
this module). Warm code writes less, and a heap without holes puts all that a request takes from it side by side.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

import apsw

from .answer import Clock, read_request, reply_to
from .database import prepare
from .execute import run_prepared
from .frames import Outbox, framed, read_frame, write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .answer import Asked
    from .configuration import Configuration
    from .database import Expired

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
    """Answer ordinary requests on a database of its own, made at the path and removed again. Raises OSError."""
    files = (path, f"{path}-journal")
    for name in files:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    reading, writing = os.pipe2(os.O_CLOEXEC)
    for _ in range(_ROUNDS):
        for sql, args in _SCRIPTS:
            write_all(writing, framed(json.dumps({"v": 1, "sql": sql, "args": args, "int64": "number"}).encode()))
            write_all(writing, framed(_reply(reading, configuration, path)))
            read_frame(reading, configuration.max_reply_bytes)
    for descriptor in (reading, writing):
        os.close(descriptor)
    for name in files:
        os.unlink(name)


def _reply(reading: int, configuration: Configuration, path: str) -> bytes:
    """As a child makes it."""
    clock = Clock(3600.0)
    request = read_request(configuration, clock, reading)
    database = prepare(configuration, path)

    def run(asked: Asked, expired: Expired) -> bytes:
        database.hold_the_file()
        return run_prepared(asked, database, expired)  # type: ignore[arg-type]  # there are no operations among the scripts

    try:
        return reply_to(request, run, clock.expired, Outbox(-1)) or b""
    finally:
        database.close()


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


_LARGEST_HOLE_BYTES = 1 << 16
_CHUNK_BYTES = 16
_HOLES = (
    *(_LARGEST_HOLE_BYTES >> shift for shift in range(6)),
    *range(2048 - _CHUNK_BYTES // 2, _CHUNK_BYTES, -_CHUNK_BYTES),
)
"""Bytes to ask for, so that what is left of one hole is taken by the next: below 2 KiB every size that there is."""


class _Heap(ctypes.Structure):
    """struct mallinfo2"""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (*"abcdefghi", "releasable"))


def fill_the_heap() -> int:
    """Take every free block below the top of the C library's heap, for good; returns how many bytes that were.

    What a child allocates lies at the top then, side by side on pages that nobody has written: 60 copies less for SELECT 1.
    """
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Heap
    library.malloc.argtypes, library.malloc.restype = (ctypes.c_size_t,), ctypes.c_size_t
    library.free.argtypes, library.free.restype = (ctypes.c_size_t,), None
    library.sbrk.argtypes, library.sbrk.restype = (ctypes.c_ssize_t,), ctypes.c_size_t
    top = library.sbrk(0) - library.mallinfo2().releasable
    library.malloc_trim(1 << 18)
    taken = 0
    for size in _HOLES:
        while (block := library.malloc(size)) < top:
            taken += size
        library.free(block)
    return taken


_HUGE_BYTES = 1 << 21
_THP = "/sys/kernel/mm/transparent_hugepage/enabled"
_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_PRIVATE, _MAP_ANONYMOUS = 0x02, 0x20
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_MADV_HUGEPAGE = 14


def enlarge_the_text() -> int:
    """Put code and constants of interpreter and SQLite onto huge pages where the kernel has them; returns how many bytes that were.

    A clone gets a huge page by one entry of its page table. In small ones it faults its code in anew, and at its end gives back 16
    pages for each that it used: 65 faults, a seventh of a request. What could be read can be executed too then; nothing can be
    written to that could not before. SQLite's code fills a huge page only where infra/image has linked it.
    """
    with open(_THP, encoding="ascii") as file:
        if "[never]" in file.read():
            return 0
    programs = (os.path.realpath(program) for program in (sys.executable, apsw.__file__))
    return sum(_enlarge(*page) for program in programs for page in _text_of(program))


def _text_of(program: str) -> list[tuple[int, list[tuple[int, int]]]]:
    """Each huge page that is the program's alone, mapped without a gap and not writable, with what in it can be read."""
    spans: list[tuple[int, int, bool]] = []
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            fields = line.split()
            if fields[-1] == program and "w" not in fields[1]:
                start, end = (int(address, 16) for address in fields[0].split("-"))
                spans.append((start, end, "r" in fields[1]))
    found = []
    for page in range(-(-spans[0][0] // _HUGE_BYTES) * _HUGE_BYTES, spans[-1][1] - _HUGE_BYTES + 1, _HUGE_BYTES):
        parts = [(max(start, page), min(end, page + _HUGE_BYTES), readable) for start, end, readable in spans]
        parts = [part for part in parts if part[0] < part[1]]
        text = [(start, end) for start, end, readable in parts if readable]
        if _bytes(parts) == _HUGE_BYTES and _bytes(text) > _HUGE_BYTES // 2:
            found.append((page, text))
    return found


def _bytes(spans: Sequence[tuple[int, ...]]) -> int:
    return sum(span[1] - span[0] for span in spans)


def _enlarge(page: int, spans: list[tuple[int, int]]) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    for name, arguments in (
        ("mmap", (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)),
        ("mremap", (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t)),
        ("mprotect", (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)),
        ("madvise", (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)),
        ("munmap", (ctypes.c_size_t, ctypes.c_size_t)),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_ssize_t
    room = library.mmap(0, 2 * _HUGE_BYTES, _PROT_READ | _PROT_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    if room == -1:
        return 0
    copy = -(-room // _HUGE_BYTES) * _HUGE_BYTES
    library.madvise(copy, _HUGE_BYTES, _MADV_HUGEPAGE)
    for start, end in spans:
        ctypes.memmove(copy + start - page, start, end - start)
    moved = 0
    # Small pages would be worse than what is there: each is then one more to copy for every clone.
    if (
        _huge_bytes_at(copy) == _HUGE_BYTES
        and not library.mprotect(copy, _HUGE_BYTES, _PROT_READ | _PROT_EXEC)
        and library.mremap(copy, _HUGE_BYTES, _HUGE_BYTES, _MREMAP_MAYMOVE | _MREMAP_FIXED, page) != -1
    ):
        moved = _HUGE_BYTES
    library.munmap(room, 2 * _HUGE_BYTES)
    return moved


def _huge_bytes_at(address: int) -> int:
    with open("/proc/self/smaps", encoding="utf-8") as maps:
        inside = False
        for line in maps:
            first = line.split()[0]
            if "-" in first:
                start, end = (int(bound, 16) for bound in first.split("-"))
                inside = start <= address < end
            elif inside and first == "AnonHugePages:":
                return int(line.split()[1]) * 1024
    return 0
