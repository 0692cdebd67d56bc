"""How a request is let in, once for all routes, and how its instance is had.

    admitted()           drain → breaker → rate of requests; what is wrong with token and headers before anything else is asked
    Visit.body()         the body, in the room that its address may take
    Visit.find()         for routes that need more than a run: the token, and the launcher's word that its instance lives
    Visit.within_turn()  ticket → token, or rate of creates and a new instance → lease and slot → runs; and back again

The body is read before anybody asks what the token is worth, on every route: a token that is no good is the same 404 after the same
work, one question to the launcher about an instance that is nowhere.
"""

from __future__ import annotations

import asyncio
import hmac
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Literal, TypeVar

from aiohttp import web

from ..protocol import NO_TAG
from ..uuid7 import uuid7
from . import damage
from .appkeys import (
    BODIES,
    BREAKER,
    BULK_GATE,
    CREATE_RATE,
    DRAIN,
    KEYS,
    LAUNCHER,
    REPLAYS,
    REQUEST_RATE,
    ROOM,
    RUNS,
    SETTINGS,
    TOKENS,
)
from .callers import owner_tag
from .connection import vouch_for
from .errors import (
    AlreadyDoneError,
    ApiError,
    BadParameterError,
    CallerError,
    DatabaseDamagedError,
    InstanceNotFoundError,
    RateLimitedError,
    ReadOnlyError,
    RunnerFailedError,
)
from .exchange import EXCHANGE, Exchange
from .launcher import Found, RepeatedError
from .leases import Ticket
from .parameters import IDEMPOTENCY_KEY, SESSION, TTL, idempotency_key, on_damage_header
from .rates import Rate
from .replays import Attempt
from .room import Loan
from .runner import Order
from .runs import Turn
from .secret import Secret
from .tokens import Resolved

T = TypeVar("T")

Makes = Literal["nothing", "fresh", "copy"]
"""Of a route: an instance for whoever comes without a token ("fresh"), one for everybody ("copy"), or none."""


def admitted(request: web.Request, *, makes: Makes = "nothing", keyed: bool = False) -> Visit:
    """For `with`, within which everything that one request does happens; raises ApiErrors.

    `keyed`: whether the route takes an Idempotency-Key.
    """
    app, exchange = request.app, request[EXCHANGE]
    drain = app[DRAIN]
    drain.enter()
    try:
        fresh = makes == "fresh" and SESSION not in request.headers
        creates = fresh or makes == "copy"
        app[BREAKER].refuse_if_open(creates=creates)
        _count(app[REQUEST_RATE], exchange)
        return Visit(request, exchange, app[ROOM].loan(exchange.address), fresh=fresh, creates=creates, keyed=keyed)
    except BaseException:
        drain.leave()
        raise


