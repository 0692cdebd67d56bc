"""The access log: one JSON line per HTTP request with exactly seven fields, a file per UTC day, deleted by the program itself.

A line is ASCII whatever a caller puts into a header, so it can neither forge a line nor reach a terminal. Lines gather in memory
and are written once a second by one thread hop; they are flushed when the process stops. What has no room in memory, in the day's
bytes or on the disk is dropped, counted in `lost`, and told to the operator once a minute at most.

Retention, for `days` N. While the process runs, by its host's clock, a line is gone from the disk before it is N days old: the file
of day D goes at 23:59 UTC of day D + N - 1. After a stop or a jump of the clock, what is too old goes before anything is written,
and so does a file of a day that has not begun: nobody can say how old its lines are. What cannot be deleted is a refusal to start;
later it is tried again every second and told. Beyond its reach: lines that were written under a wrong clock age by that clock, and
a deleted file lives on in whatever program holds it open.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
import uuid
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from http import HTTPMethod
from itertools import accumulate
from json.encoder import encode_basestring_ascii as _quoted
from pathlib import Path

from .tokens import PREFIX as TOKEN_PREFIX

USER_AGENT_CHARS = 256
_FLUSH_SECONDS = 1.0
_TELL_SECONDS = 60.0
_MAX_PENDING_BYTES = 16 << 20
# Files go this long before the midnight that the promise names, so that a slow disk or a busy process does not break it.
_AHEAD = timedelta(minutes=1)
_NAME = re.compile(r"access-(\d{4}-\d{2}-\d{2})\.jsonl", re.ASCII)
_UNPRINTABLE = re.compile(r"[^ -~]")
_TOKEN = re.compile(TOKEN_PREFIX + r"[\w-]*")
_METHODS = frozenset(str(method) for method in HTTPMethod)

_log = logging.getLogger(__name__)


class AccessLogError(RuntimeError):
    """The access log cannot be kept as promised; the message says what to change."""


def file_of(folder: Path, day: date) -> Path:
    return folder / f"access-{day.isoformat()}.jsonl"


def files_by_day(folder: Path) -> dict[date, Path]:
    """The log's own files, oldest first; names that are no day are somebody else's. Raises OSError."""
    found = {}
    for path in folder.iterdir():
        if match := _NAME.fullmatch(path.name):
            try:
                found[date.fromisoformat(match[1])] = path
            except ValueError:
                continue
    return dict(sorted(found.items()))


class AccessLog:
    """`record()` never blocks and never raises for what a caller sent.

    `lost` counts, since the start, lines that were dropped: "memory" too much was pending, "day_bytes" the day was full, "disk" it
    could not be written, "day" its day is not kept (the clock jumped).
    """

    def __init__(self, folder: Path, days: int, day_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self.lost: Counter[str] = Counter()
        self._folder = folder
        self._days = days
        self._day_bytes = day_bytes
        self._clock = clock
        self._pending: list[tuple[date, bytes]] = []
        self._pending_bytes = 0
        # A flush whose task was cancelled still writes when the last one begins.
        self._writing = threading.Lock()
        self._purged_on: date | None = None
        self._told_at = float("-inf")
        self._told: Counter[str] = Counter()
        self._troubles: set[str] = set()

    def now(self) -> float:
        return self._clock()

    def record(
        self,
        *,
        at: float,
        source_ip: str,
        instance: uuid.UUID | None,
        method: str,
        status: int,
        sql_bytes: int,
        user_agent: str,
    ) -> None:
        """Keep one line. `at` is the unix time of the request; without an instance the field is absent."""
        if self._pending_bytes >= _MAX_PENDING_BYTES:
            self.lost["memory"] += 1
            return
        moment = datetime.fromtimestamp(at, UTC)
        # Written out: by a dictionary, strftime and json.dumps it costs 12 µs more, 7 % of what this process spends on a request.
        timestamp = moment.isoformat(timespec="milliseconds").removesuffix("+00:00")
        named = "" if instance is None else f'"instance_id":"{instance}",'
        # A method is whatever word a caller begins its request line with.
        known = method if method in _METHODS else "OTHER"
        line = (
            f'{{"timestamp":"{timestamp}Z","source_ip":{_quoted(source_ip)},{named}"http_method":"{known}",'
            f'"http_status":{status},"sql_byte_length":{sql_bytes},"user_agent":{_quoted(_printable(user_agent))}}}\n'
        ).encode("ascii")
        self._pending_bytes += len(line)
        self._pending.append((moment.date(), line))

    def open(self) -> None:
        """Make the folder, private to this user, delete what is too old, try to write; raises AccessLogError."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._purge():
                raise AccessLogError(f"access log: {'; '.join(sorted(self._troubles))}")
            self._append(self._today(), [])
        except OSError as error:
            raise AccessLogError(f"access log: {self._folder}: {error.strerror}") from None

    async def keep_writing(self) -> None:
        """Until cancelled: write and purge."""
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Delete what is too old and write what is pending. What cannot be written is dropped, so it never fills the memory."""
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        if pending or self._purged_on != self._today():
            await asyncio.to_thread(self._purge_and_write, pending)
        self._tell()

    def _purge_and_write(self, pending: list[tuple[date, bytes]]) -> None:
        with self._writing:
            if self._purged_on != self._today():
                # Before the writing: on a full disk it is what makes room.
                self._purge()
            lines: dict[date, list[bytes]] = {}
            for day, line in pending:
                lines.setdefault(day, []).append(line)
            for day, of_day in lines.items():
                if not self._is_kept(day):
                    self.lost["day"] += len(of_day)
                    continue
                try:
                    self._append(day, of_day)
                except OSError as error:
                    self.lost["disk"] += len(of_day)
                    self._troubles.add(f"not written: {error.strerror}")

    def _append(self, day: date, lines: list[bytes]) -> None:
        """All lines that have room in the day's bytes, or none and an OSError."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(file_of(self._folder, day), flags, 0o600)
        try:
            size = os.fstat(file).st_size
            fitting = len(lines)
            if self._day_bytes:
                fitting = bisect_right(list(accumulate(map(len, lines))), self._day_bytes - size)
                self.lost["day_bytes"] += len(lines) - fitting
            rest = memoryview(b"".join(lines[:fitting]))
            try:
                while rest:
                    rest = rest[os.write(file, rest) :]
            except OSError:
                os.ftruncate(file, size)  # a full disk takes half a line, and the next one would end it
                raise
        finally:
            os.close(file)

    def _purge(self) -> bool:
        """Delete every file of a day that is not kept. False if one could not be: that is told, and the next flush tries again."""
        today, failed = self._today(), False
        try:
            files = files_by_day(self._folder)
        except OSError as error:
            self._troubles.add(f"old files not looked for: {error.strerror}")
            return False
        for day, path in files.items():
            if self._is_kept(day):
                continue
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                failed = True
                self._troubles.add(f"{path.name} should be gone and cannot be deleted: {error.strerror}")
            else:
                if day > today:
                    self._troubles.add(f"{path.name} deleted, its day has not begun: the clock was wrong, or is")
        if not failed:
            self._purged_on = today
        return not failed

    def _is_kept(self, day: date) -> bool:
        today = self._today()
        return today - timedelta(days=self._days) < day <= today

    def _today(self) -> date:
        return (datetime.fromtimestamp(self._clock(), UTC) + _AHEAD).date()

    def _tell(self) -> None:
        now = self._clock()
        # Of a clock that jumps back, too, a minute is enough.
        if abs(now - self._told_at) < _TELL_SECONDS:
            return
        lost = self.lost - self._told
        if not lost and not self._troubles:
            return
        counted = ", ".join(f"{lines} {reason}" for reason, lines in sorted(lost.items()))
        _log.error("access log: %s", "; ".join([*([f"lines lost: {counted}"] if lost else []), *sorted(self._troubles)]))
        self._told_at, self._told, self._troubles = now, self.lost.copy(), set()


def _printable(user_agent: str) -> str:
    """In printable ASCII, so that JSON doubles its length at most, and without tokens."""
    text = _UNPRINTABLE.sub("?", user_agent[:USER_AGENT_CHARS])
    return _TOKEN.sub(TOKEN_PREFIX + "***", text) if TOKEN_PREFIX in text else text
