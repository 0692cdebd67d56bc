"""Runs as the zygote of a slot: the real one, but for what its children do once they have a run.

A child reads its order from the request's socket, one line of JSON, and takes the steps of runner.child.STEPS that the order
names: the operations of the plan that production made, none of them made here. It can pause: say so, with what it sees of itself,
and go on when a byte comes; meanwhile the host looks at it. The report is one line of JSON.

MAYFLY_PROBE, one JSON object, is for the control runs: what the zygote itself is to leave out.

    without    names from runner.zygote.STEPS, or from LEFT_OUT
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

sys.path += ["/opt/mayfly", "/opt/mayfly/probes"]

import compromised
import conformance
import layers
from attempts import call, read_both_files, write_the_database, write_the_journal

from runner import child, cloning, confine, main, syscalls, zygote
from runner.database import Database, hold
from runner.execute import run_prepared
from runner.failures import verdict_of
from runner.wire import Request

TOLD = json.loads(os.environ.get("MAYFLY_PROBE", "{}"))
MAYFLY_RUNNER = os.environ["MAYFLY_RUNNER"]

CONTROL, WORK = zygote._CONTROL, zygote._WORK
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 2, 4, 8, 32, 4096
MNT_DETACH = 2


def keep_the_image() -> None:
    zygote._pivot = lambda: None


def keep_the_seed() -> None:
    cloning.Entropy.forget_the_seed = lambda self: None


def keep_the_root_writable() -> None:
    zygote._MS_RDONLY = 0


def leave_something_in_the_root() -> None:
    mkdir = os.mkdir

    def make_and_leave(path: str) -> None:
        mkdir(path)
        mkdir(f"{path}/left")

    os.mkdir = make_and_leave  # type: ignore[assignment]


def keep_counting() -> None:
    cloning.make_immortal = lambda: 0


LEFT_OUT: dict[str, Callable[[], None]] = {
    "empty root": keep_the_image,
    "fresh seed": keep_the_seed,
    "read-only root": keep_the_root_writable,
    "clean root": leave_something_in_the_root,
    "immortal objects": keep_counting,
    "orders": lambda: None,  # its children serve requests then
}


class Life:
    """One child's: its order, and the steps it has before it."""

    database: Database
    read_only: bool

    def __init__(self, operations: dict[str, tuple[Any, ...]], cgroup: dict[str, Any]) -> None:
        self.order: dict[str, Any] = {}
        self.cgroup = cgroup
        self._operations = operations

    def become(self, life: child.Life, operations: dict[str, tuple[Any, ...]]) -> None:
        """What the command makes of it: the steps that are still to come."""
        self.database, self.read_only = life.database, life.read_only
        self._operations = {name: acts for name, acts in operations.items() if name != "run"}

    def take(self, *names: str) -> None:
        for name in names:
            for operation, wanted, _ in self._operations.pop(name):
                if operation() != wanted:
                    raise syscalls.failure(name)

    def take_the_volume(self) -> None:
        """Which is there in any case; unless the order names its step, without the seal."""
        if "volume" not in self.order["steps"]:
            self._operations["volume"] = self._operations["volume"][:1]
        self.take("volume")

    def take_all(self) -> None:
        self.take(*self._operations)

    def take_named(self) -> None:
        self.take(*(name for name in tuple(self._operations) if name in self.order["steps"]))

    def pause(self, name: str, found: Any = None) -> None:
        write(json.dumps({"pause": name, "found": found}).encode() + b"\n")
        os.read(0, 1)


def write(text: bytes) -> None:
    while text:
        text = text[os.write(1, text) :]


# --- orders


BEFORE_CONFINEMENT = ("volume", "descriptors", "capabilities")
"""After these a child is what a Docker container's first process is from its start."""


def survey(life: Life) -> None:
    life.take(*BEFORE_CONFINEMENT)
    everything = conformance.tree()
    life.pause(
        "before", conformance.look_from_inside(everything) | {"cgroup": life.cgroup, "paths": sorted(p for p, _ in everything)}
    )
    life.take_all()
    life.pause("after", conformance.look_when_confined(everything))


def as_in_conformance(life: Life) -> Any:
    life.take(*BEFORE_CONFINEMENT)
    return conformance.ORDERS[life.order["do"]](life.order)


def attack(life: Life) -> Any:
    """As compromised.attack: each attack's result, or the errno that refused it."""
    life.take(*BEFORE_CONFINEMENT)
    globals()["confined"] = life.take_all
    return compromised.attack(life.order)


