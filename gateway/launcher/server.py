"""The launcher's socket: who may speak, what a packet may carry, and whose descriptor is closed when.

The peer's user is checked before a byte is read. A packet that breaks docs/wire.md closes its connection, every descriptor that
came with it, and cancels the connection's runs: whoever sends one is not the gateway that this launcher was made for.
"""

from __future__ import annotations

import array
import asyncio
import errno
import logging
import os
import socket
import struct
from collections import deque
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..operator_log import about
from ..protocol import REQUEST_BYTES, MalformedPacketError, Reply, Request, Verb
from .errors import BusyError
from .service import Service

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 16
_MAX_UNSENT = 256  # replies a peer leaves unread before it is not read from any more
_DESCRIPTOR_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(2 * _DESCRIPTOR_BYTES)  # the kernel closes what finds no room, and sets MSG_CTRUNC
_UNIX_STREAM = (int(socket.AF_UNIX), int(socket.SOCK_STREAM))
_CUT_SHORT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_TOLD_AT_ONCE = frozenset({Verb.FIND, Verb.HEALTH, Verb.METRICS})
_CREDENTIALS = struct.Struct("3i")
_BACKLOG = 16


class Server:
    """Listens at `path` for the one user `uid`; at most `max_in_flight` requests at a time per connection."""

    def __init__(self, path: Path, uid: int, service: Service, max_in_flight: int) -> None:
        self._path = path
        self._uid = uid
        self._service = service
        self._max_in_flight = max_in_flight
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    def listen(self) -> None:
        """The caller holds the state folder's lock, so a socket that lies there is a dead launcher's."""
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.setblocking(False)
            listener.bind(str(self._path))
            self._path.chmod(0o666)  # the check is SO_PEERCRED; permission bits would have to name the gateway's group
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    async def close(self, patience_seconds: float, destroy_seconds: float) -> None:
        """Take nothing new, let runs end for so long, then cancel them and wait until their containers are gone."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._path.unlink(missing_ok=True)
        for connection in self._connections:
            connection.stop_reading()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=patience_seconds)
        left = set(self._tasks)
        for task in left:
            task.cancel()
        if left:
            log.warning("stopping with %d requests cut short", len(left))
            await asyncio.wait(left, timeout=destroy_seconds)
        for connection in list(self._connections):
            connection.close("the launcher stops")

    def _accept(self, listener: socket.socket) -> None:
        try:
            peer, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptors left: asking again at once would only spin
            log.error("cannot accept: %s", error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(1.0, self._listen_again, listener)
            return
        peer.setblocking(False)
        pid, uid, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid != self._uid:
            log.warning("refused a connection of user %d, process %d", uid, pid)
            peer.close()
        elif len(self._connections) >= _MAX_CONNECTIONS:
            log.warning("refused a connection: %d are open", len(self._connections))
            peer.close()
        else:
            self._connections.add(_Connection(self, peer))

    def _listen_again(self, listener: socket.socket) -> None:
        if listener.fileno() != -1:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)


class _Connection:
    def __init__(self, server: Server, sock: socket.socket) -> None:
        self._server = server
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[bytes] = deque()
        self._in_flight: dict[int, asyncio.Task[None]] = {}
        self._closed = False
        self._stopping = False
        self._waiting_to_write = False
        self._reading = False
        self._read(True)

    def stop_reading(self) -> None:
        self._stopping = True
        self._read(False)

    def close(self, reason: str) -> None:
        if self._closed:
            return
        self._closed = True
        log.info("connection closed: %s", reason)
        self._read(False)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._server._connections.discard(self)
        for task in list(self._in_flight.values()):
            task.cancel()

    def send(self, reply: Reply) -> None:
        """Never blocks. What the peer does not read waits; a peer that reads nothing is not read from either."""
        if self._closed:
            return
        packet = reply.pack()
        if not self._unsent:
            try:
                self._socket.send(packet, socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                pass
            except OSError as error:
                self.close(str(error))
                return
        self._unsent.append(packet)
        self._writable()

    def _writable(self) -> None:
        while self._unsent:
            try:
                self._socket.send(self._unsent[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                break
            except OSError as error:
                self.close(str(error))
                return
            self._unsent.popleft()
        if self._unsent:
            self._loop.add_writer(self._socket, self._writable)
        elif self._waiting_to_write:
            self._loop.remove_writer(self._socket)
        self._waiting_to_write = bool(self._unsent)
        self._read(len(self._unsent) < _MAX_UNSENT and not self._stopping)

    def _read(self, wanted: bool) -> None:
        if wanted and not self._reading:
            self._loop.add_reader(self._socket, self._readable)
        elif self._reading and not wanted:
            self._loop.remove_reader(self._socket)
        self._reading = wanted

    def _readable(self) -> None:
        descriptors: list[int] = []
        caller: socket.socket | None = None
        try:
            packet = self._receive(descriptors)
            request = Request.unpack(packet)
            caller = _caller(request, descriptors)
            if request.sequence in self._in_flight:
                raise MalformedPacketError("the sequence is in use")
        except BlockingIOError:
            return
        except EOFError:
            self.close("by the peer")
            return
        except (MalformedPacketError, OSError) as error:
            log.warning("malformed packet: %s", error)
            if caller is not None:
                caller.close()
            self.close("malformed packet")
            return
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if len(self._in_flight) >= self._server._max_in_flight:
            if caller is not None:
                caller.close()
            self.send(self._server._service.refuse(request, BusyError("too many requests at a time")))
        elif request.verb in _TOLD_AT_ONCE:
            self.send(self._server._service.tell(request))
        else:
            task = self._loop.create_task(self._server._service.answer(request, caller, self.send))
            self._in_flight[request.sequence] = task
            self._server._tasks.add(task)
            task.add_done_callback(partial(self._finished, request.sequence, request.request_id, caller))

    def _finished(self, sequence: int, request_id: bytes, caller: socket.socket | None, task: asyncio.Task[None]) -> None:
        if caller is not None:
            caller.close()  # here and not in the task, which has not run a step if it was cancelled before its first
        del self._in_flight[sequence]
        self._server._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a defect of the launcher", exc_info=error, extra=about(request_id))

    def _receive(self, descriptors: list[int]) -> bytes:
        """One packet; its descriptors are in the list as soon as they are ours, whatever is wrong with the packet."""
        packet, ancillary, flags, _ = self._socket.recvmsg(REQUEST_BYTES + 1, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(data) - len(data) % _DESCRIPTOR_BYTES
                descriptors.extend(array.array("i", data[:whole]))
        if flags & _CUT_SHORT:
            raise MalformedPacketError("too long, or too many descriptors")
        if not packet and not descriptors:
            raise EOFError
        return packet


class _SharedSocket(socket.socket):
    """One whose O_NONBLOCK is not ours alone: who passed the descriptor may keep another of the same open file, and clear it."""

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        return super().recv(size, flags | socket.MSG_DONTWAIT)

    def send(self, data: ReadableBuffer, flags: int = 0, /) -> int:
        return super().send(data, flags | socket.MSG_DONTWAIT)


def _caller(request: Request, descriptors: list[int]) -> socket.socket | None:
    """RUN's socket, taken out of the list; raises MalformedPacketError unless there is exactly what the verb carries."""
    if len(descriptors) != (request.verb is Verb.RUN):
        raise MalformedPacketError(f"{request.verb.name} with {len(descriptors)} descriptors")
    if not descriptors:
        return None
    descriptor = descriptors.pop()
    try:
        # Told what it is, it asks the kernel less; what it really is is asked below.
        caller = _SharedSocket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptor)
    except OSError as error:
        os.close(descriptor)
        raise MalformedPacketError(f"the descriptor is not a socket: {errno.errorcode.get(error.errno or 0)}") from None
    try:
        kind = (caller.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN), caller.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE))
        if kind != _UNIX_STREAM:
            raise MalformedPacketError("the descriptor is not a unix stream socket")
        caller.getpeername()
    except OSError:
        caller.close()
        raise MalformedPacketError("the socket is not connected") from None
    except MalformedPacketError:
        caller.close()
        raise
    return caller
