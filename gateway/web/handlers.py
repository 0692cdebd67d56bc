"""What each route does, from top to bottom in the order in which it happens. GET and PUT /db are in transfer.py."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated

import msgspec
from aiohttp import web

from . import batch as batches
from . import body, damage, lines, openapi
from .admission import admitted
from .appkeys import HEALTH, LAUNCHER, REPLAYS, RUNS, SETTINGS, TOKENS
from .health import LIVE
from .parameters import IMPORT_TYPES, TTL, read_import, read_query, wants_lines
from .runner import Batch as BatchReply
from .runner import Imported, Ok, Schema, StepResult, batch_order, import_order, request_frame, schema_order
from .runs import Turn

# Far beyond every MAYFLY_MAX_LIFE_SECONDS.
MAX_EXTENSION_SECONDS = 10**9


class _Extension(msgspec.Struct, forbid_unknown_fields=True):
    seconds: Annotated[int, msgspec.Meta(ge=1, le=MAX_EXTENSION_SECONDS)] | None = None


_encoded = msgspec.json.Encoder().encode
_extension = msgspec.json.Decoder(_Extension)


async def sql(request: web.Request) -> web.StreamResponse:
    settings = request.app[SETTINGS]
    with admitted(request, makes="fresh", keyed=True) as visit:
        body.check_headers(request, settings.max_body_bytes)
        statement = body.parse(await visit.body(settings.max_body_bytes))
        visit.exchange.sql_bytes = len(statement.sql.encode())
        if wants_lines(request.headers.getall("Accept", ())):
            return await lines.answer(visit, statement)
        frame, int64 = request_frame(statement, settings.max_request_frame_bytes), statement.int64
        del statement  # the wait may be long, and decoded arguments take many times the frame's size
        visit.loan.hold(len(frame))

        async def work(turn: Turn) -> bytes:
            async def run(tag: bytes) -> bytes:
                return _encoded(_result(await visit.ran(turn.run(frame, int64, read_only=visit.reads_only, tag=tag), turn)))

            return await visit.once(turn, run)

        return _json(await visit.within_turn(work))


async def batch(request: web.Request) -> web.Response:
    """Statements in one transaction."""
    settings = request.app[SETTINGS]
    with admitted(request, makes="fresh", keyed=True) as visit:
        read_query(request.rel_url.raw_query_string)
        body.check_headers(request, settings.max_body_bytes)
        statements = batches.parse(await visit.body(settings.max_body_bytes))
        visit.exchange.sql_bytes = sum(len(step.sql.encode()) for step in statements.steps)
        order = batch_order(statements.steps, statements.int64, settings.max_request_frame_bytes, read_only=visit.reads_only)
        del statements
        visit.loan.hold(len(order.frame))

        async def work(turn: Turn) -> bytes:
            async def run(tag: bytes) -> bytes:
                done = await visit.perform(turn, replace(order, tag=tag), BatchReply)
                return _encoded({"results": [_step(result) for result in done.results]})

            return await visit.once(turn, run)

        return _json(await visit.within_turn(work))


async def import_rows(request: web.Request) -> web.Response:
    """Rows of CSV, JSON or NDJSON into one table, all or none."""
    settings = request.app[SETTINGS]
    with admitted(request, makes="fresh", keyed=True) as visit:
        declared = body.check_headers(request, settings.instance_bytes, IMPORT_TYPES)
        how = read_import(request.rel_url.raw_query_string, declared)
        upload = await visit.body(settings.instance_bytes)
        order = import_order(upload, **how, cap=settings.max_request_frame_bytes)
        del upload
        if not visit.fresh:
            await visit.find(writes=True)

        async def work(turn: Turn) -> bytes:
            async def run(tag: bytes) -> bytes:
                return _encoded(_keys_of(await visit.perform(turn, replace(order, tag=tag), Imported)))

            return await visit.once(turn, run)

        return _json(await visit.within_bulk_turn(work))


async def schema(request: web.Request) -> web.Response:
    with admitted(request) as visit:
        read_query(request.rel_url.raw_query_string)
        found = await visit.within_turn(lambda turn: visit.perform(turn, schema_order(), Schema))
        return _json(_encoded(_keys_of(found)))


async def fork(request: web.Request) -> web.Response:
    """A copy of the instance, with a token and a life of its own. Who can read an instance can copy it."""
    launcher = request.app[LAUNCHER]
    with admitted(request, makes="copy") as visit:
        read_query(request.rel_url.raw_query_string)
        await visit.find(writes=False)
        visit.count_create()
        request_id = visit.exchange.request_id_bytes
        copy, expires_at = await visit.within_turn(lambda _: launcher.fork(visit.own_instance, visit.owner, request_id))
        visit.hand_over(copy, expires_at)
        return _json(b"{}", status=201)


async def share(request: web.Request) -> web.Response:
    """A token of the same instance that can only read."""
    with admitted(request) as visit:
        read_query(request.rel_url.raw_query_string)
        await visit.find(writes=True)
        token = request.app[TOKENS].issue(visit.own_instance, "read-only").reveal()
        return _json(_encoded({"session": token, "access": "read-only"}))


async def extend(request: web.Request) -> web.Response:
    """A later end of the instance, as far as the operator lets it go; never an earlier one."""
    app = request.app
    with admitted(request) as visit:
        read_query(request.rel_url.raw_query_string)
        if request.content_length != 0:  # programs name a type for no body too
            body.check_headers(request, app[SETTINGS].max_body_bytes)
        seconds = _seconds(await visit.body(app[SETTINGS].max_body_bytes)) or app[SETTINGS].ttl_seconds
        await visit.find(writes=True)
        wished = int(time.time()) + seconds
        expires_at = await app[LAUNCHER].extend(visit.own_instance, wished, visit.exchange.request_id_bytes)
        app[RUNS].extended(visit.own_instance, expires_at)
        app[REPLAYS].extended(visit.own_instance, expires_at)
        visit.exchange.headers[TTL] = str(expires_at)
        return _json(_encoded({"expires_at": expires_at}))


async def end(request: web.Request) -> web.Response:
    """The instance is deleted when those that came before are done."""
    launcher = request.app[LAUNCHER]
    with admitted(request) as visit:
        read_query(request.rel_url.raw_query_string)
        await visit.find(writes=True)
        await visit.within_turn(lambda _: launcher.remove(visit.own_instance, visit.exchange.request_id_bytes))
        request.app[RUNS].ended(visit.own_instance)
        request.app[REPLAYS].forget(visit.own_instance)
        del visit.exchange.headers[TTL]
        return web.Response(status=204)


async def salvage(request: web.Request) -> web.Response:
    """What can be read of a damaged database takes its place; one that is in order is left alone."""
    with admitted(request) as visit:
        read_query(request.rel_url.raw_query_string)
        await visit.find(writes=True)
        report = await visit.within_bulk_turn(lambda turn: damage.recover(visit, turn))
        return _json(_encoded({"report": report}))


async def healthz(request: web.Request) -> web.Response:
    status, report = await request.app[HEALTH].report()
    return _json(_encoded(report), status=status)


async def livez(request: web.Request) -> web.Response:
    """That the loop turns; nobody is asked."""
    return _json(LIVE)


async def readyz(request: web.Request) -> web.Response:
    status, report = await request.app[HEALTH].readiness()
    return _json(_encoded(report), status=status)


async def openapi_json(request: web.Request) -> web.Response:
    return _json(openapi.DOCUMENT)


def _json(answer: bytes, status: int = 200) -> web.Response:
    return web.Response(status=status, body=answer, content_type="application/json")


def _keys_of(reply: Imported | Schema) -> dict[str, object]:
    """What is the caller's of a reply."""
    return {name: getattr(reply, name) for name in reply.__struct_fields__ if name != "v"}


def _seconds(raw: bytes) -> int | None:
    """What the body of POST /extend asks for; None if it leaves that open, or there is none."""
    return body.decoded(raw, _extension, '{"seconds": a positive integer}').seconds if raw else None


def _result(answer: Ok | StepResult) -> dict[str, object]:
    if answer.columns is None:
        return {"rows_affected": answer.rows_affected}
    result = {"columns": answer.columns, "rows": answer.rows, "rows_affected": answer.rows_affected}
    return {**result, "truncated": True} if answer.truncated else result


def _step(result: StepResult) -> dict[str, object]:
    return {"skipped": True} if result.skipped else _result(result)
