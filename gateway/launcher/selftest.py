"""One container of the real specification, told to confine itself and report what it saw, before any tenant gets one."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from ..protocol import MAX_DETAIL_BYTES, Verdict
from ..uuid7 import uuid7
from .engines import Engine
from .errors import RefusedError
from .registry import Registry


async def self_test(engine: Engine, registry: Registry) -> dict[str, Any]:
    """The runner's facts; raises RefusedError if it could not confine itself, EngineError if it did not get that far."""
    with registry.scratch() as volume:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        with ours:
            report = asyncio.create_task(_read(ours))
            try:
                verdict = await engine.run(uuid7(), volume, theirs, lambda: None, "selftest")
                output = await report  # the engine has closed its end, so this ends too
            finally:
                report.cancel()
                await asyncio.gather(report, return_exceptions=True)
    try:
        facts = json.loads(output)
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or verdict is not Verdict.EXITED:
        # A daemon that stops takes its containers along: then connecting anew fails, and nothing was learnt about this host.
        await engine.open()
        raise RefusedError(f"the self-test gave no report (verdict {verdict.name}, {len(output)} bytes: {output[:200]!r})")
    if "refused" in facts:
        raise RefusedError(f"the runner cannot confine itself on this host: {facts['refused']}")
    return facts


async def _read(sock: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    output = b""
    while len(output) < MAX_DETAIL_BYTES // 2 and (data := await loop.sock_recv(sock, MAX_DETAIL_BYTES)):
        output += data
    return output[: MAX_DETAIL_BYTES // 2]
