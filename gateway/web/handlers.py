"""The routes. POST /sql reads from top to bottom in the order in which a request is let in."""

from __future__ import annotations

import asyncio
import hmac
import uuid

import msgspec
from aiohttp import HttpVersion11, web

from ..uuid7 import uuid7
from . import body, openapi
from .appkeys import BODIES, BREAKER, CREATE_RATE, DRAIN, HEALTH, KEYS, LAUNCHER, REQUEST_RATE, RUNS, SETTINGS, TOKENS
from .callers import owner_tag
from .connection import vouch_for
from .errors import ApiError, CallerError, InstanceNotFoundError, RateLimitedError, RunnerFailedError
from .exchange import EXCHANGE, Exchange
from .health import LIVE
from .leases import Ticket
from .rates import Rate
from .runner import Ok, request_frame
from .runs import Turn
from .secret import Secret

SESSION = "X-Walkin-Session"
TTL = "X-Walkin-TTL"
PATHS = ("/sql", "/livez", "/readyz", "/healthz", "/openapi.json")


async def sql(request: web.Request) -> web.Response:
    app, exchange = request.app, request[EXCHANGE]
    with app[DRAIN].work():
        creates = SESSION not in request.headers
        app[BREAKER].refuse_if_open(creates=creates)
        _count(app[REQUEST_RATE], exchange)
        body.check_headers(request, app[SETTINGS].max_body_bytes)
        statement = body.parse(await app[BODIES].read(request))
        exchange.sql_bytes = len(statement.sql.encode())
        frame, int64 = request_frame(statement, app[SETTINGS].max_request_frame_bytes), statement.int64
        del statement  # the wait may be long, and decoded arguments take many times the frame's size
        presented = [Secret(value) for value in request.headers.getall(SESSION, [])]
        with app[BREAKER].passage(creates=creates), app[RUNS].ticket(exchange.address, creates=creates) as ticket:
            if creates:
                _count(app[CREATE_RATE], exchange)
                answer = await _first(app, exchange, ticket, frame, int64)
            else:
                answer = await _again(app, exchange, ticket, presented, frame, int64)
                vouch_for(request)
        return web.Response(body=_result(answer), content_type="application/json")


async def healthz(request: web.Request) -> web.Response:
    status, report = await request.app[HEALTH].report()
    return web.Response(status=status, body=msgspec.json.encode(report), content_type="application/json")


async def livez(request: web.Request) -> web.Response:
    """That the loop turns; nobody is asked."""
    return web.Response(body=LIVE, content_type="application/json")


async def readyz(request: web.Request) -> web.Response:
    status, report = await request.app[HEALTH].readiness()
    return web.Response(status=status, body=msgspec.json.encode(report), content_type="application/json")


async def openapi_json(request: web.Request) -> web.Response:
    return web.Response(body=openapi.DOCUMENT, content_type="application/json")


async def preflight(request: web.Request) -> web.Response:
    """Open to every origin: there is nothing a browser could add to a request, so nothing is protected by refusing one."""
    allowed = "POST, OPTIONS" if request.path == "/sql" else "GET, HEAD, OPTIONS"
    return web.Response(
        status=204,
        headers={
            "Allow": allowed,
            "Access-Control-Allow-Methods": allowed,
            "Access-Control-Allow-Headers": f"Content-Type, {SESSION}",
            "Access-Control-Max-Age": "86400",
        },
    )


