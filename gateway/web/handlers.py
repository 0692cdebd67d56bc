"""The routes. POST /sql reads from top to bottom in the order in which a request is let in."""

from __future__ import annotations

import uuid

import msgspec
from aiohttp import web

from ..uuid7 import uuid7
from . import body, openapi
from .appkeys import CREATE_RATE, DRAIN, HEALTH, LAUNCHER, REQUEST_RATE, RUNS, SETTINGS, TOKENS
from .errors import CallerError, InstanceNotFoundError, RateLimitedError, RunnerFailedError
from .exchange import EXCHANGE, Exchange
from .leases import Ticket
from .rates import Rate
from .runner import Ok, request_frame
from .secret import Secret

SESSION = "X-Walkin-Session"
TTL = "X-Walkin-TTL"
PATHS = ("/sql", "/healthz", "/openapi.json")


async def sql(request: web.Request) -> web.Response:
    app, exchange = request.app, request[EXCHANGE]
    with app[DRAIN].work():
        _count(app[REQUEST_RATE], request, exchange)
        max_bytes = app[SETTINGS].max_body_bytes
        body.check_headers(request, max_bytes)
        statement = body.parse(await body.read(request, max_bytes))
        exchange.sql_bytes = len(statement.sql.encode())
        frame, int64 = request_frame(statement, app[SETTINGS].max_request_frame_bytes), statement.int64
        del statement  # the wait may be long, and decoded arguments take many times the frame's size
        presented = [Secret(value) for value in request.headers.getall(SESSION, [])]
        with app[RUNS].ticket(request.remote or "") as ticket:
            if presented:
                answer = await _again(app, exchange, ticket, presented, frame, int64)
            else:
                _count(app[CREATE_RATE], request, exchange)
                answer = await _first(app, exchange, ticket, frame, int64)
        return web.Response(body=_result(answer), content_type="application/json")


async def healthz(request: web.Request) -> web.Response:
    status, report = await request.app[HEALTH].report()
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
    """`Expect: 100-continue`: ask for the body unless its declared length is refused anyway."""
    if (request.content_length or 0) <= request.app[SETTINGS].max_body_bytes and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _again(
    app: web.Application, exchange: Exchange, ticket: Ticket, presented: list[Secret[str]], frame: bytes, int64: body.Int64Form
) -> Ok:
    """A request with a token. RUN notices by itself that an instance is gone. A token that is no good never holds a slot: it asks
    FIND for an instance that is nowhere, and gets the same answer."""
    instance, verified = app[TOKENS].resolve(presented[0])
    if not verified or len(presented) > 1:
        await app[LAUNCHER].find(instance)
        raise InstanceNotFoundError
    if app[LAUNCHER].silent:
        # Nobody is to wait for a lease, a slot and a container of a launcher that hangs: it answers this, or it answers nothing.
        await app[LAUNCHER].find(instance)
    exchange.instance = instance
    async with app[RUNS].turn(ticket, instance) as turn:
        try:
            return await turn.run(frame, int64)
        finally:
            if turn.expires_at is not None:
                exchange.headers[TTL] = str(turn.expires_at)


async def _first(app: web.Application, exchange: Exchange, ticket: Ticket, frame: bytes, int64: body.Int64Form) -> Ok:
    """A request without a token: a fresh instance once its turn has come, kept if its SQL was at fault, removed if we were."""
    # Nobody else can want what has no name yet, so any lease will do until the launcher has named it.
    async with app[RUNS].turn(ticket, uuid7()) as turn:
        instance, expires_at = await app[LAUNCHER].create()
        turn.rename(instance)
        exchange.instance = instance
        try:
            answer = await turn.run(frame, int64)
        except InstanceNotFoundError:
            # Nobody presented a token, so this cannot be the caller's 404: the instance ended before its first request began.
            raise RunnerFailedError(reason="a new instance expired before it ran") from None
        except CallerError:
            _hand_over(app, exchange, instance, expires_at)
            raise
        except BaseException:
            app[RUNS].discard(instance)
            raise
        _hand_over(app, exchange, instance, expires_at)
        return answer


def _hand_over(app: web.Application, exchange: Exchange, instance: uuid.UUID, expires_at: int) -> None:
    exchange.headers[SESSION] = app[TOKENS].issue(instance).reveal()
    exchange.headers[TTL] = str(expires_at)


def _count(rate: Rate, request: web.Request, exchange: Exchange) -> None:
    standing = rate.hit(request.remote or "")
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
