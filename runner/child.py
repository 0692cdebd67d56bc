"""The child: what the zygote clones for one run. It waits for its request and its volume, seals itself, answers, and ends.

Its way is one plan, made ready in the zygote: system calls laid out in memory, and what each must give. A call that gives
anything else is the answer `unconfined`, and nothing is read. So little happens in Python because whatever a fresh clone looks at
it also writes to, by counting references, and pays 1.8 µs for each page (measured; 700 µs instead of 61 for the same request).
"""

from __future__ import annotations

import ctypes
import os
import struct
from time import monotonic

from . import confine, landlock, seccomp, syscalls
from .answer import Exit, answer, read_request, refuse_self_test, reply_to, self_test
from .confine import DATA, FILES
from .database import hold
from .execute import run_prepared
from .wire import Verdict, encode_failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

    from .configuration import Configuration
    from .database import Database
    from .wire import Request

    Act = tuple[Callable[[], int], int]
    """Something to do, and the number it must give."""
    Operation = tuple[Callable[[], int], int, str]
    """The same, with the name of its step."""

HEADER = struct.Struct("!BBxxI")
"""Of every packet of docs/wire.md: kind, command or flags, run."""
_SELFTEST = 1

DATABASE = 3
"""The descriptor of the database, in a child: the lowest that is free."""

_MOUNT_ATTR_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
_MOVE_MOUNT_F_EMPTY_PATH = 4
_AT_FDCWD = -100
_LAST_DESCRIPTOR = 0xFFFFFFFF
_CAPABILITY_VERSION_3 = 0x20080522
_PR_CAPBSET_DROP = 24


class Inbox:
    """Room for one packet and the descriptors that come with it, where the calls that use them find them."""

    def __init__(self, socket: int, flags: int = 0) -> None:
        self.packet = bytearray(HEADER.size + 1)
        content = (ctypes.c_char * len(self.packet)).from_buffer(self.packet)
        self._rights = ctypes.create_string_buffer(_RIGHTS.size)
        self.first = ctypes.c_int.from_buffer(self._rights, _RIGHTS.size - 8)
        self.second = ctypes.c_int.from_buffer(self._rights, _RIGHTS.size - 4)
        vector = struct.pack("@PN", ctypes.addressof(content), len(self.packet))  # struct iovec
        self._vector = ctypes.create_string_buffer(vector, len(vector))
        self._message = ctypes.create_string_buffer(_MESSAGE.size)
        self.receive = syscalls.prepare("recvmsg", socket, self._message, flags)
        """To be called after `clear`; gives the packet's length, which is `HEADER.size` if all is well."""
        self.clear()

    def clear(self) -> None:
        """No descriptors have come."""
        self.first.value = self.second.value = -1
        vector, rights = ctypes.addressof(self._vector), ctypes.addressof(self._rights)
        _MESSAGE.pack_into(self._message, 0, 0, 0, vector, 1, rights, len(self._rights), 0)


_MESSAGE = struct.Struct("@PI4xPNPNi4x")  # struct msghdr
_RIGHTS = struct.Struct("@Niiii")  # struct cmsghdr, and two descriptors


def child(
    database: Database, inbox: Inbox, plan: tuple[Operation, ...], facts: confine.Facts, build: dict[str, Any] | None
) -> Callable[[], NoReturn]:
    """What a child runs, from its first step to its last."""
    configuration = database.configuration
    deadline_seconds, max_request_bytes = configuration.deadline_ms / 1000, configuration.max_request_bytes
    packet, answered = inbox.packet, int(Exit.ANSWERED)
    acts = tuple((operation, wanted) for operation, wanted, _ in plan)
    deadline = 0.0

    def expired() -> bool:
        return monotonic() >= deadline

    def run(request: Request, expired: Callable[[], bool]) -> bytes:
        hold(DATABASE)
        return run_prepared(request, database, expired)

    def serve() -> NoReturn:
        nonlocal deadline
        for act in acts:
            operation, wanted = act
            try:
                if operation() != wanted:
                    raise syscalls.failure("a system call")
            except Exception as refusal:
                _refuse(inbox, f"{plan[acts.index(act)][2]}: {refusal}")
        if packet[1] == _SELFTEST:
            deadline = monotonic() + deadline_seconds
            self_test(configuration, facts, run, expired, build)
        frame = read_request(max_request_bytes)
        deadline = monotonic() + deadline_seconds
        answer(reply_to(frame, run, expired), answered)

    return serve


