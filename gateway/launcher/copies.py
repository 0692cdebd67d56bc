"""A tenant's file into a file of ours, by the kernel: not a byte of it passes through this process.

Native code in a runner should find no way to plant anything in a volume. If it did, nothing here would follow it: each part of the
path is opened by itself and never through a link, no open waits for another end, and what is no regular file with one name, on our
own file system and within the cap, is not copied.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .errors import UnfitVolumeError

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_PLANTED = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EACCES, errno.ENODEV, errno.EISDIR}
_CANNOT = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP}


@contextmanager
def opened(folder: int, path: str, most_bytes: int) -> Iterator[tuple[int, int]]:
    """A descriptor of the file that `path` names below `folder`, and its size; UnfitVolumeError for what is not to be copied."""
    with ExitStack() as open_ones:
        *folders, name = path.split("/")
        place = folder
        try:
            for part in folders:
                place = os.open(part, _FOLDER, dir_fd=place)
                open_ones.callback(os.close, place)
            descriptor = os.open(name, _FILE, dir_fd=place)
        except OSError as error:
            if error.errno in _PLANTED:
                raise UnfitVolumeError(f"{name} cannot be opened: {error.strerror}") from error
            raise
        open_ones.callback(os.close, descriptor)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_dev != os.fstat(folder).st_dev:
            raise UnfitVolumeError(f"{name} is no regular file with one name")
        if found.st_size > most_bytes:
            raise UnfitVolumeError(f"{name} has {found.st_size} bytes, more than {most_bytes}")
        yield descriptor, found.st_size


def copy(source: int, target: int, size: int) -> None:
    """The first `size` bytes of one open file to the beginning of another. Raises OSError, also when there are fewer."""
    copied = 0
    by_reference = True  # where the file system can: nothing is written then
    while copied < size:
        try:
            if by_reference:
                piece = os.copy_file_range(source, target, size - copied, copied, copied)
            else:
                os.lseek(target, copied, os.SEEK_SET)
                piece = os.sendfile(target, source, copied, size - copied)
        except OSError as error:
            if not by_reference or error.errno not in _CANNOT:
                raise
            by_reference = False
            continue
        if not piece:
            raise OSError(errno.EIO, "the file has become shorter")
        copied += piece
