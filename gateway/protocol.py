"""The packets between web and launcher, as docs/wire.md defines them. Shared by both; nothing here does I/O."""

from __future__ import annotations

import struct
import uuid
from enum import IntEnum
from typing import NamedTuple

VERSION = 1
MAX_DETAIL_BYTES = 32 * 1024
NO_INSTANCE = uuid.UUID(int=0)

_REQUEST = struct.Struct("!BBHQ16s")
_REPLY = struct.Struct("!BBBBQQ16s")

REQUEST_BYTES = _REQUEST.size
MAX_REPLY_BYTES = _REPLY.size + MAX_DETAIL_BYTES


class Verb(IntEnum):
    CREATE = 1
    RUN = 2
    FIND = 3
    REMOVE = 4
    HEALTH = 5


_NAMELESS = frozenset({Verb.CREATE, Verb.HEALTH})


class Status(IntEnum):
    DONE = 0
    UNKNOWN = 1
    STARTED = 2
    ENDED = 3
    ENGINE_DOWN = 4
    IMAGE_MISSING = 5
    STORAGE_LOW = 6
    BUSY = 7
    FAILED = 8


class Verdict(IntEnum):
    """How a run ended."""

    EXITED = 0
    DEADLINE = 1
    OUT_OF_MEMORY = 2
    SIGNALLED = 3
    CANCELLED = 4
    LOST = 5


# A look-up takes a third of what calling an enumeration takes.
_VERBS = {int(verb): verb for verb in Verb}
_STATUSES = {int(status): status for status in Status}
_VERDICTS = {int(verdict): verdict for verdict in Verdict}


class MalformedPacketError(ValueError):
    """A packet that is not of the documented form."""


class Request(NamedTuple):
    verb: Verb
    sequence: int
    instance: uuid.UUID

    def pack(self) -> bytes:
        return _REQUEST.pack(VERSION, self.verb, 0, self.sequence, self.instance.bytes)

    @classmethod
    def unpack(cls, packet: bytes) -> Request:
        """Read one packet; raises MalformedPacketError for any but the documented form."""
        if len(packet) != _REQUEST.size:
            raise MalformedPacketError(f"{len(packet)} bytes instead of {_REQUEST.size}")
        version, verb, reserved, sequence, raw = _REQUEST.unpack(packet)
        if version != VERSION or reserved != 0:
            raise MalformedPacketError("unknown version")
        known = _VERBS.get(verb)
        if known is None:
            raise MalformedPacketError("unknown verb")
        instance = uuid.UUID(bytes=raw)
        if known in _NAMELESS:
            if instance != NO_INSTANCE:
                raise MalformedPacketError(f"{known.name} names no instance")
        elif instance.version != 7:
            raise MalformedPacketError("not a UUIDv7")
        return cls(known, sequence, instance)


class Reply(NamedTuple):
    status: Status
    sequence: int
    expires_at: int = 0
    verdict: Verdict = Verdict.EXITED
    detail: str = ""
    instance: uuid.UUID = NO_INSTANCE

    def pack(self) -> bytes:
        detail = self.detail.encode("utf-8", "replace")[:MAX_DETAIL_BYTES]
        head = _REPLY.pack(VERSION, self.status, self.verdict, 0, self.sequence, self.expires_at, self.instance.bytes)
        return head + detail

    @classmethod
    def unpack(cls, packet: bytes) -> Reply:
        """Read one packet; raises MalformedPacketError for any but the documented form."""
        if not _REPLY.size <= len(packet) <= MAX_REPLY_BYTES:
            raise MalformedPacketError(f"{len(packet)} bytes")
        version, status, verdict, reserved, sequence, expires_at, raw = _REPLY.unpack_from(packet)
        if version != VERSION or reserved != 0:
            raise MalformedPacketError("unknown version")
        try:
            detail = packet[_REPLY.size :].decode()
            return cls(_STATUSES[status], sequence, expires_at, _VERDICTS[verdict], detail, uuid.UUID(bytes=raw))
        except (KeyError, UnicodeDecodeError):
            raise MalformedPacketError("unknown status or verdict, or a detail that is not UTF-8") from None
