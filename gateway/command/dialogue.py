"""What is said to the runner and what it may answer: docs/wire.md, `verify_file`, `salvage_file`. The answer is hostile input."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from ..settings import Settings
from ..web.errors import ReplyInvalidError
from ..web.runner import (
    FileHead,
    HostFull,
    MemoryLimit,
    Order,
    Reply,
    Report,
    Reported,
    StorageFull,
    Timeout,
    export_order,
    read_reply,
    salvage_order,
    verify_order,
)
from .errors import BeyondLimitsError, SandboxError
from .sandbox import Sandbox

Kind = Literal["verify", "salvage"]

_LENGTH_BYTES = 4
# Answered as the gateway's orders of that kind are.
_LIKE: Mapping[Kind, Order] = {"verify": verify_order(), "salvage": salvage_order()}
_A_FILE = export_order()
_BEYOND: tuple[tuple[type[Reply], str], ...] = (
    (Timeout, "the time, MAYFLY_BULK_DEADLINE_SECONDS, was not enough for it"),
    (MemoryLimit, "the memory, MAYFLY_HEAP_BYTES, was not enough for it"),
    (StorageFull, "what can be recovered is larger than MAYFLY_INSTANCE_BYTES"),
    (HostFull, "the container has too little room for it"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    report: Report
    recovered: bytes | None
    """What salvage has made of the file, if it has."""


async def converse(sandbox: Sandbox, kind: Kind, content: bytes, settings: Settings) -> Answer:
    """Send the file, take the answer. Raises SandboxError, BeyondLimitsError."""
    order = msgspec.json.encode({"v": 1, "op": f"{kind}_file", "upload": len(content)})
    await sandbox.send(len(order).to_bytes(_LENGTH_BYTES, "big") + order + content)
    try:
        report = await _report(sandbox, kind, content, settings)
        recovered = await _file(sandbox, settings) if kind == "salvage" and report.ok else None
    except ReplyInvalidError as error:
        raise SandboxError(f"the runner's answer is invalid: {error.reason}") from error
    if await sandbox.receive(1):
        raise SandboxError("the runner's answer is invalid: bytes after its end")
    return Answer(report, recovered)


async def _report(sandbox: Sandbox, kind: Kind, content: bytes, settings: Settings) -> Report:
    reply = await _reply(sandbox, _LIKE[kind], settings)
    if not isinstance(reply, Reported):
        raise _no_report(reply)
    report = reply.report
    if (report.size, report.sha256) != (len(content), hashlib.sha256(content).hexdigest()):
        raise SandboxError("the runner's report is about something else")
    return report


async def _file(sandbox: Sandbox, settings: Settings) -> bytes:
    head = await _reply(sandbox, _A_FILE, settings)
    if not isinstance(head, FileHead) or head.size > settings.instance_bytes:
        raise SandboxError("the runner announces no file, or one that is too large")
    content = await sandbox.receive(head.size)
    if len(content) != head.size or hashlib.sha256(content).hexdigest() != head.sha256:
        raise SandboxError("the runner's file is not the one that it announced")
    return content


async def _reply(sandbox: Sandbox, order: Order, settings: Settings) -> Reply:
    header = await sandbox.receive(_LENGTH_BYTES)
    if not header:
        raise BeyondLimitsError("the runner ended without an answer: out of memory (MAYFLY_CONTAINER_MEMORY_BYTES), or killed")
    length = int.from_bytes(header, "big")
    if len(header) < _LENGTH_BYTES or not 1 <= length <= settings.max_reply_frame_bytes:
        raise SandboxError("the runner's answer is no frame")
    payload = await sandbox.receive(length)
    if len(payload) < length:
        raise SandboxError("the runner's answer ends before its end")
    return read_reply(payload, order)


def _no_report(reply: Reply) -> SandboxError | BeyondLimitsError:
    for kind, reason in _BEYOND:
        if isinstance(reply, kind):
            return BeyondLimitsError(reason)
    message = getattr(reply, "message", "")
    # Its own words could be orders to a terminal.
    return SandboxError(f"the runner answers {reply.__struct_config__.tag}: {message!a}")
