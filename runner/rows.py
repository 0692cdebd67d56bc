"""Rows in frames: all that the last statement of a script returns, sent while it runs.

Nothing is sent before the first frame is full or all rows are there, so what goes wrong until then is an ordinary failure. What
goes wrong later is told by the last frame, which says how many rows came before it.
"""

from __future__ import annotations

from functools import partial

from .execute import LEFT_OPEN, NAMES_TOO_LONG, Script
from .frames import framed
from .wire import ResultFullError, RowEncoder, Verdict, VerdictError, encode_rows_end, encode_rows_head

TYPE_CHECKING = False
if TYPE_CHECKING:
    import apsw

    from .database import Database, Expired
    from .frames import Outbox
    from .wire import Request

_FULL_BYTES = 1 << 16
"""A frame is sent when it has this many: enough to pay for its system call, and little enough not to be waited for."""
_MOST_BYTES = 1 << 18
"""No frame of more than one row is longer."""
_HEAD_BYTES = 1 << 10
"""More than the head has beside the names."""


def stream(database: Database, request: Request, expired: Expired, outbox: Outbox) -> bytes:
    """The inside of the last frame; those before it are sent. Raises VerdictError, also when some are."""
    script = _Stream(database, request, expired, outbox)
    try:
        script.run()
        if database.connection.in_transaction:
            raise VerdictError(Verdict.SQL_ERROR, LEFT_OPEN)
    except Exception as error:
        failure = script.explain(error)
        if outbox.ending is not None:
            script.send_rest()
        raise failure from error
    return script.last_frame()


class _Stream(Script):
    __slots__ = ("_is_cut", "_outbox", "_sent", "_settled")

    def __init__(self, database: Database, request: Request, expired: Expired, outbox: Outbox) -> None:
        super().__init__(database, request, expired)
        self._outbox = outbox
        self._sent = 0
        self._is_cut = False
        self._settled = 0
        """The rows affected that stay so whatever comes."""

    def last_frame(self) -> bytes:
        self.send_rest()
        return encode_rows_end(self._sent, self.rows_affected, "bytes" if self._is_cut else None, None)

    def _attempt(self, text: str, is_last: bool) -> int | None:
        if not self._connection.in_transaction:
            self._settled = self.rows_affected
        return super()._attempt(text, is_last)

    def _fetch(self, cursor: apsw.Cursor) -> None:
        if not (self._is_last and self._has_rows):
            super()._fetch(cursor)
            return
        if self.columns is not None and len(self.columns) + _HEAD_BYTES > self._configuration.max_reply_bytes:
            raise VerdictError(Verdict.SQL_ERROR, NAMES_TOO_LONG)
        self.rows = []
        try:
            self._fetch_and_send(cursor)
        except ResultFullError:
            self._is_cut = True
            cursor.close(True)

    def _fetch_and_send(self, cursor: apsw.Cursor) -> None:
        """Leaves in `rows` what does not fill a frame."""
        configuration, as_string = self._configuration, self._request.int64_as_string
        room, row_bytes = configuration.max_stream_bytes, max(configuration.max_result_bytes, _MOST_BYTES)
        # One for each frame: what it counts against its bound is what is being held in memory.
        encoder = partial(RowEncoder, row_bytes + _FULL_BYTES, as_string)
        encode, size = encoder().encode, 0
        for row in cursor:
            line = encode(row)
            taken = len(line) + 1
            room -= taken
            if room < 0 or taken > row_bytes:
                raise ResultFullError
            if self.rows and size + taken > _MOST_BYTES:
                self.send_rest()
                encode, size = encoder().encode, 0
            self.rows.append(line)
            size += taken
            if size >= _FULL_BYTES:
                self.send_rest()
                encode, size = encoder().encode, 0
                self.check_time()  # rows that come without much work come without a look at the clock, and readers can be slow

    def send_rest(self) -> None:
        """What is in `rows`, as a frame; before the first the head."""
        if not self._has_rows:
            self.columns, self.rows = None, []
        if not self.rows and self._outbox.ending is not None:
            return
        piece = framed(b"[%b]" % b",".join(self.rows)) if self.rows else b""
        if self._outbox.ending is None:
            piece = framed(encode_rows_head(self.columns)) + piece
        self._sent += len(self.rows)
        self.rows = []
        self._outbox.send(piece, partial(_ending, self._sent, self._settled))


def _ending(sent: int, rows_affected: int, failure: VerdictError) -> bytes:
    if failure.verdict is Verdict.TIMEOUT:
        return encode_rows_end(sent, rows_affected, "timeout", None)
    return encode_rows_end(sent, rows_affected, "error", failure.message or failure.verdict)
