"""So many slots at any time: started, greeted, replaced when they die or have served long enough, removed.

Starting one takes as long as any container, so a slot that is worn is replaced by one that is ready already, one at a time. Whoever
runs requests sees slots come (`freed`) and go (`lost`), hears when none is to be expected (`hopeless`), and sees nothing of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ...settings import Settings
from ..errors import EngineDownError, EngineError, LauncherError, RefusedError
from ..specification import RUNNER_UID
from . import host
from .completion import to_the_end
from .slot import HEADER, MAX_TEXT_BYTES, READY, REFUSED, WORK, Slot
from .slot_containers import SlotContainers
from .starts import cores

log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("3i")
_DESCRIPTOR = struct.Struct("i")
_PAUSE_SECONDS = (1.0, 30.0)  # after a slot that never served: the first, and, doubled each time, the longest
_LOOK_AGAIN_SECONDS = 1.0
_RETRY_SECONDS = (0.2, 5.0)  # likewise between attempts to remove what an unreachable daemon still has
_MAX_WORDS = 500


@dataclass(frozen=True, slots=True)
class _Removal:
    """`tried` is done after the first attempt, and says whether it was the last."""

    task: asyncio.Task[None]
    tried: asyncio.Future[bool]


class _Place:
    """Where one slot stands, and the next one after it."""

    __slots__ = ("_pause", "_resting_until", "changed", "lock", "slot", "trouble")

    def __init__(self) -> None:
        self.slot: Slot | None = None
        self.trouble: str | None = None
        """Why the last attempt to start a slot failed; None while there is one, or one can be expected."""
        self.changed = asyncio.Event()
        self.lock = asyncio.Lock()
        self._pause = _PAUSE_SECONDS[0]
        self._resting_until = 0.0

    @property
    def filled(self) -> bool:
        return self.slot is not None and not self.slot.condemned

    def rest(self, why: str) -> None:
        """A pause after each slot that came to nothing: an image whose zygotes die must not cost a start after the other."""
        log.warning("no new slot for %.1f s: %s", self._pause, why)
        self.trouble = why
        self._resting_until = asyncio.get_running_loop().time() + self._pause
        self._pause = min(2 * self._pause, _PAUSE_SECONDS[1])

    def require_rested(self) -> None:
        """Raises EngineDownError during the pause."""
        if self.rest_left() > 0:
            raise EngineDownError(f"no slot: {self.trouble}")

    def rest_left(self) -> float:
        return self._resting_until - asyncio.get_running_loop().time()

    def served(self) -> None:
        self._pause = _PAUSE_SECONDS[0]


class Slots:
    def __init__(
        self,
        settings: Settings,
        containers: SlotContainers,
        *,
        freed: Callable[[Slot], None],
        lost: Callable[[Slot], None],
        hopeless: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._containers = containers
        self._folder = settings.state_dir / "launcher" / "slots"
        self._freed = freed
        self._lost = lost
        self._hopeless = hopeless
        self._places = [_Place() for _ in range(settings.slots)]
        self._turns = asyncio.Semaphore(cores())
        self._replacing = asyncio.Lock()
        self._keepers: list[asyncio.Task[None]] = []
        self._removals: dict[str, _Removal] = {}
        self.replaced: Counter[str] = Counter()
        """Slots so far: worn by "requests" or by "age", or lost by "trouble"."""
        self.alive: set[Slot] = set()
        self.owned: set[str] = set()
        """Names of the slots whose container is, or may still be, there."""

    async def fill(self) -> None:
        """Start what is missing. The first time every place has a slot on return, later at least one has.

        Raises EngineError, or, the first time, RefusedError with what to do about it.
        """
        stood = bool(self._keepers)
        if not stood:
            self._clear_folder()
            await self._fill(self._places[0])  # where one cannot stand, no more are tried
        outcomes = await asyncio.gather(*(self._fill(place) for place in self._places), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for failure in sorted(failures, key=lambda failure: not isinstance(failure, RefusedError)):
            if not stood:
                raise failure
            if not self.alive:  # the host could do it once: this is trouble, and may pass
                raise EngineDownError(str(failure)) from failure
        if not stood:
            self._keepers = [asyncio.create_task(self._keep(place)) for place in self._places]

    @property
    def trouble(self) -> str | None:
        """Why no slot is left and none can be expected soon; None otherwise."""
        for place in self._places:
            if place.filled or place.trouble is None:
                return None
        return self._places[0].trouble

    def removal(self, slot: Slot) -> asyncio.Task[None] | None:
        """What ends when the container of a condemned slot is gone; None when it is."""
        removal = self._removals.get(slot.name)
        return None if removal is None else removal.task

    async def close(self) -> None:
        """End every slot. What cannot be removed now is left to the next start's sweep."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._keepers = []
        for slot in list(self.alive):
            slot.condemn("is closed")
        removals = list(self._removals.values())
        await asyncio.gather(*(removal.tried for removal in removals))
        for removal in removals:
            removal.task.cancel()
        await asyncio.gather(*(removal.task for removal in removals), return_exceptions=True)
        # What an unreachable daemon still had has one more chance.
        await asyncio.gather(*(self._containers.remove(name) for name in self.owned), return_exceptions=True)

    # --- keeping

    async def _fill(self, place: _Place) -> None:
        async with place.lock:
            if not place.filled:
                place.require_rested()
                await self._renew(place)

    async def _renew(self, place: _Place) -> None:
        """Start a slot, then put it in the place of the one that stands there. The caller holds the place's lock."""
        async with self._turns:
            try:
                slot = await self._start(place)
            except (LauncherError, OSError) as error:
                self._failed(place, error)
                raise
        old, place.slot, place.trouble = place.slot, slot, None
        self.alive.add(slot)
        self._freed(slot)
        if old is not None:
            old.retire()

    async def _keep(self, place: _Place) -> None:
        while True:
            place.changed.clear()
            slot = place.slot
            try:
                if slot is None or slot.condemned:
                    await self._fill(place)
                elif (left := self._left(slot)) > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(left):
                            await place.changed.wait()
                else:
                    async with self._replacing, place.lock:
                        if not slot.condemned:
                            log.info("slot=%s is replaced after %d runs", slot.name, slot.runs)
                            await self._renew(place)
                            self.replaced["requests" if slot.runs >= self._settings.slot_requests else "age"] += 1
            except (LauncherError, OSError) as error:
                log.debug("slot not started: %s", error)
                await asyncio.sleep(max(place.rest_left(), _LOOK_AGAIN_SECONDS))

    def _failed(self, place: _Place, error: Exception) -> None:
        if isinstance(error, EngineDownError):
            place.trouble = str(error)  # asking again is cheap
        else:
            place.rest(str(error))
        if (trouble := self.trouble) is not None:
            self._hopeless(trouble)

    def _left(self, slot: Slot) -> float:
        """How long until it is to be replaced. One that nobody has used does not wear."""
        if slot.runs >= self._settings.slot_requests:
            return 0.0
        left = slot.ready_at + self._settings.slot_seconds - asyncio.get_running_loop().time()
        return left if slot.runs else max(left, self._settings.slot_seconds)

    # --- starting

    def _clear_folder(self) -> None:
        """Sockets of a launcher that was killed."""
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(mode=0o700)
        except OSError as error:
            raise RefusedError(f"cannot make {self._folder}: {error.strerror}") from error

    async def _start(self, place: _Place) -> Slot:
        await self._containers.ping()  # without an answer nothing is made that would have to be removed
        name = secrets.token_hex(8)
        path = self._folder / name
        self.owned.add(name)
        with ExitStack() as undo:
            undo.callback(self._remove, name)
            opened = undo.enter_context(ExitStack())
            with _listening(path) as listener:
                container = await to_the_end(self._containers.start(name, path))
                control, work = await self._greeting(listener, container, opened)
            undo.pop_all()
        return Slot(
            name,
            control,
            work,
            self._settings.slot_requests,
            freed=self._freed,
            worn=place.changed.set,
            gone=lambda slot, why: self._condemned(place, slot, why),
        )

    async def _greeting(self, listener: socket.socket, container: str, opened: ExitStack) -> tuple[socket.socket, socket.socket]:
        """Control and work, once a child waits; `opened` closes what is open."""
        life = asyncio.create_task(self._containers.exit_code(container))
        greeting = asyncio.create_task(_greet(listener, opened))
        try:
            await asyncio.wait((life, greeting), timeout=self._settings.start_timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
            if greeting.done():
                if (sockets := greeting.result()) is not None:
                    return sockets
                opened.close()  # without its control the zygote ends, if it has not
                await asyncio.wait((life,), timeout=self._settings.start_timeout_seconds)
            if life.done():
                raise RefusedError(f"engine zygote: the zygote ended before it was ready, with exit code {life.result()}")
            raise RefusedError(f"engine zygote: not ready within {self._settings.start_timeout_seconds} s")
        finally:
            life.cancel()
            greeting.cancel()
            await asyncio.gather(life, greeting, return_exceptions=True)

    # --- removing

    def _condemned(self, place: _Place, slot: Slot, why: str) -> None:
        log.info("slot=%s %s after %d runs", slot.name, why, slot.runs)
        self.alive.discard(slot)
        self._lost(slot)
        slot.removed = self._remove(slot.name)
        if place.slot is slot and self._keepers:
            self.replaced["trouble"] += 1
        if slot.runs:
            place.served()
        elif place.slot is slot and self._keepers:
            place.rest(f"slot={slot.name} ended before it had served")
        place.changed.set()

    def _remove(self, name: str) -> asyncio.Future[bool]:
        """Whether the first attempt succeeds. If not it goes on behind."""
        tried: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._remove_at_last(name, tried), name=f"removal {name}")
        self._removals[name] = _Removal(task, tried)
        task.add_done_callback(lambda _: self._removals.pop(name))
        return tried

    async def _remove_at_last(self, name: str, tried: asyncio.Future[bool]) -> None:
        pause, longest = _RETRY_SECONDS
        while True:
            try:
                await self._containers.remove(name)
                break
            except EngineError as error:
                if not tried.done():
                    log.warning("slot=%s not removed, trying on: %s", name, error)
                    tried.set_result(False)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
        self.owned.discard(name)
        if not tried.done():
            tried.set_result(True)


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A socket for the one connection; its name lasts no longer than this."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.setblocking(False)
        try:
            listener.bind(str(path))
        except OSError as error:
            raise RefusedError(f"engine zygote: cannot listen at {path}: {error}") from error
        try:
            path.chmod(0o666)  # for a container that has it mounted; the folder above is ours alone
            listener.listen(1)
            yield listener
        finally:
            path.unlink(missing_ok=True)


