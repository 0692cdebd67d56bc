"""Huge pages: a clone gets 2 MiB of its zygote's memory by one entry of its page table, and not by 512 that are made and undone.

Done once by the zygote, to the code of interpreter and SQLite and to the C library's heap, where all of its objects lie
(specification.py of the launcher has PYTHONMALLOC=malloc for that). This is speed and no layer: where the host has said `never`, or
the kernel has none to give (MADV_COLLAPSE is Linux 6.1's), all of it stays where it is.
"""

from __future__ import annotations

import ctypes
import os
import sys

import apsw

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_HUGE_BYTES = 1 << 21
_WANTED = "/sys/kernel/mm/transparent_hugepage/enabled"
_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_PRIVATE, _MAP_ANONYMOUS = 0x02, 0x20
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_MADV_NOHUGEPAGE, _MADV_COLLAPSE = 15, 25
_M_TOP_PAD = -2


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2"""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (*"abcdefghi", "keepcost"))


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    size, number = ctypes.c_size_t, ctypes.c_int
    for name, result, *arguments in (
        ("mallinfo2", _Mallinfo),
        ("malloc", size, size),
        ("free", None, size),
        ("sbrk", size, ctypes.c_ssize_t),
        ("mmap", ctypes.c_ssize_t, size, size, number, number, number, ctypes.c_long),
        ("mremap", ctypes.c_ssize_t, size, size, size, number, size),
        ("mprotect", number, size, size, number),
        ("madvise", number, size, size, number),
        ("munmap", number, size, size),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_libc = _library()


def _are_wanted() -> bool:
    """By the host. To be called while /sys is there."""
    try:
        with open(_WANTED, encoding="ascii") as file:
            return "[never]" not in file.read()
    except FileNotFoundError:  # a kernel without any
        return False


def _up(address: int) -> int:
    return -(-address // _HUGE_BYTES) * _HUGE_BYTES


def _mappings() -> Iterator[tuple[int, int, str, str]]:
    """Start, end, permissions and name of each."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            fields = line.split()
            start, end = (int(address, 16) for address in fields[0].split("-"))
            yield start, end, fields[1], fields[-1]


# --- the code


def enlarge_the_text() -> int:
    """Put code and constants of interpreter and SQLite onto huge pages; returns how many bytes that were. Needs /proc.

    In small ones a clone faults its code in anew, and at its end gives back 16 pages for each that it used. What could be
    read can be executed too then; nothing can be written to that could not before. SQLite's code fills a huge page only where
    infra/image has linked it.
    """
    if not _are_wanted():
        return 0
    programs = (os.path.realpath(program) for program in (sys.executable, apsw.__file__))
    return sum(_enlarge(*page) for program in programs for page in _text_of(program))


def _text_of(program: str) -> list[tuple[int, list[tuple[int, int]]]]:
    """Each huge page that is the program's alone, mapped without a gap and not writable, with what in it can be read."""
    spans = [(start, end, "r" in flags) for start, end, flags, name in _mappings() if name == program and "w" not in flags]
    found = []
    for page in range(_up(spans[0][0]), spans[-1][1] - _HUGE_BYTES + 1, _HUGE_BYTES):
        parts = [(max(start, page), min(end, page + _HUGE_BYTES), readable) for start, end, readable in spans]
        parts = [part for part in parts if part[0] < part[1]]
        text = [(start, end) for start, end, readable in parts if readable]
        if _bytes(parts) == _HUGE_BYTES and _bytes(text) > _HUGE_BYTES // 2:
            found.append((page, text))
    return found


def _bytes(spans: Sequence[tuple[int, ...]]) -> int:
    return sum(span[1] - span[0] for span in spans)


def _enlarge(page: int, spans: list[tuple[int, int]]) -> int:
    room = _libc.mmap(0, 2 * _HUGE_BYTES, _PROT_READ | _PROT_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    if room == -1:
        return 0
    copy = _up(room)
    for start, end in spans:
        ctypes.memmove(copy + start - page, start, end - start)
    moved = 0
    # Small pages would be worse than what is there: each is then one more to copy for every clone.
    if (
        not _libc.madvise(copy, _HUGE_BYTES, _MADV_COLLAPSE)
        and not _libc.mprotect(copy, _HUGE_BYTES, _PROT_READ | _PROT_EXEC)
        and _libc.mremap(copy, _HUGE_BYTES, _HUGE_BYTES, _MREMAP_MAYMOVE | _MREMAP_FIXED, page) != -1
    ):
        moved = _HUGE_BYTES
    _libc.munmap(room, 2 * _HUGE_BYTES)
    return moved


# --- the heap

_LARGEST_HOLE_BYTES = 1 << 16
_CHUNK_BYTES = 16
_HOLES = (
    *(_LARGEST_HOLE_BYTES >> shift for shift in range(6)),
    *range(2048 - _CHUNK_BYTES // 2, _CHUNK_BYTES, -_CHUNK_BYTES),
)
"""Bytes to ask for, so that what is left of one hole is taken by the next: below 2 KiB every size that there is."""
_FRESH_BYTES = 1 << 20


class Heap:
    """The C library's. What the zygote has made for its children comes onto huge pages.

    What follows goes onto small ones that nobody has written to yet: what children allocate lies there side by side.
    """

    def __init__(self) -> None:
        """To be made while /proc and /sys are there."""
        self._are_wanted = _are_wanted()
        self._start = self._end = next(_up(start) for start, _, _, name in _mappings() if name == "[heap]")

    def fill(self) -> int:
        """Take every free block below the top, for good; returns how many bytes that were."""
        top, taken = self._top(), 0
        for size in _HOLES:
            while (block := _libc.malloc(size)) < top:
                taken += size
            _libc.free(block)
        return taken

    def finish(self) -> None:
        """What is there ends with a huge page; new memory is what comes behind it. To be filled then."""
        self._end = _up(self._top())
        _libc.mallopt(_M_TOP_PAD, _FRESH_BYTES)
        while (left := self._end - self._top()) > 0:
            _libc.malloc(max(_CHUNK_BYTES, min(left, _LARGEST_HOLE_BYTES) - _CHUNK_BYTES // 2))
        _libc.malloc(_CHUNK_BYTES)
        _libc.madvise(self._end, _libc.sbrk(0) - self._end, _MADV_NOHUGEPAGE)

    def enlarge(self) -> int:
        """Onto huge pages with what is there; returns how many bytes are. One that a clone writes to is its own in small ones."""
        pages = range(self._start, self._end, _HUGE_BYTES) if self._are_wanted else ()
        return sum(_HUGE_BYTES for page in pages if not _libc.madvise(page, _HUGE_BYTES, _MADV_COLLAPSE))

    def _top(self) -> int:
        """Where the free block begins that has no end."""
        return int(_libc.sbrk(0) - _libc.mallinfo2().keepcost)
