"""Which page of a file belongs to what: the trees that the schema names, the freelist, and what is left over.

A page has one place. Where two claim it, that one gets it whose keys it fits; where a tree and the freelist do, see
`Survey._is_live`.

What the file had deleted lies on free pages and in free parts of pages, and looks like any other row: so a page outside of all
trees, an *orphan*, is worth something only when it is certain which pages are free.
"""

from __future__ import annotations

from .image import INTERIORS, TABLE_INTERIOR, TABLE_LEAF, TABLES, RawText
from .wire import Verdict, VerdictError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .image import Cell, Image, Page, Value

    Expired = Callable[[], bool]
    Admits = Callable[[list[Value]], bool]
    Row = tuple[int, list[Value]]
    """Its rowid (0 in a WITHOUT ROWID table) and the values of its record."""

BELOW_ALL, MOST = -(1 << 63) - 1, (1 << 63) - 1
"""Around every rowid: one less than the least, and the greatest."""
MAX_FINDINGS = 100
MAX_CHARACTERS = 300
_CONTROLS = dict.fromkeys((*range(32), 127), "\N{REPLACEMENT CHARACTER}")
_SCHEMA_FIELDS = 5
_MOST_ENTRIES = 8_000
_MOST_INDEXED = 500_000
_MOST_CLAIMS = 16
_MOST_DEPTH = 20
"""SQLite's own: no tree in a file of any size is deeper."""
_OBJECT_TYPES = frozenset(("table", "index", "view", "trigger"))


def raise_if_over(expired: Expired) -> None:
    """Raises VerdictError when the time is over."""
    if expired():
        raise VerdictError(Verdict.TIMEOUT)


class Findings:
    """What is wrong with a file: the first hundred things."""

    __slots__ = ("_seen", "items", "more")

    def __init__(self) -> None:
        self.items: list[dict[str, object]] = []
        self.more = False
        self._seen: set[tuple[str, int | None, str | None, str]] = set()

    def add(self, code: str, message: str, page: int | None = None, of: str | None = None) -> None:
        name = None if of is None else printable(of)
        if page is not None and page < 1:  # a root page as a hostile schema has it
            page = None
        finding = (code, page, name, printable(message))
        if finding in self._seen:
            return
        if len(self.items) >= MAX_FINDINGS:
            self.more = True
            return
        self._seen.add(finding)
        self.items.append({"code": code, "page": page, "object": name, "message": finding[3]})


def printable(text: str) -> str:
    """What may be shown of a name or a message: no half of a surrogate pair, and no control character, each six bytes of JSON."""
    return text[:MAX_CHARACTERS].translate(_CONTROLS).encode("utf-8", "replace").decode("utf-8")


class Entry:
    """One row of the schema."""

    __slots__ = ("kind", "name", "root", "sql", "table")

    def __init__(self, kind: str, name: str, table: str, root: int, sql: str | None) -> None:
        self.kind = kind
        self.name = name
        self.table = table
        self.root = root
        self.sql = sql


class Tree:
    """One b-tree as far as it can be reached from its root."""

    __slots__ = ("admits", "bad_cells", "displaced", "gaps", "name", "opened", "pages", "read", "root")

    def __init__(self, name: str, root: int, admits: Admits = lambda _: True) -> None:
        self.admits = admits
        self.name = name
        self.root = root
        self.pages: list[int] = []
        """Those that hold rows or entries, in the order of their keys."""
        self.gaps: list[tuple[int, int]] = []
        """What is out of reach: rowids greater than the first number and up to the second. Of an index, any."""
        self.displaced = False
        """Whether there is a page in it, or was, that holds something else."""
        self.bad_cells = 0
        self.opened: set[int] = set()
        """Pages whose faults are counted."""
        self.read: set[int] = set()
        """Pages whose records' faults are."""

    def miss(self, low: int, high: int) -> None:
        """What lies between two keys is out of reach."""
        if self.gaps and self.gaps[-1][0] <= low <= self.gaps[-1][1]:  # the children of a page come in their order
            low, high = self.gaps[-1][0], max(high, self.gaps[-1][1])
            self.gaps.pop()
        self.gaps.append((low, high))

    @property
    def whole(self) -> bool:
        return not self.gaps and not self.bad_cells and not self.displaced


