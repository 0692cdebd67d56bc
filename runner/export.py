"""The database's file, byte for byte, by a descriptor of its own. Whoever sends it keeps it from being written meanwhile."""

from __future__ import annotations

import os

from . import digest
from .frames import framed
from .wire import Verdict, VerdictError, encode_reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .database import Expired
    from .frames import Outbox

_PIECE_BYTES = 1 << 18


def send_file(path: str, expired: Expired, outbox: Outbox, before: bytes = b"") -> None:
    """All of the `file` reply, behind the frame `before`. Raises VerdictError, and before the first byte alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size, content = 0, digest.new()
        for piece in _pieces(descriptor):
            if expired():
                raise VerdictError(Verdict.TIMEOUT)
            size += len(piece)
            content.update(piece)
        head = encode_reply(Verdict.FILE, {"size": size, "sha256": content.hexdigest()})
        outbox.send(before + framed(head), _broken_off)
        for piece in _pieces(descriptor):
            outbox.send(piece, _broken_off)
    finally:
        os.close(descriptor)


def _pieces(descriptor: int) -> Iterator[bytes]:
    place = 0
    while piece := os.pread(descriptor, _PIECE_BYTES, place):
        place += len(piece)
        yield piece


def _broken_off(failure: VerdictError) -> None:
    """Too few bytes say so by themselves."""
