"""A batch: scripts one after the other, in one transaction that none of them controls. All of it is committed, or nothing.

What fails at the commit, a deferred foreign key for one, is the last step's failure. The transaction begins with the first
statement that does not set `PRAGMA foreign_keys`: inside of one SQLite passes over that without a word, so there it is refused.
"""

from __future__ import annotations

import apsw

from .execute import Script, explained
from .wire import SKIPPED_STEP, StepFailedError, Verdict, VerdictError, encode_batch, encode_step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from .database import Database, Expired
    from .wire import Step

_PRAGMA, _TRANSACTION, _SAVEPOINT = apsw.SQLITE_PRAGMA, apsw.SQLITE_TRANSACTION, apsw.SQLITE_SAVEPOINT


def perform(database: Database, steps: tuple[Step, ...], expired: Expired) -> bytes:
    """The inside of the `batch` reply. Raises StepFailedError; what caused it is its `__cause__`, and closing rolls back."""
    configuration = database.configuration
    room, most, reply_room = configuration.max_result_bytes, configuration.max_rows, configuration.max_reply_bytes
    transaction = _Transaction(database)
    results: list[bytes] = []
    before = _SKIPPED
    for number, step in enumerate(steps):
        if step.condition is not None and not before[step.condition]:
            results.append(SKIPPED_STEP)
            before = _SKIPPED
            continue
        script = _StepScript(database, step, expired, room, most, transaction)
        try:
            script.run()
            result = encode_step(script.columns, script.rows, script.rows_affected, script.truncated)
            reply_room -= len(result) + 1
            if reply_room < (len(steps) - number) * len(SKIPPED_STEP):  # the least that the others take
                raise VerdictError(Verdict.SQL_ERROR, "the results are longer than an answer may be")
        except Exception as error:
            raise StepFailedError(number, script.explain(error)) from error
        results.append(result)
        room -= sum(map(len, script.rows)) + len(script.rows)
        most -= len(script.rows)
        before = _conditions(script)
    try:
        reply = encode_batch(results)
        if expired():
            raise VerdictError(Verdict.TIMEOUT)
        transaction.commit()
    except Exception as error:
        raise StepFailedError(len(steps) - 1, explained(database, error)) from error
    return reply


def _conditions(script: Script) -> Mapping[str, bool]:
    """Which of the conditions hold after it."""
    changed, rows = script.rows_affected > 0, bool(script.rows) or script.truncated
    return {"changed": changed, "unchanged": not changed, "rows": rows, "no_rows": not rows}


_SKIPPED: Mapping[str, bool] = {"changed": False, "unchanged": True, "rows": False, "no_rows": True}


class _Transaction:
    """The one of the batch, and the authorizer that keeps the steps from it."""

    __slots__ = ("_connection", "_controls", "_guard", "begun", "sets_foreign_keys")

    def __init__(self, database: Database) -> None:
        self._connection = database.connection
        self._guard = database.guard
        self._controls = False
        self.begun = False
        self.sets_foreign_keys = False
        """The statement at hand does."""
        database.connection.authorizer = self._authorize

    def begin(self) -> None:
        self.begun = True
        self._control("BEGIN")

    def commit(self) -> None:
        if self.begun:
            self._control("COMMIT")

    def _control(self, sql: str) -> None:
        self._controls = True
        self._connection.execute(sql)
        self._controls = False

    def _authorize(self, action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
        if action in (_TRANSACTION, _SAVEPOINT):
            if self._controls:
                return apsw.SQLITE_OK
            return self._refuse(f"{first} in a batch" if action == _TRANSACTION else f"SAVEPOINT {first} in a batch")
        if action == _PRAGMA and second is not None and (first or "").lower() == "foreign_keys":
            if self.begun:
                return self._refuse("PRAGMA foreign_keys after another statement of the batch")
            self.sets_foreign_keys = True
        return self._guard.authorize(action, first, second, database, trigger)

    def _refuse(self, what: str) -> int:
        self._guard.refused = what
        return apsw.SQLITE_DENY


class _StepScript(Script):
    __slots__ = ("_transaction",)

    def __init__(self, database: Database, step: Step, expired: Expired, room: int, most: int, transaction: _Transaction) -> None:
        super().__init__(database, step.request, expired, room, most)
        self._transaction = transaction

    def _attempt(self, text: str, is_last: bool) -> int | None:
        self._transaction.sets_foreign_keys = False
        return super()._attempt(text, is_last)

    def _trace(self, cursor: apsw.Cursor, statement: str, bindings: Any) -> bool:
        if not self._transaction.begun and not self._transaction.sets_foreign_keys:
            self._transaction.begin()
        return super()._trace(cursor, statement, bindings)
