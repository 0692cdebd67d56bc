"""Copies finished days of the access log to S3: one gzip object for each day and host, which S3 itself deletes (expiry.py).

An object is `<prefix>/<day>/<host id>.jsonl.gz`; the id lies beside the log, in `host-id`. It is written once, by a conditional put
with its SHA-256, and what is in the bucket is the only record of what was copied: there is no local mark to be lost or to lie. The
credentials need not be able to read or delete an object. The lifecycle rule is looked at before each upload: no rule, no copy.
The files on this host go in time whether or not they were copied; a day that was not is told to the operator's log.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import IO, Any

from ..operator_log import where
from ..settings import Settings, SettingsError
from . import aws
from .access_log import AccessLogError, files_by_day
from .expiry import LAST_UPLOAD, expiry_days, require_expiry

HOST_ID_FILE = "host-id"
# The line of a request goes to the day on which it came, and is written when it has waited and run.
SETTLED = timedelta(days=1, minutes=15)
_LOOK_SECONDS = 60
_LONGEST_PAUSE_SECONDS = 1800

_log = logging.getLogger(__name__)


class Shipping:
    """`open()` before use, `run()` for as long as the service. Counted since the start: days `shipped` and `missed`, `failures`."""

    def __init__(self, settings: Settings, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """`folder` holds the log's files. Raises SettingsError."""
        self.shipped = self.missed = self.failures = 0
        self._settings = settings
        self._folder = folder
        self._clock = clock
        self._bucket = settings.access_log_bucket
        self._prefix = settings.access_log_prefix.strip("/") + "/"
        if self._prefix == "/":
            raise SettingsError("MAYFLY_ACCESS_LOG_PREFIX is empty: all that is in the bucket would be deleted with the access log")
        self._expiry_days = expiry_days(settings.access_log_days, versioned=False)
        self._host = ""
        self._s3: Any = None
        self._settled: set[date] = set()
        self._owed: set[date] = set()
        self._stopping = threading.Event()

    def open(self) -> None:
        """Read or make the host's id, see to the lifecycle rule. Blocks. Raises SettingsError, AccessLogError."""
        try:
            self._host = _host_id(self._folder)
            self._s3 = aws.client("s3", self._settings)
            self._require_expiry()
        except (aws.BotoCoreError, aws.ClientError, OSError, AccessLogError) as error:
            raise AccessLogError(f"access log in s3://{self._bucket}/{self._prefix}: {_named(error)}") from None

    async def run(self) -> None:
        """Until cancelled: ship each day once it is over, in a thread of its own that the end of the process does not wait for."""
        threading.Thread(target=self._keep_shipping, name="shipping", daemon=True).start()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._stopping.set()

    def ship(self) -> None:
        """One look at the folder: copy what is over and not in S3. Raises BotoCoreError, ClientError, OSError, AccessLogError,
        SettingsError; what is left is for the next look."""
        files = files_by_day(self._folder)
        self._settled &= files.keys()
        self._owed &= files.keys()
        for day, path in files.items():
            age = datetime.fromtimestamp(self._clock(), UTC) - datetime(day.year, day.month, day.day, tzinfo=UTC)
            if age < SETTLED or day in self._settled:
                continue
            key = f"{self._prefix}{day}/{self._host}.jsonl.gz"
            if age < timedelta(days=2 + self._expiry_days):
                self._owed.add(day)
                if self._copied(path, key, may_upload=age < LAST_UPLOAD):
                    self._owed.discard(day)
            # Else S3 may have deleted its copy by now: a day is owed only if it was when it could be looked for.
            if day in self._owed:
                self.missed += 1
                _log.error(
                    "access log of %s is NOT COPIED to s3://%s/%s: it is too late for S3 to delete it in time",
                    day,
                    self._bucket,
                    key,
                )
            self._settled.add(day)

    def _copied(self, path: Path, key: str, may_upload: bool) -> bool:
        # Listed, and not asked for by HEAD, which takes the right to read objects.
        listed = self._s3.list_objects_v2(Bucket=self._bucket, Prefix=key, MaxKeys=1)
        if any(item["Key"] == key for item in listed.get("Contents", ())):
            return True
        if may_upload:
            self._require_expiry()
            self._upload(path, key)
            self.shipped += 1
            _log.info("access log copied to s3://%s/%s", self._bucket, key)
        return may_upload

    def _upload(self, path: Path, key: str) -> None:
        # The packed lines have no name on the disk: they are gone with this process, however it ends.
        with tempfile.TemporaryFile(dir=self._folder) as packed:
            checksum = _pack(path, packed)
            try:
                self._s3.put_object(
                    Bucket=self._bucket,
                    Key=key,
                    Body=packed,
                    ContentType="application/gzip",
                    ChecksumAlgorithm="SHA256",
                    ChecksumSHA256=checksum,
                    IfNoneMatch="*",
                )
            except aws.ClientError as error:
                # It is there if the answer to an attempt before this one was lost.
                if aws.code(error) != "PreconditionFailed":
                    raise

    def _require_expiry(self) -> None:
        self._expiry_days = require_expiry(self._s3, self._bucket, self._prefix, self._settings.access_log_days)

    def _keep_shipping(self) -> None:
        pause = failed = 0
        while not self._stopping.wait(pause):
            try:
                self.ship()
                pause, failed = _LOOK_SECONDS, 0
            except Exception as error:
                self.failures += 1
                failed += 1
                pause = min(_LOOK_SECONDS << failed, _LONGEST_PAUSE_SECONDS)
                _log.error(
                    "access log not copied to s3://%s/%s, next try in %d s: %s", self._bucket, self._prefix, pause, _named(error)
                )


def _host_id(folder: Path) -> str:
    """What tells this state folder's objects from those of other gateways; made once."""
    path = folder / HOST_ID_FILE
    if not path.exists():
        beside = folder / f".{HOST_ID_FILE}"
        beside.write_text(secrets.token_hex(16))
        os.rename(beside, path)
    host = path.read_text()
    if not re.fullmatch("[0-9a-f]{32}", host):
        raise AccessLogError(f"{path} holds no host id; remove it to get a new one")
    return host


def _pack(path: Path, packed: IO[bytes]) -> str:
    """Compress a file and stand at its beginning; returns the SHA-256 of the result as S3 writes it."""
    with open(path, "rb", opener=_nofollow) as lines, gzip.GzipFile("", "wb", fileobj=packed, mtime=0) as archive:
        shutil.copyfileobj(lines, archive, 1 << 20)
    digest = hashlib.sha256()
    packed.seek(0)
    while chunk := packed.read(1 << 20):
        digest.update(chunk)
    packed.seek(0)
    return base64.b64encode(digest.digest()).decode()


def _nofollow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _named(error: Exception) -> str:
    match error:
        case aws.BotoCoreError() | aws.ClientError():
            return aws.named(error)
        case OSError():
            return f"{error.filename or 'this host'}: {error.strerror}"
        case AccessLogError() | SettingsError():
            return str(error)
        case _:
            return where(error)