async def _greet(listener: socket.socket, opened: ExitStack) -> tuple[socket.socket, socket.socket] | None:
    """Control and work, once a child waits; None when the other end has closed before that. Raises RefusedError."""
    loop = asyncio.get_running_loop()
    control, _ = await loop.sock_accept(listener)
    opened.callback(control.close)
    control.setblocking(False)
    _, uid, _ = _CREDENTIALS.unpack(control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != RUNNER_UID:
        raise RefusedError(
            f"engine zygote: a slot's socket was connected to by user {uid} instead of {RUNNER_UID}; "
            "a daemon that maps users (userns-remap, rootless) cannot serve it; set MAYFLY_ENGINE=docker"
        )
    work, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    opened.callback(work.close)
    with theirs:
        work.setblocking(False)
        theirs.setblocking(True)
        try:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(theirs.fileno()))
            control.sendmsg([HEADER.pack(WORK, 0, 0, 0)], [rights])
        except OSError:
            return None
    try:
        packet = await loop.sock_recv(control, HEADER.size + MAX_TEXT_BYTES + 1)
    except OSError:
        return None
    if not packet:
        return None
    if not HEADER.size <= len(packet) <= HEADER.size + MAX_TEXT_BYTES:
        raise RefusedError(f"engine zygote: the zygote's first packet has {len(packet)} bytes")
    kind, *rest = HEADER.unpack_from(packet)
    if any(rest) or kind not in (READY, REFUSED):
        raise RefusedError(f"engine zygote: the zygote's first packet is {packet[: HEADER.size].hex()}")
    if kind == REFUSED:
        words = packet[HEADER.size :].decode("utf-8", "replace")[:_MAX_WORDS]
        raise RefusedError(f"engine zygote: {words}; {host.remedy(words)}")
    return control, work
