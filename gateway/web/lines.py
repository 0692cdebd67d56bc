"""POST /sql answered as NDJSON: a line with the columns, a line for each row as it comes, and one that says how it ended."""

from __future__ import annotations

import logging
from contextlib import aclosing

import msgspec
from aiohttp import web

from .admission import Visit
from .appkeys import ANSWERS, BREAKER, SETTINGS
from .body import Statement
from .dialogue import RowStream
from .errors import MAX_DETAIL_CHARS, ApiError, BadParameterError, QueryTimeoutError
from .middleware import tell
from .parameters import IDEMPOTENCY_KEY
from .runner import rows_order

MEDIA_TYPE = "application/x-ndjson"

_log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()


async def answer(visit: Visit, statement: Statement) -> web.StreamResponse:
    """Errors before the first row are raised; from then on the last line alone tells what went wrong."""
    if visit.attempt is not None:
        raise BadParameterError(f"{IDEMPOTENCY_KEY} does not go with an answer in lines, which is not kept")
    order = rows_order(statement, visit.app[SETTINGS].max_request_frame_bytes, read_only=visit.reads_only)
    with visit.app[ANSWERS].loan(visit.exchange.address) as loan:
        # Lease and slot go with the rows; the head can say whose instance it is.
        async with aclosing(await visit.within_turn(lambda turn: visit.began(turn.rows(order, loan)))) as rows:
            return await _send(visit, rows)


async def _send(visit: Visit, rows: RowStream) -> web.StreamResponse:
    response = web.StreamResponse()
    response.content_type = MEDIA_TYPE
    with visit.exchange.sending():
        await response.prepare(visit.request)
        await response.write(_encoder.encode({"columns": rows.columns}) + b"\n")
        sent, failure = 0, None
        try:
            async for some in rows:
                await response.write(_encoder.encode_lines(some))
                sent += len(some)
        except ApiError as error:
            failure = error
        visit.app[BREAKER].saw(visit.exchange.address, failure)
        await response.write(_encoder.encode(_trailer(rows, sent) if failure is None else _failed(visit, failure, sent)) + b"\n")
        if failure is not None:
            response.force_close()
    return response


def _trailer(rows: RowStream, sent: int) -> dict[str, object]:
    end = rows.end
    if end is None:
        raise RuntimeError("the rows have not ended")
    trailer: dict[str, object] = {"complete": end.stopped is None, "rows": sent, "rows_affected": end.rows_affected}
    if end.stopped is not None:
        trailer["reason"] = end.stopped
    if end.message is not None:
        trailer["message"] = end.message[:MAX_DETAIL_CHARS]
    return trailer


def _failed(visit: Visit, error: ApiError, sent: int) -> dict[str, object]:
    tell(visit.exchange, error)
    reason = "timeout" if isinstance(error, QueryTimeoutError) else "failed"
    return {"complete": False, "rows": sent, "rows_affected": 0, "reason": reason, "message": error.message}