class Survey:
    """A walk over a whole file, once."""

    __slots__ = (
        "_alone",
        "_bounds",
        "_claims",
        "_entries_read",
        "_expired",
        "_links",
        "_listed",
        "_reaches",
        "_stale",
        "findings",
        "free",
        "free_known",
        "image",
        "orphans_end",
        "roots",
        "taken",
    )

    def __init__(self, image: Image, findings: Findings, expired: Expired) -> None:
        self.image = image
        self.findings = findings
        self._links: dict[int, set[int]] | None = {}
        self._reaches: dict[int, tuple[int, int]] = {}
        self._alone: list[int] | None = None
        self._bounds: dict[int, tuple[int, int]] = {}
        """By a leaf's number, between which keys its rowids are."""
        self._entries_read = 0
        self._expired = expired
        self.taken: set[int] = set()
        """Pages that have their place in a tree."""
        self._claims: dict[int, list[tuple[int, int, int]]] = {}
        """By a page's number: the interior pages that have it for a child, and between which keys."""
        self.roots: set[int] = {1}
        """Pages that the schema names."""
        self.free: set[int] = set()
        self.free_known = False
        """Whether `free` is certain to hold every free page."""
        counted = image.header.pages
        self.orphans_end = min(image.pages, counted) if counted else image.pages
        self._read_freelist()
        self._collect_claims()

    def check_time(self) -> None:
        raise_if_over(self._expired)

    # --- the freelist

    def _read_freelist(self) -> None:
        header, image = self.image.header, self.image
        listed, complete = self._follow(header.free_head)
        complete = complete and not header.faults
        self._listed = complete and len(listed) == header.free_count
        if not self._listed and (header.free_head or header.free_count):
            self.findings.add("freelist", f"{len(listed)} free pages can be found, the header counts {header.free_count}")
        trunks = self._trunks()
        self.free = listed | set(image.mapped_free())
        if self._listed and trunks <= listed:
            self.free_known = True
            return
        heads = trunks.difference(*(self._next_of(trunk) for trunk in trunks)) if trunks else set()
        found: set[int] = set()
        whole = len(heads) <= 1
        for head in sorted(heads):
            chain, ended = self._follow(head)
            whole = whole and ended
            found |= chain
        self.free |= found
        if self._listed:
            # Trunks of old, on pages that the freelist does not know: what they list may be anything.
            self.free_known = not (found - listed)
            return
        counted = header.free_count if not header.faults else None
        self.free_known = whole and (len(found) == counted or not self._unknown_pages(found))

    def _next_of(self, trunk: int) -> set[int]:
        read = self.image.pointers_of_trunk(trunk)
        return {read[0]} if read and read[0] != trunk else set()

    def _follow(self, trunk: int) -> tuple[set[int], bool]:
        """The pages of a freelist, and whether it could be read to its end."""
        pages: set[int] = set()
        image = self.image
        end = max(image.pages, image.header.pages or 0)  # of a shortened file: they are free, wherever they are
        while trunk:
            if not image.has(trunk) or trunk in pages:
                return pages, False
            read = image.pointers_of_trunk(trunk)
            if read is None:
                return pages, False
            pages.add(trunk)
            trunk, leaves = read
            before = len(pages)
            pages.update(leaf for leaf in leaves if 1 < leaf <= end)
            if len(pages) - before != len(leaves):
                return pages, False
        return pages, True

    def _trunks(self) -> set[int]:
        """Pages that look like a trunk: no other page begins with two small numbers and then distinct page numbers.

        Without a header to ask, one that begins with two zeros and goes on is the last, without leaves.
        """
        image = self.image
        found = set()
        for number in range(2, image.pages + 1):
            read = image.pointers_of_trunk(number)
            if read is None or read[0] > image.pages or image.kind(number):
                continue
            leaves = read[1]
            if not leaves and (read[0] or not image.header.faults or not image.is_used(number)):
                continue
            if len(set(leaves)) == len(leaves) and all(1 < leaf <= image.pages and leaf != number for leaf in leaves):
                found.add(number)
        return found

    def _unknown_pages(self, free: set[int]) -> bool:
        """Whether there is a page, other than the first, that is no part of anything: it may be what tells of free pages."""
        image = self.image
        known = set(free) | image.map_pages()
        for number in range(1, image.pages + 1):
            self.check_time()
            if number in free or (page := image.page(number)) is None:
                continue
            if page.sound:
                known.add(number)
            for cell in page.cells:
                if cell.overflow:
                    known.update(image.chain(cell, page.kind) or ())
        return any(number not in known for number in range(2, image.pages + 1))

    # --- who claims which page

    def _collect_claims(self) -> None:
        image = self.image
        for number in range(1, image.pages + 1):
            self.check_time()
            if image.kind(number) not in INTERIORS or (number in self.free and number != 1):
                continue
            page = image.page(number)
            if page is not None and page.sound:
                for child, low, high in children(page, BELOW_ALL, MOST):
                    claims = self._claims.setdefault(child, []) if image.has(child) else []
                    if len(claims) < _MOST_CLAIMS:
                        claims.append((number, low, high))

    def fits(self, number: int, low: int, high: int) -> bool:
        """Whether all keys of a table's page lie between two keys."""
        least, most = self._reach(number)
        return low < least and most <= high

    def _reach(self, number: int) -> tuple[int, int]:
        """The least and the greatest key of a table's page; of any other, nothing: the greatest is less."""
        if number not in self._reaches:
            page = self.image.page(number) if self.image.has(number) else None
            keys = [cell.rowid for cell in page.cells] if page is not None and page.kind in TABLES else []
            self._reaches[number] = (min(keys), max(keys)) if keys else (MOST, BELOW_ALL)
        return self._reaches[number]

    def _belongs(self, tree: Tree, number: int, parent: int, low: int, high: int) -> bool:
        """Whether a page is the child that its parent says it is, where others claim it as well."""
        if number in self.roots and not self._ends_with(number, high):
            return False
        rivals = [claim for claim in self._claims.get(number, []) if claim[0] != parent]
        if rivals:
            mine = self.fits(number, low, high)
            fitting = [claim for claim in rivals if self.fits(number, claim[1], claim[2])]
            if fitting and not (mine and self._has_rows_of(tree, number)):
                return False
            if mine and fitting and not self._ends_with(number, high) and any(self._ends_with(number, c[2]) for c in fitting):
                return False
        return number not in self.free or not self._listed or self._is_live(number, low, high)

    def _has_rows_of(self, tree: Tree, number: int) -> bool:
        page = self.image.page(number)
        if page is None or page.kind == TABLE_INTERIOR:
            return page is not None
        return any(tree.admits(values) for _, values in self._records(page))

    def _is_live(self, number: int, low: int, high: int) -> bool:
        """A page in a tree and on a freelist without other faults: either the child's number is wrong, or a free page's.

        If it is the child's, then the right child is left over, and fits in its place.
        """
        if self.image.kind(number) not in TABLES:
            return False
        return self.fits(number, low, high) and not any(self.fits(orphan, low, high) for orphan in self._unclaimed())

    def _unclaimed(self) -> list[int]:
        if self._alone is None:
            placed = self.free | self._claims.keys() | self.roots
            numbers = (number for number in range(2, self.orphans_end + 1) if number not in placed)
            self._alone = [number for number in numbers if self.image.kind(number) in TABLES]
        return self._alone

    def _ends_with(self, number: int, key: int) -> bool:
        least, most = self._reach(number)
        return least <= most == key

    # --- trees

    def walk(self, name: str, root: int, is_table: bool, admits: Admits = lambda _: True) -> Tree:
        """Everything below a root. A page that has its place already is not visited again.

        `admits` tells whether a record can be one of the table's.
        """
        tree = Tree(name, root, admits)
        stack = [(root, 0, BELOW_ALL, MOST, 0)]
        while stack:
            number, parent, low, high, depth = stack.pop()
            self.check_time()
            fault = self._fault(tree, number, parent, low, high, is_table) if depth < _MOST_DEPTH else "is too deep in the tree"
            if fault is not None:
                where = f"page {number}, a child of page {parent}," if parent else "the root page"
                self.findings.add("page", f"{where} {fault}", number, name)
                tree.miss(low, high)
                continue
            self.taken.add(number)
            kind = self.image.kind(number)
            if kind != TABLE_INTERIOR:
                tree.pages.append(number)
            if kind == TABLE_LEAF:
                self._bounds[number] = low, high
            if kind in INTERIORS and (page := self._open(tree, number)):
                if page.bad:
                    tree.miss(low, high)
                below = list(children(page, low, high))
                stack += [(child, number, least, most, depth + 1) for child, least, most in reversed(below)]
        return tree

    def _open(self, tree: Tree, number: int) -> Page | None:
        """A page of a tree; what is wrong with it counts once."""
        page = self.image.page(number)
        if page is None or page.sound or number in tree.opened:
            return page
        tree.opened.add(number)
        tree.bad_cells += page.bad if page.kind != TABLE_INTERIOR else 0
        fault = f"{page.bad} cells of the page cannot be read" if page.bad else "the page does not account for its bytes"
        self.findings.add("page", fault, number, tree.name)
        return page

    def read(self, tree: Tree) -> None:
        """Find out what is wrong with the rows."""
        for number in tree.pages:
            self.check_time()
            for _ in self.rows(tree, number):
                pass

    def _fault(self, tree: Tree, number: int, parent: int, low: int, high: int, is_table: bool) -> str | None:
        if not self.image.has(number):
            return "is not in the file"
        if number in self.taken:
            return "belongs to another place"
        if not self.image.kind(number) or (self.image.kind(number) in TABLES) != is_table:
            return "is no page of such a tree"
        if parent:
            return None if self._belongs(tree, number, parent, low, high) else "belongs to another place"
        if any(self._ends_with(number, claim[2]) for claim in self._claims.get(number, [])):
            return "belongs to another place"
        return "is free" if number in self.free and self._listed and number != 1 else None

    def rows(self, tree: Tree, number: int) -> Iterator[Row]:
        """The rows of one page of a table. Cells that cannot be read are counted in the tree.

        Where the first row cannot be one of the table's, each is looked at: the page may be another table's, in the wrong place.
        """
        page = self._open(tree, number)
        if page is None or self._is_displaced(tree, page):
            return
        of_rowids, suspicious = page.kind == TABLE_LEAF, not page.sound
        first = True
        for cell, values in self._records(page, tree):
            if first or suspicious:
                first, suspicious = False, suspicious or not tree.admits(values)
                if suspicious and not tree.admits(values):
                    tree.displaced = True
                    self.findings.add("page", "a record is none of the table's", number, tree.name)
                    continue
            yield (cell.rowid if of_rowids else 0), values
        tree.read.add(number)

    def _is_elsewhere(self, page: Page) -> bool:
        low, high = self._bounds.get(page.number, (BELOW_ALL, MOST))
        return bool(page.cells) and (page.cells[-1].rowid <= low or page.cells[0].rowid > high)

    def _is_displaced(self, tree: Tree, page: Page) -> bool:
        """Whether not one rowid of a leaf is where it should be: one wrong key in the page above leaves some in their place."""
        if not self._is_elsewhere(page):
            return False
        tree.displaced = True
        self.findings.add("page", "the rows belong to another place", page.number, tree.name)
        return True

    def _records(self, page: Page, tree: Tree | None = None) -> Iterator[tuple[Cell, list[Value]]]:
        """The records of a page that can be read; the others are counted in the tree, if one is given."""
        image = self.image
        data, base = image.data, image.start(page.number)
        record, tidy = image.record, page.sound
        for cell in page.cells:
            if cell.overflow:
                payload = image.payload(page, cell) if self._is_its_own(page, cell) else None
            else:
                at = base + cell.local
                payload = data[at : at + cell.payload]
            values = None if payload is None else record(payload)
            if values is not None and (tidy or _is_tidy(values)):
                yield cell, values
            elif tree is not None and payload is None:
                self._count(tree, page.number, "overflow", f"the rest of the record of row {cell.rowid} is lost")
            elif tree is not None:
                self._count(tree, page.number, "page", "a record cannot be read")

    def settle(self) -> None:
        """All trees are walked: from now on an overflow page that two chains claim is looked into."""
        self._links = None

    def _is_its_own(self, page: Page, cell: Cell) -> bool:
        """Whether the overflow pages of a cell belong to no other.

        Where another chain has one of them too, one of the two has a wrong number: not the one that goes on with the next page, and
        the one whose next page nobody has.
        """
        if self._links is None:
            self._links = self._collect_links()
        last = -page.number
        for number in self.image.chain(cell, page.kind) or ():
            rivals = self._links.get(number, set()) - {last}
            if number in self.taken or (self._listed and number in self.free):
                return False
            mine = last + 1 == number or (not self._is_unplaced(last) and any(map(self._is_unplaced, rivals)))
            if rivals and (not mine or number - 1 in rivals):
                return False
            last = number
        return True

    def _is_unplaced(self, last: int) -> bool:
        """Whether the page after an overflow page belongs to nothing."""
        number = abs(last) + 1
        known = number in self.taken or number in self.free or number in (self._links or {})
        return self.image.has(number) and not known

    def _collect_links(self) -> dict[int, set[int]]:
        """By an overflow page those that it follows; a cell's first follows minus its page."""
        links: dict[int, set[int]] = {}
        for number in sorted(self.taken):
            self.check_time()
            page = self.image.page(number)
            if page is None or self._is_elsewhere(page):
                continue
            for cell in page.cells:
                last = -number
                for following in (self.image.chain(cell, page.kind) or ()) if cell.overflow else ():
                    links.setdefault(following, set()).add(last)
                    last = following
        return links

    def _count(self, tree: Tree, number: int, code: str, fault: str) -> None:
        """A cell that cannot be read, when its page is read for the first time."""
        if number not in tree.read:
            tree.bad_cells += 1
            self.findings.add(code, fault, number, tree.name)

    def orphans(self) -> list[int]:
        """Sound leaves of tables that are in no tree and not free, as far as that is known."""
        skip = self.taken | self.free | self.image.map_pages()
        found = []
        for number in range(2, self.orphans_end + 1):
            self.check_time()
            if number in skip or self.image.kind(number) != TABLE_LEAF:
                continue
            page = self.image.page(number)
            if page is not None and page.sound and page.cells:
                found.append(number)
        return found

    def head_of(self, orphan: int) -> int:
        """The topmost page from which an orphan could be reached."""
        head, seen = orphan, {orphan}
        while (claims := self._claims.get(head)) and claims[0][0] not in seen:
            head = claims[0][0]
            seen.add(head)
        return head

    # --- the schema

    def schema(self) -> tuple[list[Entry], Tree]:
        """What the schema names, in its order, and its tree."""
        tree = self.walk("sqlite_schema", 1, True) if self.image.pages else Tree("sqlite_schema", 1)
        entries: list[Entry] = []
        for number in tree.pages:
            entries += self._entries(tree, number)
        if tree.gaps and self.free_known:
            for number in self.orphans():
                apart = Tree("sqlite_schema", number)
                rows = [values for _, values in self.rows(apart, number)]
                if rows and not apart.bad_cells and all(_entry(values) is not None for values in rows):
                    self.taken.add(number)
                    entries += self._entries(tree, number)
        self.roots.update(entry.root for entry in entries if entry.root)
        return entries, tree

    def _entries(self, tree: Tree, number: int) -> Iterator[Entry]:
        for _, values in self.rows(tree, number):
            entry = _entry(values)
            if entry is not None and self._entries_read < _MOST_ENTRIES:
                self._entries_read += 1
                yield entry
            else:
                tree.bad_cells += 1
                self.findings.add("schema", "a row of the schema cannot be read", number)

    def holds_rowids(self, entry: Entry) -> bool:
        """Whether a table's tree is one of rowids: by its root, or by its words."""
        if self.image.has(entry.root) and (kind := self.image.kind(entry.root)):
            return kind in TABLES
        return "without rowid" not in " ".join((entry.sql or "").lower().split())

    def indexed_rowids(self, tree: Tree) -> Iterator[int]:
        """The rowids that an index knows of."""
        seen: set[int] = set()
        width = 0
        for number in tree.pages:
            self.check_time()
            for _, values in self.rows(tree, number):
                width = width or len(values)
                rowid = values[-1] if values else None
                if type(rowid) is not int or len(values) != width or rowid in seen or len(seen) >= _MOST_INDEXED:
                    tree.displaced = True
                else:
                    seen.add(rowid)
                    yield rowid


