"""One request from its first byte to the reply's last, and the end of the process that answered it."""

from __future__ import annotations

import json
import os
from enum import IntEnum
from time import monotonic

import apsw

from .database import absent_limits
from .failures import verdict_of
from .frames import NoRequestError, framed, read_frame, read_upload, write_all
from .wire import Operation, Request, Verdict, VerdictError, decode_request, encode_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from .configuration import Configuration
    from .confine import Facts
    from .database import Expired
    from .frames import Outbox

    Asked = Request | Operation
    Run = Callable[[Asked, Expired], bytes | None]
    """Does what was asked: gives the inside of the reply's last frame, or None if there is nothing more to say, or raises."""

IN, OUT = 0, 1
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


class Clock:
    """The deadline of one request."""

    __slots__ = ("deadline", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        """From the request's last byte."""
        self.deadline = monotonic() + seconds
        """An instant of the monotonic clock; until a request has come, as if it had come now."""

    def expired(self) -> bool:
        return monotonic() >= self.deadline


def read_request(configuration: Configuration, clock: Clock) -> Asked | VerdictError:
    """The request with its upload, or why it is none; its last byte starts the clock. Ends the process when none comes."""
    try:
        frame, behind = read_frame(IN, configuration.max_request_bytes)
        clock.deadline = monotonic() + clock.seconds
        request = decode_request(frame)
        if type(request) is Operation and request.upload_bytes:
            _receive_upload(request, behind, configuration.instance_bytes)
            clock.deadline = monotonic() + clock.seconds
        return request
    except NoRequestError:
        os._exit(Exit.NO_REQUEST)
    except Exception as error:  # also MemoryError and RecursionError: there is always an answer
        clock.deadline = monotonic() + clock.seconds
        return verdict_of(error, None, 0)


def _receive_upload(operation: Operation, behind: bytes, max_bytes: int) -> None:
    if operation.upload_bytes > max_bytes:
        raise VerdictError(Verdict.REQUEST_INVALID, f"an upload of {operation.upload_bytes} bytes; {max_bytes} are allowed")
    operation.upload = read_upload(IN, operation.upload_bytes, behind)


def reply_to(request: Asked | VerdictError, run: Run, expired: Expired, outbox: Outbox) -> bytes | None:
    """The inside of the reply's last frame, whatever happens; None if all of it has been sent."""
    try:
        if isinstance(request, VerdictError):
            raise request
        return run(request, expired)
    except Exception as error:
        # Not by a name of its own: the error would hold this frame, and the frame the error.
        return (outbox.ending or encode_error)(verdict_of(error, None, 0))


def answer(payload: bytes | None, code: int) -> NoReturn:
    """Write the last frame and end at once: every change is on the disk already, and the interpreter needs no taking down."""
    try:
        if payload is not None:
            write_all(OUT, framed(payload))
    except OSError:
        os._exit(Exit.NO_READER)
    os._exit(code)


def self_test(configuration: Configuration, facts: Facts, run: Run, expired: Expired, build: dict[str, Any] | None) -> NoReturn:
    """Confined already: write, read and drop a table in the real place, and print one JSON object."""
    try:
        replies = {name: json.loads(run(request, expired) or "null") for name, request in _SELFTEST.items()}
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
    os.write(OUT, json.dumps(facts).encode() + b"\n")
    os._exit(code)


def read_build() -> dict[str, Any] | None:
    """What the image was built from, without what would not fit into a report of 16 KiB or stands in it already."""
    try:
        with open(_BUILD, encoding="utf-8") as file:
            build = json.load(file)
    except FileNotFoundError:
        return None
    return {key: value for key, value in build.items() if key not in ("builder", "compile_options")}
