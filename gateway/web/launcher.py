"""The client of the launcher's socket: one SEQPACKET connection, many requests at once, told apart by their sequence.

A unix socket connects or fails at once, so there is no reconnecting in the background: a call that finds no connection makes one,
and while the launcher is down every call fails immediately. A lost connection fails everything that was outstanding on it; the
launcher destroys what it ran for a connection that is gone.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import struct
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..protocol import (
    KEEP,
    MAX_REPLY_BYTES,
    NO_INSTANCE,
    NO_REQUEST,
    NO_TAG,
    NOBODY,
    QUIET,
    SALVAGE,
    MalformedPacketError,
    Reply,
    Request,
    Status,
    Verb,
    Verdict,
)
from .errors import (
    ApiError,
    EngineUnavailableError,
    ExtendDisabledError,
    HostFullError,
    HostStorageLowError,
    ImageMissingError,
    InstanceNotFoundError,
    InternalError,
    LauncherUnavailableError,
    OverloadedError,
    QueryQuotaError,
    TooManyInstancesError,
)

_ANSWER_SECONDS = 10.0
_PEER = struct.Struct("3i")

_log = logging.getLogger(__name__)


class RepeatedError(Exception):
    """A run of this instance with this tag was begun before. What it answered, the launcher does not know."""


RunEnd = Verdict | ApiError | RepeatedError


class Found(NamedTuple):
    """An instance that lives."""

    expires_at: int
    """The unix second of its deletion."""
    salvage: bool
    """Whether whoever finds it damaged is to salvage it."""


class _RunCall(NamedTuple):
    started: Callable[[int], None] | None
    over: Callable[[RunEnd], None]


# What is made by a verb belongs to nobody until its name has arrived.
_MAKING = frozenset({Verb.CREATE, Verb.FORK})


class Launcher:
    """`request_id` is that of the HTTP request that a call is part of, for the launcher's log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._peer_uid = -1
        self._sequences = itertools.count(1)
        self._answers: dict[int, tuple[Verb, asyncio.Future[Reply]]] = {}
        self._runs: dict[int, _RunCall] = {}
        self._unsent: deque[tuple[bytes, socket.socket | None]] = deque()
        self.silent = False
        """Whether an answer was overdue and nothing at all has come since: the launcher hangs, or the host does."""

    @property
    def connected(self) -> bool:
        return self._socket is not None

    @property
    def separated(self) -> bool:
        """Whether the launcher at the other end runs under another user than this process."""
        return self._socket is not None and self._peer_uid != os.geteuid()

    async def create(self, owner: bytes, request_id: bytes, *, salvage: bool = False) -> tuple[uuid.UUID, int]:
        """Have an instance made for the owner of that tag: its id, and the unix second of its deletion."""
        reply = await self._ask(Verb.CREATE, request_id, flags=SALVAGE if salvage else 0, other=owner)
        return reply.instance, reply.expires_at

    async def fork(self, instance: uuid.UUID, owner: bytes, request_id: bytes) -> tuple[uuid.UUID, int]:
        """Have a copy made, for the owner of that tag: as `create`. Raises InstanceNotFoundError too."""
        reply = await self._ask(Verb.FORK, request_id, instance, other=owner)
        return reply.instance, reply.expires_at

    async def replace(self, instance: uuid.UUID, other: uuid.UUID, request_id: bytes, *, keep: bool = False) -> None:
        """Give an instance the volume of another, which is no more then. `keep`: the volume that it had stays beside it."""
        await self._ask(Verb.REPLACE, request_id, instance, flags=KEEP if keep else 0, other=other.bytes)

    async def extend(self, instance: uuid.UUID, wished: int, request_id: bytes) -> int:
        """The unix second at which the instance ends from now on; it is asked for `wished`. Raises ExtendDisabledError."""
        return (await self._ask(Verb.EXTEND, request_id, instance, number=wished)).expires_at

    async def find(self, instance: uuid.UUID, request_id: bytes = NO_REQUEST) -> int | None:
        """The unix second of an instance's deletion, or None if there is no such instance."""
        found = await self.look(instance, request_id)
        return None if found is None else found.expires_at

    async def look(self, instance: uuid.UUID, request_id: bytes = NO_REQUEST) -> Found | None:
        """What the launcher knows of an instance, or None if there is no such instance."""
        try:
            reply = await self._ask(Verb.FIND, request_id, instance)
        except InstanceNotFoundError:
            return None
        return Found(reply.expires_at, bool(reply.flags & SALVAGE))

    async def remove(self, instance: uuid.UUID, request_id: bytes = NO_REQUEST) -> None:
        """Delete an instance; one that is gone already is a success."""
        with suppress(InstanceNotFoundError):
            await self._ask(Verb.REMOVE, request_id, instance)

    async def health(self) -> str:
        """The launcher's JSON object, not yet parsed."""
        return (await self._ask(Verb.HEALTH)).detail

    async def metrics(self) -> str:
        """The launcher's metrics in Prometheus's text format."""
        return (await self._ask(Verb.METRICS)).detail

    def run(
        self,
        instance: uuid.UUID,
        passed: socket.socket,
        started: Callable[[int], None] | None,
        over: Callable[[RunEnd], None],
        request_id: bytes = NO_REQUEST,
        flags: int = 0,
        tag: bytes = NO_TAG,
    ) -> None:
        """Ask for a container that holds `passed`, which is closed here in every case. Raises LauncherUnavailableError.

        `started` hears the unix second of the instance's deletion; None spares both ends a packet. `over` hears, once, the verdict,
        or why there will be none: RUN was refused, or the connection was lost. `flags`: READ_ONLY and BULK.
        """
        sequence = next(self._sequences)
        flags |= QUIET if started is None else 0
        self._send(Request(Verb.RUN, sequence, instance, flags, request_id, tag).pack(), passed)
        self._runs[sequence] = _RunCall(started, over)

    def hurry(self) -> None:
        """The launcher is silent: nobody waits for what it was asked, runs aside. An instance that it still makes is removed."""
        for verb, answer in self._answers.values():
            if verb is not Verb.HEALTH and not answer.done():
                answer.set_exception(LauncherUnavailableError(reason=f"no answer to {verb.name}: the launcher is silent"))

    def close(self) -> None:
        """Fail what is outstanding and drop the connection. The next call would connect again."""
        self._lose("closed")

    async def _ask(
        self,
        verb: Verb,
        request_id: bytes = NO_REQUEST,
        instance: uuid.UUID = NO_INSTANCE,
        *,
        flags: int = 0,
        other: bytes = NOBODY,
        number: int = 0,
    ) -> Reply:
        """The launcher's DONE; every other answer is raised."""
        sequence = next(self._sequences)
        answer = self._order(Request(verb, sequence, instance, flags, request_id, other, number))
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                reply = await answer
        except TimeoutError:
            self.silent = True
            raise LauncherUnavailableError(reason=f"no answer to {verb.name} in {_ANSWER_SECONDS:.0f} s") from None
        except asyncio.CancelledError:
            if verb in _MAKING and answer.done() and not answer.cancelled() and answer.exception() is None:
                self._remove_unwanted(answer.result())  # cancelled in the instant between the answer and its being looked at
            raise
        if reply.status is not Status.DONE:
            raise _failure(reply)
        return reply

    def _order(self, request: Request) -> asyncio.Future[Reply]:
        self._send(request.pack(), None)
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._answers[request.sequence] = request.verb, answer
        return answer

    def _remove_unwanted(self, created: Reply) -> None:
        """Whoever asked for this instance has left before its name was known: nobody will ever hold a token of it."""
        if created.status is Status.DONE:
            with suppress(LauncherUnavailableError):
                self._order(Request(Verb.REMOVE, next(self._sequences), created.instance)).add_done_callback(_seen)

    def _connected(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        connection: socket.socket | None = None
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            connection.connect(str(self._path))
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        except OSError as error:
            if connection is not None:
                connection.close()
            raise LauncherUnavailableError(reason=f"{self._path}: {error.strerror}") from None
        self._peer_uid = _PEER.unpack(peer)[1]
        asyncio.get_running_loop().add_reader(connection, self._receive)
        self._socket = connection
        return connection

    def _send(self, packet: bytes, passed: socket.socket | None) -> None:
        try:
            connection = self._connected()
        except LauncherUnavailableError:
            if passed is not None:
                passed.close()
            raise
        self._unsent.append((packet, passed))
        if len(self._unsent) == 1:
            self._flush()
            if self._unsent:
                asyncio.get_running_loop().add_writer(connection, self._flush)
        if self._socket is None:
            raise LauncherUnavailableError(reason="the connection broke while sending")

    def _flush(self) -> None:
        connection = self._socket
        while connection is not None and self._unsent:
            packet, passed = self._unsent[0]
            try:
                if passed is None:
                    connection.send(packet)
                else:
                    socket.send_fds(connection, [packet], [passed.fileno()])
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(error.strerror or "send failed")
                return
            self._unsent.popleft()
            if passed is not None:
                passed.close()
        if connection is not None:
            asyncio.get_running_loop().remove_writer(connection)

    def _receive(self) -> None:
        while self._socket is not None:
            try:
                # recv and not recvmsg: a descriptor sent to us is dropped by the kernel.
                packet = self._socket.recv(MAX_REPLY_BYTES + 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._lose(error.strerror or "receive failed")
                return
            if not packet:
                self._lose("closed by the launcher")
                return
            self.silent = False
            try:
                self._dispatch(Reply.unpack(packet))
            except MalformedPacketError as error:
                self._lose(f"malformed packet: {error}")
                return

    def _dispatch(self, reply: Reply) -> None:
        if reply.sequence in self._answers:
            verb, answer = self._answers.pop(reply.sequence)
            if not answer.done():
                answer.set_result(reply)
            elif verb in _MAKING:
                self._remove_unwanted(reply)
            return
        call = self._runs.get(reply.sequence)
        if call is None:
            raise MalformedPacketError("an answer to nothing")
        if reply.status is Status.STARTED:
            if call.started is None:
                raise MalformedPacketError("STARTED was not asked for")
            call.started(reply.expires_at)
            return
        del self._runs[reply.sequence]
        if reply.status is Status.REPEATED:
            call.over(RepeatedError())
        else:
            call.over(reply.verdict if reply.status is Status.ENDED else _failure(reply))

    def _lose(self, reason: str) -> None:
        connection, self._socket = self._socket, None
        self.silent = False
        if connection is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(connection)
            loop.remove_writer(connection)
            connection.close()
            _log.warning("connection to the launcher lost: %s", reason)
        for _, passed in self._unsent:
            if passed is not None:
                passed.close()
        self._unsent.clear()
        answers, self._answers = self._answers, {}
        runs, self._runs = self._runs, {}
        for _, answer in answers.values():
            if not answer.done():
                answer.set_exception(LauncherUnavailableError(reason=reason))
        for call in runs.values():
            call.over(LauncherUnavailableError(reason=reason))


def _failure(reply: Reply) -> ApiError:
    reason = f"launcher: {reply.status.name} {reply.detail!r}"
    match reply.status:
        case Status.UNKNOWN:
            return InstanceNotFoundError()
        case Status.ENGINE_DOWN:
            return EngineUnavailableError(reason=reason)
        case Status.IMAGE_MISSING:
            return ImageMissingError(reason=reason)
        case Status.STORAGE_LOW:
            return HostStorageLowError(reason=reason)
        case Status.BUSY:
            return OverloadedError(reason=reason)
        case Status.QUOTA:
            return QueryQuotaError(hint="start a new instance")
        case Status.OWNER_FULL:
            return TooManyInstancesError(headers={"Retry-After": str(max(1, reply.expires_at - int(time.time())))})
        case Status.HOST_FULL:
            return HostFullError(reason=reason)
        case Status.OFF:
            return ExtendDisabledError()
        case _:
            return InternalError(reason=reason)


def _seen(future: asyncio.Future[Reply]) -> None:
    """Mark an exception as looked at: a call whose caller hung up has nobody to raise it to."""
    if not future.cancelled():
        future.exception()