async def expect(request: web.Request) -> None:
    """`Expect: 100-continue`: ask for the body unless its declared length is refused anyway. HTTP/1.0 knows no such answer."""
    wanted = request.version >= HttpVersion11 and (request.content_length or 0) <= request.app[SETTINGS].max_body_bytes
    if wanted and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _again(
    app: web.Application, exchange: Exchange, ticket: Ticket, presented: list[Secret[str]], frame: bytes, int64: body.Int64Form
) -> Ok:
    """A request with a token. RUN notices by itself that an instance is gone. A token that is no good never holds a slot: it asks
    FIND for an instance that is nowhere, and gets the same answer.

    Who would wait asks FIND first too: a token of an instance that is gone is answered as soon as one that never was any. Nor does
    anybody wait for lease, slot and container of a launcher that hangs: it answers this, or it answers nothing.
    """
    instance, verified = app[TOKENS].resolve(presented[0])
    genuine = verified and len(presented) == 1
    if not genuine or app[LAUNCHER].silent or app[RUNS].leases.crowded(instance):
        expires_at = await app[LAUNCHER].find(instance, exchange.request_id_bytes)
        if not genuine or expires_at is None:
            raise InstanceNotFoundError
    exchange.instance = instance
    async with app[RUNS].turn(ticket, instance, exchange.request_id_bytes) as turn:
        try:
            return await _run(app, exchange, turn, frame, int64)
        finally:
            if turn.expires_at is not None:
                exchange.headers[TTL] = str(turn.expires_at)


async def _first(app: web.Application, exchange: Exchange, ticket: Ticket, frame: bytes, int64: body.Int64Form) -> Ok:
    """A request without a token: a fresh instance once its turn has come, kept if its SQL was at fault, removed if we were."""
    # Nobody else can want what has no name yet, so any lease will do until the launcher has named it.
    async with app[RUNS].turn(ticket, uuid7(), exchange.request_id_bytes) as turn:
        instance, expires_at = await app[LAUNCHER].create(_owner(app, exchange), exchange.request_id_bytes)
        turn.rename(instance, expires_at)
        exchange.instance = instance
        try:
            answer = await _run(app, exchange, turn, frame, int64)
        except InstanceNotFoundError:
            # Nobody presented a token, so this cannot be the caller's 404: the instance ended before its first request began.
            raise RunnerFailedError(reason="a new instance expired before it ran") from None
        except CallerError:
            _hand_over(app, exchange, instance, expires_at)
            raise
        except BaseException:
            app[RUNS].discard(instance, exchange.request_id_bytes)
            raise
        _hand_over(app, exchange, instance, expires_at)
        return answer


async def _run(app: web.Application, exchange: Exchange, turn: Turn, frame: bytes, int64: body.Int64Form) -> Ok:
    try:
        answer = await turn.run(frame, int64)
    except ApiError as error:
        app[BREAKER].saw(exchange.address, error)
        raise
    except asyncio.CancelledError:
        if turn.expires_at is not None:
            app[BREAKER].saw(exchange.address, None)
        raise
    app[BREAKER].saw(exchange.address, None)
    return answer


def _owner(app: web.Application, exchange: Exchange) -> bytes:
    """Whose instances the launcher counts together. A tag is good for one token key: what an address had made before the key was
    replaced counts no more for it, so that for one lifetime after each rotation it may have twice its share."""
    key = hmac.digest(app[KEYS].current.value.reveal(), b"mayfly owner tags", "sha256")
    return owner_tag(key, exchange.address)


def _hand_over(app: web.Application, exchange: Exchange, instance: uuid.UUID, expires_at: int) -> None:
    exchange.headers[SESSION] = app[TOKENS].issue(instance).reveal()
    exchange.headers[TTL] = str(expires_at)


def _count(rate: Rate, exchange: Exchange) -> None:
    standing = rate.hit(exchange.address)
    if standing is None:
        return
    if not standing.allowed:
        raise RateLimitedError(retry_after_seconds=standing.reset_seconds, headers=standing.headers())
    # The first limit counted is the one shown: the second one appears when it refuses.
    for name, value in standing.headers().items():
        exchange.headers.setdefault(name, value)


def _result(answer: Ok) -> bytes:
    if answer.columns is None:
        return msgspec.json.encode({"rows_affected": answer.rows_affected})
    result = {"columns": answer.columns, "rows": answer.rows, "rows_affected": answer.rows_affected}
    if answer.truncated:
        result["truncated"] = True
    return msgspec.json.encode(result)
