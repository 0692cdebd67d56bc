"""Confinement: how an ordinary process becomes one that can compute, read and write two files, answer, and end.

`STEPS` is the whole of it, in order. Each step is total: it applies its layer in full or raises, and whatever it raises leaves as
UnconfinedError, so nothing is ever read by a process that lacks a layer. The order has reasons:

* `process` looks first, because later steps close the view of /proc. Landlock does not reach threads that run already, so
  there must be only one.
* `privileges` gives up gaining any (needed by Landlock and seccomp), and hides the process from ptrace and /proc.
* `descriptors` and `limits` need calls that the filter takes away.
* `landlock` comes before the watchdog, whose thread inherits it.
* `watchdog` comes before `threads`, which forbids any further thread or process, and before `seccomp`, which has no clone.
* `seccomp` is last and covers the watchdog's thread too. It stands even where an earlier layer has a hole, and they where it has.

What the runner would open later must be open, loaded or seeded before: modules, and SQLite's random generator, which without
/dev/urandom falls back to the second and the process id, the same in every container.

Address space is not limited: the watchdog's malloc arena alone reserves 64 MiB of it, so a bound that lets SQLite have its
heap bounds nothing that the container's memory limit does not.
"""

from __future__ import annotations

import os
import resource

from . import landlock, seccomp, syscalls
from .configuration import PLAIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from .configuration import Configuration, Kind

    Step = Callable[["Order", "Facts"], None]

DATA = "/data"
FILES = (f"{DATA}/db.sqlite", f"{DATA}/db.sqlite-journal")

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39
_CPU_MARGIN_SECONDS = 2


class UnconfinedError(Exception):
    """A layer of the confinement cannot be applied; the reason is for the operator."""


class Facts:
    """What was applied."""

    __slots__ = ("landlock_abi", "rlimits", "seccomp_syscalls", "steps")

    def __init__(self) -> None:
        self.steps: tuple[str, ...] = ()
        self.landlock_abi = 0
        """0: the kernel has no Landlock and the settings allow that."""
        self.seccomp_syscalls = 0
        """How many system calls are left."""
        self.rlimits: dict[str, int] = {}

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class Order:
    """What is to be applied."""

    __slots__ = ("configuration", "kind", "start_watchdog")

    def __init__(self, configuration: Configuration, start_watchdog: Callable[[], None], kind: Kind = PLAIN) -> None:
        self.configuration = configuration
        self.kind = kind
        self.start_watchdog = start_watchdog
        """Starts the one further thread; returns when it runs."""


def check_process() -> None:
    """Raises UnconfinedError unless this is the process that a container of ours begins with."""
    status = _read_status()
    for identity in ("Uid", "Gid"):
        if "0" in status[identity].split():
            raise UnconfinedError(f"runs as root: {identity} {status[identity]}")
    if "0" in status["Groups"].split():
        raise UnconfinedError("is in root's group")
    for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(status[capabilities], 16):
            raise UnconfinedError(f"holds capabilities: {capabilities} {status[capabilities]}")
    for name, wanted, meaning in (
        ("NoNewPrivs", "1", "the container was started without no-new-privileges"),
        ("Seccomp", "2", "the container was started without a seccomp profile"),
        ("Threads", "1", "threads run already"),
    ):
        if status[name] != wanted:
            raise UnconfinedError(f"{meaning}: {name} {status[name]}")
    if not os.statvfs("/").f_flag & os.ST_RDONLY:
        raise UnconfinedError("the root file system is writable")
    if interfaces := _interfaces() - {"lo"}:
        raise UnconfinedError(f"a network is attached: {', '.join(sorted(interfaces))}")


def _read_status() -> dict[str, str]:
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def _interfaces() -> set[str]:
    with open("/proc/self/net/dev", encoding="utf-8") as file:  # two lines of headings
        return {line.partition(":")[0].strip() for line in file.readlines()[2:]}


_SEAL = ((os.ST_NOSUID, "nosuid"), (os.ST_NODEV, "nodev"), (os.ST_NOEXEC, "noexec"))


def check_volume(read_only: bool = False) -> None:
    """Raises UnconfinedError unless the volume is sealed against set-user-id, devices and programs, and writes if it should be."""
    lacking = ~os.statvfs(DATA).f_flag
    for flag, option in (*_SEAL, (os.ST_RDONLY, "ro")) if read_only else _SEAL:
        if lacking & flag:
            raise UnconfinedError(f"{DATA} is not mounted {option}")


