"""`mayfly verify FILE`, `mayfly salvage FILE`: arguments, exit codes, and the report as JSON on stdout."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..launcher.__main__ import read_seccomp_profile
from ..launcher.errors import RefusedError
from ..launcher.specification import command_specification
from ..settings import Settings, SettingsError
from ..web.runner import Report
from . import files
from .dialogue import Answer, Kind, converse
from .errors import BeyondLimitsError, CommandError, FileError, SandboxError
from .sandbox import sandbox

_HEALTHY, _DAMAGED, _USAGE, _LOST = 0, 1, 2, 3
_INTERRUPTED = 130  # what a shell says of a program that SIGINT ended

_ABOUT = """Looks into a SQLite file that may be damaged or hostile. Its bytes go into a sealed container and are opened there;
FILE is never changed. The report is JSON on stdout, messages are on stderr. MAYFLY_* variables hold as for the service."""

CODES = {
    _HEALTHY: "verify: nothing was found; salvage: all of it is in OUT",
    _DAMAGED: "verify: damaged; salvage: OUT is written, with losses that the report names",
    _USAGE: "wrong arguments or `MAYFLY_*` variables",
    _LOST: "salvage: nothing could be recovered, OUT is not written",
    FileError.code: "FILE cannot be read or is too large, or OUT or the report cannot be written",
    SandboxError.code: "no sealed container, or an answer that is not to be trusted",
    BeyondLimitsError.code: "the runner's time, memory or room was not enough for this file",
    _INTERRUPTED: "interrupted; the container is gone",
}
"""Every exit code and its meaning; docs/operations.md has the same."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    chosen = _parser().parse_args(arguments)
    kind: Kind = chosen.command
    source: Path = chosen.file
    try:
        settings = Settings.from_environment()
        if kind == "verify":
            answer = _ask(settings, kind, source)
        else:
            out: Path = chosen.out or source.with_name(f"{source.name}.salvaged")
            files.check_place(out, source, replace=chosen.force)
            answer = _ask(settings, kind, source)
            if answer.recovered is not None:
                files.write(out, answer.recovered, replace=chosen.force)
                _say(f"recovered into {out}")
    except SettingsError as error:
        _say(str(error))
        return _USAGE
    except CommandError as error:
        _say(str(error))
        return error.code
    except (KeyboardInterrupt, asyncio.CancelledError):
        _say("interrupted")
        return _INTERRUPTED
    return _code(kind, answer.report) if _print(answer.report) else FileError.code


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    codes = "\n".join(["exit codes:", *(f"  {code:>3}  {meaning}" for code, meaning in CODES.items())])
    parser = argparse.ArgumentParser("mayfly", description=_ABOUT, epilog=codes, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True, metavar="verify|salvage")
    verify = commands.add_parser("verify", help="say what is wrong with FILE", epilog=codes, formatter_class=form)
    salvage = commands.add_parser("salvage", help="write what can be read of FILE into OUT", epilog=codes, formatter_class=form)
    for command in (verify, salvage):
        command.add_argument("file", type=Path, metavar="FILE", help="of MAYFLY_INSTANCE_BYTES at most")
    salvage.add_argument("-o", "--out", type=Path, metavar="OUT", help="default: FILE.salvaged")
    salvage.add_argument("-f", "--force", action="store_true", help="replace OUT if it exists")
    return parser


def _ask(settings: Settings, kind: Kind, source: Path) -> Answer:
    content = files.read(source, settings.instance_bytes)
    for neighbour in files.unread_neighbours(source):
        _say(f"{neighbour} is not looked at; what stands there alone is missing")
    return asyncio.run(_ask_a_container(settings, kind, content))


async def _ask_a_container(settings: Settings, kind: Kind, content: bytes) -> Answer:
    """Cancelled by SIGINT, which is asyncio.run()'s work, and by SIGTERM."""
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        specification = command_specification(settings, read_seccomp_profile())
    except RefusedError as error:
        raise SandboxError(str(error)) from error
    async with sandbox(settings, specification) as container:
        try:
            async with asyncio.timeout(settings.start_timeout_seconds + settings.bulk_deadline_seconds + settings.grace_seconds):
                return await converse(container, kind, content, settings)
        except TimeoutError as error:
            raise BeyondLimitsError("no answer in time; the container was killed") from error


def _print(report: Report) -> bool:
    """Whether it could be written."""
    # ASCII alone: names out of a hostile file could be orders to a terminal.
    text = json.dumps(msgspec.to_builtins(report), indent=2 if sys.stdout.isatty() else None)
    try:
        print(text, flush=True)
    except OSError as error:
        _say(f"cannot write the report: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the interpreter's own last attempt goes
        return False
    return True


def _code(kind: Kind, report: Report) -> int:
    if kind == "verify":
        return _HEALTHY if report.ok else _DAMAGED
    if not report.ok:
        return _LOST
    known_whole = all(not table.lost and table.lost_is_exact for table in report.tables)
    return _HEALTHY if known_whole and not report.unassigned and not report.objects_lost else _DAMAGED


def _say(text: str) -> None:
    print(f"mayfly: {text}", file=sys.stderr)


def run() -> None:
    """The console script."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = SandboxError.code  # Python's own, 1, is a verdict here
    sys.exit(code)


if __name__ == "__main__":
    run()
