"""What is done about a damaged database: a report in strict mode, and in salvage mode a new file with what could be read of it.

Strict: `verify` runs read-only, and nothing is touched. Salvage: the instance is forked, `salvage` works on the copy, and REPLACE
puts the copy in the instance's place in one step on the disk, which keeps the damaged file beside it. The copy belongs to nobody
and has no token; it is removed whatever keeps it from its place. The instance's lease is held from the look at its mode to the end.

The request that met the damage has given its lease and slot back by then: it takes a new ticket, behind the gate of bulk runs, so
that whoever holds a slot never waits at that gate.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from ..protocol import NOBODY
from .appkeys import LAUNCHER, RUNS
from .errors import (
    ApiError,
    CallerError,
    DatabaseDamagedError,
    DatabaseSalvagedError,
    InstanceNotFoundError,
    OverloadedError,
)
from .runner import Order, Report, Reported, salvage_order, verify_order
from .runs import Turn

if TYPE_CHECKING:
    from .admission import Visit


async def met(visit: Visit, error: DatabaseDamagedError) -> CallerError:
    """What a request is answered whose run ended in `error`, after whatever its instance's mode has done about it. Raises
    ServiceErrors: then nothing was done about it. Too much to do is no reason to say less than what is known.
    """
    try:
        return await _dealt_with(visit, error)
    except OverloadedError:
        return error


async def _dealt_with(visit: Visit, error: DatabaseDamagedError) -> CallerError:
    instance = visit.own_instance
    async with _turn_for_damage(visit, instance) as turn:
        found = await visit.app[LAUNCHER].look(instance, visit.exchange.request_id_bytes)
        if found is None:
            return InstanceNotFoundError()
        if not found.salvage:
            try:
                return _damaged(error, await report(visit, turn, verify_order()))
            except ApiError:
                return error  # without its report it is still what the caller has to know
        recovered = await _salvage(visit, turn, instance)
        if recovered.ok:
            return DatabaseSalvagedError(extra={**error.extra, "report": recovered})
        return _damaged(error, recovered)


async def recover(visit: Visit, turn: Turn) -> Report:
    """Of POST /salvage: the report of what was done, or that there was nothing to do. Raises DatabaseDamagedError if it failed."""
    verified = await report(visit, turn, verify_order())
    if verified.ok:
        return verified
    recovered = await _salvage(visit, turn, visit.own_instance)
    if not recovered.ok:
        raise DatabaseDamagedError(extra={"report": recovered})
    return recovered


async def report(visit: Visit, turn: Turn, order: Order, on: uuid.UUID | None = None) -> Report:
    """What `verify` or `salvage` says of the instance, or of a copy."""
    return (await visit.perform(turn, order, Reported, on)).report


async def _salvage(visit: Visit, turn: Turn, instance: uuid.UUID) -> Report:
    """The report of the salvage; or, where it goes beyond what a run may take, that of the damage."""
    launcher, request_id = visit.app[LAUNCHER], visit.exchange.request_id_bytes
    with ExitStack() as unless_placed:
        copy, _ = await launcher.fork(instance, NOBODY, request_id)
        unless_placed.callback(visit.app[RUNS].discard, copy, request_id)
        try:
            recovered = await report(visit, turn, salvage_order(), on=copy)
        except CallerError:
            return await report(visit, turn, verify_order())
        if recovered.ok:
            await launcher.replace(instance, copy, request_id, keep=True)
            unless_placed.pop_all()
        return recovered


def _damaged(error: DatabaseDamagedError, found: Report) -> DatabaseDamagedError:
    return DatabaseDamagedError(extra={**error.extra, "report": found})


@asynccontextmanager
async def _turn_for_damage(visit: Visit, instance: uuid.UUID) -> AsyncIterator[Turn]:
    runs, exchange = visit.app[RUNS], visit.exchange
    async with visit.gate():
        with runs.ticket(exchange.address, creates=False) as ticket:
            async with runs.turn(ticket, instance, exchange.request_id_bytes) as turn:
                yield turn
