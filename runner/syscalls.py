"""The system calls of the runner: what the second filter lets through, why, with which arguments, and their numbers.

Tables only, plus what makes the few calls that libc has no wrapper for. The filter is an allow-list: a name that
is not here ends the process. The lists were read from strace of the image's CPython and apsw under a broad workload (TRUNCATE
journal, full sync, VACUUM, FTS5, R-tree, sorts in memory, interrupts from the watchdog, MemoryError, a full disk quota, a
reply of 1 MB, exit).

Groups stand in the order in which the filter compares, so the calls of SQLite's inner loop come first.
"""

from __future__ import annotations

import ctypes
import os
from functools import partial

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Passed = int | bytes | ctypes.Array[ctypes.c_char] | ctypes.c_int | ctypes.c_long | None

_LOW_WORD = 0xFFFFFFFF


class UnsupportedMachineError(LookupError):
    """The processor architecture has no table here."""


class Group:
    """System calls that are there for one reason."""

    __slots__ = ("names", "reason")

    def __init__(self, reason: str, names: tuple[str, ...]) -> None:
        self.reason = reason
        self.names = names


class Argument:
    """A condition: the low word of argument `index`, and-ed with `mask`, is one of `values`.

    The low word is enough: every argument tested is an int to the kernel, or a set of flags that all lie in it.
    """

    __slots__ = ("index", "mask", "values")

    def __init__(self, index: int, mask: int, values: tuple[int, ...]) -> None:
        self.index = index
        self.mask = mask
        self.values = values


def _only_flags(index: int, allowed: int, required: int = 0) -> Argument:
    return Argument(index, _LOW_WORD & ~allowed | required, (required,))


ALLOWED: tuple[Group, ...] = (
    Group(
        "SQLite reads and writes its pages and looks for a journal; a lock keeps others away",
        ("pwrite64", "pread64", "fcntl", "stat"),
    ),
    Group("the request comes and the reply goes through descriptors 0 and 1", ("read", "write")),
    Group("memory of malloc and of the interpreter", ("brk", "mmap", "munmap", "mprotect", "mremap", "madvise")),
    Group("locks of the interpreter and of malloc, the watchdog's wait", ("futex", "clock_nanosleep")),
    Group(
        "SQLite opens, measures, shortens and syncs its two files",
        ("openat", "close", "fstat", "lstat", "newfstatat", "lseek", "ftruncate", "fdatasync", "fsync"),
    ),
    Group("SQLite asks at each new file who it is", ("getpid", "geteuid")),
    Group("clocks, where the vDSO cannot answer", ("clock_gettime", "gettimeofday")),
    Group("randomness for the interpreter", ("getrandom",)),
    Group(
        "signals: masks while threads end, handlers put back at exit, calls begun again after a stop",
        ("rt_sigprocmask", "rt_sigaction", "rt_sigreturn", "restart_syscall"),
    ),
    Group("the end of a thread and of the process", ("exit", "exit_group")),
)

REFUSED: tuple[Group, ...] = (
    Group("SQLite removes a stale journal beside an empty database, and goes on when it may not", ("unlink", "unlinkat")),
    Group("SQLite copies the database's mode or owner to a new journal, and goes on when it may not", ("fchmod", "fchown")),
    Group("SQLite looks for a folder for temporary files, of which there are none", ("access", "faccessat")),
)
"""Answered EPERM instead of ending the process: SQLite asks, and takes no for an answer."""

_F_GETFD, _F_SETFD, _F_GETFL, _F_OFD_SETLK = 1, 2, 3, 37
_PROT_READ, _PROT_WRITE = 1, 2
_MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE, _MAP_STACK = 0x02, 0x10, 0x20, 0x4000, 0x20000
_MADV_DONTNEED, _MADV_FREE = 4, 8
_MREMAP_MAYMOVE = 1
_FUTEX_WAIT, _FUTEX_WAKE, _FUTEX_WAIT_BITSET, _FUTEX_WAKE_BITSET = 0, 1, 9, 10
_FUTEX_OPTIONS = 128 | 256  # FUTEX_PRIVATE_FLAG, FUTEX_CLOCK_REALTIME
_AT_FDCWD = -100 & _LOW_WORD

