"""What can be read of a damaged database becomes a new one, in its place.

All of it happens in memory: the file is written when the new database is whole and verified, under a journal that puts the old
bytes back if the writing ends half-way. Where the new database does not come out well, nothing is touched.

A row comes back only if it was committed, as far as bytes can tell: what had been deleted stays so, and a row whose table is not
certain goes into a table of its own.
"""

from __future__ import annotations

import errno
import os
from functools import partial

import apsw

from .frames import write_all
from .image import ImageError, undoing
from .policy import PAGE_BYTES
from .rebuild import Rebuild, is_virtual, module_of, shadows
from .trees import BELOW_ALL, MOST, Survey, Tree, printable, raise_if_over
from .verify import examine, read_file, read_rolled_back, summary
from .wire import Verdict, VerdictError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from .configuration import Configuration
    from .rebuild import Layout, Stray
    from .trees import Entry, Expired, Row
    from .verify import Examined

_MOST_NAMED = 500
"""Tables and lost objects in a report."""
_RAW, _REFILLED, _GONE = range(3)
"""How a virtual table comes back: with the tables it had, filled anew, or not at all."""


class Counted:
    """One table of the report."""

    __slots__ = ("exact", "kept", "lost", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept = self.lost = 0
        self.exact = True


def salvage(path: str, configuration: Configuration, expired: Expired) -> dict[str, Any]:
    """Recover the file at `path`; the report. Raises VerdictError when the time is over, and the file is what it was."""
    data = read_rolled_back(path)
    report, recovered = recover(data, configuration, expired)
    if recovered is not None:
        undo = undoing(data, configuration.instance_bytes)
        if undo is None:
            return _refused(report, "there is no room for a journal of the old file")
        raise_if_over(expired)
        _replace(path, data, undo, recovered)
    return report


def recover(data: bytes, configuration: Configuration, expired: Expired) -> tuple[dict[str, Any], bytes | None]:
    """The report on a database's bytes, and the new database: None where the old one is healthy, or nothing better can be had."""
    examined = examine(data, configuration, expired)
    if examined.healthy and _is_servable(examined):
        return summary("salvage", examined, ok=True), None
    try:
        examined.image.mend(partial(raise_if_over, expired))
    except ImageError as error:
        examined.findings.add("truncated", str(error))
        return summary("salvage", examined, ok=False), None
    recovery = _Recovery(examined, configuration, expired)
    try:
        recovered = recovery.run()
    except apsw.InterruptError:
        raise VerdictError(Verdict.TIMEOUT) from None
    except apsw.FullError:
        return _refused(recovery.report(), "what can be read does not fit into the database's pages"), None
    except (apsw.Error, MemoryError) as error:
        return _refused(recovery.report(), f"the new database could not be made: {type(error).__name__}"), None
    report = recovery.report()
    return (report, recovered) if recovered is not None else (_refused(report, recovery.failure), None)


def _is_servable(examined: Examined) -> bool:
    header = examined.image.header
    return not examined.data or (header.page_size == PAGE_BYTES and not header.wal)


def _refused(report: dict[str, Any], message: str) -> dict[str, Any]:
    findings = [*report["findings"][:99], {"code": "other", "page": None, "object": None, "message": message}]
    return {**report, "ok": False, "findings": findings, "more_findings": report["more_findings"] or len(report["findings"]) > 99}


class _Recovery:
    __slots__ = ("_configuration", "_counted", "_examined", "_expired", "_lost", "_modes", "_unassigned", "failure")

    def __init__(self, examined: Examined, configuration: Configuration, expired: Expired) -> None:
        self._examined = examined
        self._configuration = configuration
        self._expired = expired
        self._modes: dict[str, int] = {}
        self._counted: list[Counted] = []
        self._lost: list[tuple[str, str]] = []
        self._unassigned = 0
        self.failure = "the new database could not be made"

    def run(self) -> bytes | None:
        """The new database, verified, or None."""
        for _ in range(_GONE + 2):
            attempt = _Attempt(self._examined, self._configuration, self._expired, self._modes)
            try:
                recovered = attempt.run()
            finally:
                attempt.close()
            self._counted, self._lost, self._unassigned = attempt.counted, attempt.lost, attempt.unassigned
            if recovered is None:
                self.failure = "nothing can be recovered"
                return None
            if attempt.again:
                continue
            if self._nothing_kept():
                self.failure = "not a row can be read"
                return None
            after = examine(recovered, self._configuration, self._expired)
            if after.healthy:
                return recovered
            self.failure = f"the new database is not healthy: {after.findings.items[0]['message']}"
            if not attempt.degrade({str(item["object"]).lower() for item in after.findings.items if item["code"] == "content"}):
                break
        return None

    def _nothing_kept(self) -> bool:
        """Of rows that there were: an empty database would be in nobody's interest."""
        kept = self._unassigned + sum(counted.kept for counted in self._counted)
        return not kept and any(counted.lost or not counted.exact for counted in self._counted)

    def report(self) -> dict[str, Any]:
        if max(len(self._counted), len(self._lost)) > _MOST_NAMED:
            self._examined.findings.add("other", f"only {_MOST_NAMED} tables and lost objects are named")
        report = summary("salvage", self._examined, ok=True)
        report["tables"] = [
            {"name": printable(table.name), "kept": table.kept, "lost": table.lost, "lost_is_exact": table.exact}
            for table in self._counted[:_MOST_NAMED]
        ]
        report["unassigned"] = self._unassigned
        report["objects_lost"] = [{"type": kind, "name": printable(name)} for kind, name in self._lost[:_MOST_NAMED]]
        return report


class _Found:
    """A table: its entry in the schema, its place in the new database and its tree in the old one."""

    __slots__ = ("extra", "layout", "tree", "virtual")

    def __init__(self, layout: Layout, tree: Tree, virtual: Entry | None) -> None:
        self.layout = layout
        self.tree = tree
        self.virtual = virtual
        """The virtual table whose data it holds."""
        self.extra: list[int] = []
        """Leaves that are not in the tree any more and belong to it."""


class _Attempt:
    """One new database."""

    __slots__ = (
        "_apart",
        "_configuration",
        "_entries",
        "_examined",
        "_found",
        "_indexes",
        "_internal",
        "_leftover",
        "_modes",
        "_rebuild",
        "_schema",
        "_survey",
        "_virtual",
        "again",
        "counted",
        "lost",
        "unassigned",
    )

    def __init__(self, examined: Examined, configuration: Configuration, expired: Expired, modes: dict[str, int]) -> None:
        self._examined = examined
        self._configuration = configuration
        self._modes = modes
        self._survey = Survey(examined.image, examined.findings, expired)
        self._entries, self._schema = self._survey.schema()
        self._virtual: dict[str, Entry] = {}
        """Virtual tables that have been made, by their names in lower case."""
        self._found: list[_Found] = []
        self._internal: list[Tree] = []
        """Of tables that only SQLite can make."""
        self._indexes: list[tuple[Entry, Tree]] = []
        self._apart: list[Tree] = []
        """Of tables that could not be made."""
        self._leftover: list[int] = []
        """Leaves of no known table."""
        self.counted: list[Counted] = []
        self.lost: list[tuple[str, str]] = []
        self.unassigned = 0
        self.again = False
        """Whether a virtual table turned out to be none: another attempt keeps the tables that it had."""
        self._rebuild = Rebuild(examined.image, configuration, expired)

    def close(self) -> None:
        self._rebuild.close()

    def run(self) -> bytes | None:
        """The new database file, not verified; None if there is nothing to put into one."""
        self._make_tables()
        self._make(entry for entry in self._entries if _is_unique(entry))
        self._walk_indexes()
        self._assign_orphans()
        for found in self._found:
            self._fill(found)
        for tree in self._internal:
            self._fill_internal(tree)
        self._keep_the_rest()
        self._make(entry for entry in self._entries if entry.kind == "index" and not _is_unique(entry))
        self._refill_virtual_tables()
        self._make(entry for entry in self._entries if entry.kind == "view")
        self._make(entry for entry in self._entries if entry.kind == "trigger")
        if not self._entries and not self.unassigned and not self._is_empty_database():
            return None
        return self._rebuild.finish()

    def degrade(self, names: set[str]) -> bool:
        """Take the next best way for the virtual tables among `names`, or for all if none is; False if there is nothing to it."""
        for name in (names & self._virtual.keys()) or self._virtual if names else ():
            self._modes[name] = self._mode(name) + 1
        return bool(names and self._virtual)

    def _mode(self, name: str) -> int:
        return self._modes.get(name.lower(), _RAW)

    def _is_empty_database(self) -> bool:
        page = self._examined.image.page(1)
        return page is not None and page.sound

    # --- the schema

    def _make_tables(self) -> None:
        for entry in self._entries:
            if is_virtual(entry):
                if self._mode(entry.name) < _GONE and self._rebuild.create(entry) == entry.name:
                    self._virtual[entry.name.lower()] = entry
                else:
                    self.lost.append(("table", entry.name))
        owners = {name: entry for entry in self._virtual.values() for name in shadows(entry)}
        for entry in self._entries:
            if entry.kind == "table" and not is_virtual(entry):
                self._make_table(entry, owners.get(entry.name.lower()))

    def _make_table(self, entry: Entry, virtual: Entry | None) -> None:
        if entry.name.lower().startswith("sqlite_"):
            self._internal.append(self._survey.walk(entry.name, entry.root, True))
            return
        name: str | None = entry.name
        if virtual is None or not self._rebuild.has_table(entry.name):
            virtual, name = None, self._rebuild.create(entry)
        if name is None:
            self.lost.append(("table", entry.name))
            if self._survey.holds_rowids(entry):
                self._apart.append(self._survey.walk(entry.name, entry.root, True))
            return
        layout = self._rebuild.layout(name)
        self._found.append(_Found(layout, self._survey.walk(name, entry.root, not layout.without_rowid, layout.admits), virtual))

    def _make(self, entries: Iterator[Entry]) -> None:
        for entry in entries:
            if entry.sql is not None and self._rebuild.create(entry) is None:
                self.lost.append((entry.kind, entry.name))

    # --- rows

    def _rows(self, tree: Tree, pages: list[int]) -> Iterator[Row]:
        for number in pages:
            self._survey.check_time()
            yield from self._survey.rows(tree, number)

    def _walk_indexes(self) -> None:
        for entry in self._entries:
            if entry.kind == "index" and entry.root:
                self._indexes.append((entry, self._survey.walk(entry.name, entry.root, False)))
        self._survey.settle()

    def _assign_orphans(self) -> None:
        """Find the table of each page that no tree leads to; see `_table_of`."""
        unsure = 0
        for number in self._survey.orphans():
            apart = Tree("", number)
            rows = list(self._rows(apart, [number]))
            if not self._survey.free_known:
                unsure += len(rows)
                continue
            found = None if apart.bad_cells else self._table_of(rows)
            if found is None:
                self._leftover.append(number)
            else:
                found.extra.append(number)
        if unsure:
            message = f"{unsure} rows on pages of no tree were left out: they may have been deleted before"
            self._examined.findings.add("freelist", message)

    def _table_of(self, rows: list[Row]) -> _Found | None:
        """The one table that lacks rows like these between the keys that it has.

        Where the schema is not whole they may be those of a table that nobody knows, unless the gap has an end on both sides.
        """
        least, most = rows[0][0], rows[-1][0]
        fitting = []
        for found in self._found:
            gaps = found.tree.gaps if not found.layout.without_rowid else []
            if not self._schema.whole:
                gaps = [gap for gap in gaps if gap[0] != BELOW_ALL and gap[1] != MOST]
            if any(low < least and most <= high for low, high in gaps) and all(found.layout.admits(row[1]) for row in rows):
                fitting.append(found)
        exact = [found for found in fitting if len(rows[0][1]) == found.layout.fields]
        fitting = exact or fitting
        return fitting[0] if len(fitting) == 1 else None

    def _fill(self, found: _Found) -> None:
        rows = self._rows(found.tree, found.tree.pages + found.extra)
        counted = Counted(found.layout.name)
        if found.virtual is None:
            came, counted.kept = self._rebuild.insert(found.layout, rows)
        elif self._is_raw(found.virtual):
            came, counted.kept = self._rebuild.replace_shadow(found.layout, rows)
        else:
            came = counted.kept = sum(1 for _ in rows)
        refused = came - counted.kept
        if refused:
            refused = self._distinct(found) - counted.kept
            found.tree.displaced = found.tree.displaced or refused < came - counted.kept
        if refused:
            self._examined.findings.add("constraint", f"{refused} rows break a constraint", of=counted.name)
        if refused or not found.tree.whole:
            self._count_lost(found, counted, refused)
        self.counted.append(counted)

    def _distinct(self, found: _Found) -> int:
        """How many rows there are: one whose page is there twice is one."""
        pages = found.tree.pages + found.extra
        if found.layout.without_rowid:
            return len({repr(values) for _, values in self._rows(found.tree, pages)})
        return len({rowid for rowid, _ in self._rows(found.tree, pages)})

    def _count_lost(self, found: _Found, counted: Counted, refused: int) -> None:
        counted.lost = found.tree.bad_cells + refused
        counted.exact = not found.tree.gaps and not found.tree.displaced
        if found.layout.without_rowid or found.virtual is not None or not found.layout.has_rowids:
            return
        name = found.layout.name.lower()
        indexes = [tree for entry, tree in self._indexes if entry.table.lower() == name and not _is_partial(entry)]
        missing: set[int] = set()
        for tree in indexes:
            missing.update(self._survey.indexed_rowids(tree))
            if tree.whole:
                break
        if missing:
            missing.difference_update(self._rebuild.rowids(found.layout))
        if any(tree.whole for tree in indexes):
            counted.lost, counted.exact = len(missing), True
        else:
            counted.lost = max(counted.lost, len(missing))

    def _fill_internal(self, tree: Tree) -> None:
        rows = self._rows(tree, tree.pages)
        name = tree.name.lower()
        kept = self._rebuild.set_sequences(rows) if name == "sqlite_sequence" else None
        if name.startswith("sqlite_stat"):
            kept = self._rebuild.set_statistics(name, rows)
        if kept is None:
            self.lost.append(("table", tree.name))
            return
        counted = Counted(tree.name)
        counted.kept, counted.lost, counted.exact = kept, tree.bad_cells, not tree.gaps
        self.counted.append(counted)

    def _keep_the_rest(self) -> None:
        most = self._configuration.sqlite_limits["COLUMN"]
        taken = {entry.name.lower() for entry in self._entries}
        self.unassigned = self._rebuild.keep_apart(self._unassigned_rows, most, taken)

    def _unassigned_rows(self) -> Iterator[Stray]:
        for tree in self._apart:
            yield from self._strays(tree, tree.pages)
        for number in self._leftover:
            yield from self._strays(Tree("", self._survey.head_of(number)), [number])

    def _strays(self, tree: Tree, pages: list[int]) -> Iterator[Stray]:
        for number in pages:
            for rowid, values in self._rows(tree, [number]):
                yield tree.root, number, len(values), rowid, *values

    # --- virtual tables

    def _is_raw(self, virtual: Entry) -> bool:
        """Whether its own tables go back as they were: all of them were read whole, and it came out well so."""
        if self._mode(virtual.name) != _RAW:
            return False
        for found in self._found:
            if found.virtual is virtual:
                self._survey.read(found.tree)
        return all(found.tree.whole for found in self._found if found.virtual is virtual)

    def _refill_virtual_tables(self) -> None:
        for name, entry in list(self._virtual.items()):
            if self._is_raw(entry):
                continue
            source = f"{entry.name}_{'content' if module_of(entry) == 'fts5' else 'node'}".lower()
            found = next((each for each in self._found if each.layout.name.lower() == source), None)
            rows = self._rows(found.tree, found.tree.pages + found.extra) if found is not None else iter(())
            if not self._rebuild.refill(entry, rows):
                self._modes[name] = _GONE
                self.again = True


def _is_unique(entry: Entry) -> bool:
    return entry.kind == "index" and (entry.sql or "").startswith("CREATE UNIQUE ")


def _is_partial(entry: Entry) -> bool:
    """Whether it may lack rows of its table; by its words, so it may be more careful than it need be."""
    return "where" in (entry.sql or "").lower()


def _replace(path: str, old: bytes, undo: bytes, new: bytes) -> None:
    """Put new bytes in the place of a file's. Killed anywhere in here, the journal that stands then gives the old ones back."""
    journal = f"{path}-journal"
    if read_file(path) != old:  # the rollback that its journal asks for
        _write(path, old)
    _write(journal, b"")
    try:
        _write(journal, b"\0" * _MAGIC_BYTES + undo[_MAGIC_BYTES:])  # none to SQLite before it is whole
        _write(journal, undo[:_MAGIC_BYTES], cut=False)
        _write(path, new)
    except OSError as error:
        _write(path, old)
        _write(journal, b"")
        raise VerdictError(_FULL.get(error.errno or 0, Verdict.INTERNAL), type(error).__name__) from error
    _write(journal, b"")


_MAGIC_BYTES = 8
_FULL = {errno.ENOSPC: Verdict.HOST_FULL, errno.EDQUOT: Verdict.HOST_FULL, errno.EFBIG: Verdict.STORAGE_FULL}


def _write(path: str, content: bytes, *, cut: bool = True) -> None:
    """Write from the beginning of a file that is there, and wait for the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        write_all(descriptor, content)
        if cut:
            os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
