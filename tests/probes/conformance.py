"""What a container of one request looks like from the inside, and what a compromised runner in it would try.

It stands in the runner's place: same entry, same user, same volume. The order is one line of JSON on standard input, or argv[1]
where that is an object; the report is one JSON object on standard output. `do` names one of the functions below, or `attack` of
compromised.py. `survey` looks twice, before and after the runner's own confinement.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import stat
import sys
import threading
import time
from typing import Any

sys.path += ["/opt/mayfly", "/opt/mayfly/probes"]

from looks import look, parse_limits, parse_status, read

from runner import confine
from runner.configuration import Configuration
from runner.watchdog import Watchdog

MOST_DESCRIPTORS = 4096
CGROUP_FILES = {  # first the name of version 2, then that of version 1 with its controller's folder
    "memory": ("memory.max", "memory/memory.limit_in_bytes"),
    "memory_and_swap": ("memory.swap.max", "memory/memory.memsw.limit_in_bytes"),
    "pids": ("pids.max", "pids/pids.max"),
    "cpu": ("cpu.max", "cpu,cpuacct/cpu.cfs_quota_us", "cpu/cpu.cfs_quota_us"),
    "cpu_period": ("cpu,cpuacct/cpu.cfs_period_us", "cpu/cpu.cfs_period_us"),
}


def witnesses() -> list[int]:
    """Descriptors of what the kernel says about this process: read on when nothing can be opened any more."""
    return [os.open(f"/proc/self/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in ("status", "limits")]


def confined() -> list[int]:
    """Apply the runner's own confinement, all of it, and return witnesses from just before Landlock."""
    found: list[int] = []

    def open_witnesses(order: confine.Order, facts: confine.Facts) -> None:
        found.extend(witnesses())

    steps = list(confine.STEPS)
    steps.insert([name for name, _ in steps].index("landlock"), ("witnesses", open_witnesses))
    configuration = Configuration.parse(os.environ["MAYFLY_RUNNER"])
    confine.apply(steps, confine.Order(configuration, Watchdog(lambda: os._exit(3)).start))
    return found


def outcome(attempt: Any, *arguments: Any) -> str:
    try:
        attempt(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


# --- the survey


def survey(order: dict[str, Any]) -> dict[str, Any]:
    everything = tree()
    before = look("/proc/self") | look_from_inside(everything) | {"cgroup": cgroup()}
    before["processes"] = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    witness = confined() if order["confine"] else witnesses()
    status, limits = (os.pread(descriptor, 1 << 16, 0).decode() for descriptor in witness)
    after = {"status": parse_status(status), "limits": parse_limits(limits)} | look_when_confined(everything)
    after["descriptors"] = [number for number in after["descriptors"] if number not in witness]
    return {"before": before, "after": after}


def look_from_inside(everything: list[tuple[str, int]]) -> dict[str, Any]:
    """What needs no /proc."""
    return {
        "environment": dict(os.environ),
        "descriptors": descriptors(),
        "identity": sorted({os.getuid(), os.geteuid(), os.getgid(), os.getegid()}),
        "sockets_to_be_had": {name: outcome(open_socket, family) for name, family in (("AF_UNIX", 1), ("AF_INET", 2))},
        "hostname": os.uname().nodename,
        "root": sorted(os.listdir("/")),
        "devices": {path: device(path) for path, mode in everything if stat.S_ISCHR(mode) or stat.S_ISBLK(mode)},
        "sockets": [path for path, mode in everything if stat.S_ISSOCK(mode)],
        "privileged_files": [path for path, mode in everything if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID)],
        "writable": writable(everything),
        **look_elsewhere(),
    }


def look_when_confined(everything: list[tuple[str, int]]) -> dict[str, Any]:
    return {
        "descriptors": descriptors(),
        "standard_error": standard_error(),
        "writable": writable(everything),
        **look_elsewhere(),
    }


def look_elsewhere() -> dict[str, str]:
    """The interpreter; the process's own mount table, which names the volume's path on the host; a folder that every root has."""
    return {path: outcome(read_some, path) for path in (sys.executable, "/proc/self/mountinfo", "/")}


