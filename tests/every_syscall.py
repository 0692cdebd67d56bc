"""Kills a runner with SIGKILL at one of its system calls after the other, and looks each time at what its database is then.

A *case* is a database, one request, and how its runner is born. The runner is the real one, from its first line to its end, in a
process of its own that ptrace stops at the entry and at the exit of every system call of its main thread. Nothing else is left
out but the confinement, which needs a container and takes no part in writing. A call at whose entry the process is killed does
not happen. The first life is only watched; each life after it ends at another of the stops that were seen, counted as "the n-th
call of this name", from the last byte of the request on.

After each death the file is opened again by the runner's own way, for `SELECT 1`, and then another SQLite, Python's own, checks
its integrity and reads all that it holds. That has to be one of the states that the case's statements lead through, each of them
by itself; once the whole answer was written, it has to be the last.

`python -m tests.every_syscall` reads a case from stdin as JSON and prints what it found; `explore` runs it in namespaces of its
own, in which /data is a place in memory, so it leaves nothing behind and needs no root.
"""

from __future__ import annotations

import base64
import ctypes
import functools
import hashlib
import json
import os
import random
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from runner import database as database_module
from runner import main as main_module
from runner import syscalls
from runner.answer import OUT, Clock, Exit, answer, read_request, reply_to
from runner.configuration import Configuration
from runner.confine import FILES
from runner.database import prepare
from runner.execute import run_prepared, run_request
from runner.failures import verdict_of
from runner.frames import Outbox
from runner.wire import Request

from .runner_database import CONFIGURATION_KEYS

ROOT = Path(__file__).resolve().parent.parent
DATABASE, JOURNAL = map(Path, FILES)

ALL = os.environ.get("EVERY_SYSCALL") == "1"
"""Kill at every stop that there is, whatever it takes."""
MOST_OF_THE_OTHERS = 24
"""Stops at calls that change no file, else; chosen by the case's name."""
CHANGING = frozenset({"pwrite64", "write", "ftruncate", "fallocate", "fsync", "fdatasync", "unlink", "rename"})

_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_TRACESYSGOOD, _EXITKILL = 1, 1 << 20
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_INFO = struct.Struct("=B3xIQQQQQQ")  # op, architecture, two pointers, then nr and arguments, or the result
_ENTRY, _EXIT = 1, 2
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")  # a journal that does not begin with it is none
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_LIBC.ptrace.restype = ctypes.c_long
_CONFIGURATION = json.dumps({name: 60_000 if name.endswith("_ms") else value for name, value in CONFIGURATION_KEYS.items()})
_NAMES = {pair[syscalls.machine() == "aarch64"]: name for name, pair in syscalls.NUMBERS.items()}


@dataclass(frozen=True)
class Case:
    name: str
    setting_up: str
    """What makes the database, run before by Python's SQLite."""
    statements: Sequence[str] = ()
    """Each ends in a state of its own. The request is all of them, one behind the other."""
    order: dict[str, Any] | None = None
    """A request with `op` in place of the statements; it ends in one state."""
    upload: str = ""
    """Base64."""
    life: str = "serve"
    """`serve`, `serve-bulk`: the runner's mode. `prepared`: a zygote's child, whose database was prepared before."""
    journal_mode: str = ""
    """What the runner sets in place of its own, for the control."""
    staged: bool = False
    """The file is served only after the answer: before, it may be anything."""
    rollback: bool = False
    """Explored is not the runner of the statements, which is killed at the end of its writing, but the one after it."""


@dataclass
class Found:
    stops: int = 0
    """That the first life had, between the request and the end."""
    killed: int = 0
    at_changes: int = 0
    """Of these, at a call that changes a file."""
    states: list[int] = field(default_factory=list)
    """Which states were seen, from 0, the one before."""
    broken: list[str] = field(default_factory=list)
    answer: str = ""
    """The first life's verdict."""


