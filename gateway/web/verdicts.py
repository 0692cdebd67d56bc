"""What a run's end means to the caller: the runner's verdict if it gave one, the launcher's if it did not."""

from __future__ import annotations

import re

from ..protocol import Verdict
from .errors import (
    ApiError,
    DatabaseDamagedError,
    EngineUnavailableError,
    FileRefusedError,
    ForbiddenSqlError,
    HostStorageLowError,
    ImportInvalidError,
    InternalError,
    InvalidArgsError,
    InvalidSqlError,
    MemoryLimitError,
    QueryTimeoutError,
    RunnerFailedError,
    StorageLimitError,
    TooComplexError,
)
from .runner import (
    ArgsInvalid,
    Damaged,
    Failing,
    Failure,
    FileRefused,
    Forbidden,
    HostFull,
    ImportInvalid,
    Internal,
    MemoryLimit,
    Ok,
    RequestInvalid,
    SqlError,
    StepFailed,
    StorageFull,
    Timeout,
    TooComplex,
    Unconfined,
)

_TOO_COMPLEX = "statement too complex"
_CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)


def rows_or_raise(reply: Ok | Failure) -> Ok:
    """The rows of a reply that has some; every other verdict is raised as the error it stands for."""
    if isinstance(reply, Ok):
        return reply
    raise error_of(reply)


def error_of(reply: Failing) -> ApiError:
    """The error that a verdict by which nothing was done stands for."""
    match reply:
        case SqlError(message=message):
            return InvalidSqlError(message)
        case Forbidden(message=message):
            return ForbiddenSqlError(message)
        case ArgsInvalid(message=message):
            return InvalidArgsError(hint=message)
        case TooComplex(message=message):
            detail = message.removeprefix(_TOO_COMPLEX).removeprefix(": ")
            return TooComplexError(f": {detail}" if detail else "")
        case Timeout():
            return QueryTimeoutError()
        case StorageFull():
            return StorageLimitError()
        case HostFull():
            return HostStorageLowError(reason="the runner found no room on the host's disk")
        case MemoryLimit():
            return MemoryLimitError()
        case Damaged():
            return DatabaseDamagedError()
        case ImportInvalid(line=line, message=message):
            return ImportInvalidError(message, extra={"line": line})
        case FileRefused(message=message):
            return FileRefusedError(message)
        case StepFailed(step=step, failure=failure):
            error = error_of(failure)
            error.extra["statement"] = step
            return error
        case Unconfined(message=message):
            # Nothing of the tenant's was read when an honest runner says this; a hostile one gets one short, escaped line.
            return InternalError(reason=f"runner unconfined: {message[:200]!a}")
        case RequestInvalid(message=message) | Internal(message=message):
            return InternalError(reason=f"runner verdict {type(reply).__name__}: {_class_name(message)}")
        case _:
            return InternalError(reason=f"runner verdict {type(reply).__name__} out of place")


def error_without_reply(verdict: Verdict) -> ApiError:
    """The error for a container that ended without a byte of reply."""
    match verdict:
        case Verdict.DEADLINE:
            return QueryTimeoutError()
        case Verdict.OUT_OF_MEMORY:
            return MemoryLimitError()
        case Verdict.LOST:
            return EngineUnavailableError(reason="the engine lost sight of the container")
        case _:
            return RunnerFailedError(reason=f"no reply, container {verdict.name}")


def _class_name(message: str) -> str:
    """An exception's class name is the operator's to see; anything else could be the tenant's text."""
    return message if _CLASS_NAME.fullmatch(message) else "(withheld)"
