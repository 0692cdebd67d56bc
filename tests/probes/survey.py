"""Calls every system call once, each in a child, and tells which reached the kernel. argv[1]: the steps to apply first, as JSON.

A filter is seen from inside only by trying. Arguments are nonsense (all bits set), so that what gets through fails at once,
except where the tables ask for certain values. Report: {"number": "reached" | "EPERM" | "ENOSYS" | "SIGSYS"}.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import sys
from contextlib import suppress
from types import SimpleNamespace

sys.path.append("/opt/mayfly")

from runner import confine, syscalls

HIGHEST = 470
CLONE_THREAD = 0x10000

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
machine = syscalls.machine()
names = {number: name for name in syscalls.NUMBERS if (number := syscalls.number(name, machine)) is not None}
clone = {"x86_64": 56, "aarch64": 220}[machine]


def arguments(number: int) -> list[int]:
    values = [-1] * 6
    for argument in syscalls.ARGUMENTS.get(names.get(number, ""), ()):
        values[argument.index] = argument.values[0]
    if number == clone:
        values[0] = CLONE_THREAD
    return values


def attempt(number: int, steps: list[str]) -> str:
    note = mmap.mmap(-1, 4096)
    child = os.fork()
    if child == 0:
        with suppress(OSError):  # the container's profile has no timers, and no call that waits
            signal.setitimer(signal.ITIMER_REAL, 0.3)
        configuration = SimpleNamespace(instance_bytes=10 << 20, nofile=64, min_landlock_abi=3, deadline_ms=2000)
        confine.apply([s for s in confine.STEPS if s[0] in steps], confine.Order(configuration, int))
        passed = [ctypes.c_long(value) for value in arguments(number)]
        note[0:1] = b"r"
        if libc.syscall(ctypes.c_long(number), *passed) == -1 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS):
            note[0:1] = b"p" if ctypes.get_errno() == errno.EPERM else b"n"
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS:
        return "SIGSYS"
    return {b"r": "reached", b"p": "EPERM", b"n": "ENOSYS"}[note[0:1]]


steps = json.loads(sys.argv[1])
print(json.dumps({number: attempt(number, steps) for number in range(HIGHEST + 1)}))
