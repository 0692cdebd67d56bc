"""The child: what the zygote clones for one run. It waits for its request and its volume, seals itself, answers, and ends.

Its way is a plan, made ready in the zygote for each kind of run: system calls laid out in memory, and what each must give. A call
that gives anything else is the answer `unconfined`, and nothing is read. So little happens in Python because a clone pays for each
page of memory that it is the first to write to (1.8 µs, measured).
"""

from __future__ import annotations

import ctypes
import os
import struct

from . import confine, landlock, seccomp, syscalls
from .answer import OUT, Clock, Exit, answer, read_request, refuse_self_test, reply_to, self_test
from .configuration import PLAIN, Kind
from .confine import DATA, FILES
from .database import hold
from .execute import run_prepared
from .frames import Outbox
from .operations import is_on_the_database, perform_prepared
from .wire import Request, Verdict, encode_failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any, NoReturn

    from .answer import Asked
    from .configuration import Configuration
    from .database import Database, Expired

    Act = tuple[Callable[[], int], int]
    """Something to do, and the number it must give."""
    Plan = tuple[tuple[Callable[[], int], int, str], ...]
    """Acts, each with the name of its step."""

HEADER = struct.Struct("!BBxxI")
"""Of every packet of docs/wire.md: kind, command or flags, run."""
_SERVE, _SELFTEST, _READ_ONLY, _BULK = 0, 1, 2, 4

KINDS: Mapping[int, Kind] = {
    command: Kind(read_only=bool(command & _READ_ONLY), bulk=bool(command & _BULK))
    for command in (_READ_ONLY, _BULK, _READ_ONLY | _BULK)
} | {_SERVE: PLAIN, _SELFTEST: PLAIN}
"""What each command of a `RUN` makes of a child."""

DATABASE = 3
"""The descriptor of the database, in a child: the lowest that is free."""

_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID_NODEV_NOEXEC = 1, 2 | 4 | 8
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


class Life:
    """What a child does from the moment it knows what it is for, made ready in the zygote."""

    __slots__ = ("clock", "database", "facts", "plan", "read_only")

    def __init__(self, plan: Plan, database: Database, facts: confine.Facts, kind: Kind) -> None:
        self.plan = plan
        self.facts = facts
        self.database = database
        self.read_only = kind.read_only
        self.clock = Clock(kind.deadline_ms(database.configuration) / 1000)


def child(inbox: Inbox, waiting: Plan, lives: Mapping[int, Life], build: dict[str, Any] | None) -> Callable[[], bytes | None]:
    """What a child runs, from its first step to its reply, for `answer`: `waiting`, and the life that the command then names."""
    packet, outbox = inbox.packet, Outbox(OUT)

    def take(plan: Plan) -> None:
        for operation, wanted, step in plan:
            try:
                if operation() != wanted:
                    raise syscalls.failure("a system call")
            except Exception as refusal:
                _refuse(inbox, f"{step}: {refusal}")

    def reply() -> bytes | None:
        take(waiting)
        command = packet[1]
        if command not in lives:
            _refuse(inbox, f"no command {command} is known")
        life = lives[command]
        take(life.plan)
        run, configuration, clock = _run_by(life, outbox), life.database.configuration, life.clock
        if command == _SELFTEST:
            clock = Clock(clock.seconds)
            self_test(configuration, life.facts, run, clock.expired, build)
        return reply_to(read_request(configuration, clock), run, clock.expired, outbox)

    return reply


def _run_by(life: Life, outbox: Outbox) -> Callable[[Asked, Expired], bytes | None]:
    database, read_only = life.database, life.read_only

    def run(asked: Asked, expired: Expired) -> bytes | None:
        if isinstance(asked, Request):
            hold(DATABASE, read_only)
            return run_prepared(asked, database, expired)
        if is_on_the_database(asked):
            hold(DATABASE, read_only)
        return perform_prepared(asked, database, expired, outbox)

    return run


def _refuse(inbox: Inbox, reason: str) -> NoReturn:
    if inbox.packet[1] == _SELFTEST:
        refuse_self_test(reason)
    answer(encode_failure(Verdict.UNCONFINED, reason), Exit.REFUSED)


# --- its steps: each gives operations of the plan, ready to be done


