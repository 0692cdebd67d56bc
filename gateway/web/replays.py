"""Answers kept for a request that may come again: by its instance and its Idempotency-Key, in bounded memory.

That a write runs once is the launcher's doing, which remembers the key's tag on its disk before the run. What is kept here is only
the answer. It is gone with the instance, with this process, or for want of room; whoever asks again then hears `already_done`.

All answers together take a bounded room, and those of one address no more of it than they leave free: whoever fills it loses
answers of its own.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import hmac
import time
import uuid
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TypeVar

from .errors import ApiError, IdempotencyMismatchError
from .rates import counted_as

REPLAY_BYTES = 16 << 20
"""Of all answers that are kept."""
# What an entry takes besides its answer.
_ENTRY_BYTES = 1024
_PURGE_SECONDS = 30.0

T = TypeVar("T")

Answer = bytes | ApiError


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request with a key. `fingerprint`: of all that it asks for."""

    key: str
    fingerprint: bytes

    @classmethod
    def of(cls, key: str, *parts: bytes) -> Attempt:
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(8) + part)
        return cls(key, digest.digest())

    @property
    def tag(self) -> bytes:
        """What the launcher remembers of the key: 16 bytes, never all zero."""
        return hashlib.sha256(b"mayfly idempotency key\0" + self.key.encode()).digest()[:15] + b"\1"


@dataclass(frozen=True, slots=True)
class _Kept:
    fingerprint: bytes
    answer: Answer
    size: int


@dataclass(slots=True)
class _Held:
    """The answers of one instance, oldest first."""

    address: str
    expires_at: int
    kept: OrderedDict[str, _Kept] = field(default_factory=OrderedDict)


class Replays:
    def __init__(self, room_bytes: int = REPLAY_BYTES, clock: Callable[[], float] = time.time) -> None:
        self._room = room_bytes
        self._clock = clock
        self._instances: dict[uuid.UUID, _Held] = {}
        # Of each address: its instances, the oldest first, and the bytes of their answers.
        self._of: defaultdict[str, dict[uuid.UUID, None]] = defaultdict(dict)
        self._sizes: Counter[str] = Counter()
        self.held_bytes = 0
        self._purge_at = 0.0
        self._tasks: set[asyncio.Task[object]] = set()

    def find(self, instance: uuid.UUID, attempt: Attempt) -> Answer | None:
        """The answer to the same request, or None; raises IdempotencyMismatchError if the key was another request's."""
        held = self._instances.get(instance)
        kept = None if held is None else held.kept.get(attempt.key)
        if kept is None:
            return None
        if not hmac.compare_digest(kept.fingerprint, attempt.fingerprint):
            raise IdempotencyMismatchError(hint="take a new key for another request")
        # An exception that was raised remembers where: a copy does not keep what that holds alive.
        return copy.copy(kept.answer) if isinstance(kept.answer, ApiError) else kept.answer

    def keep(self, instance: uuid.UUID, attempt: Attempt, answer: Answer, address: str, expires_at: int) -> None:
        """Keep it if there is room, instead of what was kept for that key. `address`: of who asked. `expires_at`: the unix second
        of the instance's end."""
        self._purge()
        self._drop(instance, attempt.key)
        answer = copy.copy(answer) if isinstance(answer, ApiError) else answer
        size = _ENTRY_BYTES + len(attempt.key) + len(answer.body("") if isinstance(answer, ApiError) else answer)
        held = self._instances.get(instance)
        address = counted_as(address) if held is None else held.address
        while not self._fits(address, size):
            if address not in self._of:
                return
            self._drop_oldest_of(address)
        held = self._instances.setdefault(instance, _Held(address, expires_at))
        held.kept[attempt.key] = _Kept(attempt.fingerprint, answer, size)
        self._of[address][instance] = None
        self._sizes[address] += size
        self.held_bytes += size

    def extended(self, instance: uuid.UUID, expires_at: int) -> None:
        """The instance's end has moved."""
        if (held := self._instances.get(instance)) is not None:
            held.expires_at = expires_at

    def forget(self, instance: uuid.UUID) -> None:
        """The instance is no more. Doing it again is harmless."""
        if (held := self._instances.get(instance)) is not None:
            for key in tuple(held.kept):
                self._drop(instance, key)

    async def finish(self, work: Coroutine[object, object, T]) -> T:
        """Do it to its end, even if the caller hangs up: whoever sends the request again is to find its answer."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End what goes on without its caller and was not done when the drain was over."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(set(self._tasks))

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # of a caller that is gone nobody else looks at it

    def _fits(self, address: str, size: int) -> bool:
        return self._sizes[address] + size <= self._room - self.held_bytes - size

    def _drop_oldest_of(self, address: str) -> None:
        instance = next(iter(self._of[address]))
        self._drop(instance, next(iter(self._instances[instance].kept)))

    def _drop(self, instance: uuid.UUID, key: str) -> None:
        held = self._instances.get(instance)
        if held is None or key not in held.kept:
            return
        size = held.kept.pop(key).size
        self._sizes[held.address] -= size
        self.held_bytes -= size
        if held.kept:
            return
        del self._instances[instance], self._of[held.address][instance]
        if not self._of[held.address]:
            del self._of[held.address], self._sizes[held.address]

    def _purge(self) -> None:
        now = self._clock()
        if now < self._purge_at:
            return
        self._purge_at = now + _PURGE_SECONDS
        for instance in [instance for instance, held in self._instances.items() if held.expires_at <= now]:
            self.forget(instance)
