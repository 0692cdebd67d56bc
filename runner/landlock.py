"""Landlock: after what `restriction` gives has run, this process reads and writes the named files and touches nothing else by path.

Everything that the kernel's ABI can take away is handled, and only the named files get something back: read, write, truncate,
or to be read alone.
They are rules on the files themselves, not on their folder, so nothing can be made, removed, renamed or listed anywhere. From
ABI 4 TCP is gone too, from ABI 6 abstract sockets and signals to processes outside.

What Landlock does not cover: descriptors that are open already, threads that run already, and stat, chmod and their like.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from . import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_RULE = struct.Struct("=Qi")  # rights, descriptor
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_STATX_TYPE, _STATX_NLINK = 1, 4
_STATX = struct.Struct("=16xI8xH")  # of struct statx: links and mode
_WRITE_FILE, _READ_FILE, _TRUNCATE = 1 << 1, 1 << 2, 1 << 14

_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}  # ABI → how many rights it knows: 2 added refer, 3 truncate, 5 ioctl on devices
_NET_RIGHTS = {4: 2}  # bind and connect TCP
_SCOPES = {6: 2}  # abstract unix sockets and signals


class UnsuitableFileError(OSError):
    """What should become a rule is not a regular file with exactly one name."""


def abi() -> int:
    """The ABI of this kernel; 0 where Landlock is not built in or not switched on. Raises OSError when asking is not allowed."""
    try:
        return syscalls.invoke("landlock_create_ruleset", None, 0, _CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


def handled(abi: int) -> tuple[int, int, int]:
    """File system, network and scope rights, each as the bits of everything that the ABI knows."""
    return _all_known(_FS_RIGHTS, abi), _all_known(_NET_RIGHTS, abi), _all_known(_SCOPES, abi)


def _all_known(rights: dict[int, int], abi: int) -> int:
    return (1 << max((count for since, count in rights.items() if since <= abi), default=0)) - 1


def restriction(files: Sequence[str], abi: int, read_only: bool = False) -> Callable[[], int]:
    """What leaves this thread, and all it starts, nothing but the files; everything is made ready that can be before they exist.

    Needs an ABI of at least 1. What it gives returns 0, needs no_new_privs and raises OSError.
    """
    rights = handled(abi)
    attributes = struct.pack("=QQQ", *rights)  # a kernel takes a longer struct than it knows, as long as the rest is zero
    ruleset = ctypes.c_int()
    create = syscalls.prepare("landlock_create_ruleset", attributes, len(attributes), 0)
    how = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    opens = tuple(syscalls.prepare("openat", _AT_FDCWD, path.encode() + b"\0", how) for path in files)
    given = _READ_FILE if read_only else _READ_FILE | _WRITE_FILE | _TRUNCATE
    rule = ctypes.create_string_buffer(_RULE.pack(rights[0] & given, -1), _RULE.size)
    file = ctypes.c_int.from_buffer(rule, 8)
    found = ctypes.create_string_buffer(256)
    look = syscalls.prepare("statx", file, b"\0", _AT_EMPTY_PATH, _STATX_TYPE | _STATX_NLINK, found)
    add = syscalls.prepare("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, rule, 0)
    close = syscalls.prepare("close", file)
    restrict = syscalls.prepare("landlock_restrict_self", ruleset, 0)
    close_ruleset = syscalls.prepare("close", ruleset)
    unpack = _STATX.unpack_from
    failure = syscalls.failure

    def apply() -> int:
        ruleset.value = created = create()
        if created < 0:
            raise failure("landlock_create_ruleset")
        for open_file in opens:
            file.value = descriptor = open_file()
            if descriptor < 0 or look():
                raise failure(files[opens.index(open_file)])
            links, mode = unpack(found)
            if links != 1 or mode & 0o170000 != 0o100000:
                raise UnsuitableFileError(errno.EINVAL, f"{files[opens.index(open_file)]} is not a regular file with one link")
            if add():
                raise failure("landlock_add_rule")
            close()
        if restrict():
            raise failure("landlock_restrict_self")
        return close_ruleset()

    return apply
