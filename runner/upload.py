"""Accept: a database file from outside takes the place of what the volume holds, if it is healthy and this system can serve it.

    refuse     what is no database at all, but a part of one: a write-ahead log, a rollback journal
    write      in place; the journal is emptied first, since no transaction of the old file, and none of the upload's, may be
               rolled back into it
    verify     the file as it lies there; damage is a report, and the file stays for a salvage
    convert    another page size into ours, because the quota counts pages
    open       as every request does, with its switches and limits. What fails here is whole, by `verify`, and beyond a limit

A file that says it is in WAL mode is written in rollback mode (bytes 18 and 19 of its header; what else SQLite does when it leaves
WAL mode is to bring over what stands in the log, and the log is not here). SQLite itself takes it for the same database: without
its -wal it is what the last checkpoint has left. Half of a checkpoint, without the log that has the other half, is damage.

What is as good as ours stays as it is, to the byte: any text encoding, auto-vacuum, reserved bytes, application_id and
user_version, older schema formats, and objects that cannot be used here (virtual tables of modules that are not there, views and
triggers that call what is refused): using them gives SQLite's words, and the rest of the database is not the worse for it.
"""

from __future__ import annotations

import errno
import os

import apsw

from .database import hold, open_database, prepare, watch_the_clock
from .digest import sha256
from .failures import verdict_of
from .frames import write_all
from .policy import PAGE_BYTES
from .verify import read_file, report
from .wire import Verdict, VerdictError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .configuration import Configuration
    from .database import Database, Expired

_PARTS = {
    b"\x37\x7f\x06\x82": "this is a write-ahead log (-wal), not a database",
    b"\x37\x7f\x06\x83": "this is a write-ahead log (-wal), not a database",
    b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7": "this is a rollback journal (-journal), not a database",
}
_MAGIC = b"SQLite format 3\0"
_PAGE_SIZE = slice(16, 18)
_FORMAT_VERSIONS = slice(18, 20)
_ROLLBACK, _WAL = 1, 2
_FULL = {errno.EFBIG: Verdict.STORAGE_FULL, errno.ENOSPC: Verdict.HOST_FULL, errno.EDQUOT: Verdict.HOST_FULL}
_NOT_OF_THE_FILE = frozenset({Verdict.TIMEOUT, Verdict.HOST_FULL, Verdict.UNCONFINED, Verdict.INTERNAL})


def accept(path: str, upload: bytes, configuration: Configuration, expired: Expired) -> dict[str, Any]:
    """Write the upload to `path` and judge it: the reply `accepted`, `file_refused` or `report`, without `v`.

    Path and journal exist. Raises VerdictError for every other verdict. Unless accepted, what is there is for a salvage alone.
    """
    for magic, message in _PARTS.items():
        if upload.startswith(magic):
            return _refused(message)
    converted = []
    if _is_in_wal_mode(upload):
        upload = upload[: _FORMAT_VERSIONS.start] + bytes((_ROLLBACK, _ROLLBACK)) + upload[_FORMAT_VERSIONS.stop :]
        converted.append("journal_mode")
    _write(path, upload)
    found = report(path, configuration, expired)
    if not found["ok"]:
        return {"verdict": Verdict.REPORT.value, "report": found}
    try:
        ours = _fit(path, upload, configuration, expired)
    except VerdictError as error:
        if error.verdict in _NOT_OF_THE_FILE:
            raise
        if error.verdict is Verdict.STORAGE_FULL:
            return _refused(f"it takes more than {configuration.max_pages} pages of {PAGE_BYTES} bytes")
        return _refused(error.message)
    if ours is not upload:
        converted.append("page_size")
    return {"verdict": Verdict.ACCEPTED.value, "size": len(ours), "sha256": sha256(ours), "converted": converted}


def _fit(path: str, upload: bytes, configuration: Configuration, expired: Expired) -> bytes:
    """Make a healthy file one that is served here. Gives what it is then; raises VerdictError where it cannot be one."""
    if upload and _page_bytes(upload) != PAGE_BYTES:
        _convert_pages(path, configuration, expired)
        upload = read_file(path)
    if len(upload) > configuration.max_pages * PAGE_BYTES:
        raise VerdictError(Verdict.STORAGE_FULL)
    _look(path, configuration, expired)
    return upload


def _refused(message: str) -> dict[str, Any]:
    return {"verdict": Verdict.FILE_REFUSED.value, "message": message}


def _is_in_wal_mode(upload: bytes) -> bool:
    versions = upload[_FORMAT_VERSIONS]
    return upload.startswith(_MAGIC) and _WAL in versions and all(version in (_ROLLBACK, _WAL) for version in versions)


def _page_bytes(upload: bytes) -> int:
    """Of a database that was found to be healthy."""
    written = int.from_bytes(upload[_PAGE_SIZE], "big")
    return 1 << 16 if written == 1 else written


def _write(path: str, content: bytes) -> None:
    try:
        _overwrite(f"{path}-journal", b"")
        _overwrite(path, content)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise VerdictError(_FULL[error.errno]) from error


def _overwrite(path: str, content: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        hold(descriptor)
        os.ftruncate(descriptor, 0)
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _convert_pages(path: str, configuration: Configuration, expired: Expired) -> None:
    """VACUUM into pages of ours. The journal is in memory: it can be larger than the quota, and nobody needs a half-done file."""
    database = prepare(configuration, path)
    try:
        database.hold_the_file()
        connection = database.connection
        watch_the_clock(database, expired)
        connection.limit(apsw.SQLITE_LIMIT_ATTACHED, 1)  # VACUUM attaches the copy that it makes
        connection.execute(f"PRAGMA journal_mode=MEMORY; PRAGMA page_size={PAGE_BYTES}; VACUUM").fetchall()
    except apsw.Error as error:
        raise _verdict(database, error) from error
    finally:
        database.close()


def _look(path: str, configuration: Configuration, expired: Expired) -> None:
    """Open it as for a request and read the schema."""
    try:
        database = open_database(configuration, expired, path)
    except apsw.Error as error:
        raise VerdictError(verdict_of(error, None, 0).verdict, str(error)) from error
    try:
        database.connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    except apsw.Error as error:
        raise _verdict(database, error) from error
    finally:
        database.close()


def _verdict(database: Database, error: apsw.Error) -> VerdictError:
    """As for a request, but always with SQLite's words."""
    verdict = verdict_of(error, None, database.connection.system_errno)
    database.close()
    if isinstance(error, apsw.FullError) and database.host_is_full():
        return VerdictError(Verdict.HOST_FULL)
    return VerdictError(verdict.verdict, str(error))
