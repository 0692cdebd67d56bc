"""The command's errors: one tree, each with the exit code that it ends in."""

from __future__ import annotations

from typing import ClassVar


class CommandError(Exception):
    """Root of everything the command raises itself. The text is for the operator."""

    code: ClassVar[int]


class FileError(CommandError):
    """FILE cannot be read or is too large, or OUT cannot be written."""

    code = 4


class SandboxError(CommandError):
    """There is no sealed container, or what it says is not of the documented form."""

    code = 5


class BeyondLimitsError(CommandError):
    """The runner's time, memory or room was not enough for this file."""

    code = 6