def read_some(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def standard_error() -> str:
    """Where descriptor 2 leads: the kind of file, and of a device its numbers."""
    found = os.fstat(2)
    if stat.S_ISCHR(found.st_mode):
        return f"c {os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    return "a pipe" if stat.S_ISFIFO(found.st_mode) else "a file"


def descriptors() -> list[int]:
    return [number for number in range(MOST_DESCRIPTORS) if is_open(number)]


def is_open(number: int) -> bool:
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def open_socket(family: int) -> None:
    """By libc: the image may have no socket module."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.socket(family, 1, 0)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "socket")
    os.close(descriptor)


def cgroup() -> dict[str, str | None]:
    """The limits as the container sees them; None where it sees no such file."""
    found: dict[str, str | None] = {}
    for limit, names in CGROUP_FILES.items():
        there = [path for path in (f"/sys/fs/cgroup/{name}" for name in names) if os.path.exists(path)]
        found[limit] = read(there[0]).strip() if there else None
    return found


def device(path: str) -> str:
    found = os.lstat(path)
    return f"{'c' if stat.S_ISCHR(found.st_mode) else 'b'} {os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"


def tree() -> list[tuple[str, int]]:
    """Every path with its mode, symbolic links not followed, without the folders of processes (they are this process's own)."""
    found = [(path, os.lstat(path).st_mode) for path in confine.FILES if os.path.exists(path)]  # their folder cannot be listed
    for folder, folders, files in os.walk("/"):
        if folder == "/proc":
            folders[:] = [name for name in folders if not name.isdigit()]
        for path in [folder, *(os.path.join(folder, name) for name in files)]:
            try:
                found.append((path, os.lstat(path).st_mode))
            except OSError:
                continue
    return list(dict.fromkeys(found))


def writable(everything: list[tuple[str, int]]) -> list[str]:
    """Files that open for writing, and folders in which a new file can be made; by flags that the second filter allows."""
    found = []
    for path, mode in everything:
        if stat.S_ISDIR(mode):
            target, flags = os.path.join(path, "mayfly-probe"), os.O_WRONLY | os.O_CREAT
        elif stat.S_ISREG(mode):
            target, flags = path, os.O_WRONLY
        else:
            continue
        try:
            os.close(os.open(target, flags | os.O_NOFOLLOW | os.O_CLOEXEC))
        except OSError:
            continue
        found.append(path)
    return found


# --- limits, by their effect


def eat(order: dict[str, Any]) -> dict[str, Any]:
    """Touch that much memory."""
    held = [bytearray(b"x" * (1 << 20)) for _ in range(order["mebibytes"])]
    return {"mebibytes": len(held)}


def multiply(order: dict[str, Any]) -> dict[str, Any]:
    """Start threads, which count as processes do, until there is no more or `most` is reached; and try a child process."""
    hold = threading.Event()
    started = 0
    try:
        for _ in range(order["most"]):
            threading.Thread(target=hold.wait, daemon=True).start()
            started += 1
    except RuntimeError:
        pass
    return {"threads": started + 1, "fork": outcome(fork)}


def fork() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def breed(order: dict[str, Any]) -> dict[str, Any]:
    """Fork until there is no more or `most` is reached; what refused, if anything."""
    children: list[int] = []
    refused = None
    while len(children) < order["most"]:
        try:
            child = os.fork()
        except OSError as error:
            refused = errno.errorcode[error.errno or 0]
            break
        if child == 0:
            signal.pause()
        children.append(child)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return {"processes": len(children) + 1, "refused": refused}


def burn(order: dict[str, Any]) -> dict[str, Any]:
    """The share of one processor that is to be had over some time."""
    wall, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - wall < order["seconds"]:
        pass
    return {"share": (time.process_time() - cpu) / (time.monotonic() - wall)}


def read_line() -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        line += os.read(0, 1) or sys.exit("no order")
    return bytes(line)


ORDERS: dict[str, Any] = {"survey": survey, "eat": eat, "multiply": multiply, "breed": breed, "burn": burn}


def main() -> None:
    from compromised import attack

    order = json.loads(sys.argv[1] if sys.argv[1].startswith("{") else read_line())
    report = json.dumps((ORDERS | {"attack": attack})[order["do"]](order)).encode()
    while report:
        report = report[os.write(1, report) :]
    os._exit(0)


if __name__ == "__main__":
    main()
