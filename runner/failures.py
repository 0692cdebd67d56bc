"""What each exception means to the caller. A closed mapping from classes, result codes and errno, never from words."""

from __future__ import annotations

import errno

import apsw

from .wire import Verdict, VerdictError

_TENANT_ERRORS = (
    apsw.SQLError,
    apsw.ConstraintError,
    apsw.MismatchError,
    apsw.RangeError,
    apsw.AbortError,
    apsw.SchemaChangeError,
    apsw.LockedError,  # a table in use by the same statement; other connections are BusyError
    apsw.TooBigError,
)

_ERRNO = {
    errno.EFBIG: Verdict.STORAGE_FULL,  # RLIMIT_FSIZE
    errno.ENOSPC: Verdict.HOST_FULL,
    errno.EDQUOT: Verdict.HOST_FULL,
    errno.ENOMEM: Verdict.MEMORY_LIMIT,
}


def verdict_of(error: Exception, refused: str | None, system_errno: int, read_only: bool = False) -> VerdictError:
    """The verdict for an exception from SQLite or Python.

    `refused` is what the authorizer refused in the statement, `system_errno` the connection's last, and `read_only` is whether that
    was opened only to be read. FullError is `storage_full` here and NoMemError `memory_limit`; the caller looks closer, because
    both have a second cause that leaves no trace in them.
    """
    if isinstance(error, VerdictError):
        return error
    if refused is not None:  # a refusal reaches us in several classes, depending on what was refused
        return VerdictError(Verdict.FORBIDDEN, refused)
    if isinstance(error, apsw.AuthError):
        return VerdictError(Verdict.FORBIDDEN, str(error))
    if isinstance(error, apsw.InterruptError):
        return VerdictError(Verdict.TIMEOUT)
    if isinstance(error, apsw.FullError):
        return VerdictError(Verdict.STORAGE_FULL)
    if isinstance(error, (apsw.NoMemError, MemoryError)):
        return VerdictError(Verdict.MEMORY_LIMIT)
    if isinstance(error, apsw.IOError):
        if _extended_code(error) == apsw.SQLITE_IOERR_NOMEM:
            return VerdictError(Verdict.MEMORY_LIMIT)
        return VerdictError(_ERRNO.get(system_errno, Verdict.INTERNAL), _name(error))
    if isinstance(error, apsw.CorruptError) and _extended_code(error) == apsw.SQLITE_CORRUPT_VTAB:
        return VerdictError(Verdict.SQL_ERROR, str(error))  # an index that does not fit its content table; the file is whole
    if isinstance(error, apsw.ReadOnlyError):
        if _extended_code(error) == apsw.SQLITE_READONLY_ROLLBACK:
            return VerdictError(Verdict.UNSETTLED)
        if read_only:
            return VerdictError(Verdict.SQL_ERROR, str(error))
    if isinstance(error, (apsw.CorruptError, apsw.NotADBError, apsw.ReadOnlyError)):  # read-only: the header names a newer format
        return VerdictError(Verdict.DAMAGED, str(error))
    if isinstance(error, _TENANT_ERRORS):
        return VerdictError(Verdict.SQL_ERROR, str(error))
    if isinstance(error, UnicodeDecodeError):  # an apsw as released: the image's own hands such text on
        return VerdictError(Verdict.SQL_ERROR, "a text that is not UTF-8 cannot be returned; CAST it AS BLOB")
    if isinstance(error, UnicodeEncodeError):
        return VerdictError(Verdict.ARGS_INVALID, "a text that is not UTF-8 cannot be bound; use $blob and CAST it AS TEXT")
    return VerdictError(Verdict.INTERNAL, _name(error))


def _extended_code(error: Exception) -> int:
    code: int = getattr(error, "extendedresult", 0)  # apsw sets it on every error from SQLite; its type stubs do not say so
    return code


def _name(error: Exception) -> str:
    return type(error).__name__
