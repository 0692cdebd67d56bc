"""FILE in, as bytes and nothing else; OUT out, whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from .errors import FileError


def read(path: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file. Raises FileError."""
    try:
        # A pipe without a writer would hold us here for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileError(f"{path} is not a regular file")
            content = file.read(most_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise FileError(f"cannot read {path}: {_reason(error)}") from error
    if len(content) > most_bytes:
        raise FileError(f"{path} is larger than MAYFLY_INSTANCE_BYTES, {most_bytes} bytes")
    return content


def unread_neighbours(path: Path) -> list[Path]:
    """What SQLite itself would have looked at too: a journal or write-ahead log beside the file."""
    beside = [path.with_name(f"{path.name}{suffix}") for suffix in ("-journal", "-wal")]
    return [file for file in beside if file.is_file() and file.stat().st_size]


def check_place(out: Path, source: Path, *, replace: bool) -> None:
    """Before anything is started; raises FileError unless `out` can be put there."""
    if out.exists() and out.samefile(source):
        raise FileError(f"{out} is the file that is to be salvaged, and that one is never touched")
    if os.path.lexists(out) and not replace:
        raise FileError(f"{out} exists; --force replaces it")
    if not out.parent.is_dir():
        raise FileError(f"{out.parent} is not a folder")


def write(out: Path, content: bytes, *, replace: bool) -> None:
    """Durable when it returns, and at no moment half there. Raises FileError."""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            if replace:
                os.replace(temporary, out)
            else:
                os.link(temporary, out)  # fails where something has appeared meanwhile
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        _sync_folder(out.parent)
    except OSError as error:
        raise FileError(f"cannot write {out}: {_reason(error)}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
