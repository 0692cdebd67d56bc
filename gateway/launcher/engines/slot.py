"""One slot, as the launcher sees it: a zygote behind two sockets, and the run that it serves. docs/wire.md has the packets.

A zygote can be taken over by what it runs, so whatever it says is hostile input: a packet that is not exactly the one that is due
condemns the slot, and its container is removed. Nothing it says can touch another slot.

This is on the way of every request. A run costs two sends and one receive, no timer, no task and no registration with the loop:
deadlines and hang-ups are looked after by the engine's tick.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
from collections.abc import Callable

from ...protocol import Verdict
from ..specification import Command

WORK, READY, REFUSED, RUN, KILL, ENDED = range(1, 7)
MAX_TEXT_BYTES = 32 << 10

HEADER = struct.Struct("!BBHI")
REPORT = struct.Struct("!BBHIi")
_DESCRIPTORS = struct.Struct("2i")
_COMMANDS: dict[Command, int] = {"serve": 0, "selftest": 1, "serve-read": 2, "serve-bulk": 4, "serve-bulk-read": 6}
_KILLED_FOR_MEMORY = 1
_KILL_PATIENCE_SECONDS = 5.0  # from KILL to ENDED; a child that waits for a slow disk dies when the disk has answered


class MalformedPacketError(ValueError):
    """A zygote said something that is not due, or not of the documented form."""


class Run:
    """One run on its way. `end` is done when `verdict` is known, or when the slot is lost and none will come."""

    __slots__ = ("caller", "end", "give_up_at", "hung_up", "kill_at", "killed_as", "verdict")

    def __init__(self, caller: socket.socket, end: asyncio.Future[None]) -> None:
        self.caller = caller
        self.end = end
        self.verdict: Verdict | None = None
        self.killed_as: Verdict | None = None
        self.hung_up = False
        self.kill_at = 0.0
        self.give_up_at = 0.0

    def finish(self, verdict: Verdict | None) -> None:
        self.verdict = verdict
        if not self.end.done():
            self.end.set_result(None)


class Slot:
    """Idle while `run` is None; then busy. Condemned for good by whatever breaks the protocol, and by `retire`.

    `freed` is called when a run has ended and the slot can take the next one, `worn` before that from the run on that makes `wear`
    of them; `gone` once, when the slot is condemned and its sockets are closed.
    """

    __slots__ = (
        "_control",
        "_freed",
        "_gone",
        "_loop",
        "_retired",
        "_wear",
        "_work",
        "_worn",
        "condemned",
        "name",
        "ready_at",
        "removed",
        "run",
        "runs",
    )

    def __init__(
        self,
        name: str,
        control: socket.socket,
        work: socket.socket,
        wear: int,
        *,
        freed: Callable[[Slot], None],
        worn: Callable[[], None],
        gone: Callable[[Slot, str], None],
    ) -> None:
        self.name = name
        self.runs = 0
        self.run: Run | None = None
        self.condemned = False
        self.removed: asyncio.Future[bool] | None = None
        """Once condemned: whether the first attempt at removing the container succeeded."""
        self._control = control
        self._work = work
        self._wear = wear
        self._freed = freed
        self._worn = worn
        self._gone = gone
        self._retired = False
        self._loop = asyncio.get_running_loop()
        self.ready_at = self._loop.time()
        self._loop.add_reader(control, self._readable)

    def hand_over(self, run: Run, mount: int, command: Command, kill_after_seconds: float) -> bool:
        """Give the waiting child its run; false, and nothing has happened, if the slot turns out to be dead."""
        if self.condemned:
            return False
        descriptors = _DESCRIPTORS.pack(run.caller.fileno(), mount)
        packet = HEADER.pack(RUN, _COMMANDS[command], 0, self.runs + 1)
        try:
            run.caller.setblocking(True)  # the flag is the open file's, and the child waits in a read
            self._work.sendmsg((packet,), ((socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors),))
        except OSError as error:  # a full queue too: it holds one packet at most, unless somebody else fills it
            self.condemn(f"takes no run: {error}")
            return False
        self.runs += 1
        run.kill_at = self._loop.time() + kill_after_seconds
        self.run = run
        return True

    def kill(self, run: Run, verdict: Verdict) -> None:
        """End it for the reason `verdict`; the first reason stands. Nothing happens if it has ended: the next one may be here."""
        if self.run is not run or run.killed_as is not None:
            return
        run.killed_as = verdict
        run.give_up_at = self._loop.time() + _KILL_PATIENCE_SECONDS
        try:
            self._control.send(HEADER.pack(KILL, 0, 0, self.runs))
        except OSError as error:
            self.condemn(f"takes no order: {error}")

    def look(self, now: float) -> None:
        """Kill what has had its time, or what nobody waits for; give up on what does not die."""
        run = self.run
        if run is None:
            return
        if run.killed_as is not None:
            if now >= run.give_up_at:
                self.condemn("does not end its run")
        elif now >= run.kill_at:
            self.kill(run, Verdict.DEADLINE)
        elif run.hung_up:
            self.kill(run, Verdict.CANCELLED)

    def retire(self) -> None:
        """Take no more runs; the one at hand goes on to its end."""
        self._retired = True
        if self.run is None:
            self.condemn("has served its time")

    def condemn(self, why: str) -> None:
        """Close everything. The zygote ends with its control; the run at hand, if there is one, is lost."""
        if self.condemned:
            return
        self.condemned = True
        self._loop.remove_reader(self._control)
        self._control.close()
        self._work.close()
        run, self.run = self.run, None
        self._gone(self, why)
        if run is not None:
            run.finish(None)

    def _readable(self) -> None:
        try:
            packet = self._control.recv(REPORT.size + 1)
        except BlockingIOError:
            return
        except OSError as error:
            self.condemn(f"is out of reach: {error}")
            return
        if not packet:
            self.condemn("has no zygote any more")
            return
        run = self.run
        try:
            verdict = self._verdict(packet, run)
        except MalformedPacketError as error:
            self.condemn(f"broke the protocol: {error}")
            return
        self.run = None
        if run is not None:
            run.finish(verdict)
        if self._retired:
            self.condemn("has served its time")
            return
        if self.runs >= self._wear:
            self._worn()
        self._freed(self)

    def _verdict(self, packet: bytes, run: Run | None) -> Verdict:
        if len(packet) != REPORT.size:
            raise MalformedPacketError(f"{len(packet)} bytes")
        kind, flags, reserved, ordinal, status = REPORT.unpack(packet)
        if run is None or kind != ENDED or ordinal != self.runs or reserved or flags & ~_KILLED_FOR_MEMORY:
            raise MalformedPacketError(f"not the packet that is due: {packet.hex()}")
        if os.WIFEXITED(status):
            return Verdict.EXITED
        if not os.WIFSIGNALED(status):
            raise MalformedPacketError(f"no process ends with status {status}")
        if os.WTERMSIG(status) != signal.SIGKILL:
            return Verdict.SIGNALLED
        if flags & _KILLED_FOR_MEMORY:
            return Verdict.OUT_OF_MEMORY
        return run.killed_as or Verdict.SIGNALLED
