"""Landlock: after `restrict` this process reads and writes the named files and touches nothing else by path.

Everything that the kernel's ABI can take away is handled, and only the named files get something back: read, write, truncate.
They are rules on the files themselves, not on their folder, so nothing can be made, removed, renamed or listed anywhere. From
ABI 4 TCP is gone too, from ABI 6 abstract sockets and signals to processes outside.

What Landlock does not cover: descriptors that are open already, threads that run already, and stat, chmod and their like.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Sequence

from . import syscalls

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
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


def restrict(files: Sequence[str], abi: int) -> None:
    """Leave this thread, and all it starts, nothing but the files. Needs no_new_privs and an ABI of at least 1. Raises OSError."""
    rights = handled(abi)
    attributes = struct.pack("=QQQ", *rights)  # a kernel takes a longer struct than it knows, as long as the rest is zero
    ruleset = syscalls.invoke("landlock_create_ruleset", attributes, len(attributes), 0)
    try:
        for path in files:
            _add_file(ruleset, path, rights[0] & (_READ_FILE | _WRITE_FILE | _TRUNCATE))
        syscalls.invoke("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _add_file(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise UnsuitableFileError(errno.EINVAL, f"{path} is not a regular file with one link")
        syscalls.invoke("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)
