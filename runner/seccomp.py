"""The second seccomp filter: classic BPF made from the tables in `syscalls`, put on every thread of the process at once.

A call that is not in the tables ends the process (SECCOMP_RET_KILL_PROCESS) and is not merely refused. Three reasons. It is
the safer answer: whoever runs native code here gets one try, not a search. It can be seen: the process ends by SIGSYS, which
the launcher reports as SIGNALLED and the kernel logs, where EPERM would look like an odd SQLite error. And it costs the
ordinary caller nothing: interpreter, C library and SQLite are pinned in the image, so which calls they make is known, and the
tests run the whole SQL workload under this very action. The few calls that SQLite makes without needing them are answered
EPERM (`syscalls.REFUSED`).

The container's own profile (infra/seccomp.json) is the first filter; it still holds the start-up's needs. The kernel runs
both, and the stricter answer wins.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from . import syscalls

KILL_PROCESS = 0x80000000
ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | errno.EPERM

_SET_MODE_FILTER = 1
_FLAG_TSYNC = 1

_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_JUMP_EQUAL, _JUMP_AT_LEAST = 0x15, 0x35
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_X32_BIT = 0x40000000
_HEADER = struct.Struct("@HP")  # struct sock_fprog: how many instructions, and where; here they follow it

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand: struct sock_filter."""


def build(machine: str, otherwise: int = KILL_PROCESS) -> list[Instruction]:
    """The filter for one architecture. `otherwise` answers a call that is not allowed; a foreign architecture always kills."""
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, syscalls.AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        # x32 calls have the architecture of x86_64 and this bit; no architecture has real numbers this high.
        (_JUMP_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, KILL_PROCESS),
    ]
    for name, number in syscalls.numbers(syscalls.ALLOWED, machine).items():
        checks: list[Instruction] = []
        for argument in syscalls.ARGUMENTS.get(name, ()):
            checks += _check(argument, otherwise)
        program += [(_JUMP_EQUAL, 0, len(checks) + 1, number), *checks, (_RETURN, 0, 0, ALLOW)]
    for number in syscalls.numbers(syscalls.REFUSED, machine).values():
        program += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, REFUSE)]
    return [*program, (_RETURN, 0, 0, otherwise)]


def _check(argument: syscalls.Argument, otherwise: int) -> list[Instruction]:
    """Fall through when the condition holds, else answer `otherwise`."""
    count = len(argument.values)
    low_word = _ARGUMENTS + 8 * argument.index  # both architectures are little-endian
    return [
        (_LOAD, 0, 0, low_word),
        (_AND, 0, 0, argument.mask),
        *((_JUMP_EQUAL, count - position, 0, value) for position, value in enumerate(argument.values)),
        (_RETURN, 0, 0, otherwise),
    ]


class Filter:
    """A program laid out for the kernel."""

    __slots__ = ("call",)

    def __init__(self, program: list[Instruction]) -> None:
        code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
        header = ctypes.create_string_buffer(bytes(_HEADER.size) + code, _HEADER.size + len(code))
        _HEADER.pack_into(header, 0, len(program), ctypes.addressof(header) + _HEADER.size)
        self.call = syscalls.prepare("seccomp", _SET_MODE_FILTER, _FLAG_TSYNC, header)
        """Put it on this thread and all others, for good; gives 0. Needs no_new_privs."""

    def install(self) -> int:
        """As `call`; raises OSError, all unfiltered."""
        result = self.call()
        if result < 0:
            raise syscalls.failure("seccomp")
        if result:
            raise OSError(errno.EBUSY, f"thread {result} cannot take the filter")
        return 0
