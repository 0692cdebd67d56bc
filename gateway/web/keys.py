"""The keys that sign session tokens: one current, one previous, in `<state>/keys/token-keys.json`.

The file is written beside its place, synced and renamed, so a crash leaves either the old or the new. It is refused when anyone
but its owner could read it. A key is replaced once it is older than the rotation period; the one before it stays valid for one
period more. A clock that jumps back makes the current key younger, never invalid, and never causes a rotation.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from .secret import Secret

KEY_BYTES = 32
FILE_NAME = "token-keys.json"
_MAX_FILE_BYTES = 4096
_LOOK_SECONDS = 60.0

_log = logging.getLogger(__name__)


class KeysError(RuntimeError):
    """The key file cannot be used; the message says what to change and holds no key."""


class _StoredKey(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    key: str
    created_at: Annotated[int, msgspec.Meta(ge=0)]


class _StoredKeys(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    version: Literal[1]
    current: _StoredKey
    previous: _StoredKey | None


@dataclass(frozen=True, slots=True)
class Key:
    value: Secret[bytes]
    created_at: int

    @classmethod
    def fresh(cls, now: float) -> Key:
        return cls(Secret(secrets.token_bytes(KEY_BYTES)), int(now))


class KeyRing:
    """Current and previous key. `open()` once before use; `rotate_if_due()` as often as wanted."""

    def __init__(self, folder: Path, rotation_seconds: int, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._path = folder / FILE_NAME
        self._rotation_seconds = rotation_seconds
        self._clock = clock
        # Stands in while there is no previous key, so that two digests are computed for every token.
        self._decoy = Key.fresh(0)
        self._current: Key | None = None
        self._previous: Key | None = None

    @property
    def current(self) -> Key:
        if self._current is None:
            raise KeysError("the keys are not open")
        return self._current

    @property
    def previous(self) -> Key:
        return self._previous or self._decoy

    def open(self) -> None:
        """Read the file or make the first one; raises KeysError."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_private(os.stat(self._folder, follow_symlinks=False), self._folder, stat.S_ISDIR)
            raw = self._read()
        except OSError as error:
            raise KeysError(f"{self._path}: {error.strerror}") from None
        if raw is None:
            self._replace(Key.fresh(self._clock()), None)
            return
        try:
            stored = msgspec.json.decode(raw, type=_StoredKeys)
            self._current = _load(stored.current)
            self._previous = _load(stored.previous) if stored.previous else None
        except (msgspec.DecodeError, UnicodeDecodeError, binascii.Error, ValueError):
            raise KeysError(f"{self._path} is not a key file; remove it to start with new keys (all tokens lapse)") from None
        self.rotate_if_due()

    def rotate_if_due(self) -> bool:
        """True if the current key was old enough and a new one is in its place."""
        now = self._clock()
        old = self.current
        age = now - old.created_at
        if age < self._rotation_seconds:
            return False
        # After a long stop the old key has outlived its second period too.
        self._replace(Key.fresh(now), old if age < 2 * self._rotation_seconds else None)
        return True

    async def keep_rotating(self) -> None:
        """Until cancelled: look once a minute, off the event loop because of fsync. A failure keeps the old key and tries again."""
        while True:
            await asyncio.sleep(min(_LOOK_SECONDS, self._rotation_seconds))
            try:
                if await asyncio.to_thread(self.rotate_if_due):
                    _log.info("token key rotated")
            except KeysError as error:
                _log.error("token key not rotated: %s", error)

    def _read(self) -> bytes | None:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            _require_private(os.fstat(descriptor), self._path, stat.S_ISREG)
            return file.read(_MAX_FILE_BYTES)

    def _replace(self, current: Key, previous: Key | None) -> None:
        """In memory only once it is on disk: a token must never be signed by a key that a crash forgets."""
        stored = _StoredKeys(1, _store(current), _store(previous) if previous else None)
        try:
            self._write(msgspec.json.encode(stored))
        except OSError as error:
            raise KeysError(f"{self._path}: {error.strerror}") from None
        self._current, self._previous = current, previous

    def _write(self, raw: bytes) -> None:
        beside = self._folder / f".{FILE_NAME}.{secrets.token_hex(8)}"
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(descriptor)
            os.rename(beside, self._path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _store(key: Key) -> _StoredKey:
    return _StoredKey(base64.b64encode(key.value.reveal()).decode(), key.created_at)


def _load(stored: _StoredKey) -> Key:
    value = base64.b64decode(stored.key, validate=True)
    if len(value) != KEY_BYTES:
        raise ValueError("key length")
    return Key(Secret(value), stored.created_at)


def _require_private(status: os.stat_result, path: Path, is_kind: Callable[[int], bool]) -> None:
    if not is_kind(status.st_mode):
        raise KeysError(f"{path} is not of the expected kind")
    if status.st_uid != os.geteuid():
        raise KeysError(f"{path} belongs to user {status.st_uid}, not to this process's user {os.geteuid()}")
    if status.st_mode & 0o077:
        raise KeysError(f"{path} has mode {stat.S_IMODE(status.st_mode):04o}; others must have no access (chmod go= {path})")
