"""One life of a runner, in order: configuration, confinement, request, SQL, answer, end.

`serve` answers one request; `selftest` takes the same way with a request of its own and prints the facts it found.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from dataclasses import asdict
from enum import IntEnum
from time import monotonic
from typing import Any, NoReturn

import apsw

from .configuration import Configuration, ConfigurationError
from .confine import UnconfinedError, confine
from .database import absent_limits
from .execute import run_request
from .failures import verdict_of
from .watchdog import Watchdog
from .wire import (
    NoRequestError,
    Request,
    Verdict,
    VerdictError,
    decode_request,
    encode_failure,
    read_frame,
    write_frame,
)

_IN, _OUT = 0, 1
_BUILD = "/opt/mayfly/build.json"

_SELFTEST = {
    "write": Request("CREATE TABLE selftest(a); INSERT INTO selftest VALUES (?) RETURNING a; DROP TABLE selftest", [1], False),
}


class Exit(IntEnum):
    """The process's code."""

    ANSWERED = 0
    REFUSED = 1
    """Unconfined; said so."""
    NO_REQUEST = 2
    """The stream ended before a whole request, or none came for very long."""
    NO_READER = 3
    """The reply could not be written."""


def main() -> NoReturn:
    # A write beyond RLIMIT_FSIZE is then an error that SQLite can roll back from.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # One request makes no cycles worth a search, and a search would cost in the middle of it.
    gc.disable()
    # SQLite seeds its generator from /dev/urandom, which Landlock is about to take away; clock and pid would be all it had left.
    apsw.randomness(8)
    modes = {"serve": serve, "selftest": selftest}
    if len(sys.argv) != 2 or sys.argv[1] not in modes:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(modes)}")
    modes[sys.argv[1]]()


def serve() -> NoReturn:
    watchdog = Watchdog(_time_out, _end_unasked)
    try:
        configuration = _configuration()
        confine(configuration, watchdog.start)
    except (ConfigurationError, UnconfinedError) as refusal:
        _answer(encode_failure(Verdict.UNCONFINED, str(refusal)), Exit.REFUSED)
    try:
        frame: bytes | VerdictError = read_frame(_IN, configuration.max_request_bytes)
    except NoRequestError:
        os._exit(Exit.NO_REQUEST)
    except VerdictError as error:
        frame = error
    deadline = monotonic() + configuration.deadline_ms / 1000
    watchdog.arm(deadline)
    reply = _reply(frame, configuration, watchdog, deadline)
    watchdog.claim_answer()
    _answer(reply, Exit.ANSWERED)


def _reply(frame: bytes | VerdictError, configuration: Configuration, watchdog: Watchdog, deadline: float) -> bytes:
    try:
        if isinstance(frame, VerdictError):
            raise frame
        return _run(decode_request(frame), configuration, watchdog, deadline)
    except Exception as error:  # also MemoryError and RecursionError: there is always an answer
        verdict = verdict_of(error, None, 0)
        return encode_failure(verdict.verdict, verdict.message)


def _run(request: Request, configuration: Configuration, watchdog: Watchdog, deadline: float) -> bytes:
    return run_request(request, configuration, lambda: monotonic() >= deadline, watchdog.guard)


def selftest() -> NoReturn:
    """Confine for real, write, read and drop a table in the real place, and print one JSON object."""
    build = _build()
    watchdog = Watchdog(_time_out)
    try:
        configuration = _configuration()
        facts = confine(configuration, watchdog.start)
        deadline = monotonic() + configuration.deadline_ms / 1000
        replies = {name: json.loads(_run(request, configuration, watchdog, deadline)) for name, request in _SELFTEST.items()}
    except (ConfigurationError, UnconfinedError) as refusal:
        _print({"refused": str(refusal)}, Exit.REFUSED)
    except VerdictError as refusal:
        _print({"refused": f"{refusal.verdict}: {refusal.message}"}, Exit.REFUSED)
    except Exception as error:
        _print({"refused": f"{type(error).__name__}: {error}"}, Exit.REFUSED)
    _print(
        {
            "apsw": apsw.apsw_version(),
            "sqlite": apsw.sqlite_lib_version(),
            "compile_options": list(apsw.compile_options),
            "absent_limits": list(absent_limits(configuration)),
            "confinement": asdict(facts),
            "replies": replies,
            "build": build,
        },
        Exit.ANSWERED,
    )


def _build() -> dict[str, Any] | None:
    """What the image was built from, without what would not fit into a report of 16 KiB or stands in it already."""
    try:
        with open(_BUILD, encoding="utf-8") as file:
            build = json.load(file)
    except FileNotFoundError:
        return None
    return {key: value for key, value in build.items() if key not in ("builder", "compile_options")}


def _print(facts: dict[str, Any], code: Exit) -> NoReturn:
    os.write(_OUT, json.dumps(facts).encode() + b"\n")
    os._exit(code)


def _end_unasked() -> NoReturn:
    os._exit(Exit.NO_REQUEST)


def _time_out() -> NoReturn:
    _answer(encode_failure(Verdict.TIMEOUT), Exit.ANSWERED)


def _answer(payload: bytes, code: Exit) -> NoReturn:
    """Write the reply and end at once: every change is on the disk already, and the interpreter needs no taking down."""
    try:
        write_frame(_OUT, payload)
    except OSError:
        os._exit(Exit.NO_READER)
    os._exit(code)


def _configuration() -> Configuration:
    text = os.environ.get("MAYFLY_RUNNER")
    os.environ.clear()
    return Configuration.parse(text)
