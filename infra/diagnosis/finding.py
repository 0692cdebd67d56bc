"""What a check answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    """It works; something is weaker, slower or blinder than it need be."""
    FAILURE = "failure"
    """Mayfly does not start so, or must not."""


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    found: str
    remedy: str = ""
    """A command to paste, or two with `&&`; what no command can do in words, after a `#`."""


def ok(found: str) -> Finding:
    return Finding(Level.OK, found)


def warning(found: str, remedy: str) -> Finding:
    return Finding(Level.WARNING, found, remedy)


def failure(found: str, remedy: str) -> Finding:
    return Finding(Level.FAILURE, found, remedy)
