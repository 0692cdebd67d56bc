"""Which path takes which method: one table for the router, CORS, `Expect` and the metrics' labels."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import wraps

from aiohttp import HttpVersion11, hdrs, web

from ..settings import Settings
from . import handlers, transfer
from .appkeys import REPLAYS, SETTINGS
from .parameters import IDEMPOTENCY_KEY, ON_DAMAGE, SESSION

Handler = Callable[[web.Request], Coroutine[object, object, web.StreamResponse]]


def _finished(handler: Handler) -> Handler:
    """With a key, what a caller has begun goes on when it hangs up."""

    @wraps(handler)
    async def handle(request: web.Request) -> web.StreamResponse:
        if IDEMPOTENCY_KEY not in request.headers:
            return await handler(request)
        return await request.app[REPLAYS].finish(handler(request))

    return handle


def _nothing(_: Settings) -> int:
    return 0


def _statements(settings: Settings) -> int:
    return settings.max_body_bytes


def _file(settings: Settings) -> int:
    return settings.instance_bytes


@dataclass(frozen=True, slots=True)
class Route:
    path: str
    method: str
    handler: Handler
    headers: tuple[str, ...] = ()
    """Of a request, beside those that browsers send anyway."""
    max_body_bytes: Callable[[Settings], int] = _nothing


_DATA = ("Content-Type", SESSION)
_NEW = (*_DATA, ON_DAMAGE)
_KEYED = (*_NEW, IDEMPOTENCY_KEY)
_CACHED = (SESSION, "If-None-Match", "If-Range", "Range")

ROUTES = (
    Route("/sql", hdrs.METH_POST, _finished(handlers.sql), ("Accept", *_KEYED), _statements),
    Route("/batch", hdrs.METH_POST, _finished(handlers.batch), _KEYED, _statements),
    Route("/import", hdrs.METH_POST, _finished(handlers.import_rows), _KEYED, _file),
    Route("/db", hdrs.METH_GET, transfer.get, _CACHED),
    Route("/db", hdrs.METH_HEAD, transfer.get, _CACHED),
    Route("/db", hdrs.METH_PUT, transfer.put, _NEW, _file),
    Route("/schema", hdrs.METH_GET, handlers.schema, (SESSION,)),
    Route("/schema", hdrs.METH_HEAD, handlers.schema, (SESSION,)),
    Route("/fork", hdrs.METH_POST, handlers.fork, (SESSION,)),
    Route("/share", hdrs.METH_POST, handlers.share, (SESSION,)),
    Route("/extend", hdrs.METH_POST, handlers.extend, _DATA, _statements),
    Route("/session", hdrs.METH_DELETE, handlers.end, (SESSION,)),
    Route("/salvage", hdrs.METH_POST, handlers.salvage, (SESSION,)),
    *(
        Route(path, method, handler)
        for path, handler in (
            ("/livez", handlers.livez),
            ("/readyz", handlers.readyz),
            ("/healthz", handlers.healthz),
            ("/openapi.json", handlers.openapi_json),
        )
        for method in (hdrs.METH_GET, hdrs.METH_HEAD)
    ),
)
PATHS = tuple(dict.fromkeys(route.path for route in ROUTES))


def add_to(router: web.UrlDispatcher) -> None:
    for route in ROUTES:
        router.add_route(route.method, route.path, route.handler, expect_handler=_expect(route.max_body_bytes))
    for path in PATHS:
        router.add_route(hdrs.METH_OPTIONS, path, _preflight(path))


def _preflight(path: str) -> Handler:
    """Open to every origin: there is nothing a browser could add to a request, so nothing is protected by refusing one."""
    here = [route for route in ROUTES if route.path == path]
    allowed = ", ".join([*(route.method for route in here), hdrs.METH_OPTIONS])
    headers = {
        "Allow": allowed,
        "Access-Control-Allow-Methods": allowed,
        "Access-Control-Allow-Headers": ", ".join(dict.fromkeys(name for route in here for name in route.headers)),
        "Access-Control-Max-Age": "86400",
    }

    async def preflight(request: web.Request) -> web.Response:
        return web.Response(status=204, headers=headers)

    return preflight


def _expect(max_body_bytes: Callable[[Settings], int]) -> Callable[[web.Request], Awaitable[web.StreamResponse | None]]:
    async def expect(request: web.Request) -> None:
        """`Expect: 100-continue`: ask for the body unless its declared length is refused anyway. HTTP/1.0 knows no such answer."""
        wanted = request.version >= HttpVersion11 and (request.content_length or 0) <= max_body_bytes(request.app[SETTINGS])
        if wanted and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    return expect
