"""Instances on disk. The folder is the registry: whatever died, what is in it at a start is what exists.

    <instances>/<uuid>/instance.json              {"v": 1, "created_at": …, "expires_at": …, "owner": "<hex>", "queries": …,
                                                  "salvage": …}; the times are 0 while it is prepared and nobody has claimed it
    <instances>/<uuid>/volume/db.sqlite           made beforehand and writable by the runner's user; nothing else can be made here
    <instances>/<uuid>/volume/db.sqlite-journal   the volume alone is ever mounted
    <instances>/<uuid>/damaged/…                  a volume that was replaced and is kept for the operator
    <instances>/<uuid>/tags                       `tags`: which runs must not be had twice
    <instances>/.new-… .gone-… .scratch-…         on the way in, on the way out, or for one self-test; never an instance
    <instances>/.replace-…                        `replacement`: a note of what is under way

A rename is the moment at which an instance begins and at which it ends. The folder above is 0700, so the files' mode 0666 is
of use only to a container that has the volume mounted. Tenant files are made, and unlinked, and for a fork opened by `copies`.
An instance that was prepared and never claimed has expired long ago, so whoever sweeps up expired ones after a crash takes it too.

The records are read once and kept: who holds the state folder's lock is the only writer, and `find` is asked twice for a run (12 µs
each from the disk, 0.2 µs from memory). What somebody else does to the folder meanwhile is met by `expired`, which lists it, and
by `look_again`; a record that is edited by hand counts from the next start on.
How many runs an instance has had is counted in memory, and written by each sweep and at the end: a crash forgets one sweep's.
All methods but `find`, `lives` and `ran` block for as long as the disk takes. Those that write, and `expired`, are called from one
thread, so they never overlap, and no two creates take the last place below a cap; those that need not be say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..protocol import NOBODY
from . import copies, tags
from .caps import Caps
from .errors import ExtendingOffError, InstanceExistsError, LauncherError, StorageLowError, UnknownInstanceError
from .replacement import Replacement

log = logging.getLogger(__name__)

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}
VOLUME_FILES = ("db.sqlite", "db.sqlite-journal")
_VOLUME_MODE = 0o711  # a runner is another user: it may get at the two files, and neither list nor add
_RECORD_FILE = "instance.json"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_EMPTY_FILE = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_WRITTEN_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
_RECORD_BYTES = 4096  # far more than any record of ours
_SAVED_AT_ONCE = 64  # records, 50 µs each: a create that comes meanwhile waits for no more


@dataclass(slots=True)
class Record:
    """Times in unix seconds."""

    created_at: int
    expires_at: int
    owner: bytes = NOBODY
    queries: int = 0
    """Runs so far."""
    salvage: bool = False
    """Whether its database is to be salvaged by whoever finds it damaged. All but the end and the queries stays as it was made."""


def _nobodys() -> Record:
    """Prepared and not claimed, or a record that cannot be read."""
    return Record(0, 0)


class Registry:
    def __init__(
        self,
        folder: Path,
        *,
        ttl_seconds: int,
        min_free_bytes: int,
        max_life_seconds: int = 0,
        caps: Caps | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._folder_name = str(folder)
        self._ttl_seconds = ttl_seconds
        self._min_free_bytes = min_free_bytes
        self._max_life_seconds = max_life_seconds
        self._caps = caps or Caps(0, 0)
        self._clock = clock
        self._descriptor = os.open(folder, _FOLDER)
        self._records: dict[uuid.UUID, Record] = {}
        self._unclaimed: set[uuid.UUID] = set()
        self._unsaved: set[uuid.UUID] = set()
        self._compare()

    def close(self) -> None:
        while self.save():
            pass
        os.close(self._descriptor)

    @property
    def count(self) -> int:
        """Instances on disk that somebody has or had, the expired but not yet reaped included."""
        return len(self._records) - len(self._unclaimed)

    @property
    def live(self) -> int:
        """Instances that somebody has and that have not expired."""
        return self._caps.live(self._clock())

    def free_bytes(self) -> int:
        room = os.fstatvfs(self._descriptor)
        return room.f_bavail * room.f_frsize

    def volume(self, instance: uuid.UUID) -> str:
        """Its path; text, because a run costs 2 µs less than by pathlib."""
        return f"{self._folder_name}/{instance}/volume"

    def create(self, instance: uuid.UUID, owner: bytes = NOBODY, *, salvage: bool = False) -> Record:
        """Make an empty instance, or leave nothing.

        Raises OwnerFullError, HostFullError, InstanceExistsError or StorageLowError.
        """
        record = self._record_from_now(owner, salvage)
        self._make(instance, record)
        self._take_up(instance, record)
        return record

    def prepare(self, instance: uuid.UUID) -> None:
        """Make an empty instance that nobody can find until it is claimed, or leave nothing; no cap counts it.

        Raises InstanceExistsError or StorageLowError.
        """
        record = _nobodys()
        self._make(instance, record)
        self._records[instance] = record
        self._unclaimed.add(instance)

    def claim(self, instance: uuid.UUID, owner: bytes = NOBODY, *, salvage: bool = False) -> Record:
        """The life of a prepared instance begins.

        Raises OwnerFullError, HostFullError or StorageLowError, and then it can be claimed another time.
        """
        record = self._record_from_now(owner, salvage)
        self._require_room()
        try:
            self._replace_record(instance, record)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise StorageLowError(f"no room: {error.strerror}") from error
            raise
        self._unclaimed.discard(instance)
        self._take_up(instance, record)
        return record

    def copy(self, source: uuid.UUID, instance: uuid.UUID, owner: bytes, most_bytes: int) -> None:
        """Make ready what `adopt` makes an instance: two files like the source's, each of `most_bytes` at most. Or leave nothing.

        From any thread. The caller holds the source's lease. Raises OwnerFullError, HostFullError, StorageLowError, or
        UnfitVolumeError if the source holds something that is no runner's.
        """
        self._caps.require_room(owner, self._clock())
        with self._draft(instance) as draft:
            self._build(draft, _nobodys())
            for file in VOLUME_FILES:
                with copies.opened(self._descriptor, f"{source}/volume/{file}", most_bytes) as (descriptor, size):
                    self._require_room(size)
                    target = os.open(f"{draft}/volume/{file}", _EMPTY_FILE, dir_fd=self._descriptor)
                    try:
                        copies.copy(descriptor, target, size)
                    finally:
                        os.close(target)

    def adopt(self, instance: uuid.UUID, owner: bytes, *, salvage: bool) -> Record:
        """The life of a copy begins, or nothing is left of it. Raises OwnerFullError, HostFullError or StorageLowError."""
        with self._draft(instance) as draft:
            record = self._record_from_now(owner, salvage)
            self._write_record(f"{draft}/{_RECORD_FILE}", record)
            os.rename(draft, str(instance), src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        self._take_up(instance, record)
        return record

    def replace(self, instance: uuid.UUID, other: uuid.UUID, *, keep: bool) -> None:
        """Give `instance` the volume of `other`, and remove that. The caller holds both leases, and nothing has a volume mounted.

        With `keep` the old volume stays as `damaged`. Raises UnknownInstanceError, or OSError when nothing was done.
        """
        try:
            replacement = Replacement.of(self._descriptor, instance, other, keep=keep)
        except FileNotFoundError:
            raise UnknownInstanceError(f"{instance} or {other}") from None
        replacement.begin(self._descriptor)
        try:
            self._remove_replaced(replacement)
        except OSError as error:  # it is done all the same; the note tells the next start of the rest
            log.warning("not removed after it was replaced instance=%s: %s", other, error)

    def extend(self, instance: uuid.UUID, wished: int) -> Record:
        """Let it live until `wished`, or as long as a life may be; never shorter than it would.

        Raises UnknownInstanceError or ExtendingOffError.
        """
        if not self._max_life_seconds:
            raise ExtendingOffError("MAYFLY_MAX_LIFE_SECONDS is 0")
        record = self.find(instance)
        until = min(wished, record.created_at + self._max_life_seconds)
        if until > record.expires_at:
            self._replace_record(instance, dataclasses.replace(record, expires_at=until))
            record.expires_at = until
            self._caps.add(instance, record.owner, until)
        return record

    def begin_once(self, instance: uuid.UUID, tag: bytes) -> None:
        """Note that a run begins which must not be had twice. From any thread. The caller holds the lease.

        Raises RepeatedError or QuotaError.
        """
        tags.begin(self._descriptor, instance, tag)

    def take_back(self, instance: uuid.UUID, tag: bytes) -> None:
        """The run that was noted last has not run. From any thread. The caller still holds the lease."""
        tags.take_back(self._descriptor, instance, tag)

    def find(self, instance: uuid.UUID) -> Record:
        """Raises UnknownInstanceError from the very second at which the instance expires, reaped or not. Asks no disk."""
        record = self._records.get(instance)
        if record is None or self._clock() >= record.expires_at:
            raise UnknownInstanceError(str(instance))
        return record

    def lives(self, instance: uuid.UUID) -> bool:
        """Whether somebody has it and it has not expired. Asks no disk."""
        record = self._records.get(instance)
        return record is not None and self._clock() < record.expires_at

    def ran(self, instance: uuid.UUID) -> None:
        """Count a run."""
        record = self._records.get(instance)
        if record is not None:
            record.queries += 1
            self._unsaved.add(instance)

    def save(self) -> bool:
        """Write some of the counts that have changed; whether there are more."""
        for _ in range(min(len(self._unsaved), _SAVED_AT_ONCE)):
            instance = self._unsaved.pop()
            record = self._records.get(instance)
            if record is None or self._clock() >= record.expires_at:
                continue
            try:
                self._replace_record(instance, record)
            except OSError as error:  # the next run counts it again
                log.warning("runs not saved instance=%s: %s", instance, error)
        return bool(self._unsaved)

    def look_again(self, instance: uuid.UUID) -> None:
        """Raises UnknownInstanceError if somebody else has taken the instance's volume away."""
        if not os.path.isdir(self.volume(instance)):
            raise UnknownInstanceError(str(instance))

    def expired(self) -> list[uuid.UUID]:
        """Instances past their time, and those whose record could not be read: nobody can use them any more."""
        self._compare()
        now = self._clock()
        return [instance for instance, record in self._records.items() if now >= record.expires_at]

    def remove(self, instance: uuid.UUID) -> bool:
        """Delete an instance; false when there was none. The caller holds its lease."""
        gone = f".gone-{instance}-{secrets.token_hex(4)}"
        try:
            os.rename(str(instance), gone, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        except FileNotFoundError:
            self._forget(instance)
            return False
        self._forget(instance)
        self._delete(gone)
        return True

    def sweep_leftovers(self) -> int:
        """Clear up what was under way when a launcher died; how much that was. Only at start: a draft of ours would go too."""
        with os.scandir(self._folder) as entries:
            leftovers = [entry.name for entry in entries if entry.name.startswith(".")]
        removed = 0
        for name in leftovers:
            try:
                self._finish(name)
            except OSError as error:  # one that cannot go must not keep every other instance from being served
                log.warning("leftover %s not removed: %s", name, error)
            else:
                removed += 1
        return removed

    @contextmanager
    def scratch(self) -> Iterator[str]:
        """A volume like any other that is no instance's."""
        name = f".scratch-{secrets.token_hex(4)}"
        try:
            self._build(name, _nobodys())
            yield f"{self._folder_name}/{name}/volume"
        finally:
            self._delete(name)

    def _require_room(self, wanted_bytes: int = 0) -> None:
        if (free := self.free_bytes()) - wanted_bytes < self._min_free_bytes:
            raise StorageLowError(f"{free} bytes are free, and {self._min_free_bytes} are to stay so")

    def _record_from_now(self, owner: bytes, salvage: bool) -> Record:
        now = self._clock()
        self._caps.require_room(owner, now)
        return Record(int(now), math.ceil(now + self._ttl_seconds), owner, salvage=salvage)

    def _make(self, instance: uuid.UUID, record: Record) -> None:
        self._require_room()
        with self._draft(instance) as draft:
            self._build(draft, record)
            os.rename(draft, str(instance), src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    @contextmanager
    def _draft(self, instance: uuid.UUID) -> Iterator[str]:
        """The name of an instance on its way in. On an exception nothing of it is left; want of room is a StorageLowError."""
        draft = f".new-{instance}"
        try:
            yield draft
        except OSError as error:
            self._delete(draft)
            if error.errno in _NO_ROOM:
                raise StorageLowError(f"no room: {error.strerror}") from error
            if error.errno in _TAKEN:
                raise InstanceExistsError(str(instance)) from error
            raise
        except LauncherError:
            self._delete(draft)
            raise

    def _remove_replaced(self, replacement: Replacement) -> None:
        self.remove(replacement.other)
        replacement.end(self._descriptor)

    def _finish(self, leftover: str) -> None:
        replacement = Replacement.noted(leftover)
        if replacement is None:
            self._delete(leftover)
        elif replacement.begun(self._descriptor):
            replacement.put_aside(self._descriptor)
            self._remove_replaced(replacement)
        else:
            replacement.end(self._descriptor)

    def _take_up(self, instance: uuid.UUID, record: Record) -> None:
        self._records[instance] = record
        self._caps.add(instance, record.owner, record.expires_at)

    def _forget(self, instance: uuid.UUID) -> None:
        record = self._records.pop(instance, None)
        if record is not None:
            self._caps.discard(instance, record.owner, self._clock())
        self._unclaimed.discard(instance)

    def _compare(self) -> None:
        """Take up what the folder has and we do not know, forget what it has no more. 10,000 names: 9 ms, their records 90 ms."""
        missing = {str(instance): instance for instance in self._records}
        with os.scandir(self._folder) as entries:
            unknown = [entry.name for entry in entries if missing.pop(entry.name, None) is None]
        for instance in missing.values():
            self._forget(instance)
        for name in filter(_is_instance, unknown):
            try:
                self._take_up(uuid.UUID(name), self._read(name))
            except OSError as error:  # the disk's trouble, not the record's: the instance is neither served nor deleted
                log.warning("record of instance=%s not read: %s", name, error)

    def _read(self, name: str) -> Record:
        try:
            descriptor = os.open(f"{name}/{_RECORD_FILE}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._descriptor)
            try:
                value = json.loads(os.read(descriptor, _RECORD_BYTES))
            finally:
                os.close(descriptor)
            if value["v"] != 1:
                return _nobodys()
            owner = bytes.fromhex(value.get("owner", NOBODY.hex()))
            if len(owner) != len(NOBODY):
                return _nobodys()
            times = int(value["created_at"]), int(value["expires_at"])
            return Record(*times, owner, int(value.get("queries", 0)), value.get("salvage") is True)
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return _nobodys()

    def _build(self, name: str, record: Record) -> None:
        os.mkdir(name, 0o700, dir_fd=self._descriptor)
        volume = f"{name}/volume"
        os.mkdir(volume, dir_fd=self._descriptor)
        for file in VOLUME_FILES:
            descriptor = os.open(f"{volume}/{file}", _NEW_FILE, dir_fd=self._descriptor)
            try:
                os.fchmod(descriptor, 0o666)
            finally:
                os.close(descriptor)
        os.chmod(volume, _VOLUME_MODE, dir_fd=self._descriptor)
        self._write_record(f"{name}/{_RECORD_FILE}", record)

    def _replace_record(self, instance: uuid.UUID, record: Record) -> None:
        draft = f"{instance}/.{_RECORD_FILE}"
        self._write_record(draft, record)
        os.rename(draft, f"{instance}/{_RECORD_FILE}", src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def _write_record(self, name: str, record: Record) -> None:
        times = {"created_at": record.created_at, "expires_at": record.expires_at}
        more = {"owner": record.owner.hex(), "queries": record.queries, "salvage": record.salvage}
        text = json.dumps({"v": 1, **times, **more}).encode()
        descriptor = os.open(name, _WRITTEN_FILE, 0o600, dir_fd=self._descriptor)
        try:
            if os.write(descriptor, text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)

    def _delete(self, name: str) -> None:
        """By descriptor from our own folder down: no symbolic link is ever followed."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(name, dir_fd=self._descriptor)


def _is_instance(name: str) -> bool:
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False
