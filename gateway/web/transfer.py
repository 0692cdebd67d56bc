"""GET, HEAD and PUT /db: the instance as a SQLite file. The bytes pass through here and are never opened."""

from __future__ import annotations

import uuid
from contextlib import ExitStack

import msgspec
from aiohttp import hdrs, web

from ..protocol import NOBODY
from .admission import Visit, admitted
from .appkeys import ANSWERS, LAUNCHER, RUNS, SETTINGS
from .body import check_headers
from .damage import report
from .errors import BadParameterError, DatabaseDamagedError, RangeNotSatisfiableError
from .exchange import EXCHANGE
from .parameters import FILE_TYPES, read_on_damage, read_query
from .ranges import Beyond, Part, Unchanged, decide
from .runner import Accepted, Report, Reported, accept_order, export_order, salvage_order, verify_order
from .runs import Turn

MEDIA_TYPE = "application/vnd.sqlite3"
FILE_HEADERS = {"Accept-Ranges": "bytes", "Content-Disposition": 'attachment; filename="mayfly.sqlite"'}
# A caller has MAYFLY_ANSWER_SECONDS to read so much.
PIECE_BYTES = 1 << 20


async def get(request: web.Request) -> web.StreamResponse:
    """Of HEAD too, which costs as much: the tag is the file's."""
    with admitted(request) as visit, request.app[ANSWERS].loan(visit.exchange.address) as loan:
        read_query(request.rel_url.raw_query_string)
        file = await visit.within_turn(lambda turn: visit.ran(turn.fetch(export_order(), loan), turn))
        return await _send(request, file.content, f'"{file.sha256}"')


async def put(request: web.Request) -> web.Response:
    """A file becomes a new instance, or takes the place of the caller's own once it has been accepted."""
    with admitted(request, makes="fresh") as visit:
        if hdrs.IF_MATCH in request.headers or hdrs.IF_NONE_MATCH in request.headers:
            raise BadParameterError("PUT /db takes no If-Match and no If-None-Match")  # to ignore one would lose somebody's data
        wished = read_on_damage(request.rel_url.raw_query_string)
        limit = request.app[SETTINGS].instance_bytes
        check_headers(request, limit, FILE_TYPES)
        upload = await visit.body(limit)
        salvages = visit.salvages if visit.fresh else (await visit.find(writes=True)).salvage
        if wished is not None:
            salvages = wished == "salvage"
        bring = _take_in if visit.fresh else _replace
        taken = await visit.within_bulk_turn(lambda turn: bring(visit, turn, upload, salvages), keeps_at_fault=False)
        status = 201 if visit.fresh else 200
        return web.Response(status=status, body=msgspec.json.encode(taken), content_type="application/json")


async def _replace(visit: Visit, turn: Turn, upload: bytes, salvages: bool) -> dict[str, object]:
    """Into an instance that belongs to nobody, whose volume then takes the place of the caller's."""
    launcher, request_id = visit.app[LAUNCHER], visit.exchange.request_id_bytes
    with ExitStack() as unless_placed:
        staging, _ = await launcher.create(NOBODY, request_id)
        unless_placed.callback(visit.app[RUNS].discard, staging, request_id)
        taken = await _take_in(visit, turn, upload, salvages, staging)
        await launcher.replace(visit.own_instance, staging, request_id)
        unless_placed.pop_all()
    return taken


async def _take_in(visit: Visit, turn: Turn, upload: bytes, salvages: bool, on: uuid.UUID | None = None) -> dict[str, object]:
    """The answer, once the file is in the volume; raises DatabaseDamagedError with a report, or FileRefusedError."""
    try:
        reply = await visit.ran(turn.perform(accept_order(upload), on=on), turn)
    except DatabaseDamagedError:
        reply = Reported(v=1, report=await report(visit, turn, verify_order(), on))
    if isinstance(reply, Accepted):
        return {"size": reply.size, "sha256": reply.sha256, "converted": reply.converted}
    if not isinstance(reply, Reported):
        raise TypeError("accept answers neither")
    found: Report = reply.report
    if salvages:
        found = await report(visit, turn, salvage_order(), on)
    if not salvages or not found.ok:
        raise DatabaseDamagedError(extra={"report": found})
    with visit.app[ANSWERS].loan(visit.exchange.address) as loan:
        file = await visit.ran(turn.fetch(export_order(), loan, on=on), turn)
        return {"size": len(file.content), "sha256": file.sha256, "converted": [], "report": found}


async def _send(request: web.Request, content: bytes, tag: str) -> web.StreamResponse:
    headers, lines = request.headers, FILE_HEADERS | {"ETag": tag}
    decision = decide(
        len(content),
        tag,
        if_none_match=headers.getall(hdrs.IF_NONE_MATCH, ()),
        if_range=headers.getall(hdrs.IF_RANGE, ()),
        ranges=headers.getall(hdrs.RANGE, ()) if request.method == hdrs.METH_GET else (),
    )
    match decision:
        case Unchanged():
            return web.Response(status=304, headers=lines)
        case Beyond():
            raise RangeNotSatisfiableError(headers={"Content-Range": f"bytes */{len(content)}"})
        case Part(first, last):
            content_range = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            return await _stream(request, 206, memoryview(content)[first : last + 1], lines | content_range)
        case _:
            return await _stream(request, 200, memoryview(content), lines)


async def _stream(request: web.Request, status: int, content: memoryview, headers: dict[str, str]) -> web.StreamResponse:
    """Sent from here and not by aiohttp, so that the loan holds the file until the caller has it."""
    response = web.StreamResponse(status=status, headers=headers)
    response.content_type, response.content_length = MEDIA_TYPE, len(content)
    with request[EXCHANGE].sending():
        await response.prepare(request)
        if request.method == hdrs.METH_GET:
            for start in range(0, len(content), PIECE_BYTES):
                await response.write(bytes(content[start : start + PIECE_BYTES]))
    return response
