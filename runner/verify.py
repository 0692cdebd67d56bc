"""What is wrong with a database file, if anything. Nothing is written: SQLite gets a copy in memory.

SQLite's own integrity_check decides first, and what it cannot see is added: a header that it forgives, bytes behind the last page.
Where nothing is found, that is all. Otherwise the file's pages are read one by one, which tells where the damage is.
"""

from __future__ import annotations

import os
import re
from functools import partial

import apsw

from .digest import sha256
from .image import Image, ImageError, rolled_back
from .memory import in_memory
from .policy import LIMITS
from .trees import MAX_FINDINGS, Findings, Survey, raise_if_over
from .wire import Verdict, VerdictError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .configuration import Configuration
    from .trees import Expired

_WAL_VERSIONS = slice(18, 20)


class Examined:
    """A file, and what was found in it."""

    __slots__ = ("data", "findings", "image")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.findings = Findings()
        self.image = Image(data)

    @property
    def healthy(self) -> bool:
        return not self.findings.items


def report(path: str, configuration: Configuration, expired: Expired) -> dict[str, Any]:
    """The report on a file, as it is after the rollback that its journal asks for. Raises VerdictError when the time is over."""
    return report_of(read_rolled_back(path), configuration, expired)


def report_of(data: bytes, configuration: Configuration, expired: Expired) -> dict[str, Any]:
    """The same, of a database's bytes."""
    examined = examine(data, configuration, expired)
    if not examined.healthy:
        locate(examined, expired)
    return summary("verify", examined, ok=examined.healthy)


def read_rolled_back(path: str) -> bytes:
    return rolled_back(read_file(path), read_file(f"{path}-journal"))


def read_file(path: str) -> bytes:
    """All of a file, or nothing where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return b""
    try:
        content = bytearray()
        while chunk := os.read(descriptor, max(1 << 16, os.fstat(descriptor).st_size - len(content) + 1)):
            content += chunk
        return bytes(content)
    finally:
        os.close(descriptor)


def examine(data: bytes, configuration: Configuration, expired: Expired) -> Examined:
    """What SQLite says, and what it does not look at."""
    examined = Examined(data)
    if data:
        _look_at_the_ends(examined)
        _ask_sqlite(examined, configuration, expired)
    return examined


def locate(examined: Examined, expired: Expired) -> None:
    """Read every page of a damaged file for what is wrong there."""
    try:
        examined.image.mend(partial(raise_if_over, expired))
    except ImageError as error:
        examined.findings.add("truncated", str(error))
        return
    survey = Survey(examined.image, examined.findings, expired)
    entries, _ = survey.schema()
    trees = [
        survey.walk(entry.name, entry.root, entry.kind == "table" and survey.holds_rowids(entry))
        for entry in entries
        if entry.root and entry.kind in ("table", "index")
    ]
    survey.settle()
    for tree in trees:
        survey.read(tree)


def summary(kind: str, examined: Examined, *, ok: bool) -> dict[str, Any]:
    """A report without what only a salvage has."""
    image, findings, data = examined.image, examined.findings, examined.data
    told = image.header.page_size
    return {
        "kind": kind,
        "ok": ok,
        "size": len(data),
        "sha256": sha256(data),
        "page_size": told if data else None,
        "pages": image.header.pages if data else None,
        "findings": findings.items,
        "more_findings": findings.more,
        "tables": [],
        "unassigned": 0,
        "objects_lost": [],
    }


def _look_at_the_ends(examined: Examined) -> None:
    header, findings, size = examined.image.header, examined.findings, len(examined.data)
    for fault in header.faults:
        findings.add("header", fault, 1)
    if header.page_size is None:
        return
    pages = size // header.page_size if header.pages is None else header.pages
    if size < pages * header.page_size:
        findings.add("truncated", f"the header counts {pages} pages of {header.page_size} bytes, the file has {size} bytes")
    elif size > pages * header.page_size:
        findings.add("appended", f"{size - pages * header.page_size} bytes come after the last page")


def _ask_sqlite(examined: Examined, configuration: Configuration, expired: Expired) -> None:
    findings = examined.findings
    # The limits of requests are not the file's: what is too long for them is no damage.
    connection = in_memory(configuration, expired, LIMITS)
    try:
        connection.deserialize("main", _without_wal(examined.data))
        for (text,) in connection.execute(f"PRAGMA integrity_check({MAX_FINDINGS + 1})"):
            for line in text.split("\n"):
                if line != "ok" and not line.startswith("*** in database"):
                    _add_sqlites(findings, line)
    except apsw.InterruptError:
        raise VerdictError(Verdict.TIMEOUT) from None
    except apsw.NotADBError as error:
        findings.add("header", str(error), 1)
    except apsw.Error as error:
        _add_sqlites(findings, str(error))
    except UnicodeDecodeError:  # an apsw as released: the image's own hands such text on
        findings.add("other", "SQLite's words on it are not UTF-8")
    finally:
        connection.close(True)


def _without_wal(data: bytes) -> bytes:
    """The same database for a place where no WAL can be; what one would hold does not exist here."""
    versions = data[_WAL_VERSIONS]
    if 2 in versions and all(version in (1, 2) for version in versions):
        return data[:18] + b"\1\1" + data[20:]
    return data


# SQLite's words. Only for the code, page and object of a finding: that something is wrong is certain by then.
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"Freelist: .*|freelist.*|Failed to read ptrmap.*"), "freelist"),
    (re.compile(r"Tree \d+ page (?P<page>\d+).*overflow.*"), "overflow"),
    (re.compile(r"Tree \d+ page (?P<page>\d+).*|[Pp]age (?P<other>\d+).*"), "page"),
    (re.compile(r"malformed database schema \((?P<object>.*?)\).*|malformed database schema.*", re.S), "schema"),
    (re.compile(r"row \S+ missing from index (?P<object>.*)"), "index"),
    (re.compile(r"rowid not at end-of-record for row \S+ of index (?P<object>.*)"), "index"),
    (re.compile(r"row \S+ values differ from index (?P<object>.*)"), "index"),
    (re.compile(r"row \S+ not in .* of index (?P<object>.*)"), "index"),
    (re.compile(r"(?:wrong # of entries in|non-unique entry in|index) (?:index )?(?P<object>.*)"), "index"),
    (re.compile(r"row \S+ not in PRIMARY KEY order for (?P<object>.*)"), "page"),
    (re.compile(r"(?:NULL value in|CHECK constraint failed in) (?P<object>.*)"), "constraint"),
    (re.compile(r"(?:non-\w+|NUMERIC|TEXT) value in (?P<object>.*)"), "constraint"),
    (re.compile(r'fts5: .*table "(?P<object>[^"]*)".*|fts5: .*'), "content"),
    (re.compile(r"(?:Mapping|Node|Cell|Dimension|Wrong number of entries in %|Rtree) .*"), "content"),
    (re.compile(r".*(?:inverted index|FTS\d table|[Rr]tree|RTree|R-Tree).*? (?:main\.|table )?(?P<object>\w+).*"), "content"),
    (re.compile(r"database disk image is malformed.*"), "page"),
)


def _add_sqlites(findings: Findings, line: str) -> None:
    for pattern, code in _PATTERNS:
        match = pattern.fullmatch(line)
        if match is not None:
            named = match.groupdict()
            page = named.get("page") or named.get("other")
            name = named.get("object")
            if name is not None and "value in" in line:
                name = name.rpartition(".")[0] or name
            findings.add(code, line, int(page) if page and len(page) < 10 else None, name)
            return
    findings.add("other", line)
