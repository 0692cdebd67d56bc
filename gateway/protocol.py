"""The packets between web and launcher, as docs/wire.md defines them. Shared by both; nothing here does I/O."""

from __future__ import annotations

import struct
import uuid
from enum import IntEnum
from typing import NamedTuple

VERSION = 3
MAX_DETAIL_BYTES = 32 * 1024
NO_INSTANCE = uuid.UUID(int=0)
NO_REQUEST = bytes(16)
"""The id of what no HTTP request asked for."""
NOBODY = bytes(16)
"""The tag of an owner whose instances are not counted."""
NO_TAG = bytes(16)
"""Of a run that may be had again."""

# Plain integers: combining members of an IntFlag takes 1 µs.
QUIET, READ_ONLY, BULK, SALVAGE, KEEP = 1, 2, 4, 8, 16
"""A request's flags. SALVAGE is one of FIND's reply too."""

_REQUEST = struct.Struct("!BBHQ16s16s16sQ")
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
    FORK = 7
    REPLACE = 8
    EXTEND = 9


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
    REPEATED = 12
    OFF = 13


class Verdict(IntEnum):
    """How a run ended."""

    EXITED = 0
    DEADLINE = 1
    OUT_OF_MEMORY = 2
    SIGNALLED = 3
    CANCELLED = 4
    LOST = 5


class _Form(NamedTuple):
    """What a verb's packet may hold."""

    verb: Verb
    flags: int = 0
    named: bool = True
    """Whether it names an instance."""
    other: bool = False
    numbered: bool = False


# A look-up takes a third of what calling an enumeration takes.
_FORMS = {
    int(form.verb): form
    for form in (
        _Form(Verb.CREATE, flags=SALVAGE, named=False, other=True),
        _Form(Verb.RUN, flags=QUIET | READ_ONLY | BULK, other=True),
        _Form(Verb.FIND),
        _Form(Verb.REMOVE),
        _Form(Verb.HEALTH, named=False),
        _Form(Verb.METRICS, named=False),
        _Form(Verb.FORK, other=True),
        _Form(Verb.REPLACE, flags=KEEP, other=True),
        _Form(Verb.EXTEND, numbered=True),
    )
}
_STATUSES = {int(status): status for status in Status}
_VERDICTS = {int(verdict): verdict for verdict in Verdict}


class MalformedPacketError(ValueError):
    """A packet that is not of the documented form."""


class Request(NamedTuple):
    verb: Verb
    sequence: int
    instance: uuid.UUID = NO_INSTANCE
    flags: int = 0
    """The sum of those that the verb knows."""
    request_id: bytes = NO_REQUEST
    """Of the HTTP request that this is part of, for the logs; bytes, because a UUID costs 1 µs."""
    other: bytes = NOBODY
    """CREATE, FORK: the owner's tag. REPLACE: the instance whose volume it is to be. RUN: the tag of what must not run twice."""
    number: int = 0
    """EXTEND: the unix second that is wished for."""

    def pack(self) -> bytes:
        verb, sequence, instance, flags, request_id, other, number = self
        return _REQUEST.pack(VERSION, verb, flags, sequence, instance.bytes, request_id, other, number)

    @classmethod
    def unpack(cls, packet: bytes) -> Request:
        """Read one packet; raises MalformedPacketError for any but the documented form."""
        if len(packet) != _REQUEST.size:
            raise MalformedPacketError(f"{len(packet)} bytes instead of {_REQUEST.size}")
        version, number_of_verb, flags, sequence, raw, request_id, other, number = _REQUEST.unpack(packet)
        if version != VERSION:
            raise MalformedPacketError("unknown version")
        form = _FORMS.get(number_of_verb)
        if form is None:
            raise MalformedPacketError("unknown verb")
        if flags & ~form.flags:
            raise MalformedPacketError("unknown flags")
        instance = uuid.UUID(bytes=raw)
        if not form.named:
            if instance != NO_INSTANCE:
                raise MalformedPacketError(f"{form.verb.name} names no instance")
        elif instance.version != 7:
            raise MalformedPacketError("not a UUIDv7")
        if number and not form.numbered:
            raise MalformedPacketError(f"{form.verb.name} has no number")
        if not form.other:
            if other != NOBODY:
                raise MalformedPacketError(f"{form.verb.name} has nothing besides")
        elif form.verb is Verb.REPLACE and uuid.UUID(bytes=other).version != 7:
            raise MalformedPacketError("the other is not a UUIDv7")
        return cls(form.verb, sequence, instance, flags, request_id, other, number)


class Reply(NamedTuple):
    status: Status
    sequence: int
    expires_at: int = 0
    verdict: Verdict = Verdict.EXITED
    detail: str = ""
    instance: uuid.UUID = NO_INSTANCE
    flags: int = 0
    """FIND: SALVAGE, if the instance's record has it."""

    def pack(self) -> bytes:
        detail = self.detail.encode("utf-8", "replace")[:MAX_DETAIL_BYTES]
        head = _REPLY.pack(VERSION, self.status, self.verdict, self.flags, self.sequence, self.expires_at, self.instance.bytes)
        return head + detail

    @classmethod
    def unpack(cls, packet: bytes) -> Reply:
        """Read one packet; raises MalformedPacketError for any but the documented form."""
        if not _REPLY.size <= len(packet) <= MAX_REPLY_BYTES:
            raise MalformedPacketError(f"{len(packet)} bytes")
        version, status, verdict, flags, sequence, expires_at, raw = _REPLY.unpack_from(packet)
        if version != VERSION:
            raise MalformedPacketError("unknown version")
        if flags and (flags != SALVAGE or status != Status.DONE):
            raise MalformedPacketError("unknown flags")
        try:
            detail = packet[_REPLY.size :].decode()
            return cls(_STATUSES[status], sequence, expires_at, _VERDICTS[verdict], detail, uuid.UUID(bytes=raw), flags)
        except (KeyError, UnicodeDecodeError):
            raise MalformedPacketError("unknown status or verdict, or a detail that is not UTF-8") from None
