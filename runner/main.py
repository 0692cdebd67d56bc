"""One life of a runner, in order: configuration, confinement, request, SQL, answer, end.

`serve` and its variants answer one request, `file` one of the command `mayfly`; `selftest` takes the same way with requests of its
own and prints the facts it found; `zygote` stays and has a child of its own serve each request.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from functools import partial

import apsw

from .answer import OUT, Clock, Exit, answer, read_build, read_request, refuse_self_test, reply_to, self_test
from .configuration import PLAIN, Configuration, ConfigurationError, Kind
from .confine import FILES, UnconfinedError, confine
from .database import PATH
from .execute import run_request
from .frames import Outbox
from .operations import perform, perform_on_a_foreign_file
from .watchdog import Watchdog
from .wire import Operation, Verdict, VerdictError, encode_error, encode_failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from .answer import Asked
    from .database import Expired
    from .execute import Watch

    Do = Callable[[Asked, Configuration, Expired, Watch, Outbox, Kind], bytes | None]


def main() -> NoReturn:
    # A write beyond RLIMIT_FSIZE is then an error that SQLite can roll back from.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # One request makes no cycles worth a search, and a search would cost in the middle of it.
    gc.disable()
    modes: dict[str, Callable[[], NoReturn]] = {
        "serve": serve,
        "serve-read": partial(serve, Kind(read_only=True)),
        "serve-bulk": partial(serve, Kind(bulk=True)),
        "serve-bulk-read": partial(serve, Kind(read_only=True, bulk=True)),
        "file": serve_a_foreign_file,
        "selftest": selftest,
        "zygote": zygote,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in modes:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(modes)}")
    modes[sys.argv[1]]()


def do_on_the_volume(
    asked: Asked, configuration: Configuration, expired: Expired, watch: Watch, outbox: Outbox, kind: Kind
) -> bytes | None:
    if isinstance(asked, Operation):
        return perform(asked, configuration, expired, watch, outbox, PATH, kind.read_only)
    return run_request(asked, configuration, expired, watch, PATH, kind.read_only)


def do_on_a_foreign_file(
    asked: Asked, configuration: Configuration, expired: Expired, watch: Watch, outbox: Outbox, kind: Kind
) -> bytes | None:
    if isinstance(asked, Operation):
        return perform_on_a_foreign_file(asked, configuration, expired, outbox)
    raise VerdictError(Verdict.REQUEST_INVALID, "no SQL is run on a foreign file")


def serve(kind: Kind = PLAIN, do: Do = do_on_the_volume) -> NoReturn:
    seed_sqlite()
    watchdog = Watchdog(lambda: _time_out(outbox), _end_unasked)
    outbox = Outbox(OUT, watchdog.claim_piece, watchdog.release_piece)
    try:
        configuration = read_configuration()
        confine(configuration, watchdog.start, kind)
    except (ConfigurationError, UnconfinedError) as refusal:
        answer(encode_failure(Verdict.UNCONFINED, str(refusal)), Exit.REFUSED)
    clock = Clock(kind.deadline_ms(configuration) / 1000)
    request = read_request(configuration, clock)
    watchdog.arm(clock.deadline)

    def run(asked: Asked, expired: Expired) -> bytes | None:
        return do(asked, configuration, expired, watchdog.guard, outbox, kind)

    reply = reply_to(request, run, clock.expired, outbox)
    watchdog.claim_answer()
    answer(reply, Exit.ANSWERED)


def serve_a_foreign_file() -> NoReturn:
    """For the command `mayfly`: the volume is memory, and empty."""
    for path in FILES:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    serve(Kind(bulk=True), do_on_a_foreign_file)


def selftest() -> NoReturn:
    """Confine for real, in the real place."""
    seed_sqlite()
    build = read_build()
    outbox = Outbox(OUT)
    watchdog = Watchdog(lambda: _time_out(outbox))
    try:
        configuration = read_configuration()
        facts = confine(configuration, watchdog.start)
    except (ConfigurationError, UnconfinedError) as refusal:
        refuse_self_test(str(refusal))
    clock = Clock(configuration.deadline_ms / 1000)

    def run(asked: Asked, expired: Expired) -> bytes | None:
        return do_on_the_volume(asked, configuration, expired, watchdog.guard, outbox, PLAIN)

    self_test(configuration, facts, run, clock.expired, build)


def zygote() -> NoReturn:
    # What it needs beyond a runner is of no use to one that serves alone.
    from .zygote import live

    live(read_configuration())


def seed_sqlite() -> None:
    """SQLite's generator needs /dev/urandom, which Landlock is about to take away; clock and pid would be all it had left."""
    apsw.randomness(8)


def _end_unasked() -> NoReturn:
    os._exit(Exit.NO_REQUEST)


def _time_out(outbox: Outbox) -> NoReturn:
    failure = VerdictError(Verdict.TIMEOUT)
    answer(encode_error(failure) if outbox.ending is None else outbox.ending(failure), Exit.ANSWERED)


def read_configuration() -> Configuration:
    """MAYFLY_RUNNER; nothing is left of the environment. Raises ConfigurationError."""
    text = os.environ.get("MAYFLY_RUNNER")
    os.environ.clear()
    return Configuration.parse(text)
