"""One instance's volume into the place of another's, so that a launcher killed at any point has lost nothing.

    .replace-<instance>-<other>-<new>-<old>[-keep]    in the instances' folder, empty: its name says what is under way

    1  the note is made               until here nothing has happened, and a launcher that finds no more forgets the note
    2  the two volumes change places  in one step on the disk; from here on `instance` has the new one, whole
    3  with keep, the old one, now in `other`, becomes <instance>/damaged; what stood there before takes its place
    4  `other` is removed, with whatever is in it
    5  the note goes

Which step is done shows by the inodes of the two folders, <new> and <old>, so all of it can be done once more from the beginning.
"""

from __future__ import annotations

import ctypes
import os
import re
import uuid
from contextlib import suppress
from dataclasses import dataclass

_INSTANCE = "([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
_NOTE = re.compile(rf"\.replace-{_INSTANCE}-{_INSTANCE}-([0-9]+)-([0-9]+)(-keep)?")
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_EXCHANGE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_renameat2 = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, use_errno=True
)(("renameat2", _libc))


@dataclass(frozen=True, slots=True)
class Replacement:
    """`new` and `old` are inodes. Raises OSError wherever the disk does."""

    instance: uuid.UUID
    other: uuid.UUID
    new: int
    old: int
    keep: bool

    @classmethod
    def of(cls, folder: int, instance: uuid.UUID, other: uuid.UUID, *, keep: bool) -> Replacement:
        """Raises FileNotFoundError unless both have a volume."""
        return cls(instance, other, _known_inode(folder, f"{other}/volume"), _known_inode(folder, f"{instance}/volume"), keep)

    @classmethod
    def noted(cls, name: str) -> Replacement | None:
        """The one whose note has that name."""
        found = _NOTE.fullmatch(name)
        if found is None:
            return None
        instance, other, new, old, keep = found.groups()
        return cls(uuid.UUID(instance), uuid.UUID(other), int(new), int(old), keep is not None)

    @property
    def note(self) -> str:
        return f".replace-{self.instance}-{self.other}-{self.new}-{self.old}{'-keep' if self.keep else ''}"

    def begun(self, folder: int) -> bool:
        """Whether the volumes have changed places."""
        return _inode(folder, f"{self.instance}/volume") == self.new

    def begin(self, folder: int) -> None:
        """Steps 1 to 3. On an exception nothing has happened, unless the disk refuses to undo it too: then the note stays."""
        os.close(os.open(self.note, _NEW_FILE, 0o600, dir_fd=folder))
        try:
            self._exchange_volumes(folder)
            self.put_aside(folder)
        except OSError:
            if self.begun(folder):
                self._exchange_volumes(folder)
            self.end(folder)
            raise

    def put_aside(self, folder: int) -> None:
        """Step 3, if it is wanted and not done."""
        volume, damaged = f"{self.other}/volume", f"{self.instance}/damaged"
        if not self.keep or _inode(folder, volume) != self.old:
            return
        if _inode(folder, damaged) is None:
            os.rename(volume, damaged, src_dir_fd=folder, dst_dir_fd=folder)
        else:
            exchange(folder, volume, damaged)

    def end(self, folder: int) -> None:
        """Step 5."""
        with suppress(FileNotFoundError):
            os.unlink(self.note, dir_fd=folder)

    def _exchange_volumes(self, folder: int) -> None:
        exchange(folder, f"{self.instance}/volume", f"{self.other}/volume")


def exchange(folder: int, one: str, other: str) -> None:
    """What has either name below `folder` gets the other's, in one step."""
    if _renameat2(folder, os.fsencode(one), folder, os.fsencode(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, f"renameat2: {os.strerror(number)}", one, None, other)


def _known_inode(folder: int, path: str) -> int:
    return os.stat(path, dir_fd=folder, follow_symlinks=False).st_ino


def _inode(folder: int, path: str) -> int | None:
    try:
        return _known_inode(folder, path)
    except FileNotFoundError:
        return None
