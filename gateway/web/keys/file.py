"""The keys in `token-keys.json` of a folder, for every gateway of one host.

The file is written beside its place, synced and renamed, so a crash leaves either the old or the new. It is refused when anyone
but its owner could read it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec

from .source import KeyForm, KeysError, Stored

FILE_NAME = "token-keys.json"
_MAX_FILE_BYTES = 4096


class _Document(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    version: Literal[1]
    current: KeyForm
    previous: KeyForm | None


class FileSource:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / FILE_NAME

    def load(self) -> Stored | None:
        try:
            raw = self._read()
        except OSError as error:
            raise KeysError(f"{self._path}: {error.strerror}") from None
        if raw is None:
            return None
        try:
            document = msgspec.json.decode(raw, type=_Document)
            older = document.previous.read() if document.previous else None
            return Stored(document.current.read(), older, _version(raw))
        except ValueError:
            raise KeysError(f"{self._path} is not a key file; remove it to start with new keys (all tokens lapse)") from None

    def rotate(self, old: Stored | None, new: Stored) -> Stored:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self._folder) as folder:
                held = self.load()
                if held is not None and (old is None or held.version != old.version):
                    return held
                raw = msgspec.json.encode(_Document(1, KeyForm.of(new.newest), KeyForm.of(new.older) if new.older else None))
                self._write(raw, folder)
        except OSError as error:
            raise KeysError(f"{self._path}: {error.strerror}") from None
        return replace(new, version=_version(raw))

    def _read(self) -> bytes | None:
        try:
            _require_private(os.stat(self._folder, follow_symlinks=False), self._folder, stat.S_ISDIR)
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            _require_private(os.fstat(descriptor), self._path, stat.S_ISREG)
            return file.read(_MAX_FILE_BYTES)

    def _write(self, raw: bytes, folder: int) -> None:
        beside = self._folder / f".{FILE_NAME}"
        # What a killed gateway left; no other is at it, for the folder is locked.
        beside.unlink(missing_ok=True)
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(descriptor)
            os.rename(beside, self._path)
        except BaseException:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        os.fsync(folder)


def _version(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """A descriptor of the folder, locked against every other gateway until it is closed, by whatever end."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _require_private(status: os.stat_result, path: Path, is_kind: Callable[[int], bool]) -> None:
    if not is_kind(status.st_mode):
        raise KeysError(f"{path} is not of the expected kind")
    if status.st_uid != os.geteuid():
        raise KeysError(f"{path} belongs to user {status.st_uid}, not to this process's user {os.geteuid()}")
    if status.st_mode & 0o077:
        raise KeysError(f"{path} has mode {stat.S_IMODE(status.st_mode):04o}; others must have no access (chmod go= {path})")
