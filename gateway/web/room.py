"""Memory for what callers send and are sent: bounded for all together, and an address has at most a seventh of what it leaves free.

One flood alone gets an eighth of it, and n floods, one after the other, leave (7/8)^n: a half after five, a tenth after seventeen.
A loan is one request's: whatever it took goes back when its `with` block ends.
"""

from __future__ import annotations

from collections import Counter

from .errors import OverloadedError
from .rates import counted_as

SHARE = 7
"""As often as an address has it, so much is free."""
ROOM_BYTES = 128 << 20
"""For bodies that arrive, and for what was made of them until the runner has it."""
ANSWERS_BYTES = 128 << 20
"""For files and rows that callers have yet to read."""


class Room:
    def __init__(self, room_bytes: int = ROOM_BYTES, share: int = SHARE) -> None:
        self._free = room_bytes
        self._share = share
        self._held: Counter[str] = Counter()

    @property
    def free(self) -> int:
        """Bytes that nobody holds."""
        return self._free

    def held(self, address: str) -> int:
        """Bytes that the address, or its IPv6 /64, holds."""
        return self._held[counted_as(address)]

    def loan(self, address: str) -> Loan:
        return Loan(self, counted_as(address))

    def _take(self, address: str, size: int) -> None:
        if (self._held[address] + size) * self._share > self._free - size:
            raise OverloadedError(reason=f"{size} bytes more of one address: it holds {self._held[address]}, {self._free} are free")
        self._free -= size
        self._held[address] += size

    def _give_back(self, address: str, size: int) -> None:
        self._free += size
        self._held[address] -= size
        if not self._held[address]:
            del self._held[address]


class Loan:
    """What one request holds. After its `with` block it holds nothing, and gets nothing."""

    __slots__ = ("_address", "_over", "_room", "size")

    def __init__(self, room: Room, address: str) -> None:
        self._room = room
        self._address = address
        self._over = False
        self.size = 0
        """Bytes."""

    def __enter__(self) -> Loan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.hold(0)
        self._over = True

    def take(self, size: int) -> None:
        """So many bytes more; raises OverloadedError, and then holds what it held."""
        if self._over:
            raise OverloadedError(reason="the request is over")
        self._room._take(self._address, size)
        self.size += size

    def give_back(self, size: int) -> None:
        """So many bytes fewer; more than it holds is a mistake of the caller's: ValueError."""
        if size > self.size:
            raise ValueError(f"{size} bytes of {self.size}")
        self.size -= size
        self._room._give_back(self._address, size)

    def hold(self, size: int) -> None:
        """So many bytes altogether, from now on; raises OverloadedError."""
        if size > self.size:
            self.take(size - self.size)
        else:
            self.give_back(self.size - size)
