"""One request from frame to frame, and the end of the process that answered it."""

from __future__ import annotations

import json
import os
from enum import IntEnum

import apsw

from .database import absent_limits
from .failures import verdict_of
from .wire import NoRequestError, Request, VerdictError, decode_request, encode_failure, read_frame, write_frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from .configuration import Configuration
    from .confine import Facts
    from .database import Expired

    Run = Callable[[Request, Expired], bytes]
    """Executes a request: gives the inside of the `ok` reply, or raises."""

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


def read_request(max_bytes: int) -> bytes | VerdictError:
    """The inside of the request's frame, or why it is none. Ends the process when none comes."""
    try:
        return read_frame(_IN, max_bytes)
    except NoRequestError:
        os._exit(Exit.NO_REQUEST)
    except VerdictError as error:
        return error


def reply_to(frame: bytes | VerdictError, run: Run, expired: Expired) -> bytes:
    """The inside of the reply's frame, whatever happens."""
    try:
        if isinstance(frame, bytes):
            return run(decode_request(frame), expired)
        raise frame
    except Exception as error:  # also MemoryError and RecursionError: there is always an answer
        verdict = verdict_of(error, None, 0)
        return encode_failure(verdict.verdict, verdict.message)


def answer(payload: bytes, code: int) -> NoReturn:
    """Write the reply and end at once: every change is on the disk already, and the interpreter needs no taking down."""
    try:
        write_frame(_OUT, payload)
    except OSError:
        os._exit(Exit.NO_READER)
    os._exit(code)


def self_test(configuration: Configuration, facts: Facts, run: Run, expired: Expired, build: dict[str, Any] | None) -> NoReturn:
    """Confined already: write, read and drop a table in the real place, and print one JSON object."""
    try:
        replies = {name: json.loads(run(request, expired)) for name, request in _SELFTEST.items()}
    except VerdictError as refusal:
        refuse_self_test(f"{refusal.verdict}: {refusal.message}")
    except Exception as error:
        refuse_self_test(f"{type(error).__name__}: {error}")
    _print(
        {
            "apsw": apsw.apsw_version(),
            "sqlite": apsw.sqlite_lib_version(),
            "compile_options": list(apsw.compile_options),
            "absent_limits": list(absent_limits(configuration)),
            "confinement": facts.as_json(),
            "replies": replies,
            "build": build,
        },
        Exit.ANSWERED,
    )


def refuse_self_test(reason: str) -> NoReturn:
    _print({"refused": reason}, Exit.REFUSED)


def _print(facts: dict[str, Any], code: Exit) -> NoReturn:
    os.write(_OUT, json.dumps(facts).encode() + b"\n")
    os._exit(code)


def read_build() -> dict[str, Any] | None:
    """What the image was built from, without what would not fit into a report of 16 KiB or stands in it already."""
    try:
        with open(_BUILD, encoding="utf-8") as file:
            build = json.load(file)
    except FileNotFoundError:
        return None
    return {key: value for key, value in build.items() if key not in ("builder", "compile_options")}
