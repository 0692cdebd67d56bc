"""Runs inside a container, in the place of the runner: one attack, with the layers that its order names and no others.

The order is one JSON object in argv[1]; under a launcher, where argv[1] is `serve`, it is the request frame. The report is one JSON
object on standard output, {"outcome": …}: what the attack got, the name of an errno, or the verdict on its SQL.

    attack         a name from ATTACKS; what else it reads is said there
    steps          names from runner.confine.STEPS, applied between the attack's preparation and the attack
    opening        names from runner.database.PREPARING and READING, taken when the database is opened
    configuration  what differs from MAYFLY_RUNNER
"""

from __future__ import annotations

import ctypes  # noqa: F401 -- the confinement's; what is not imported by then cannot be
import errno
import json
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, process_time
from typing import Any, NoReturn

sys.path.append("/opt/mayfly")

from runner import confine, database, syscalls
from runner.configuration import Configuration
from runner.execute import run_request
from runner.failures import verdict_of
from runner.frames import read_frame
from runner.watchdog import Watchdog
from runner.wire import Request

DATABASE, _ = confine.FILES
MOST_BYTES = 1 << 20

Act = Callable[[], Any]


@dataclass
class Scene:
    order: dict[str, Any]
    configuration: Configuration
    watchdog: Watchdog
    outlived: bool = False


def copy(source: str, target: str) -> None:
    with open(source, "rb") as file, open(target, "wb") as other:
        other.write(file.read())


# --- attacks by SQL


def ask(scene: Scene) -> Act:
    """`sql`, on a connection that is `given` what production's has not; `interrupts`: the watchdog knows the connection."""
    order = scene.order
    given = tuple((name, GIFTS[name](scene)) for name in order.get("given", ()))
    database.PREPARING = (*given, *(step for step in database.PREPARING if step[0] in order["opening"]))
    database.READING = tuple(step for step in database.READING if step[0] in order["opening"])

    def act() -> Any:
        deadline = monotonic() + scene.configuration.deadline_ms / 1000
        scene.watchdog.arm(deadline)
        watch = scene.watchdog.guard if order.get("interrupts") else lambda _: None
        try:
            reply = run_request(Request(order["sql"], None, False), scene.configuration, lambda: monotonic() >= deadline, watch)
        except Exception as error:
            verdict = verdict_of(error, None, 0)
            return "outlived" if scene.outlived else f"{verdict.verdict}: {verdict.message}".removesuffix(": ")
        return json.loads(reply)["rows"]

    return act


def give_a_reader_of_files(scene: Scene) -> Callable[..., None]:
    def readfile(path: str) -> bytes:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return os.read(descriptor, MOST_BYTES)

    return lambda database: database.connection.create_scalar_function("readfile", readfile)


def give_extensions(scene: Scene) -> Callable[..., None]:
    """Where they are compiled in."""

    def allow(database: database.Database) -> None:
        if hasattr(database.connection, "enable_load_extension"):
            database.connection.enable_load_extension(True)

    copy(scene.order["extension"], "/data/extension.so")
    return allow


def give_an_end(scene: Scene) -> Callable[..., None]:
    """`running()` is true until the process has used `cpu_seconds` more. A query that saw that end has outlived the deadline."""
    end = process_time() + scene.order["cpu_seconds"]

    def running() -> bool:
        scene.outlived = process_time() >= end
        return not scene.outlived

    return lambda database: database.connection.create_scalar_function("running", running)


GIFTS = {"readfile": give_a_reader_of_files, "extensions": give_extensions, "end": give_an_end}


# --- attacks by native code: Python, but nothing that machine code could not call


def read(scene: Scene) -> Act:
    """The file at `path`."""

    def act() -> str:
        descriptor = os.open(scene.order["path"], os.O_RDONLY | os.O_CLOEXEC)
        return os.read(descriptor, MOST_BYTES).decode()

    return act


def write(scene: Scene) -> Act:
    """A new file at `path`."""

    def act() -> int:
        descriptor = os.open(scene.order["path"], os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return os.write(descriptor, b"content")

    return act


def connect(scene: Scene) -> Act:
    """To `port` of the host, and read what it says."""

    def act() -> str:
        with socket.socket() as client:
            client.connect(("127.0.0.1", scene.order["port"]))
            return client.recv(MOST_BYTES).decode()

    return act


def fork() -> int:
    """As a C library does: the old call where a filter pretends that there is no new one."""
    try:
        return syscalls.invoke("clone3", struct.pack("=8Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    return os.fork()


def multiply(scene: Scene) -> Act:
    """`children` child processes at the same time."""
    reading, writing = os.pipe()

    def act() -> int:
        children: list[int] = []
        try:
            for _ in range(scene.order["children"]):
                child = fork()
                if child == 0:
                    os.close(writing)
                    os.read(reading, 1)
                    os._exit(0)
                children.append(child)
        finally:
            os.close(writing)
            for child in children:
                os.waitpid(child, 0)
        return len(children)

    return act


def execute(scene: Scene) -> Act:
    """A program of its own, brought in the place of the database. Its preparation makes it one."""
    copy(sys.executable, DATABASE)
    os.chmod(DATABASE, 0o755)
    return lambda: os.execv(DATABASE, [DATABASE, "-I", "-S", "-c", """print('{"outcome": "ran"}')"""])


ATTACKS: dict[str, Callable[[Scene], Act]] = {attack.__name__: attack for attack in (ask, read, write, connect, multiply, execute)}


# --- one life


def outcome(scene: Scene, apply_steps: Callable[[], object]) -> Any:
    """What the attack got; `apply_steps` stands between its preparation and the attack."""
    try:
        act = ATTACKS[scene.order["attack"]](scene)
        apply_steps()
        return act()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def report(found: Any) -> NoReturn:
    os.write(1, json.dumps({"outcome": found}).encode())
    os._exit(0)


def read_order(configuration: Configuration) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read_frame(0, configuration.max_request_bytes)[0] if sys.argv[1] == "serve" else sys.argv[1])
    return found


def make_scene(order: dict[str, Any], told: str) -> Scene:
    """`told` is MAYFLY_RUNNER."""
    runner, changed = json.loads(told), order.get("configuration", {})
    limits = {**runner["sqlite_limits"], **changed.get("sqlite_limits", {})}
    configuration = Configuration.parse(json.dumps({**runner, **changed, "sqlite_limits": limits}))
    give_up = (lambda: report("given up")) if order.get("gives_up") else threading.Event().wait
    return Scene(order, configuration, Watchdog(give_up))


def main() -> None:
    if sys.argv[1] == "selftest":
        report("a probe")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as the runner does
    told = os.environ["MAYFLY_RUNNER"]
    order = read_order(Configuration.parse(told))
    for path in confine.FILES:  # where no launcher made them
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
    scene = make_scene(order, told)
    steps = [step for step in confine.STEPS if step[0] in order["steps"]]
    report(outcome(scene, lambda: confine.apply(steps, confine.Order(scene.configuration, scene.watchdog.start))))


if __name__ == "__main__":
    main()
