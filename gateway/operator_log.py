"""The operator's log, on stderr: lines of text, or one JSON object a line. Both processes set theirs up here.

A line about a request carries the request's id, given with the call as `extra=about(id)`: web and launcher know it under the same
name. An exception is told as its class and the places it passed, never by its message, which can quote what a tenant sent.
Libraries are heard from WARNING on, whatever the level: below that botocore writes out secrets and urllib3 whole paths.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
from datetime import UTC, datetime
from types import TracebackType

from .settings import Settings

_NO_REQUEST = "0" * 32

_log = logging.getLogger(__name__)


def configure(settings: Settings, process: str) -> None:
    """Once, before anything is logged. `process` is "web" or "launcher"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if settings.log_format == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(__package__).setLevel(settings.log_level)
    logging.captureWarnings(True)
    sys.excepthook = _died
    sys.unraisablehook = _unraisable
    threading.excepthook = _thread_died


def about(request_id: str | bytes) -> dict[str, str] | None:
    """`extra` of a line about a request: 32 hex digits, or the 16 bytes they stand for. Nothing for the id of no request."""
    text = request_id if isinstance(request_id, str) else request_id.hex()
    return None if text == _NO_REQUEST else {"request_id": text}


def last_words(settings: Settings, process: str, words: str) -> None:
    """Why the process ends, in the form of the log; as text it is a plain sentence, for whoever started it by hand."""
    if settings.log_format == "json":
        _log.critical("%s", words)
    else:
        print(f"mayfly {process}: {words}", file=sys.stderr)


def where(error: BaseException) -> str:
    """An exception's class and the places it passed. Its message is left out: it can quote what the tenant sent."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}"


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        line = self.formatMessage(_complete(record, self.formatTime(record)))
        if (request_id := _request_id(record)) is not None:
            line += f" request={request_id}"
        if (error := _error(record)) is not None:
            line += f" exc={error}"
        return line


class _Json(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {
            "timestamp": moment,
            "level": record.levelname,
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
            "request_id": _request_id(record),
            "exc": _error(record),
        }
        # ASCII: whatever a message holds, it neither ends the line nor reaches a terminal as more than text.
        return json.dumps({key: value for key, value in line.items() if value is not None})


def _complete(record: logging.LogRecord, moment: str) -> logging.LogRecord:
    record.message, record.asctime = record.getMessage(), moment
    return record


def _request_id(record: logging.LogRecord) -> str | None:
    return getattr(record, "request_id", None)


def _error(record: logging.LogRecord) -> str | None:
    error = record.exc_info[1] if record.exc_info else None
    return None if error is None else where(error)


# ── what Python itself would print, with messages and source lines


def _died(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _log.critical("the process dies of a defect", exc_info=(kind, error, trace))


def _thread_died(died: threading.ExceptHookArgs) -> None:
    if died.exc_value is not None:
        _log.critical("a thread dies of a defect", exc_info=(died.exc_type, died.exc_value, died.exc_traceback))


def _unraisable(ignored: sys.UnraisableHookArgs) -> None:
    if (error := ignored.exc_value) is not None:
        _log.error("an exception that nobody could be told of", exc_info=(type(error), error, ignored.exc_traceback))