class Bounding:
    """The bounding set, all of it: 41 calls, for which there is time while a child waits, and which take nothing that it needs."""

    __slots__ = ("_drop", "_every", "_is_empty")

    def __init__(self) -> None:
        with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
            self._every = range(int(file.read()) + 1)
        self._drop = syscalls.prepare("prctl", _PR_CAPBSET_DROP)
        self._is_empty = bytearray(1)

    def empty(self) -> int:
        """Unless that is done. Needs a capability."""
        if not self._is_empty[0]:
            drop = self._drop
            for capability in self._every:
                if drop(capability, 0, 0, 0):
                    return -1
            self._is_empty[0] = 1
        return 0

    def empty_ahead(self) -> int:
        """What hinders it is found again, and told, once there is somebody to tell."""
        self.empty()
        return 0


class Order:
    """What the steps are for."""

    __slots__ = ("bounding", "configuration", "facts", "inbox", "kind", "taken")

    def __init__(
        self, configuration: Configuration, kind: Kind, facts: confine.Facts, inbox: Inbox, taken: int, bounding: Bounding
    ) -> None:
        self.configuration = configuration
        self.kind = kind
        self.facts = facts
        self.bounding = bounding
        self.inbox = inbox
        """`first` will be the request's socket, `second` the mount."""
        self.taken = taken
        """The eventfd that tells the zygote that the run is taken."""


def _run(order: Order) -> Iterator[Act]:
    """Wait for it; no tenant's byte comes this way. Its socket comes into place first: a refusal has to go somewhere."""
    yield order.bounding.empty_ahead, 0
    yield order.inbox.receive, HEADER.size
    yield syscalls.prepare("write", order.taken, struct.pack("=Q", 1), 8), 8
    for standard in (0, 1):
        yield syscalls.prepare("dup3", order.inbox.first, standard, 0), standard


def _volume(order: Order) -> Iterator[Act]:
    """Its place is there, in the zygote's empty root; its seal is set here and not only trusted to be there."""
    attributes = _MOUNT_ATTR_NOSUID_NODEV_NOEXEC | (_MOUNT_ATTR_RDONLY if order.kind.read_only else 0)
    seal = struct.pack("=QQQQ", attributes, 0, 0, 0)
    here = DATA.encode() + b"\0"
    yield syscalls.prepare("move_mount", order.inbox.second, b"\0", _AT_FDCWD, here, _MOVE_MOUNT_F_EMPTY_PATH), 0
    yield syscalls.prepare("mount_setattr", _AT_FDCWD, here, 0, seal, len(seal)), 0


def _descriptors(order: Order) -> Iterator[Act]:
    """All but the request's socket and the standard error, which is nowhere."""
    yield syscalls.prepare("close_range", 3, _LAST_DESCRIPTOR, 0), 0


def _capabilities(order: Order) -> Iterator[Act]:
    """All of them, over the child's own namespaces; first those of the bounding set, which takes one of them."""
    yield order.bounding.empty, 0
    yield syscalls.prepare("capset", struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)), 0


def _landlock(order: Order) -> Iterator[Act]:
    abi = order.facts.landlock_abi = confine.usable_abi(order.configuration.min_landlock_abi)
    if abi:
        yield landlock.restriction(FILES, abi, order.kind.read_only), 0


def _database(order: Order) -> Iterator[Act]:
    """Open the tenant's file by the number that the zygote's connection, which has not read a file yet, has for its own."""
    flags = (os.O_RDONLY if order.kind.read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NOFOLLOW
    yield syscalls.prepare("openat", _AT_FDCWD, FILES[0].encode() + b"\0", flags), DATABASE


def _limits(order: Order) -> Iterator[Act]:
    """What the zygote cannot have itself: an end of its processor time, and no further process."""
    limits = {"CPU": confine.cpu_seconds(order.configuration, order.kind), **confine.NO_PROCESSES}
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


_VARYING: Mapping[str, Callable[[Kind], bool]] = {
    **dict.fromkeys(("volume", "landlock", "database"), lambda kind: kind.read_only),
    "limits": lambda kind: kind.bulk,
}
"""What of the kind each step depends on; the others are the same for all."""


def plan(order: Order, steps: Iterable[tuple[str, Callable[[Order], Iterator[Act]]]], made: dict[tuple[str, bool], Plan]) -> Plan:
    """The steps, ready to be done; raises UnconfinedError. What is in `made` is not made again."""
    found: Plan = ()
    for name, step in steps:
        variant = name, _VARYING[name](order.kind) if name in _VARYING else False
        if variant not in made:
            acts: list[Act] = confine.total(name, list, step(order))
            made[variant] = tuple((act, wanted, name) for act, wanted in acts)
        found += made[variant]
        order.facts.steps += (name,)
    return found
