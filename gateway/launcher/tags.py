"""Which runs of an instance must not be had twice: their tags, 16 opaque bytes each, in the order in which the runs began.

    <instances>/<uuid>/tags     outside the mount, as long as the instance lives; an entry at the end that is cut short is none

A tag is on the disk before its run begins, as surely as a commit of the run's own, so at worst a run is taken for begun that never
was. Nothing is kept in memory: the whole file, 160 KB at most, is looked through in 20 µs. The caller holds the instance's lease.
"""

from __future__ import annotations

import errno
import os
import uuid
from contextlib import suppress

from .errors import QuotaError, RepeatedError

MOST = 10_000
"""Tags of one instance."""
_BYTES = 16
_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


def begin(folder: int, instance: uuid.UUID, tag: bytes) -> None:
    """Raises RepeatedError if it is known, QuotaError if there are too many, OSError if it cannot be kept."""
    descriptor = os.open(_path(instance), _FILE | os.O_CREAT, 0o600, dir_fd=folder)
    try:
        known = _read(descriptor)
        if _holds(known, tag):
            raise RepeatedError("a run with this tag was begun before")
        if len(known) >= MOST * _BYTES:
            raise QuotaError(f"{MOST} runs that must not be had twice")
        try:
            if os.pwrite(descriptor, tag, len(known)) != _BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fdatasync(descriptor)
        except OSError:
            os.ftruncate(descriptor, len(known))
            raise
    finally:
        os.close(descriptor)


def take_back(folder: int, instance: uuid.UUID, tag: bytes) -> None:
    """The run that was begun last has not run."""
    with suppress(FileNotFoundError):  # somebody has deleted the instance by hand
        descriptor = os.open(_path(instance), _FILE, dir_fd=folder)
        try:
            known = _read(descriptor)
            if known.endswith(tag):
                os.ftruncate(descriptor, len(known) - _BYTES)
        finally:
            os.close(descriptor)


def _path(instance: uuid.UUID) -> str:
    return f"{instance}/tags"


def _read(descriptor: int) -> bytes:
    known = os.pread(descriptor, MOST * _BYTES, 0)
    return known[: len(known) - len(known) % _BYTES]


def _holds(known: bytes, tag: bytes) -> bool:
    at = known.find(tag)
    while at % _BYTES and at != -1:  # across two of them it is none
        at = known.find(tag, at + 1)
    return at != -1