ARGUMENTS: dict[str, tuple[Argument, ...]] = {
    # No memory becomes executable, none is shared, and no file is mapped.
    "mmap": (
        _only_flags(2, _PROT_READ | _PROT_WRITE),
        _only_flags(3, _MAP_FIXED | _MAP_NORESERVE | _MAP_STACK, required=_MAP_PRIVATE | _MAP_ANONYMOUS),
    ),
    "mprotect": (_only_flags(2, _PROT_READ | _PROT_WRITE),),
    "mremap": (_only_flags(3, _MREMAP_MAYMOVE),),
    # malloc gives pages back. Page merging, among the rest, would be a side channel to other containers.
    "madvise": (Argument(2, _LOW_WORD, (_MADV_DONTNEED, _MADV_FREE)),),
    # Waits and wakes. Priority inheritance and requeueing, unused by glibc's locks, have a history of kernel holes.
    "futex": (Argument(1, _LOW_WORD & ~_FUTEX_OPTIONS, (_FUTEX_WAIT, _FUTEX_WAKE, _FUTEX_WAIT_BITSET, _FUTEX_WAKE_BITSET)),),
    # The lock on the database and the plain flags; no duplicates, leases, notifications, seals or signals.
    "fcntl": (Argument(1, _LOW_WORD, (_F_OFD_SETLK, _F_GETFL, _F_GETFD, _F_SETFD)),),
    # SQLite's own flags. It passes O_CREAT for the journal, which exists; the creation itself is Landlock's to refuse.
    "openat": (
        Argument(0, _LOW_WORD, (_AT_FDCWD,)),
        _only_flags(2, os.O_ACCMODE | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC),
    ),
}
"""All of a call's conditions hold, or it counts as not allowed."""

AUDIT_ARCH: dict[str, int] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

NUMBERS: dict[str, tuple[int | None, int | None]] = {  # (x86_64, aarch64); None: the architecture has no such call
    "access": (21, None),
    "brk": (12, 214),
    "capset": (126, 91),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "clone3": (435, 435),
    "close": (3, 57),
    "close_range": (436, 436),
    "connect": (42, 203),
    "dup3": (292, 24),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "faccessat": (269, 48),
    "fchmod": (91, 52),
    "fchown": (93, 55),
    "fcntl": (72, 25),
    "fdatasync": (75, 83),
    "fstat": (5, 80),
    "fsync": (74, 82),
    "ftruncate": (77, 46),
    "futex": (202, 98),
    "geteuid": (107, 175),
    "getpid": (39, 172),
    "getrandom": (318, 278),
    "gettimeofday": (96, 169),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "lseek": (8, 62),
    "lstat": (6, None),
    "madvise": (28, 233),
    "mmap": (9, 222),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "newfstatat": (262, 79),
    "openat": (257, 56),
    "pivot_root": (155, 41),
    "ppoll": (271, 73),
    "prctl": (157, 167),
    "pread64": (17, 67),
    "prlimit64": (302, 261),
    "pwrite64": (18, 68),
    "read": (0, 63),
    "recvmsg": (47, 212),
    "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "seccomp": (317, 277),
    "sendto": (44, 206),
    "socket": (41, 198),
    "stat": (4, None),
    "statx": (332, 291),
    "umount2": (166, 39),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "unshare": (272, 97),
    "wait4": (61, 260),
    "write": (1, 64),
}


def machine() -> str:
    """This machine's architecture as uname names it; raises UnsupportedMachineError when there is no table for it."""
    name = os.uname().machine
    if name not in AUDIT_ARCH:
        raise UnsupportedMachineError(f"no table of system calls for the architecture {name}")
    return name


def number(name: str, machine: str) -> int | None:
    """The call's number; None where the architecture has no such call. A name without an entry is a KeyError."""
    x86_64, aarch64 = NUMBERS[name]
    return x86_64 if machine == "x86_64" else aarch64


def numbers(groups: tuple[Group, ...], machine: str) -> dict[str, int]:
    """Names of the groups with their numbers, in order, without the names that the architecture does not have."""
    pairs = ((name, number(name, machine)) for group in groups for name in group.names)
    return {name: found for name, found in pairs if found is not None}


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def prepare(name: str, *arguments: Passed) -> Callable[..., int]:
    """One system call, its arguments laid out beforehand: making it touches next to no memory.

    It gives the call's result, or -1; `failure` says what that was. More arguments may be passed to it, as they are. Bytes are
    passed by address, in a copy that the kernel may write to; a buffer's or c_int's content may change from call to call.
    """
    called = number(name, machine())
    if called is None:
        raise UnsupportedMachineError(f"{name} does not exist on {machine()}")
    return partial(_syscall, called, *map(_laid_out, arguments))


def _laid_out(value: Passed) -> Passed:
    if isinstance(value, bytes):
        return ctypes.create_string_buffer(value, len(value))
    if not isinstance(value, int):
        return value
    if not -(2**31) <= value < 2**32:
        raise OverflowError(f"{value} is more than ctypes takes for an int")
    return value & _LOW_WORD  # as the same int, for which a negative one takes it an exception


def failure(name: str) -> OSError:
    """Why the call made last has failed."""
    code = ctypes.get_errno()
    return OSError(code, f"{name}: {os.strerror(code)}")


def invoke(name: str, *arguments: int | bytes | None) -> int:
    """Make one system call by name and return its result; raises OSError. Bytes are passed by address."""
    result = prepare(name, *arguments)()
    if result < 0:
        raise failure(name)
    return result
