"""One life of a runner, in order: configuration, confinement, request, SQL, answer, end.

`serve` answers one request; `selftest` takes the same way with a request of its own and prints the facts it found; `zygote` stays
and has a child of its own serve each request.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from functools import partial
from time import monotonic

import apsw

from .answer import Exit, answer, read_build, read_request, refuse_self_test, reply_to, self_test
from .configuration import Configuration, ConfigurationError
from .confine import UnconfinedError, confine
from .execute import run_request
from .wire import Verdict, encode_failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from .watchdog import Watchdog
    from .wire import Request


def main() -> NoReturn:
    # A write beyond RLIMIT_FSIZE is then an error that SQLite can roll back from.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # One request makes no cycles worth a search, and a search would cost in the middle of it.
    gc.disable()
    modes = {"serve": serve, "selftest": selftest, "zygote": zygote}
    if len(sys.argv) != 2 or sys.argv[1] not in modes:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(modes)}")
    modes[sys.argv[1]]()


def serve() -> NoReturn:
    seed_sqlite()
    watchdog = watchdog_for(_time_out, _end_unasked)
    try:
        configuration = read_configuration()
        confine(configuration, watchdog.start)
    except (ConfigurationError, UnconfinedError) as refusal:
        answer(encode_failure(Verdict.UNCONFINED, str(refusal)), Exit.REFUSED)
    frame = read_request(configuration.max_request_bytes)
    deadline = monotonic() + configuration.deadline_ms / 1000
    watchdog.arm(deadline)
    reply = reply_to(frame, partial(_run, configuration, watchdog), lambda: monotonic() >= deadline)
    watchdog.claim_answer()
    answer(reply, Exit.ANSWERED)


def selftest() -> NoReturn:
    """Confine for real, in the real place."""
    seed_sqlite()
    build = read_build()
    watchdog = watchdog_for(_time_out)
    try:
        configuration = read_configuration()
        facts = confine(configuration, watchdog.start)
    except (ConfigurationError, UnconfinedError) as refusal:
        refuse_self_test(str(refusal))
    deadline = monotonic() + configuration.deadline_ms / 1000
    self_test(configuration, facts, partial(_run, configuration, watchdog), lambda: monotonic() >= deadline, build)


def _run(configuration: Configuration, watchdog: Watchdog, request: Request, expired: Callable[[], bool]) -> bytes:
    return run_request(request, configuration, expired, watchdog.guard)


def watchdog_for(give_up: Callable[[], NoReturn], forsake: Callable[[], NoReturn] | None = None) -> Watchdog:
    # A zygote has none, and every module that it has is copied for each child.
    from .watchdog import Watchdog

    return Watchdog(give_up, forsake)


def zygote() -> NoReturn:
    # What it needs beyond a runner is of no use to one that serves alone.
    from .zygote import live

    live(read_configuration())


def seed_sqlite() -> None:
    """SQLite's generator needs /dev/urandom, which Landlock is about to take away; clock and pid would be all it had left."""
    apsw.randomness(8)


def _end_unasked() -> NoReturn:
    os._exit(Exit.NO_REQUEST)


def _time_out() -> NoReturn:
    answer(encode_failure(Verdict.TIMEOUT), Exit.ANSWERED)


def read_configuration() -> Configuration:
    """MAYFLY_RUNNER; nothing is left of the environment. Raises ConfigurationError."""
    text = os.environ.get("MAYFLY_RUNNER")
    os.environ.clear()
    return Configuration.parse(text)