def children(page: Page, low: int, high: int) -> Iterator[tuple[int, int, int]]:
    """The children of an interior page, each with the keys between which its rows are; of an index, any."""
    ordered = page.kind == TABLE_INTERIOR and _ascend(page.cells, low, high)
    if not ordered:
        for cell in page.cells:
            yield cell.child, low, high
        yield page.right, low, high
        return
    least = low
    for cell in page.cells:
        yield cell.child, least, cell.rowid
        least = cell.rowid
    yield page.right, least, high


def _ascend(cells: list[Cell], low: int, high: int) -> bool:
    last = low
    for cell in cells:
        if not (last < cell.rowid <= high):
            return False
        last = cell.rowid
    return True


def _entry(values: list[Value]) -> Entry | None:
    if len(values) != _SCHEMA_FIELDS:
        return None
    kind, name, table, root, sql = values
    if kind not in _OBJECT_TYPES or not _is_text(name) or not _is_text(table) or not (sql is None or _is_text(sql)):
        return None
    return Entry(str(kind), str(name), str(table), root if type(root) is int else 0, None if sql is None else str(sql))


def _is_text(value: Value) -> bool:
    return type(value) is str


def _is_tidy(values: list[Value]) -> bool:
    """On a page with a fault, a text with what texts hardly hold is taken for overwritten."""
    return not any(type(value) is RawText or (type(value) is str and "\0" in value) for value in values)
