"""What the launcher tells a runner: one JSON object in MAYFLY_RUNNER. Every key is required and no other is known."""

from __future__ import annotations

import json

from .policy import LIMITS, OPTIONAL_LIMITS, PAGE_BYTES

TYPE_CHECKING = False  # the typing module alone would be a fifth of a runner's memory
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_JOURNAL_HEADER_BYTES = 64 * 1024
_JOURNAL_RECORD_BYTES = 8
_REPLY_ENVELOPE_BYTES = 64 * 1024
_MAX_INT = 2**31 - 1

_MINIMUM = {
    "deadline_ms": 1,
    "bulk_deadline_ms": 1,
    "max_request_bytes": 1,
    "max_rows": 1,
    "max_result_bytes": 1,
    "max_stream_bytes": 1,
    "instance_bytes": 1 << 20,
    "heap_bytes": 1 << 20,
    "nofile": 8,
    "min_landlock_abi": 0,
}
_KEYS = frozenset({*_MINIMUM, "sqlite_limits"})


class ConfigurationError(ValueError):
    """MAYFLY_RUNNER is missing or is not of the documented form."""


class Configuration:
    """What was told, and what follows from it, computed once."""

    __slots__ = (*_MINIMUM, "max_pages", "max_reply_bytes", "sqlite_limits")

    deadline_ms: int
    """From the last byte of the request to the first of the reply, or to the last where a reply is many frames."""
    bulk_deadline_ms: int
    """The same, of a bulk run."""
    max_request_bytes: int
    max_rows: int
    max_result_bytes: int
    """Bytes of the rows as JSON."""
    max_stream_bytes: int
    """The same, of rows that come in frames: all of them together."""
    instance_bytes: int
    """Largest size of the database's file, and of its journal."""
    heap_bytes: int
    """SQLite's own memory."""
    nofile: int
    min_landlock_abi: int
    sqlite_limits: Mapping[str, int]
    """By their names without `SQLITE_LIMIT_`."""
    max_pages: int
    """Pages of a full database, such that a journal of all of them still fits under `instance_bytes`.

    Otherwise a full database could not be deleted from, because each page's old content goes to the journal first.
    """
    max_reply_bytes: int

    def __init__(self, values: Mapping[str, int], sqlite_limits: Mapping[str, int]) -> None:
        for name in _MINIMUM:
            setattr(self, name, values[name])
        self.sqlite_limits = sqlite_limits
        self.max_pages = (self.instance_bytes - _JOURNAL_HEADER_BYTES) // (PAGE_BYTES + _JOURNAL_RECORD_BYTES)
        self.max_reply_bytes = 2 * self.max_result_bytes + _REPLY_ENVELOPE_BYTES

    @classmethod
    def parse(cls, text: str | None) -> Configuration:
        """Read the variable's text; raises ConfigurationError naming what is wrong."""
        if text is None:
            raise ConfigurationError("MAYFLY_RUNNER is not set")
        try:
            document = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError):
            raise ConfigurationError("MAYFLY_RUNNER is not a JSON object with distinct keys") from None
        values = _exactly(document, _KEYS, frozenset(), "MAYFLY_RUNNER")
        limits = _exactly(values.pop("sqlite_limits"), LIMITS - OPTIONAL_LIMITS, OPTIONAL_LIMITS, "sqlite_limits")
        for name, value in values.items():
            _integer(name, value, _MINIMUM[name])
        for name, value in limits.items():
            _integer(f"sqlite_limits.{name}", value, 0)
        return cls(values, limits)


class Kind:
    """What a run may do, and for how long."""

    __slots__ = ("bulk", "read_only")

    def __init__(self, read_only: bool = False, bulk: bool = False) -> None:
        self.read_only = read_only
        """It cannot write to the volume."""
        self.bulk = bulk
        """Its time is that for an upload or a whole file."""

    def deadline_ms(self, configuration: Configuration) -> int:
        return configuration.bulk_deadline_ms if self.bulk else configuration.deadline_ms


PLAIN = Kind()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key is repeated")
    return document


def _exactly(document: Any, required: frozenset[str], optional: frozenset[str], where: str) -> dict[str, Any]:
    if type(document) is not dict:
        raise ConfigurationError(f"{where} is not an object")
    if missing := required - document.keys():
        raise ConfigurationError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := document.keys() - required - optional:
        raise ConfigurationError(f"{where} has unknown keys: {', '.join(sorted(unknown))}")
    return document


def _integer(name: str, value: Any, minimum: int) -> None:
    if type(value) is not int or not minimum <= value <= _MAX_INT:
        raise ConfigurationError(f"{name} is not an integer from {minimum} to {_MAX_INT}")
