"""Native code that took over the runner, at work on the volume: `attack` tries what the order names, confined or not yet.

It is Python here, but calls nothing that machine code could not call: what stops it is the kernel alone.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any

DATABASE, JOURNAL = "/data/db.sqlite", "/data/db.sqlite-journal"
CHUNK = bytes(1 << 16)


def plant_symlink() -> None:
    os.symlink("/etc/passwd", "/data/planted")


def replace_by_symlink() -> None:
    os.unlink(DATABASE)
    os.symlink("/etc/passwd", DATABASE)


def plant_hardlink() -> None:
    os.link(DATABASE, "/data/planted")


def plant_fifo() -> None:
    os.mkfifo("/data/planted")


def plant_device() -> None:
    os.mknod("/data/planted", stat.S_IFCHR | 0o666, os.makedev(1, 3))


def plant_folder() -> None:
    os.mkdir("/data/planted")


def plant_file() -> None:
    os.close(os.open("/data/planted", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))


def rename_the_journal() -> None:
    os.rename(JOURNAL, "/data/planted")


def make_setuid() -> None:
    os.chmod(DATABASE, 0o4777)


def _write_until_refused(path: str) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    written = 0
    try:
        while True:
            written += os.pwrite(descriptor, CHUNK, written)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
    return written


def fill_both_files() -> list[int]:
    return [_write_until_refused(path) for path in (DATABASE, JOURNAL)]


def write_far_out() -> None:
    """A sparse file: one byte a terabyte in. It costs one block, and its size would be a lie to whoever copies it."""
    descriptor = os.open(DATABASE, os.O_WRONLY | os.O_CLOEXEC)
    os.pwrite(descriptor, b"x", 1 << 40)


def seek_far_out() -> None:
    descriptor = os.open(DATABASE, os.O_WRONLY | os.O_CLOEXEC)
    os.lseek(descriptor, 1 << 40, os.SEEK_SET)
    os.write(descriptor, b"x")


def truncate_far_out() -> None:
    os.ftruncate(os.open(DATABASE, os.O_WRONLY | os.O_CLOEXEC), 1 << 40)


def truncate_to_the_last_byte() -> None:
    """As sparse as it gets within the limit."""
    os.ftruncate(os.open(DATABASE, os.O_WRONLY | os.O_CLOEXEC), 10 << 20)


ATTACKS: dict[str, Callable[[], Any]] = {
    attack.__name__: attack
    for attack in (
        plant_symlink, replace_by_symlink, plant_hardlink, plant_fifo, plant_device, plant_folder, plant_file, rename_the_journal,
        make_setuid, fill_both_files, write_far_out, seek_far_out, truncate_far_out, truncate_to_the_last_byte,
    )
}  # fmt: skip


def attack(order: dict[str, Any]) -> dict[str, Any]:
    """Each attack's result, or the errno that refused it. One that is answered by a signal leaves no report."""
    import signal

    from __main__ import confined

    for path in order.get("make", ()):  # where no launcher made them
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as in the runner: a write past the limit is an error, not an end
    if order.get("confine"):
        confined()
    results: dict[str, Any] = {}
    for name in order["attacks"]:
        try:
            results[name] = ATTACKS[name]() or "done"
        except OSError as error:
            results[name] = errno.errorcode[error.errno or 0]
    return results
