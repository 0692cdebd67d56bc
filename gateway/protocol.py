"""The packets between web and launcher, as docs/wire.md defines them. Shared by both; nothing here does I/O."""

from __future__ import annotations

import struct
import uuid
from enum import IntEnum
from typing import NamedTuple

VERSION = 2
MAX_DETAIL_BYTES = 32 * 1024
NO_INSTANCE = uuid.UUID(int=0)
NO_REQUEST = bytes(16)
"""The id of what no HTTP request asked for."""
NOBODY = bytes(16)
"""The tag of an owner whose instances are not counted."""

_REQUEST = struct.Struct("!BBHQ16s16s")
_REPLY = struct.Struct("!BBBBQQ16s")

REQUEST_BYTES = _REQUEST.size
MAX_REPLY_BYTES = _REPLY.size + MAX_DETAIL_BYTES


class Verb(IntEnum):
    CREATE = 1
    RUN = 2
    FIND = 3
    REMOVE = 4
    HEALTH = 5
    METRICS = 6


_NAMELESS = frozenset({Verb.HEALTH, Verb.METRICS})
_QUIET = 1


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
    QUOTA = 9
    OWNER_FULL = 10
    HOST_FULL = 11


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
    instance: uuid.UUID = NO_INSTANCE
    quiet: bool = False
    """Of RUN: whether STARTED is to be left out."""
    request_id: bytes = NO_REQUEST
    """Of the HTTP request that this is part of, for the logs; bytes, because a UUID costs 1 µs."""
    owner: bytes = NOBODY
    """Of CREATE, in the place of the instance."""

    def pack(self) -> bytes:
        named = self.owner if self.verb is Verb.CREATE else self.instance.bytes
        return _REQUEST.pack(VERSION, self.verb, _QUIET if self.quiet else 0, self.sequence, named, self.request_id)

    @classmethod
    def unpack(cls, packet: bytes) -> Request:
        """Read one packet; raises MalformedPacketError for any but the documented form."""
        if len(packet) != _REQUEST.size:
            raise MalformedPacketError(f"{len(packet)} bytes instead of {_REQUEST.size}")
        version, verb, flags, sequence, raw, request_id = _REQUEST.unpack(packet)
        if version != VERSION:
            raise MalformedPacketError("unknown version")
        known = _VERBS.get(verb)
        if known is None:
            raise MalformedPacketError("unknown verb")
        if flags and (flags != _QUIET or known is not Verb.RUN):
            raise MalformedPacketError("unknown flags")
        if known is Verb.CREATE:
            return cls(known, sequence, request_id=request_id, owner=raw)
        instance = uuid.UUID(bytes=raw)
        if known in _NAMELESS:
            if instance != NO_INSTANCE:
                raise MalformedPacketError(f"{known.name} names no instance")
        elif instance.version != 7:
            raise MalformedPacketError("not a UUIDv7")
        return cls(known, sequence, instance, bool(flags), request_id)


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