class Visit:
    """One request, from its admission to its answer."""

    __slots__ = (
        "_expires_at",
        "_in_bulk",
        "_key",
        "_presented",
        "_resolved",
        "app",
        "attempt",
        "creates",
        "exchange",
        "fresh",
        "instance",
        "loan",
        "on_damage",
        "request",
    )

    def __init__(self, request: web.Request, exchange: Exchange, loan: Loan, *, fresh: bool, creates: bool, keyed: bool) -> None:
        self.app = request.app
        self.request = request
        self.exchange = exchange
        self.loan = loan
        self.fresh = fresh
        """Whether it is to get an instance of its own."""
        self.creates = creates
        """Whether it counts as a new instance."""
        self.instance: uuid.UUID | None = None
        """Once it is known to be the caller's."""
        self.attempt: Attempt | None = None
        self.on_damage = on_damage_header(request.headers, creates=fresh)
        self._presented = [Secret(value) for value in request.headers.getall(SESSION, [])]
        self._resolved: Resolved | None = None
        self._expires_at: int | None = None
        self._in_bulk = False
        if not self._presented and not fresh:
            raise BadParameterError(f"{SESSION} is missing")
        self._key = idempotency_key(request.headers) if keyed else None
        if self._key is not None and fresh:
            raise BadParameterError(f"{IDEMPOTENCY_KEY} goes with {SESSION}: without it each attempt makes an instance of its own")

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.loan.close()
        self.app[DRAIN].leave()

    async def body(self, max_bytes: int) -> bytes:
        """All of it, held by the loan."""
        raw = await self.app[BODIES].read(self.request, self.loan, max_bytes)
        if self._key is not None:
            kind = self.request.headers.get("Content-Type", "")
            self.attempt = Attempt.of(self._key, self.request.path_qs.encode(), kind.encode("utf-8", "surrogateescape"), raw)
        return raw

    @property
    def reads_only(self) -> bool:
        """Whether the token is one that can only read."""
        return not self.fresh and self._token().access == "read-only"

    async def find(self, *, writes: bool) -> Found:
        """The caller's instance, as the launcher knows it; raises InstanceNotFoundError, and ReadOnlyError if it `writes`."""
        found = await self._look()
        if writes and self.reads_only:
            raise ReadOnlyError(hint="this needs the token that the instance was made with")
        vouch_for(self.request)
        return found

    def count_create(self) -> None:
        """Raises RateLimitedError."""
        _count(self.app[CREATE_RATE], self.exchange)

    async def within_turn(self, work: Callable[[Turn], Awaitable[T]], *, keeps_at_fault: bool = True) -> T:
        """Do it with lease and slot of the caller's instance, or of a new one. That is handed over if all goes well, and with
        `keeps_at_fault` if the request was at fault; otherwise it is removed. Damage that is met is dealt with afterwards.

        No context manager: one that is made of a generator costs every request 4 µs more.
        """
        app, exchange = self.app, self.exchange
        try:
            with app[BREAKER].passage(creates=self.creates), app[RUNS].ticket(exchange.address, creates=self.creates) as ticket:
                if self.fresh:
                    self.count_create()
                    return await self._within_new(ticket, work, keeps_at_fault)
                async with app[RUNS].turn(ticket, await self._known(), exchange.request_id_bytes) as turn:
                    try:
                        answer = await work(turn)
                    finally:
                        self.show_end(turn)
        except DatabaseDamagedError as error:
            if self.instance is None or "report" in error.extra:
                raise
            met = await damage.met(self, error)
            self._keep(met)
            raise met from None
        vouch_for(self.request)
        return answer

    async def within_bulk_turn(self, work: Callable[[Turn], Awaitable[T]], *, keeps_at_fault: bool = True) -> T:
        """The same, behind the gate of bulk runs."""
        async with self.gate():
            return await self.within_turn(work, keeps_at_fault=keeps_at_fault)

    @asynccontextmanager
    async def gate(self) -> AsyncIterator[None]:
        """Around a turn with bulk runs; within another gate of the same visit it is none."""
        if self._in_bulk:
            yield
            return
        async with self.app[BULK_GATE].passage(self.exchange.address):
            self._in_bulk = True
            try:
                yield
            finally:
                self._in_bulk = False

    async def ran(self, run: Awaitable[T], turn: Turn) -> T:
        """Await one run of the turn, under the breaker's eyes."""
        breaker, address = self.app[BREAKER], self.exchange.address
        try:
            answer = await run
        except ApiError as error:
            breaker.saw(address, error)
            raise
        except asyncio.CancelledError:
            if turn.expires_at is not None:
                breaker.saw(address, None)
            raise
        breaker.saw(address, None)
        return answer

    async def perform(self, turn: Turn, order: Order, kind: type[T], on: uuid.UUID | None = None) -> T:
        """An operation whose reply is of one kind. `on`: a copy or a staging instance, instead of the turn's own."""
        reply = await self.ran(turn.perform(order, on=on), turn)
        if not isinstance(reply, kind):
            raise TypeError(f"{order.op} is not answered {kind.__name__}")
        return reply

    async def began(self, run: Awaitable[T]) -> T:
        """Await the beginning of a run whose end is seen to elsewhere."""
        try:
            return await run
        except ApiError as error:
            self.app[BREAKER].saw(self.exchange.address, error)
            raise

    async def once(self, turn: Turn, run: Callable[[bytes], Awaitable[bytes]]) -> bytes:
        """What `run` answers, which gets the tag for the launcher; or what it answered before, to a request of the same key.

        Within the turn, so that two attempts never run at once. A read-only token changes nothing: its key is not looked at.
        """
        if self.attempt is None or self.reads_only:
            return await run(NO_TAG)
        if (answer := self.app[REPLAYS].find(self.own_instance, self.attempt)) is not None:
            await self._look()
            self.exchange.headers["Idempotent-Replayed"] = "true"
            if isinstance(answer, ApiError):
                raise answer
            return answer
        try:
            answer = await run(self.attempt.tag)
        except RepeatedError:
            raise AlreadyDoneError(hint="look at what is there; for another attempt take another key") from None
        except CallerError as error:
            self.show_end(turn)
            self._keep(error)
            raise
        self.show_end(turn)
        self._keep(answer)
        return answer

    def show_end(self, turn: Turn) -> None:
        """Have the answer say when the instance ends, if that is known."""
        end = self._expires_at if self._expires_at is not None else turn.expires_at
        if end is not None:
            self._tell_end(end)

    def _tell_end(self, expires_at: int) -> None:
        self._expires_at = expires_at
        self.exchange.headers[TTL] = str(expires_at)

    def hand_over(self, instance: uuid.UUID, expires_at: int) -> None:
        """Have the answer carry the token of a new instance, which is the caller's from now on."""
        self.exchange.headers[SESSION] = self.app[TOKENS].issue(instance).reveal()
        self.exchange.headers[TTL] = str(expires_at)

    @property
    def owner(self) -> bytes:
        """Whose instances the launcher counts together. A tag is good for one token key: what an address had made before the key
        was replaced counts no more for it, so that for one lifetime after each rotation it may have twice its share."""
        key = hmac.digest(self.app[KEYS].current.value.reveal(), b"mayfly owner tags", "sha256")
        return owner_tag(key, self.exchange.address)

    @property
    def salvages(self) -> bool:
        """Whether a new instance of this request is to be salvaged when it is found damaged."""
        return (self.on_damage or self.app[SETTINGS].on_damage) == "salvage"

    @property
    def own_instance(self) -> uuid.UUID:
        """The caller's, once it is known."""
        if self.instance is None:
            raise RuntimeError("the instance is not known yet")
        return self.instance

    def _token(self) -> Resolved:
        if self._resolved is None:
            self._resolved = self.app[TOKENS].resolve(self._presented[0])
        return self._resolved

    @property
    def _genuine(self) -> bool:
        return self._token().verified and len(self._presented) == 1

    async def _known(self) -> uuid.UUID:
        """The caller's instance. RUN notices by itself that it is gone. A token that is no good never holds a slot: it asks FIND
        for an instance that is nowhere, and gets the same answer.

        Who would wait asks FIND first too, unless a run has told already that the instance lives: a token of one that is gone is
        answered as soon as one that never was any. Nor does who asks wait for lease, slot and container of a launcher that hangs:
        it answers this, or it answers nothing. Who need not ask waits until the breaker has noticed.
        """
        if self.instance is None:
            instance, runs = self._token().instance, self.app[RUNS]
            if not self._genuine or self.app[LAUNCHER].silent:
                await self._look()
            elif runs.leases.crowded(instance):
                if (expires_at := runs.end_to_come(instance)) is None:
                    await self._look()
                else:
                    self._tell_end(expires_at)
            self.instance = self.exchange.instance = instance
        return self.instance

    async def _look(self) -> Found:
        instance = self._token().instance
        found = await self.app[LAUNCHER].look(instance, self.exchange.request_id_bytes)
        if not self._genuine or found is None:
            raise InstanceNotFoundError
        self.instance = self.exchange.instance = instance
        self._tell_end(found.expires_at)
        return found

    async def _within_new(self, ticket: Ticket, work: Callable[[Turn], Awaitable[T]], keeps_at_fault: bool) -> T:
        app, request_id = self.app, self.exchange.request_id_bytes
        # Nobody else can want what has no name yet, so any lease will do until the launcher has named it.
        async with app[RUNS].turn(ticket, uuid7(), request_id) as turn:
            instance, expires_at = await app[LAUNCHER].create(self.owner, request_id, salvage=self.salvages)
            turn.rename(instance, expires_at)
            self.instance = self.exchange.instance = instance
            self._expires_at = expires_at
            try:
                answer = await work(turn)
            except InstanceNotFoundError:
                # Nobody presented a token, so this cannot be the caller's 404: the instance ended before its first request began.
                raise RunnerFailedError(reason="a new instance expired before it ran") from None
            except BaseException as error:
                if keeps_at_fault and isinstance(error, CallerError):
                    self.hand_over(instance, expires_at)
                else:
                    app[RUNS].discard(instance, request_id)
                raise
            self.hand_over(instance, expires_at)
            return answer

    def _keep(self, answer: bytes | ApiError) -> None:
        if self.attempt is not None and not self.reads_only and self._expires_at is not None:
            self.app[REPLAYS].keep(self.own_instance, self.attempt, answer, self.exchange.address, self._expires_at)


def _count(rate: Rate, exchange: Exchange) -> None:
    standing = rate.hit(exchange.address)
    if standing is None:
        return
    if not standing.allowed:
        raise RateLimitedError(retry_after_seconds=standing.reset_seconds, headers=standing.headers())
    # The first limit counted is the one shown: the second one appears when it refuses.
    for name, value in standing.headers().items():
        exchange.headers.setdefault(name, value)
