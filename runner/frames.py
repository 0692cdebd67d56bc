"""Frames of docs/wire.md as bytes on a descriptor, and what comes and goes behind one: an upload, a file, more frames."""

from __future__ import annotations

import os
import struct

from .wire import Verdict, VerdictError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Ending = Callable[[VerdictError], bytes | None]
    """The inside of the last frame of a reply that fails half-way; None where there is nothing that could say so."""

LENGTH_BYTES = 4
_LENGTH = struct.Struct("!I")
_FIRST_READ_BYTES = 4096
_READ_BYTES = 1 << 16


class NoRequestError(Exception):
    """The stream ended before a whole request had come."""


def read_frame(descriptor: int, max_bytes: int) -> tuple[bytes, bytes]:
    """The inside of one frame, and what has come already of what follows it.

    Raises NoRequestError at an early end, VerdictError for a length that is not allowed.
    """
    # All of most requests in one read.
    data = _read_until(descriptor, LENGTH_BYTES, b"", _FIRST_READ_BYTES)
    (length,) = _LENGTH.unpack_from(data)
    if not 1 <= length <= max_bytes:
        raise VerdictError(Verdict.REQUEST_INVALID, f"a frame of {length} bytes; 1 to {max_bytes} are allowed")
    end = LENGTH_BYTES + length
    data = _read_until(descriptor, end, data, _READ_BYTES)
    return data[LENGTH_BYTES:end], data[end:]


def read_upload(descriptor: int, length: int, begun: bytes) -> bytes:
    """`length` bytes, the first of which have come already. Raises NoRequestError at an early end."""
    return _read_until(descriptor, length, begun, _READ_BYTES)[:length]


def _read_until(descriptor: int, end: int, data: bytes, most: int) -> bytes:
    """`data` and what comes after it, at least `end` bytes in all. Grows with what has come, not with what was announced."""
    if len(data) >= end:
        return data
    chunk = os.read(descriptor, most)
    if not data and len(chunk) >= end:
        return chunk
    grown = bytearray(data)
    while chunk:
        grown += chunk
        if len(grown) >= end:
            return bytes(grown)
        chunk = os.read(descriptor, most)
    raise NoRequestError


def framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


def write_all(descriptor: int, data: bytes) -> None:
    sent = os.write(descriptor, data)
    if sent < len(data):
        rest = memoryview(data)[sent:]
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def _no_rival() -> None:
    """A zygote's child has no second thread."""


class Outbox:
    """Where a reply goes that is more than one frame, piece by piece. Its last frame, if it ends with one, is for `answer`."""

    __slots__ = ("_claim", "_descriptor", "_release", "ending")

    def __init__(self, descriptor: int, claim: Callable[[], object] = _no_rival, release: Callable[[], object] = _no_rival) -> None:
        """Between `claim` and `release` no rival writes."""
        self._descriptor = descriptor
        self._claim = claim
        self._release = release
        self.ending: Ending | None = None
        """Of what has been sent; None before the first piece."""

    def send(self, piece: bytes, ending: Ending) -> None:
        """Raises OSError when nobody reads. Does not return when a rival has written: the process ends first."""
        self._claim()
        try:
            write_all(self._descriptor, piece)
            self.ending = ending
        finally:
            self._release()
