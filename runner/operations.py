"""What is done for each `op` of docs/wire.md, as two tables: on the database, opened as for any SQL, and on the file itself.

Those on the file open it as they need it, by its path, and hold it themselves while they write.
"""

from __future__ import annotations

import os

from . import batch, bulk, export, rows, salvage, schema, upload, verify
from .database import PATH, limit_heap
from .execute import explained, in_opened, in_prepared
from .frames import framed, write_all
from .wire import Verdict, VerdictError, encode_reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from .configuration import Configuration
    from .database import Database, Expired
    from .execute import Watch
    from .frames import Outbox
    from .wire import Operation

    Reply = bytes | None
    """The inside of the reply's last frame; None if all of it has been sent."""
    OnTheDatabase = Callable[[Database, Operation, Expired, Outbox], Reply]
    OnTheFile = Callable[[str, Operation, Configuration, Expired, Outbox], Reply]


def perform(
    operation: Operation,
    configuration: Configuration,
    expired: Expired,
    watch: Watch,
    outbox: Outbox,
    path: str = PATH,
    read_only: bool = False,
) -> Reply:
    """As execute.run_request, for an operation."""
    act = _ON_THE_DATABASE.get(operation.name)
    if act is None:
        return _on_the_file(_ON_THE_FILE, operation, configuration, expired, outbox, path)
    return in_opened(_given(act, outbox), operation, configuration, expired, watch, path, read_only)


def perform_prepared(operation: Operation, database: Database, expired: Expired, outbox: Outbox) -> Reply:
    """As execute.run_prepared, for an operation. The database is held if it is one for `is_on_the_database`."""
    act = _ON_THE_DATABASE.get(operation.name)
    if act is None:
        return _on_the_file(_ON_THE_FILE, operation, database.configuration, expired, outbox, database.path)
    return in_prepared(_given(act, outbox), operation, database, expired)


def is_on_the_database(operation: Operation) -> bool:
    return operation.name in _ON_THE_DATABASE


def _given(act: OnTheDatabase, outbox: Outbox) -> Callable[[Database, Operation, Expired], Reply]:
    return lambda database, operation, expired: act(database, operation, expired, outbox)


def perform_on_a_foreign_file(
    operation: Operation, configuration: Configuration, expired: Expired, outbox: Outbox, path: str = PATH
) -> Reply:
    """What the command `mayfly` asks for: the file is its upload, and what lies at the path is empty."""
    return _on_the_file(_ON_A_FOREIGN_FILE, operation, configuration, expired, outbox, path)


def _on_the_file(
    acts: Mapping[str, OnTheFile], operation: Operation, configuration: Configuration, expired: Expired, outbox: Outbox, path: str
) -> Reply:
    act = acts.get(operation.name)
    if act is None:
        raise VerdictError(Verdict.REQUEST_INVALID, f"{operation.name} is not done here")
    limit_heap(configuration.heap_bytes)
    return act(path, operation, configuration, expired, outbox)


# --- on the database


def _rows(database: Database, operation: Operation, expired: Expired, outbox: Outbox) -> Reply:
    return rows.stream(database, operation.content, expired, outbox)


def _batch(database: Database, operation: Operation, expired: Expired, outbox: Outbox) -> Reply:
    return batch.perform(database, operation.content, expired)


def _schema(database: Database, operation: Operation, expired: Expired, outbox: Outbox) -> Reply:
    return schema.describe(database, expired)


def _export(database: Database, operation: Operation, expired: Expired, outbox: Outbox) -> Reply:
    """What a killed run left was rolled back when the database was read."""
    export.send_file(database.path, expired, outbox)
    return None


def _import(database: Database, operation: Operation, expired: Expired, outbox: Outbox) -> Reply:
    order = bulk.ImportOrder(**operation.content)
    try:
        loaded = bulk.load(database.connection, operation.upload, order, database.configuration.sqlite_limits, expired)
    except Exception as error:
        raise explained(database, error) from error
    done = {"table": loaded.table, "created": loaded.created, "columns": loaded.columns, "rows": loaded.rows}
    return encode_reply(Verdict.IMPORTED, done)


_ON_THE_DATABASE: dict[str, OnTheDatabase] = {
    "rows": _rows,
    "batch": _batch,
    "schema": _schema,
    "export": _export,
    "import": _import,
}


# --- on the file


def _accept(path: str, operation: Operation, configuration: Configuration, expired: Expired, outbox: Outbox) -> Reply:
    done = upload.accept(path, operation.upload, configuration, expired)
    verdict = done.pop("verdict")
    return _report(done["report"], configuration) if verdict == Verdict.REPORT else encode_reply(verdict, done)


def _verify(path: str, operation: Operation, configuration: Configuration, expired: Expired, outbox: Outbox) -> Reply:
    return _report(verify.report(path, configuration, expired), configuration)


def _salvage(path: str, operation: Operation, configuration: Configuration, expired: Expired, outbox: Outbox) -> Reply:
    return _report(salvage.salvage(path, configuration, expired), configuration)


def _verify_file(path: str, operation: Operation, configuration: Configuration, expired: Expired, outbox: Outbox) -> Reply:
    _put(path, operation.upload)
    return _verify(path, operation, configuration, expired, outbox)


def _salvage_file(path: str, operation: Operation, configuration: Configuration, expired: Expired, outbox: Outbox) -> Reply:
    _put(path, operation.upload)
    report = salvage.salvage(path, configuration, expired)
    if not report["ok"]:
        return _report(report, configuration)
    export.send_file(path, expired, outbox, before=framed(_report(report, configuration)))
    return None


def _report(report: Mapping[str, Any], configuration: Configuration) -> bytes:
    """What is too long for a reply is cut, and `more_findings` says so."""
    while len(reply := encode_reply(Verdict.REPORT, {"report": report})) > configuration.max_reply_bytes:
        halves = {name: report[name][: len(report[name]) // 2] for name in ("findings", "tables", "objects_lost")}
        report = {**report, **halves, "more_findings": True}
    return reply


def _put(path: str, content: bytes) -> None:
    """Into an empty file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        write_all(descriptor, content)
    finally:
        os.close(descriptor)


_ON_THE_FILE: dict[str, OnTheFile] = {"accept": _accept, "verify": _verify, "salvage": _salvage}
_ON_A_FOREIGN_FILE: dict[str, OnTheFile] = {"verify_file": _verify_file, "salvage_file": _salvage_file}