@dataclass(frozen=True)
class Stop:
    name: str
    nth: int
    at_exit: bool

    def __str__(self) -> str:
        return f"{'after' if self.at_exit else 'before'} {self.name} number {self.nth}"


@dataclass(frozen=True)
class Files:
    """What a volume holds."""

    database: bytes
    journal: bytes = b""

    def lay_out(self) -> None:
        DATABASE.write_bytes(self.database)
        JOURNAL.write_bytes(self.journal)


def explore(case: Case) -> Found:
    """Run the case to its end. Raises RuntimeError if it cannot be run."""
    with tempfile.TemporaryDirectory() as root:
        root_of_its_own = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.getuid() else [])]
        command = [*root_of_its_own, sys.executable, "-m", "tests.every_syscall", root]
        done = subprocess.run(command, cwd=ROOT, input=json.dumps(asdict(case)).encode(), capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace"))
    return Found(**json.loads(done.stdout))


# --- in the namespaces


def main() -> None:
    make_room(Path(sys.argv[1]))
    print(json.dumps(asdict(explored(Case(**json.load(sys.stdin))))))


def make_room(root: Path) -> None:
    """Make the root folder one in memory that has all of the old one, and /data."""
    mount = functools.partial(subprocess.run, check=True)
    mount(["mount", "-t", "tmpfs", "every-syscall", root])
    for entry in Path("/").iterdir():
        if entry.is_symlink():
            (root / entry.name).symlink_to(entry.readlink())
        elif entry.is_dir():
            (root / entry.name).mkdir()
            mount(["mount", "--rbind", entry, root / entry.name])
    (root / DATABASE.parent.name).mkdir(exist_ok=True)
    mount(["mount", "-t", "tmpfs", "every-syscall", root / DATABASE.parent.name])
    for file in (DATABASE, JOURNAL):
        place = root / file.relative_to("/")
        place.touch()
        mount(["mount", "--bind", place, place])  # cannot be removed, which is Landlock's business otherwise
    os.chroot(root)
    os.chdir(ROOT)


def explored(case: Case) -> Found:
    before = Files(made(case.setting_up))
    states = [state(before.database)]
    if case.rollback:
        before = half_written(case, before)
        case = replace(case, statements=["SELECT 1"])
    else:
        states += states_after(case, before)
    request = frame_of(case) + base64.b64decode(case.upload)
    found = Found()
    before.lay_out()
    stops: list[Stop] = []
    with born(case, request) as first:
        stops.extend(first.stops())
        found.answer = json.loads(first.answer[4:])["verdict"]
    found.stops = len(stops)
    seen = set()
    for stop in chosen(case, stops):
        before.lay_out()
        with born(case, request) as life:
            life.kill_at(stop)
            answered = life.has_answered
        found.killed += 1
        found.at_changes += stop.name in CHANGING
        if case.staged and not answered:
            continue
        problem, place = judged(states, answered)
        if problem:
            found.broken.append(f"killed {stop}: {problem}")
        elif place is not None:
            seen.add(place)
    found.states = sorted(seen)
    return found


def frame_of(case: Case, statements: int | None = None) -> bytes:
    request = case.order or {"sql": ";\n".join(case.statements[:statements]), "args": None, "int64": "number"}
    payload = json.dumps({"v": 1, **request}).encode()
    return len(payload).to_bytes(4, "big") + payload


def made(script: str) -> bytes:
    """The file that a script makes, in pages of the runner's size."""
    with tempfile.TemporaryDirectory(dir=DATABASE.parent) as folder:
        path = Path(folder) / "made"
        path.touch()
        connection = sqlite3.connect(path, isolation_level=None)
        connection.executescript(script)
        connection.close()
        return path.read_bytes()


def half_written(case: Case, before: Files) -> Files:
    """What is left of a runner that has written every page and is killed before it empties the journal."""
    before.lay_out()
    with born(case, frame_of(case)) as life:
        stops = [*life.stops()]
    before.lay_out()
    with born(case, frame_of(case)) as life:
        life.kill_at(next(stop for stop in stops if stop.name == "ftruncate"))
    return Files(DATABASE.read_bytes(), JOURNAL.read_bytes())


def states_after(case: Case, before: Files) -> Iterator[str]:
    """What the file holds after the first statement, after the first two, and so on, by lives that nobody stops."""
    for count in range(1, len(case.statements) + 1) if case.order is None else (None,):
        before.lay_out()
        upload = base64.b64decode(case.upload)
        with born(case, frame_of(case, count) + upload) as life:
            list(life.stops())
        yield state(DATABASE.read_bytes())


def state(database: bytes) -> str:
    """A digest of everything that it holds. Raises sqlite3.DatabaseError, or ValueError, unless it is whole."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        if database:
            connection.deserialize(database)
        if (problems := connection.execute("PRAGMA integrity_check").fetchall()) != [("ok",)]:
            raise ValueError(f"integrity_check: {problems[0][0]}")
        connection.text_factory = bytes  # text that is not UTF-8 too
        everything = hashlib.sha256()
        for pragma in ("user_version", "application_id"):
            everything.update(repr(connection.execute(f"PRAGMA {pragma}").fetchall()).encode())
        schema = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name").fetchall()
        everything.update(repr(schema).encode())
        for kind, name, _, _ in schema:
            if kind == b"table":
                quoted = '"' + name.decode().replace('"', '""') + '"'
                everything.update(repr(sorted(connection.execute(f"SELECT * FROM {quoted}").fetchall(), key=repr)).encode())
        return everything.hexdigest()
    finally:
        connection.close()


def chosen(case: Case, stops: Sequence[Stop]) -> list[Stop]:
    """Every stop at a call that changes a file, and of the others as many as there is time for."""
    if ALL:
        return [*stops]
    changes = [stop for stop in stops if stop.name in CHANGING]
    others = [stop for stop in stops if stop.name not in CHANGING]
    return changes + random.Random(case.name).sample(others, min(len(others), MOST_OF_THE_OTHERS))


def judged(states: Sequence[str], answered: bool) -> tuple[str, int | None]:
    """What is wrong with the file that a dead runner left, or else which state it is."""
    if verdict := opened_again():
        return f"the runner that comes next says {verdict}", None
    # Without a single page there is nothing to roll back to, and SQLite does not look at the journal.
    if DATABASE.stat().st_size and JOURNAL.read_bytes()[: len(_JOURNAL_MAGIC)] == _JOURNAL_MAGIC:
        return "a hot journal is left over", None
    try:
        now = state(DATABASE.read_bytes())
    except (sqlite3.DatabaseError, ValueError) as error:
        return str(error), None
    if now not in states:
        return "neither the state before nor one after", None
    if answered and now != states[-1]:
        return "its answer was written, and what it answered is not kept", None
    return "", states.index(now)


def opened_again() -> str:
    """What a runner says that opens the file next, by its own way and in this process; empty if that is `ok`."""
    try:
        run_request(Request("SELECT 1", None, False), Configuration.parse(_CONFIGURATION), lambda: False, lambda _: None)
    except Exception as error:
        verdict = verdict_of(error, None, 0)
        return f"{verdict.verdict}: {verdict.message}"
    return ""


class Life:
    """One runner's process, stopped before its first line, and what it is given and gives."""

    def __init__(self, pid: int, reply: int) -> None:
        self._pid = pid
        self._reply = reply
        self._alive = True

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *_: object) -> None:
        if self._alive:
            self.kill()
        os.close(self._reply)

    @property
    def answer(self) -> bytes:
        return os.pread(self._reply, os.fstat(self._reply).st_size, 0)

    @property
    def has_answered(self) -> bool:
        """Whether the whole first frame of an answer was written."""
        answer = self.answer
        return len(answer) >= 4 and len(answer) >= 4 + int.from_bytes(answer[:4], "big")

    def stops(self) -> Iterator[Stop]:
        """Each system call's entry and exit, from the first read of the request on; it is stopped there meanwhile."""
        info = ctypes.create_string_buffer(_INFO.size)
        calls: dict[int, int] = {}
        number, reading = -1, False
        while self._next_stop():
            _ptrace(_GET_SYSCALL_INFO, self._pid, _INFO.size, ctypes.addressof(info))
            op, _, _, _, value, first, _, _ = _INFO.unpack(info.raw)
            if op == _ENTRY:
                number = value
                reading = reading or (_NAMES.get(number) == "read" and first == 0)
                calls[number] = calls.get(number, 0) + 1
            if reading:
                yield Stop(_NAMES.get(number, str(number)), calls[number], op == _EXIT)

    def kill_at(self, wanted: Stop) -> None:
        """A life may end before it comes there: none is quite like the other."""
        for stop in self.stops():
            if stop == wanted:
                self.kill()
                return

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        while self._alive:
            self._alive = not _is_over(os.waitpid(self._pid, 0)[1])

    def _next_stop(self) -> bool:
        passed_on = 0
        while True:
            _ptrace(_SYSCALL, self._pid, 0, passed_on)
            status = os.waitpid(self._pid, 0)[1]
            if _is_over(status):
                self._alive = False
                return False
            if os.WSTOPSIG(status) == _SYSCALL_STOP:
                return True
            passed_on = os.WSTOPSIG(status)


