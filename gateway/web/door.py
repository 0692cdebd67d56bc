"""Who may come in: an accept loop of our own, a cap on all connections and on each address's, and one watch over their deadlines.

A storm of connections waits in the kernel while a few are taken up in each turn of the loop. Beyond an address's cap a newcomer is
reset. Beyond the cap on all, one gives way that has no whole request at hand: first strangers that never were answered, then
strangers, then those that do not read their answer, then callers with a genuine token, of each kind the one that has been waiting
longest.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from math import inf

from ..settings import Settings
from .callers import Callers
from .connection import Connection, reset_on_close
from .rates import counted_as, network_of
from .turnstile import TURN_SECONDS, Acquaintances, Turnstile

# A connection that comes while so many wait to be taken up is not answered by the kernel, and its caller tries again.
BACKLOG = 1024
# What a connection may have sent before it is read: the kernel's memory, and the largest piece that is read at once.
RECEIVE_BYTES = 64 << 10
# Of answers that callers have not read, all together; beyond it the oldest goes unread.
MAX_UNREAD_BYTES = 64 << 20
# An IPv6 /48 has as many connections as this many addresses.
_ADDRESSES_OF_48 = 4
_ACCEPT_SECONDS = 0.0005
_PAUSE_SECONDS = 0.1
_WATCH_SECONDS = 1.0
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_log = logging.getLogger(__name__)

MakeConnection = Callable[["Door", str, bool], Connection]


class Door:
    """In the form of an asyncio server: `sockets`, `close()`."""

    def __init__(self, settings: Settings, callers: Callers, make: MakeConnection) -> None:
        self._loop = asyncio.get_running_loop()
        self._callers = callers
        self._make = make
        self._most = settings.connections or inf
        self._most_of_address = settings.connections_per_address or inf
        self.header_seconds = settings.header_seconds
        self.keepalive_seconds = settings.keepalive_seconds
        self.answer_seconds = settings.answer_seconds
        self.turnstile = Turnstile()
        self.acquaintances = Acquaintances()
        self.sockets: list[socket.socket] = []
        self._addresses: Counter[str] = Counter()
        self._open: set[Connection] = set()
        # Those without a whole request, in the order in which they give way: line after line, each from its front.
        self._lines: tuple[dict[Connection, None], ...] = ({}, {}, {})
        self._unread: dict[Connection, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._exhausted = False
        self.refused: Counter[str] = Counter()
        """Newcomers so far that were reset: their "address" had its most, or the door was "full" of requests at work."""
        self.evicted: Counter[str] = Counter()
        """Connections so far that were closed: to make "room", for an answer "unread", or one read too slowly ("answer"), for want
        of the rest of a "header", or of another request ("idle")."""
        self.answered: Counter[tuple[int, str]] = Counter()
        """Answers so far to what never became a request, by status and code."""
        self._watch_seconds = min(_WATCH_SECONDS, settings.header_seconds / 2, settings.keepalive_seconds / 2)
        self._watch: asyncio.Handle = self._loop.call_later(self._watch_seconds, self._begin_watch)

    @property
    def connections(self) -> int:
        return len(self._open)

    # ── taking up

    async def listen(self, host: str, port: int) -> None:
        """On every address of the host; raises OSError."""
        found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, kind, protocol, _, address in dict.fromkeys(found):
                listener = socket.socket(family, kind, protocol)
                self.sockets.append(listener)
                listener.setblocking(False)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES // 2)  # the kernel doubles it
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind(address)
                listener.listen(BACKLOG)
                self._loop.add_reader(listener, self._accept, listener)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Nobody new comes in."""
        for listener in self.sockets:
            self._loop.remove_reader(listener)
            listener.close()
        self.sockets.clear()
        self._watch.cancel()

    def _accept(self, listener: socket.socket) -> None:
        end = time.perf_counter() + _ACCEPT_SECONDS
        taken = 0
        # Each that is taken up is a stranger's work of some turns to come, so no more of them than of strangers' requests.
        while taken < self.turnstile.width:
            try:
                accepted, peer = listener.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._rest(listener, error)
                    break
                accepted = None  # who came has hung up already
            if accepted is not None:
                taken += self._admit(accepted, peer[0])
            if time.perf_counter() > end:
                break
        if taken:
            self.turnstile.turn()

    def _admit(self, accepted: socket.socket, peer: str) -> bool:
        address = counted_as(self._callers.of(peer, ()))
        trusted_proxy = self._callers.is_proxy(peer)
        full = not trusted_proxy and any(
            self._addresses[network] >= factor * self._most_of_address for network, factor in _networks(address).items()
        )
        if full or (len(self._open) >= self._most and not self._make_room()):
            self.refused["address" if full else "full"] += 1
            reset_on_close(accepted)
            accepted.close()
            return False
        accepted.setblocking(False)
        connection = self._make(self, address, trusted_proxy)
        self._open.add(connection)
        self._addresses.update(_networks(address).keys())
        task = self._loop.create_task(self._welcome(connection, accepted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _welcome(self, connection: Connection, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, accepted)
        except OSError:
            accepted.close()
            self.left(connection)

    def _make_room(self) -> bool:
        for line in (*self._lines[:2], self._unread, self._lines[2]):
            for connection in line:
                self.evicted["room"] += 1
                connection.reset()
                self.left(connection)
                return True
        return False

    def _rest(self, listener: socket.socket, error: OSError) -> None:
        """Who waits in the kernel would wake us in every turn."""
        if not self._exhausted:
            _log.error("no connection can be taken up: %s", error.strerror)
        self._exhausted = True
        self._loop.remove_reader(listener)
        self._loop.call_later(_PAUSE_SECONDS, self._go_on, listener)

    def _go_on(self, listener: socket.socket) -> None:
        self._exhausted = False
        if listener in self.sockets:
            self._loop.add_reader(listener, self._accept, listener)

    # ── what connections tell

    def entered(self, connection: Connection) -> None:
        self._line_up(connection)

    def at_work(self, connection: Connection) -> None:
        """A whole request is at hand."""
        if connection.line is not None:
            del connection.line[connection]
            connection.line = None

    def idle(self, connection: Connection, begun: bool) -> None:
        """All its requests have been answered; `begun`: but for one that has only begun to arrive."""
        if connection in self._open:
            connection.deadline = time.monotonic() + (self.header_seconds if begun else self.keepalive_seconds)
            self.at_work(connection)
            self._line_up(connection)

    def left(self, connection: Connection) -> None:
        if connection not in self._open:
            return
        self._open.discard(connection)
        self.at_work(connection)
        self.read(connection)
        for network in _networks(connection.address):
            self._addresses[network] -= 1
            if not self._addresses[network]:
                del self._addresses[network]

    def unread(self, connection: Connection) -> None:
        """An answer does not fit the kernel's buffers."""
        self._unread[connection] = None
        while sum(each.unsent_bytes for each in self._unread) > MAX_UNREAD_BYTES:
            oldest = next(iter(self._unread))
            del self._unread[oldest]
            self.evicted["unread"] += 1
            oldest.reset()

    def read(self, connection: Connection) -> None:
        self._unread.pop(connection, None)

    def _line_up(self, connection: Connection) -> None:
        connection.line = self._lines[2 if connection.known else int(connection.served)]
        connection.line[connection] = None

    # ── deadlines

    def close_idle(self) -> None:
        """Those that were answered and wait for their next request."""
        for connection in [*self._open]:
            if connection.served and connection.deadline < inf:
                connection.force_close()

    def _begin_watch(self) -> None:
        self._go_round(iter([*self._open]))

    def _go_round(self, connections: Iterator[Connection]) -> None:
        now = time.monotonic()
        for number, connection in enumerate(connections):
            if connection.deadline <= now:
                connection.expire()
            if number % 16 == 15 and time.monotonic() - now > TURN_SECONDS / 2:
                self._watch = self._loop.call_soon(self._go_round, connections)
                return
        self._watch = self._loop.call_later(self._watch_seconds, self._begin_watch)


def _networks(address: str) -> dict[str, int]:
    """What a connection of the address, or of the IPv6 /64, counts for, each with how many addresses' connections it may have."""
    if "/" not in address:
        return {address: 1}
    return {address: 1, network_of(address.partition("/")[0], 48): _ADDRESSES_OF_48}
