"""The zygote: a warm interpreter in a slot container that clones one sealed child for each run. docs/wire.md has its packets.

It never reads a tenant's byte. The child that waits reads one packet from the work socket, with two descriptors in it: the
request's socket, and a mount of one instance's volume that is attached nowhere yet. Child and zygote have no other tie.

    zygote   user and mount namespaces and an empty read-only root of its own; prepares one connection on an empty file that it then
             closes; keeps nothing but its sockets. `STEPS`, once
    child    fresh user, mount, pid, ipc and uts namespaces; waits. Then child.STEPS: hangs the volume into the empty root, gives up
             everything, reads the request, answers, ends

What a child does not get: capabilities (it has them over its own namespaces alone, until the volume is mounted), any way to /proc,
/dev or the image's files, any descriptor but the request's, the zygote's random state. Limits, no_new_privs and the slot's seccomp
profile are inherited. The network namespace is the slot's, which has no interface but `lo`: one made with the child would belong to
the child's user namespace, and be the one thing over which it had CAP_NET_ADMIN (and cost 500 µs of about 1,100).

The next child is cloned when the last one is gone, so that the slot's cgroup holds one request at a time, and before its request
comes, so that nobody waits for that. There is no watchdog thread in a child: the progress handler keeps the deadline, and where a
single opcode outlasts it, the launcher's KILL does.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import signal
import struct
import sys
from functools import partial

from . import child, cloning, confine, huge_pages, syscalls
from .answer import Exit, answer, read_build
from .child import HEADER, Inbox
from .configuration import PLAIN
from .confine import DATA, UnconfinedError
from .database import PATH, prepare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from .configuration import Configuration, Kind
    from .database import Database

ADDRESS = "/slot.sock"

_READY, _REFUSED, _KILL, _ENDED = 2, 3, 5, 6
_REPORT = struct.Struct("!BBxxIi")
_KILLED_FOR_MEMORY = 1

# Fixed places, below everything else that is ever open but the pidfd: that is where a child has its database.
_CONTROL, _WORK, _TAKEN, _MEMORY_EVENTS, _FIRST_FREE = 4, 5, 6, 7, 8

_AF_UNIX, _SOCK_SEQPACKET, _MSG_DONTWAIT, _MSG_NOSIGNAL = 1, 5, 0x40, 0x4000
_POLLIN = 1
# Of the lower bytes of two revents, which hold all that can come.
_ORDERS_CAME, _CHILD_ENDED = 6, 14
_SIGKILL = int(signal.SIGKILL)
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_PIDFD = 0x10000000, 0x20000000, 0x1000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MNT_DETACH = 2

# The kernel's count of processes that it has killed in this cgroup for want of memory, in version 2 and version 1.
_MEMORY_FILES = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
_MOST_UNTAKEN = 3


def live(configuration: Configuration) -> NoReturn:
    """Until the launcher closes the control."""
    connect()
    entropy = cloning.Entropy()
    facts = confine.Facts()
    order = Order(configuration)
    try:
        heap = confine.total("heap", huge_pages.Heap)
        for name, step in STEPS:
            confine.total(name, step, order)
            facts.steps += (name,)
        inbox = Inbox(_WORK)
        childs_order = partial(child.Order, configuration, inbox=inbox, taken=_TAKEN, bounding=child.Bounding())
        waiting = child.plan(childs_order(PLAIN, facts), child.STEPS[:1], {})
        reply = child.child(inbox, waiting, _lives(order, childs_order, facts), read_build())
        confine.total("root", _pivot)
    except UnconfinedError as refusal:
        _refuse(str(refusal))
    entropy.forget_the_seed()
    gc.collect()
    cloning.make_immortal()
    heap.finish()
    heap.fill()
    clone = Clone(reply)
    gc.freeze()
    heap.enlarge()
    clone.ever()


def _lives(order: Order, childs_order: Callable[[Kind, confine.Facts], child.Order], facts: confine.Facts) -> dict[int, child.Life]:
    """By their commands. `facts` become those of a plain one, which a self-test tells."""
    made: dict[tuple[str, bool], child.Plan] = {}

    def life(kind: Kind) -> child.Life:
        told = facts if kind is PLAIN else confine.Facts()
        plan = child.plan(childs_order(kind, told), child.STEPS[1:], made)
        return child.Life(plan, order.databases[kind.read_only], told, kind)

    lives = {kind: life(kind) for kind in dict.fromkeys((PLAIN, *child.KINDS.values()))}
    return {command: lives[kind] for command, kind in child.KINDS.items()}


def _refuse(reason: str) -> NoReturn:
    os.write(_CONTROL, HEADER.pack(_REFUSED, 0, 0) + reason.encode())
    sys.exit(Exit.REFUSED)


def connect() -> None:
    """The sockets and what else has a fixed place; then nothing else is open."""
    nowhere = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    control = syscalls.invoke("socket", _AF_UNIX, _SOCK_SEQPACKET, 0)
    address = struct.pack("=H", _AF_UNIX) + ADDRESS.encode() + b"\0"
    syscalls.invoke("connect", control, address, len(address))
    inbox = Inbox(control)
    if inbox.receive() != HEADER.size:
        sys.exit("no work socket")
    memory_events = [os.open(path, os.O_RDONLY) for path in _MEMORY_FILES if os.path.exists(path)] or [nowhere]
    sources = (control, inbox.first.value, os.eventfd(0, os.EFD_NONBLOCK), memory_events[0])
    out_of_the_way = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _FIRST_FREE) for descriptor in sources]
    for place, descriptor in zip((_CONTROL, _WORK, _TAKEN, _MEMORY_EVENTS), out_of_the_way, strict=True):
        os.dup2(descriptor, place)
    for first, last in ((child.DATABASE, child.DATABASE), (_FIRST_FREE, 0xFFFFFFFF)):
        syscalls.invoke("close_range", first, last, 0)


# --- its own steps, once


class Order:
    """What the steps are for, and what they make."""

    __slots__ = ("configuration", "databases")

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.databases: dict[bool, Database] = {}
        """By whether they only read. Prepared, without a file: the descriptor is nobody's here, the tenant's in a child."""


def _process(order: Order) -> None:
    confine.check_process()


def _limits(order: Order) -> None:
    confine.limit(confine.lasting_limits(order.configuration))


def _namespaces(order: Order) -> None:
    """A user namespace in which it may mount, and within which its children's are made. Nobody but its own user exists there."""
    uid, gid = os.getuid(), os.getgid()
    syscalls.invoke("unshare", _CLONE_NEWUSER | _CLONE_NEWNS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


_SEALED = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC


def _database(order: Order) -> None:
    """Warm up, and prepare the children's connections on an empty file in the tenant's place; then that is gone for good.

    Nothing has been read of it: SQLite meets the tenant's file as it would have met it at the opening. A child uses one of them.
    """
    _mount_tmpfs()
    cloning.warm_up(order.configuration, PATH)
    os.close(os.open(PATH, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    for read_only in (False, True):
        order.databases[read_only] = prepare(order.configuration, PATH, read_only)
        if os.readlink(f"/proc/self/fd/{child.DATABASE}") != PATH:
            raise UnconfinedError(f"SQLite has not opened its file as descriptor {child.DATABASE}")
        os.close(child.DATABASE)
    syscalls.invoke("umount2", f"{DATA}\0".encode(), 0)  # which it can't be while anything in it is open


def _root(order: Order) -> None:
    """An empty file system for the place of the image's, with a place for the volume."""
    huge_pages.enlarge_the_text()
    _mount_tmpfs()
    os.mkdir(f"{DATA}{DATA}")
    syscalls.invoke("mount", None, f"{DATA}\0".encode(), None, _SEALED | _MS_REMOUNT | _MS_RDONLY, None)


def _mount_tmpfs() -> None:
    syscalls.invoke("mount", b"root\0", f"{DATA}\0".encode(), b"tmpfs\0", _SEALED, b"size=4m,mode=755\0")


def _pivot() -> None:
    """What a child finds. Nothing of the image can be opened from here on."""
    os.chdir(DATA)
    syscalls.invoke("pivot_root", b".\0", b".\0")
    syscalls.invoke("umount2", b".\0", _MNT_DETACH)
    os.chdir("/")
    if os.listdir("/") != [DATA[1:]] or os.listdir(DATA):
        raise UnconfinedError("the root is not empty")


def _privileges(order: Order) -> None:
    confine.renounce_privileges()


STEPS: tuple[tuple[str, Callable[[Order], None]], ...] = (
    ("process", _process),
    ("limits", _limits),
    ("namespaces", _namespaces),
    ("database", _database),
    ("root", _root),
    ("privileges", _privileges),
)


# --- one child after the other


class Clone:
    """Its children, by clone3: one call for a process with its namespaces, where fork and unshare take two processes."""

    def __init__(self, reply: Callable[[], bytes | None]) -> None:
        self._reply = reply
        self._polled = bytearray(struct.pack("=ihhihh", _CONTROL, _POLLIN, 0, 0, _POLLIN, 0))  # two struct pollfd
        polled = (ctypes.c_char * len(self._polled)).from_buffer(self._polled)
        pidfd = ctypes.c_int.from_buffer(self._polled, len(self._polled) // 2)
        flags = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWIPC | _CLONE_NEWUTS | _CLONE_PIDFD
        # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls
        arguments = struct.pack("=8Q", flags, ctypes.addressof(pidfd), 0, 0, signal.SIGCHLD, 0, 0, 0)
        self._clone = syscalls.prepare("clone3", arguments, len(arguments))
        self._sleep = syscalls.prepare("ppoll", polled, 2, None, None, 8)
        self._close = syscalls.prepare("close", pidfd)
        status = ctypes.create_string_buffer(4)
        self._status = ctypes.c_int.from_buffer(status)
        self._reap = syscalls.prepare("wait4", -1, status, 0, None)
        self._was_taken = syscalls.prepare("read", _TAKEN, bytes(8), 8)
        self._report = ctypes.create_string_buffer(_REPORT.size)
        self._send = syscalls.prepare("sendto", _CONTROL, self._report, _REPORT.size, _MSG_NOSIGNAL, None, 0)
        self._orders = Inbox(_CONTROL)
        self._untaken_run = Inbox(_WORK, _MSG_DONTWAIT)
        self._oom_kills = _count_oom_kills()

    def ever(self) -> NoReturn:
        """One after the other, until the control closes. It sleeps at once: what it writes to while a child lives is copied."""
        clone, reply, sleep, polled, answered = self._clone, self._reply, self._sleep, self._polled, int(Exit.ANSWERED)
        run = untaken = 0
        while True:
            pid = clone()
            if not pid:
                try:
                    answer(reply(), answered)
                finally:
                    os._exit(Exit.REFUSED)
            if not run:
                self._begin(pid)
                run = 1
            killed = False
            while True:
                if sleep() < 0 or pid < 0:
                    sys.exit(f"no child: {syscalls.failure('ppoll or clone3')}")
                if polled[_CHILD_ENDED]:
                    break
                if polled[_ORDERS_CAME]:
                    killed = self._obey(pid, run) or killed
            if self._reap() != pid:
                sys.exit(f"a child stays: {syscalls.failure('wait4')}")
            self._close()
            taken = self._was_taken() > 0
            if taken or killed:
                untaken, status = 0, self._status.value
                if not taken:
                    self._throw_away()
                flags = self._flags() if status & 0x7F == _SIGKILL else 0
                _REPORT.pack_into(self._report, 0, _ENDED, flags, run, status)
                if self._send() < 0:
                    sys.exit("the launcher is gone")
                run += 1
            else:
                untaken += 1
                if untaken == _MOST_UNTAKEN:
                    sys.exit("children die before they take a run")

    def _begin(self, pid: int) -> None:
        if pid < 0:
            _refuse(f"clone: {syscalls.failure('clone3')}")
        os.write(_CONTROL, HEADER.pack(_READY, 0, 0))

    def _obey(self, pid: int, run: int) -> bool:
        """Read one order; whether it was to kill this run."""
        if self._orders.receive() != HEADER.size:
            os.kill(pid, signal.SIGKILL)
            sys.exit(0)  # which the kernel delays until the child is gone: it is of this pid namespace
        kind, _, wanted = HEADER.unpack_from(self._orders.packet)
        if kind != _KILL or wanted != run:
            return False
        os.kill(pid, signal.SIGKILL)
        return True

    def _flags(self) -> int:
        """Of one that was killed."""
        before, self._oom_kills = self._oom_kills, _count_oom_kills()
        return _KILLED_FOR_MEMORY if self._oom_kills > before else 0

    def _throw_away(self) -> None:
        """The run that was to be killed, and that no child has taken."""
        self._untaken_run.clear()
        if self._untaken_run.receive() == HEADER.size:
            os.close(self._untaken_run.first.value)
            os.close(self._untaken_run.second.value)


def _count_oom_kills() -> int:
    for line in os.pread(_MEMORY_EVENTS, 4096, 0).splitlines():
        if line.startswith(b"oom_kill "):
            return int(line[9:])
    return 0
