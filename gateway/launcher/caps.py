"""How many instances live: on this host, and of each owner. One that has expired is not among them from the very second on.

Nor does it come back: under a wall clock that jumps forward and then back, what seemed expired meanwhile is not counted until the
next start, and a cap may be passed by as many.
"""

from __future__ import annotations

import heapq
import threading
import uuid

from ..protocol import NOBODY
from .errors import HostFullError, OwnerFullError

_SPARE = 16  # entries of instances that are gone or have got another end, before an index is made anew


class _Ends:
    """Instances by the second of their end. Every one is looked at once more when that has come, so a call is cheap on average."""

    __slots__ = ("_by_end", "_ends")

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}
        self._by_end: list[tuple[int, int]] = []  # a heap; what `_ends` does not say is of what is gone or has another end

    def add(self, instance: int, end: int) -> None:
        self._ends[instance] = end
        heapq.heappush(self._by_end, (end, instance))
        self._tidy()

    def discard(self, instance: int) -> None:
        self._ends.pop(instance, None)
        self._tidy()

    def _tidy(self) -> None:
        if len(self._by_end) > 2 * len(self._ends) + _SPARE:
            self._by_end = [(end, instance) for instance, end in self._ends.items()]
            heapq.heapify(self._by_end)

    def count(self, now: float) -> int:
        while self._by_end:
            end, instance = self._by_end[0]
            known = self._ends.get(instance)
            if known == end and now < end:
                break
            heapq.heappop(self._by_end)
            if known == end:
                del self._ends[instance]
        return len(self._ends)

    @property
    def first(self) -> int:
        """When the first of them ends, after `count` has found some."""
        return self._by_end[0][0]


class Caps:
    """A cap of 0 is off. From any thread; times are unix seconds. Whoever adds has asked for room, with nobody between."""

    def __init__(self, most: int, most_per_owner: int) -> None:
        self._most = most
        self._most_per_owner = most_per_owner
        self._all = _Ends()
        self._owners: dict[bytes, _Ends] = {}
        self._lock = threading.Lock()

    def require_room(self, owner: bytes, now: float) -> None:
        """Raises OwnerFullError or HostFullError."""
        with self._lock:
            own = self._owners.get(owner)
            if own is not None and self._most_per_owner and (count := own.count(now)) >= self._most_per_owner:
                raise OwnerFullError(f"the owner has {count} live instances", until=own.first)
            if self._most and (count := self._all.count(now)) >= self._most:
                raise HostFullError(f"the host has {count} live instances")

    def add(self, instance: uuid.UUID, owner: bytes, expires_at: int) -> None:
        """Or, of one that is counted, give it another end."""
        with self._lock:
            self._all.add(instance.int, expires_at)
            if owner != NOBODY:
                self._owners.setdefault(owner, _Ends()).add(instance.int, expires_at)

    def discard(self, instance: uuid.UUID, owner: bytes, now: float) -> None:
        with self._lock:
            self._all.discard(instance.int)
            own = self._owners.get(owner)
            if own is not None:
                own.discard(instance.int)
                if not own.count(now):
                    del self._owners[owner]

    def live(self, now: float) -> int:
        with self._lock:
            return self._all.count(now)