def _refuse(inbox: Inbox, reason: str) -> NoReturn:
    if inbox.packet[1] == _SELFTEST:
        refuse_self_test(reason)
    answer(encode_failure(Verdict.UNCONFINED, reason), Exit.REFUSED)


# --- its steps: each gives operations of the plan, ready to be done


class Order:
    """What the steps are for."""

    __slots__ = ("configuration", "facts", "inbox", "taken")

    def __init__(self, configuration: Configuration, facts: confine.Facts, inbox: Inbox, taken: int) -> None:
        self.configuration = configuration
        self.facts = facts
        self.inbox = inbox
        """`first` will be the request's socket, `second` the mount."""
        self.taken = taken
        """The eventfd that tells the zygote that the run is taken."""


def _run(order: Order) -> Iterator[Act]:
    """Wait for it; no tenant's byte comes this way. Its socket comes into place first: a refusal has to go somewhere."""
    yield order.inbox.receive, HEADER.size
    yield syscalls.prepare("write", order.taken, struct.pack("=Q", 1), 8), 8
    for standard in (0, 1):
        yield syscalls.prepare("dup3", order.inbox.first, standard, 0), standard


def _volume(order: Order) -> Iterator[Act]:
    """Its place is there, in the zygote's empty root; its seal is set here and not only trusted to be there."""
    seal = struct.pack("=QQQQ", _MOUNT_ATTR_NOSUID_NODEV_NOEXEC, 0, 0, 0)
    here = DATA.encode() + b"\0"
    yield syscalls.prepare("move_mount", order.inbox.second, b"\0", _AT_FDCWD, here, _MOVE_MOUNT_F_EMPTY_PATH), 0
    yield syscalls.prepare("mount_setattr", _AT_FDCWD, here, 0, seal, len(seal)), 0


def _descriptors(order: Order) -> Iterator[Act]:
    """All but the request's socket and the standard error, which is nowhere."""
    yield syscalls.prepare("close_range", 3, _LAST_DESCRIPTOR, 0), 0


def _capabilities(order: Order) -> Iterator[Act]:
    """All of them, over the child's own namespaces; first those of the bounding set, which takes one of them."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        every = range(int(file.read()) + 1)
    drop = syscalls.prepare("prctl", _PR_CAPBSET_DROP)

    def drop_all() -> int:
        for capability in every:
            if drop(capability, 0, 0, 0):
                return -1
        return 0

    yield drop_all, 0
    yield syscalls.prepare("capset", struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)), 0


def _landlock(order: Order) -> Iterator[Act]:
    abi = order.facts.landlock_abi = confine.usable_abi(order.configuration.min_landlock_abi)
    if abi:
        yield landlock.restriction(FILES, abi), 0


def _database(order: Order) -> Iterator[Act]:
    """Open the tenant's file by the number that the zygote's connection, which has not read a file yet, has for its own."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    yield syscalls.prepare("openat", _AT_FDCWD, FILES[0].encode() + b"\0", flags), DATABASE


def _limits(order: Order) -> Iterator[Act]:
    """What the zygote cannot have itself: an end of its processor time, and no further process."""
    limits = {"CPU": confine.cpu_seconds(order.configuration), **confine.NO_PROCESSES}
    order.facts.rlimits |= limits
    for name, value in limits.items():
        yield syscalls.prepare("prlimit64", 0, confine.limit_number(name), struct.pack("=QQ", value, value), None), 0


def _seccomp(order: Order) -> Iterator[Act]:
    machine = syscalls.machine()
    order.facts.seccomp_syscalls = len(syscalls.numbers(syscalls.ALLOWED, machine))
    yield seccomp.Filter(seccomp.build(machine)).call, 0


STEPS: tuple[tuple[str, Callable[[Order], Iterator[Act]]], ...] = (
    ("run", _run),
    ("volume", _volume),
    ("descriptors", _descriptors),
    ("capabilities", _capabilities),
    ("landlock", _landlock),
    ("database", _database),
    ("limits", _limits),
    ("seccomp", _seccomp),
)


def plan(order: Order) -> tuple[Operation, ...]:
    """Every step, ready to be done; raises UnconfinedError."""
    operations: list[Operation] = []
    for name, step in STEPS:
        acts: list[Act] = confine.total(name, list, step(order))
        operations += ((act, wanted, name) for act, wanted in acts)
        order.facts.steps += (name,)
    return tuple(operations)