def layer(life: Life) -> Any:
    """One attack of layers.ATTACKS against the named `steps`."""
    life.take_the_volume()
    return {"outcome": layers.outcome(layers.make_scene(life.order, MAYFLY_RUNNER), life.take_named)}


def ask(life: Life) -> Any:
    """`sql`, in a child that has taken every step."""
    life.take_all()
    hold(child.DATABASE, life.read_only)
    reply = run_prepared(Request(life.order["sql"], None, False), life.database, lambda: False)
    return json.loads(reply)["rows"]


def ask_early(life: Life) -> Any:
    """`sql`, in a child that has given up the zygote's descriptors and has not opened its own."""
    life.take("volume", "descriptors")
    try:
        return json.loads(run_prepared(Request(life.order["sql"], None, False), life.database, lambda: False))
    except Exception as error:
        return verdict_of(error, None, 0).verdict


def write_by_sql(life: Life) -> dict[str, str]:
    """After the named steps, which are to leave a descriptor of the database that can write: what becomes of an INSERT."""
    life.take_the_volume()
    life.take_named()
    if os.open(confine.FILES[0], os.O_RDWR | os.O_CLOEXEC) != child.DATABASE:
        raise OSError("the descriptor is another")
    try:
        run_prepared(Request("INSERT INTO t VALUES (3)", None, False), life.database, lambda: False)
    except Exception as error:
        verdict = verdict_of(error, None, 0)
        return {"outcome": f"{verdict.verdict}: {verdict.message}"}
    return {"outcome": "done"}


def draw(life: Life) -> Any:
    """Random numbers of each kind that there is here."""
    rows = ask(life)
    return {"SQLite": rows, "the kernel": os.urandom(16).hex()}


def mark(life: Life) -> None:
    """Leave a mark wherever a process has memory: heap, mapped pages, a database in memory."""
    life.take_all()
    half = bytes.fromhex(life.order["mark"])
    held = [half + half, bytearray((half + half) * (1 << 16))]
    life.pause("marked", len(held))


def idle(life: Life) -> None:
    life.take_all()
    life.pause("idle")


def attempt(life: Life) -> Any:
    """Each of `attempts`, after the named `steps`: "done", or the errno that refused it."""
    life.take_the_volume()
    life.take_named()
    if life.order.get("pause"):
        life.pause("prepared")
    return {name: conformance.outcome(ATTEMPTS[name]) for name in life.order["attempts"]}


def linger(life: Life) -> None:
    """Never end by itself: every signal ignored, `children` children that do likewise."""
    life.take_named()
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue
    for _ in range(life.order.get("children", 0)):
        if not layers.fork():
            while True:
                time.sleep(60)
    life.pause("lingers")
    while True:
        time.sleep(60)


class ComeBack(BaseException):
    """Into the zygote's code, which a child must never run."""


def come_back(life: Life) -> NoReturn:
    life.take("volume")
    raise ComeBack


def throw(life: Life) -> NoReturn:
    """What nothing catches."""
    raise SystemExit("the child's own end")


def die(life: Life) -> None:
    """By `signal`, which the second filter or the kernel sends."""
    life.take_named()
    life.pause("dies")
    if life.order["by"] == "SIGSYS":
        os.kill(os.getpid(), 0)
    elif life.order["by"] == "memory":
        conformance.eat({"mebibytes": 1 << 20})
    else:
        import ctypes

        ctypes.string_at(0)


ORDERS: dict[str, Callable[[Life], Any]] = {
    **dict.fromkeys(("eat", "multiply", "breed", "burn"), as_in_conformance),
    **{
        order.__name__: order
        for order in (survey, attack, layer, ask, ask_early, write_by_sql, draw, mark, idle, attempt, linger, come_back, throw, die)
    },
}


# --- what only a child of a zygote could try


def mount(source: str, target: str, kind: str | None, flags: int) -> None:
    number = syscalls.number("mount", syscalls.machine())
    call(number, source.encode() + b"\0", target.encode() + b"\0", kind.encode() + b"\0" if kind else 0, flags, 0)


def make_the_volume_executable() -> None:
    mount("none", "/data", None, MS_REMOUNT | MS_BIND)


def make_the_root_writable() -> None:
    mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV | MS_NOEXEC)


def make_the_roots_file_system_writable() -> None:
    mount("none", "/", None, MS_REMOUNT | MS_NOSUID | MS_NODEV | MS_NOEXEC)