def _is_over(status: int) -> bool:
    return os.WIFEXITED(status) or os.WIFSIGNALED(status)


def _ptrace(request: int, pid: int, address: int, data: int) -> None:
    if _LIBC.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace {request}: {os.strerror(number)}")


def born(case: Case, request: bytes) -> Life:
    """A runner of the case, with the request on its stdin."""
    inbox, reply = os.memfd_create("request"), os.memfd_create("reply")
    os.write(inbox, request)
    os.lseek(inbox, 0, os.SEEK_SET)
    pid = os.fork()
    if pid == 0:
        os.dup2(inbox, 0)
        os.dup2(reply, 1)
        _live(case)
    os.close(inbox)
    os.waitpid(pid, 0)  # its SIGSTOP
    _ptrace(_SETOPTIONS, pid, 0, _TRACESYSGOOD | _EXITKILL)
    return Life(pid, reply)


def _live(case: Case) -> NoReturn:
    try:
        _LIVES[case.life](case)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(70)


def _serve(case: Case) -> None:
    os.environ["MAYFLY_RUNNER"] = _CONFIGURATION
    main_module.confine = lambda _, start_watchdog, *kind: start_watchdog()
    sys.argv[1:] = [case.life]
    if case.journal_mode:
        _replace_the_journal_mode(case.journal_mode)
    _stop_here()
    main_module.main()


def _serve_prepared(case: Case) -> None:
    """As runner/child.py does behind its confinement, which here is none."""
    configuration = Configuration.parse(_CONFIGURATION)
    database = prepare(configuration)
    _stop_here()
    clock, outbox = Clock(configuration.deadline_ms / 1000), Outbox(OUT)
    request = read_request(configuration, clock)
    database.hold_the_file()
    answer(reply_to(request, lambda asked, expired: run_prepared(asked, database, expired), clock.expired, outbox), Exit.ANSWERED)


def _replace_the_journal_mode(wanted: str) -> None:
    ordinary = database_module._of_the_file

    def replaced(configuration: Configuration) -> Any:
        return tuple(
            (name, wanted, wanted.lower(), why) if name == "journal_mode" else (name, value, answer, why)
            for name, value, answer, why in ordinary(configuration)
        )

    database_module._of_the_file = replaced


_LIVES: dict[str, Callable[[Case], None]] = {"serve": _serve, "serve-bulk": _serve, "prepared": _serve_prepared}


def _stop_here() -> None:
    _ptrace(_TRACEME, 0, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    main()