def _process(order: Order, facts: Facts) -> None:
    check_process()
    check_volume(order.kind.read_only)


def renounce_privileges() -> None:
    """No way to new privileges, and nobody's to look into; raises UnconfinedError unless both hold."""
    syscalls.invoke("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    syscalls.invoke("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    if syscalls.invoke("prctl", _PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1 or syscalls.invoke("prctl", _PR_GET_DUMPABLE, 0, 0, 0, 0):
        raise UnconfinedError("no_new_privs does not hold")


def _privileges(order: Order, facts: Facts) -> None:
    renounce_privileges()


def _descriptors(order: Order, facts: Facts) -> None:
    """Keep the request's and the reply's. Standard error would be a way to fill the host's disk with logs."""
    nowhere = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, 2)
    syscalls.invoke("close_range", 3, 0xFFFFFFFF, 0)


def cpu_seconds(configuration: Configuration, kind: Kind) -> int:
    """The kernel's own deadline, should nobody else kill: whole seconds, start-up included."""
    return -(-kind.deadline_ms(configuration) // 1000) + _CPU_MARGIN_SECONDS


def lasting_limits(configuration: Configuration) -> dict[str, int]:
    """What may hold from the first process on."""
    return {"FSIZE": configuration.instance_bytes, "NOFILE": configuration.nofile, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}


# NPROC counts every process of the user on the host, runners of other requests too, so the only dependable value is none.
NO_PROCESSES = {"NPROC": 0}


def _limits(order: Order, facts: Facts) -> None:
    facts.rlimits |= limit({**lasting_limits(order.configuration), "CPU": cpu_seconds(order.configuration, order.kind)})


def usable_abi(minimum: int) -> int:
    """The kernel's Landlock ABI, 0 for none; raises UnconfinedError below `minimum`."""
    abi = landlock.abi()
    if abi < minimum:
        found = f"the kernel has Landlock ABI {abi}" if abi else "the kernel has no Landlock"
        raise UnconfinedError(f"{found}, and MAYFLY_MIN_LANDLOCK_ABI asks for {minimum}")
    return abi


def _landlock(order: Order, facts: Facts) -> None:
    facts.landlock_abi = usable_abi(order.configuration.min_landlock_abi)
    if facts.landlock_abi:
        landlock.restriction(FILES, facts.landlock_abi, order.kind.read_only)()


def _watchdog(order: Order, facts: Facts) -> None:
    order.start_watchdog()


def _threads(order: Order, facts: Facts) -> None:
    facts.rlimits |= limit(NO_PROCESSES)


def limit_number(name: str) -> int:
    number: int = getattr(resource, f"RLIMIT_{name}")
    return number


def limit(wanted: Mapping[str, int]) -> dict[str, int]:
    """Set resource limits, soft and hard; returns them as they are then: a hard limit can only be lowered."""
    applied = {}
    for name, value in wanted.items():
        kind = limit_number(name)
        hard = resource.getrlimit(kind)[1]
        applied[name] = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (applied[name], applied[name]))
    return applied


def _seccomp(order: Order, facts: Facts) -> None:
    machine = syscalls.machine()
    seccomp.Filter(seccomp.build(machine)).install()
    facts.seccomp_syscalls = len(syscalls.numbers(syscalls.ALLOWED, machine))


STEPS: tuple[tuple[str, Step], ...] = (
    ("process", _process),
    ("privileges", _privileges),
    ("descriptors", _descriptors),
    ("limits", _limits),
    ("landlock", _landlock),
    ("watchdog", _watchdog),
    ("threads", _threads),
    ("seccomp", _seccomp),
)


def confine(configuration: Configuration, start_watchdog: Callable[[], None], kind: Kind = PLAIN) -> Facts:
    """Apply every step, for good. Raises UnconfinedError; the process is then of no further use.

    `start_watchdog` starts the watchdog's thread and returns once that thread runs Python code: what a thread does to come up
    is more than the filter allows."""
    return apply(STEPS, Order(configuration, start_watchdog, kind))


def apply(steps: Iterable[tuple[str, Step]], order: Order) -> Facts:
    facts = Facts()
    for name, step in steps:
        total(name, step, order, facts)
        facts.steps += (name,)
    return facts


def total(name: str, step: Callable[..., Any], *arguments: object) -> Any:
    """What the step gives; whatever it raises leaves as UnconfinedError."""
    try:
        return step(*arguments)
    except UnconfinedError:
        raise
    except Exception as error:
        raise UnconfinedError(f"{name}: {error}") from error
