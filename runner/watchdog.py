"""The thread that keeps the deadline when SQLite does not look at the clock.

At the deadline it interrupts SQLite, again and again, because an interrupt that falls between two statements is forgotten. A
single opcode can outlast that: then, after a grace, the watchdog gives the answer itself and ends the process. Whoever holds
`_answer` may write to the reply's descriptor. For a piece of an answer it is let go of again; for the last nobody does, so there is
never more than one end.

The thread is started before the seccomp filter, and from then on needs clocks and futexes alone.
"""

from __future__ import annotations

import threading
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    import apsw

GRACE_SECONDS = 0.25
# A daemon that is killed while it starts a container forgets it, but its shim lives on and holds the stream open: the end never
# comes. Longer than any container waits warm.
LONGEST_WAIT_SECONDS = 3600.0
_REPEAT_SECONDS = 0.01


class Watchdog:
    """Started once, armed once; `give_up` writes what the reply lacks for a `timeout` and ends the process.

    One that is not armed within `longest_wait_seconds` calls `forsake`, which ends the process without a word.
    """

    def __init__(
        self,
        give_up: Callable[[], NoReturn],
        forsake: Callable[[], NoReturn] | None = None,
        longest_wait_seconds: float = LONGEST_WAIT_SECONDS,
    ) -> None:
        self._give_up = give_up
        self._forsake = forsake or give_up
        self._longest_wait_seconds = longest_wait_seconds
        self._armed = threading.Event()
        self._done = threading.Event()
        self._answer = threading.Lock()
        self._guarded = threading.Lock()
        self._connection: apsw.Connection | None = None
        self._deadline = 0.0

    def start(self) -> None:
        """Start the thread; returns when it runs."""
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def arm(self, deadline: float) -> None:
        """Watch from now on; `deadline` is an instant of the monotonic clock."""
        self._deadline = deadline
        self._armed.set()

    def guard(self, connection: apsw.Connection | None) -> None:
        """What is to be interrupted. None, before a connection is closed: interrupting a closed one is undefined."""
        with self._guarded:
            self._connection = connection

    def claim_answer(self) -> None:
        """Take the right to answer. Does not return when the watchdog has it: the process ends first."""
        self._answer.acquire()
        self._done.set()

    def claim_piece(self) -> None:
        """Take the right to write a part of the answer. Does not return when the watchdog has it."""
        self._answer.acquire()

    def release_piece(self) -> None:
        self._answer.release()

    def _run(self) -> None:
        if not self._armed.wait(self._longest_wait_seconds):
            self._forsake()
        if self._done.wait(self._deadline - monotonic()):
            return
        while monotonic() < self._deadline + GRACE_SECONDS:
            with self._guarded:
                if self._connection is not None:
                    self._connection.interrupt()
            if self._done.wait(_REPEAT_SECONDS):
                return
        self._answer.acquire()  # after the piece that is being written; after the last one never
        self._give_up()