def cover_the_volume() -> None:
    mount("mayfly", "/data", "tmpfs", 0)
    call(syscalls.number("umount2", syscalls.machine()), b"/data\0", MNT_DETACH)


def mount_proc() -> None:
    mount("proc", "/data", "proc", 0)
    call(syscalls.number("umount2", syscalls.machine()), b"/data\0", MNT_DETACH)


def unmount_the_volume() -> None:
    call(syscalls.number("umount2", syscalls.machine()), b"/data\0", MNT_DETACH)


def uncover_what_is_below_the_root() -> None:
    call(syscalls.number("umount2", syscalls.machine()), b"/\0", MNT_DETACH)


def read_the_zygotes_orders() -> None:
    read_packet(CONTROL)


def take_the_next_childs_run() -> None:
    read_packet(WORK)


def read_packet(descriptor: int) -> None:
    if child.Inbox(descriptor, socket.MSG_DONTWAIT | socket.MSG_PEEK).receive() < 0:
        error = syscalls.failure("recvmsg")
        if error.errno != errno.EAGAIN:  # nothing there yet
            raise error


def say_that_a_run_is_taken() -> None:
    os.fstat(zygote._TAKEN)


def read_the_image() -> None:
    conformance.read_some(sys.executable)


def read_the_slots_proc() -> None:
    conformance.read_some("/proc/1/status")


def reach_the_slots_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(zygote.ADDRESS)


def leave_something_for_the_next() -> None:
    os.close(os.open("/left", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def find_what_was_left() -> None:
    os.close(os.open("/left", os.O_RDONLY | os.O_CLOEXEC))


def unshare_a_user_namespace() -> None:
    call(syscalls.number("unshare", syscalls.machine()), zygote._CLONE_NEWUSER)


def execute_from_the_volume() -> None:
    """No program, so that the kernel's answer tells whether it would have run one."""
    os.execv("/data/db.sqlite", ["/data/db.sqlite"])


def write_by_the_databases_descriptor() -> None:
    os.pwrite(child.DATABASE, b"written", 0)


def have_a_child() -> None:
    child = layers.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)


def open_a_local_socket() -> None:
    conformance.open_socket(socket.AF_UNIX)


def signal_itself() -> None:
    os.kill(os.getpid(), 0)


def see_its_limits() -> None:
    syscalls.invoke("prlimit64", 0, confine.limit_number("CPU"), None, bytes(16))


ATTEMPTS: dict[str, Callable[[], None]] = {
    attempt.__name__: attempt
    for attempt in (
        make_the_volume_executable, make_the_root_writable, make_the_roots_file_system_writable, cover_the_volume, mount_proc,
        unmount_the_volume, uncover_what_is_below_the_root, read_the_zygotes_orders, take_the_next_childs_run,
        say_that_a_run_is_taken, read_the_image, read_the_slots_proc, reach_the_slots_socket, leave_something_for_the_next,
        find_what_was_left, unshare_a_user_namespace, execute_from_the_volume, have_a_child,
        open_a_local_socket, signal_itself, see_its_limits, write_by_the_databases_descriptor,
    )
} | {
    attempt.__name__: partial(attempt, None) for attempt in (read_both_files, write_the_database, write_the_journal)
}  # fmt: skip


# --- in production's place


def by_step(plan: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(act for act in plan if act[2] == name) for name, _ in child.STEPS}


def serve_orders(inbox: child.Inbox, waiting: tuple[Any, ...], lives: dict[int, child.Life], build: Any) -> Callable[[], None]:
    """What stands in the place of runner.child.child."""
    plans = {command: by_step(waiting + life.plan) for command, life in lives.items()}
    cgroup = conformance.cgroup()

    def serve() -> None:
        life = Life(dict(plans[0]), cgroup)
        try:
            life.take("run")
            life.become(lives[inbox.packet[1]], plans[inbox.packet[1]])
            life.order = json.loads(conformance.read_line())
            write(json.dumps(ORDERS[life.order["do"]](life)).encode())
        except ComeBack:
            return
        except Exception:
            write(json.dumps({"error": traceback.format_exc()}).encode())
        os._exit(0)

    return serve


def run_as_zygote() -> None:
    own_steps = {name for name, _ in zygote.STEPS}
    for name in TOLD.get("without", ()):
        if name in own_steps:
            zygote.STEPS = tuple(step for step in zygote.STEPS if step[0] != name)
        else:
            LEFT_OUT[name]()
    if "orders" not in TOLD.get("without", ()):
        child.child = serve_orders
    main.main()


if __name__ == "__main__":
    run_as_zygote()
