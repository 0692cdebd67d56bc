"""What every answer has in common: an id, one line in the access log, one form of error, one set of headers."""

from __future__ import annotations

import asyncio
import logging
import time

from aiohttp import web
from aiohttp.typedefs import Handler

from ..operator_log import about, where
from .appkeys import ACCESS_LOG, CALLERS, DRAIN, TRAFFIC
from .errors import (
    NO_REQUEST_ID,
    ApiError,
    BadRequestError,
    CircuitOpenError,
    InstanceNotFoundError,
    InternalError,
    MethodNotAllowedError,
    NotFoundError,
    ServiceError,
)
from .exchange import EXCHANGE, Exchange

# nginx's number for a caller that hung up; it is never sent, only logged.
CLIENT_CLOSED = 499

COMMON_HEADERS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": (
        "X-Walkin-Session, X-Walkin-TTL, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset, Retry-After, X-Request-ID, "
        "ETag, Accept-Ranges, Content-Range, Content-Disposition, Idempotent-Replayed"
    ),
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_log = logging.getLogger(__name__)


@web.middleware
async def logged(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost: begins the exchange, and writes its line however it ends."""
    log = request.app[ACCESS_LOG]
    at, began = log.now(), time.perf_counter()
    address = request.app[CALLERS].of(request.remote or "", request.headers.getall("X-Forwarded-For", ()))
    exchange = request[EXCHANGE] = Exchange(address)
    status = InternalError.status
    try:
        response = await handler(request)
        status = CLIENT_CLOSED if exchange.hung_up else response.status
        if request.app[DRAIN].draining:
            response.force_close()
        return response
    except asyncio.CancelledError:
        status = CLIENT_CLOSED
        raise
    finally:
        log.record(
            at=at,
            source_ip=address,
            instance=exchange.instance,
            method=request.method,
            status=status,
            sql_bytes=exchange.sql_bytes,
            user_agent=request.headers.get("User-Agent", ""),
        )
        request.app[TRAFFIC].count(request.path, request.method, status, exchange.code, time.perf_counter() - began)


@web.middleware
async def enveloped(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every failure into the one envelope; tells the operator of those that are ours."""
    exchange = request[EXCHANGE]
    try:
        return await handler(request)
    except ApiError as error:
        return _refuse(exchange, error)
    except web.HTTPException as error:
        return _refuse(exchange, _routing_error(error))
    except Exception as error:
        return _refuse(exchange, InternalError(reason=where(error)))


async def finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    """The last word on every answer's headers, on_response_prepare, which comes before the first byte is sent."""
    exchange = request[EXCHANGE]
    response.headers.update(exchange.headers)
    response.headers.update(COMMON_HEADERS)
    response.headers.setdefault("X-Request-ID", exchange.request_id)
    response.headers.pop("Server", None)


def tell(exchange: Exchange, error: ApiError) -> None:
    """Have the metrics know how a request ended, and the operator, if it was our doing."""
    exchange.code = error.code
    if isinstance(error, ServiceError) and not isinstance(error, CircuitOpenError):  # the breaker says once what is wrong
        _log.log(
            logging.ERROR if error.status == InternalError.status else logging.WARNING,
            "%d %s %s",
            error.status,
            error.code,
            error.reason,
            extra=about(exchange.request_id),
        )


def _refuse(exchange: Exchange, error: ApiError) -> web.Response:
    tell(exchange, error)
    exchange.headers |= error.headers
    if isinstance(error, InstanceNotFoundError):
        # The same bytes and headers for every token failure: no id, no counters, no expiry.
        exchange.request_id, exchange.headers, exchange.instance = NO_REQUEST_ID, {}, None
    return web.Response(status=error.status, body=error.body(exchange.request_id), content_type="application/json")


def _routing_error(error: web.HTTPException) -> ApiError:
    match error:
        case web.HTTPMethodNotAllowed():
            return MethodNotAllowedError(headers={"Allow": ", ".join(sorted(error.allowed_methods))})
        case web.HTTPNotFound():
            return NotFoundError()
        case web.HTTPClientError():
            return BadRequestError()
        case _:
            return InternalError(reason=where(error))
