"""The file format of SQLite, read from bytes: whatever they are, every answer is bounded and nothing loops.

The words are those of https://sqlite.org/fileformat2.html. Pages are numbered from 1. Nothing here writes, and nothing here is
SQLite: a file that SQLite refuses as a whole is still read page by page. What cannot be read is None, or missing, and never an
exception but ImageError, which says that there are no pages at all.

A page that is *sound* accounts for each of its bytes: cells, freeblocks and fragments fill its content area exactly. On any other
page a cell counts only where it contradicts nothing, because a wrong pointer may lead to what was deleted long ago.
"""

from __future__ import annotations

import codecs
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Value = None | int | float | str | bytes
    Plan = tuple[tuple[tuple[int, int, int], ...], int]
    """For each field its kind, where it begins and where it ends in the record; and the record's length."""

MAGIC = b"SQLite format 3\0"
HEADER_BYTES = 100
PAGE_SIZES = (4096, 512, 1024, 2048, 8192, 16384, 32768, 65536)
MAX_FIELDS = 32767

INDEX_INTERIOR, TABLE_INTERIOR, INDEX_LEAF, TABLE_LEAF = 2, 5, 10, 13
INTERIORS, TABLES = (INDEX_INTERIOR, TABLE_INTERIOR), (TABLE_INTERIOR, TABLE_LEAF)
_KINDS = frozenset((INDEX_INTERIOR, TABLE_INTERIOR, INDEX_LEAF, TABLE_LEAF))

UTF8, UTF16LE, UTF16BE = 1, 2, 3
# The functions and not the names: a name imports a module at its first use, and nothing can be imported after the confinement.
DECODERS = {UTF8: codecs.utf_8_decode, UTF16LE: codecs.utf_16_le_decode, UTF16BE: codecs.utf_16_be_decode}
_ENCODERS = {UTF8: codecs.utf_8_encode, UTF16LE: codecs.utf_16_le_encode, UTF16BE: codecs.utf_16_be_encode}
PRAGMA_ENCODINGS = {UTF8: "UTF-8", UTF16LE: "UTF-16le", UTF16BE: "UTF-16be"}

_U16, _U32, _TWO_U32 = struct.Struct(">H"), struct.Struct(">I"), struct.Struct(">II")
_DOUBLE = struct.Struct(">d")
_PENDING_BYTE = 0x40000000
_NULL, _INT, _REAL, _CONSTANT, _BLOB, _TEXT = range(6)
_INT_BYTES = (0, 1, 2, 3, 4, 6, 8)
_MAX_PLANNED = 100_000
"""Bytes of records' heads whose meaning is remembered."""
_STEPS_A_PAGE, _STEPS = 64, 100_000
"""How often overflow pages are looked at: in a file in good order, each a few times."""
_FULL, _INCREMENTAL = 1, 2
_MOST_FRAGMENTS = 60
_WITNESS = 16
_SAMPLE_BYTES, _SAMPLES = 65536, 16


class ImageError(Exception):
    """There is not a single page to read."""


class RawText(bytes):
    """The bytes of a text that is not well-formed in the database's encoding."""


class Cell:
    """One cell: of a table's page with its rowid, of an interior page with its child."""

    __slots__ = ("child", "end", "local", "overflow", "payload", "rowid", "start")

    def __init__(self, start: int, end: int, child: int, rowid: int, payload: int, local: int, overflow: int) -> None:
        self.start = start
        self.end = end
        """Where it lies within the page."""
        self.child = child
        self.rowid = rowid
        """In an interior page of a table the key: no rowid to the left of it is greater."""
        self.payload = payload
        """Bytes of its record, wherever they are."""
        self.local = local
        """Where the record begins within the page."""
        self.overflow = overflow
        """The first page of the record's rest, or 0."""


class Page:
    """One page of a b-tree: those of its cells that can be believed."""

    __slots__ = ("bad", "cells", "kind", "number", "right", "sound")

    def __init__(self, number: int, kind: int, cells: list[Cell], bad: int, right: int, sound: bool) -> None:
        self.number = number
        self.kind = kind
        self.cells = cells
        self.bad = bad
        """How many more there should be."""
        self.right = right
        """The last child of an interior page."""
        self.sound = sound


class Header:
    """What the first 100 bytes say, as far as it can be meant; None for what cannot."""

    __slots__ = (
        "application_id",
        "auto_vacuum",
        "encoding",
        "faults",
        "free_count",
        "free_head",
        "page_size",
        "pages",
        "reserved",
        "user_version",
        "wal",
    )

    def __init__(self, data: bytes) -> None:
        head = data[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0")
        self.faults: list[str] = []
        """What is wrong with it, in words."""
        magic = head.startswith(MAGIC)
        self._check(magic, "the file does not begin like an SQLite database")
        size = _U16.unpack_from(head, 16)[0]
        size = 65536 if size == 1 else size
        self.page_size: int | None = size if size in PAGE_SIZES else None
        self._check(self.page_size is not None, "the page size is none")
        self._check(head[18] in (1, 2) and head[19] in (1, 2), "the format versions are unknown")
        self.wal = head[18] == 2 or head[19] == 2
        self._check(head[21:24] == b"\x40\x20\x20", "the payload fractions are not 64, 32 and 32")
        self.reserved = head[20]
        self._check(self.page_size is None or self.page_size - self.reserved >= 480, "too much of each page is reserved")
        self._check(self._u32(head, 44) <= 4, "the schema format is unknown")
        encoding = self._u32(head, 56)
        self.encoding: int | None = encoding if encoding in DECODERS else None
        self._check(encoding in DECODERS or not encoding, "the text encoding is unknown")  # SQLite takes 0 for UTF-8
        self.free_head, self.free_count = self._u32(head, 32), self._u32(head, 36)
        self.auto_vacuum = 0 if not self._u32(head, 52) else _INCREMENTAL if self._u32(head, 64) else _FULL
        believable = magic and self.page_size is not None
        counted = self._u32(head, 28)
        fresh = self._u32(head, 24) == self._u32(head, 92)
        self.pages: int | None = counted if believable and fresh and counted else None
        """Of the database; None where the file's length alone tells."""
        self.user_version = int.from_bytes(head[60:64], "big", signed=True) if magic else None
        self.application_id = int.from_bytes(head[68:72], "big", signed=True) if magic else None

    @staticmethod
    def _u32(head: bytes, offset: int) -> int:
        number: int = _U32.unpack_from(head, offset)[0]
        return number

    def _check(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)


class Image:
    """A database file in memory, and how it is divided into pages."""

    __slots__ = ("_planned", "_plans", "_steps", "data", "decode_text", "encoding", "header", "page_size", "pages", "usable")

    def __init__(self, data: bytes) -> None:
        """Guesses what the header does not tell. Raises ImageError."""
        self.data = data
        self.header = Header(data)
        self._plans: dict[bytes, Plan | None] = {}
        self._planned = 0
        self._steps = 0
        self.page_size = self.usable = 0
        self._divide(self.header.page_size or PAGE_SIZES[0], self.header.reserved)
        self.encoding = self.header.encoding or UTF8
        self.decode_text = DECODERS[self.encoding]

    def _divide(self, page_size: int, reserved: int) -> None:
        self.page_size = page_size
        self.usable = page_size - reserved if page_size - reserved >= 480 else page_size
        self.pages = len(self.data) // page_size

    def mend(self, check_time: Callable[[], None]) -> None:
        """Where the pages make more sense with another size or encoding than the header's, take that. Raises ImageError.

        `check_time` is called now and then, and may raise what it likes.
        """
        declared = self.page_size, self.page_size - self.usable
        sizes = dict.fromkeys((self.page_size, *PAGE_SIZES))
        choices = dict.fromkeys((declared, *((size, reserved) for size in sizes for reserved in (0, declared[1]))))
        best = max(choices, key=lambda choice: self._sense(choice[0], choice[1], check_time))  # the first of equals
        self._divide(*best)
        if not self.pages:
            raise ImageError("the file has no page")
        if self.header.faults and not self.header.auto_vacuum and self._looks_like_a_map(2):
            self.header.auto_vacuum = _INCREMENTAL
        words = {encoding: self.data.count(encode("CREATE ")[0]) for encoding, encode in _ENCODERS.items()}
        if not words[self.encoding]:
            self.encoding = max(words, key=lambda encoding: (words[encoding], encoding == self.encoding))
        self.decode_text = DECODERS[self.encoding]

    def _looks_like_a_map(self, number: int) -> bool:
        if not self.has(number):
            return False
        base = self.start(number)
        entries = [self.data[at : at + 5] for at in range(base, base + 5 * min(self.usable // 5, self.pages - number), 5)]
        return bool(entries) and all(1 <= entry[0] <= 5 and _U32.unpack_from(entry, 1)[0] <= self.pages for entry in entries)

    def _sense(self, page_size: int, reserved: int, check_time: Callable[[], None]) -> int:
        """How many bytes are in sound pages of a b-tree, if the file is divided so."""
        if page_size - reserved < 480 or len(self.data) < page_size:
            return -1
        self._divide(page_size, reserved)
        stride = max(1, len(self.data) // _SAMPLE_BYTES // _SAMPLES) * _SAMPLE_BYTES
        begins = (at for block in range(0, len(self.data), stride) for at in range(block, block + _SAMPLE_BYTES, page_size))
        sound = 0
        for at in begins:
            if at + page_size <= len(self.data):
                check_time()
                sound += page_size if self._is_sound(at // page_size + 1) else 0
        return sound

    def _is_sound(self, number: int) -> bool:
        page = self.page(number)
        return page is not None and page.sound and bool(page.cells)

    def has(self, number: int) -> bool:
        return 1 <= number <= self.pages and (number - 1) * self.page_size != _PENDING_BYTE

    def is_used(self, number: int) -> bool:
        """Whether a page holds more than zeros."""
        begin = self.start(number)
        return self.data.count(0, begin, begin + self.page_size) < self.page_size

    def start(self, number: int) -> int:
        return (number - 1) * self.page_size

    def kind(self, number: int) -> int:
        """Of a page of a b-tree, or 0."""
        kind = self.data[self.start(number) + (HEADER_BYTES if number == 1 else 0)]
        return kind if kind in _KINDS else 0

    def page(self, number: int) -> Page | None:
        """A page of a b-tree with the cells that can be believed; None if it is none."""
        base, head = self.start(number), HEADER_BYTES if number == 1 else 0
        kind = self.data[base + head]
        if kind not in _KINDS:
            return None
        return _PageReader(self, number, kind, base, head).read()

    def cell(self, base: int, kind: int, at: int) -> Cell | None:
        """The cell at `at` within the page that begins at `base`."""
        data, usable = self.data, self.usable
        end = base + usable
        position = base + at
        child = rowid = 0
        if kind in INTERIORS:
            if position + 5 > end:
                return None
            child = _U32.unpack_from(data, position)[0]
            position += 4
            if kind == TABLE_INTERIOR:
                rowid, position = _varint(data, position)
                return Cell(at, position - base, child, _signed(rowid), 0, 0, 0) if position <= end else None
        if position + 2 > end:
            return None
        payload = data[position]
        if payload < 0x80:
            position += 1
        else:
            payload, position = _varint(data, position)
        if kind == TABLE_LEAF:
            rowid = data[position] if position < end else 0x80
            if rowid < 0x80:
                position += 1
            else:
                rowid, position = _varint(data, position)
                rowid = _signed(rowid)
        if payload > len(data) or position > end:
            return None
        local = self._local(kind, payload)
        after, overflow = position + local, 0
        if local < payload:
            if after + 4 > end:
                return None
            overflow = _U32.unpack_from(data, after)[0]
            after += 4
        if after > end:
            return None
        return Cell(at, max(after - base, at + 4), child, rowid, payload, position - base, overflow)

    def _local(self, kind: int, payload: int) -> int:
        """How many bytes of a record are in the cell itself."""
        usable = self.usable
        most = usable - 35 if kind == TABLE_LEAF else (usable - 12) * 64 // 255 - 23
        if payload <= most:
            return payload
        least = (usable - 12) * 32 // 255 - 23
        local = least + (payload - least) % (usable - 4)
        return local if local <= most else least

    def chain(self, cell: Cell, kind: int) -> list[int] | None:
        """The overflow pages of a cell; None where the chain is too short, goes in a circle or leads out of the file."""
        rest = cell.payload - self._local(kind, cell.payload)
        pages: list[int] = []
        number = cell.overflow
        while rest > 0:
            if not self.has(number) or len(pages) > self.pages:
                return None
            pages.append(number)
            self._steps += 1
            if self._steps > _STEPS + _STEPS_A_PAGE * self.pages:
                return None
            rest -= self.usable - 4
            number = _U32.unpack_from(self.data, self.start(number))[0]
        return pages if len(set(pages)) == len(pages) else None

    def ends(self, page: Page, cell: Cell, chain: list[int]) -> bool:
        """Whether a chain's last page is intact, as far as it tells: it knows of no next one.

        If it does, a text that goes on in there long enough is still witness enough that the number alone is wrong.
        """
        if not chain or not _U32.unpack_from(self.data, self.start(chain[-1]))[0]:
            return True
        payload = self._assembled(page, cell, chain)
        tail = (cell.payload - self._local(page.kind, cell.payload)) - (len(chain) - 1) * (self.usable - 4)
        last = next((value for value in reversed(self.record(payload) or ()) if value is not None), None)
        return type(last) is str and "\0" not in last and min(tail, len(last)) >= _WITNESS

    def payload(self, page: Page, cell: Cell) -> bytes | None:
        """A cell's whole record, or None."""
        begin = self.start(page.number) + cell.local
        if not cell.overflow:
            return self.data[begin : begin + cell.payload]
        chain = self.chain(cell, page.kind)
        return self._assembled(page, cell, chain) if chain is not None and self.ends(page, cell, chain) else None

    def _assembled(self, page: Page, cell: Cell, chain: list[int]) -> bytes:
        begin = self.start(page.number) + cell.local
        pieces = [self.data[begin : begin + self._local(page.kind, cell.payload)]]
        pieces += [self.data[self.start(n) + 4 : self.start(n) + self.usable] for n in chain]
        return b"".join(pieces)[: cell.payload]

    def record(self, payload: bytes) -> list[Value] | None:
        """The values of a record, or None if its parts do not make its length."""
        length = payload[0] if payload else 0
        if length >= 0x80:
            length, _ = _varint(payload, 0)
        head = payload[:length]
        if head in self._plans:
            plan = self._plans[head]
        else:
            plan = _plan(head, length)
            self._planned += len(head)
            if self._planned > _MAX_PLANNED:
                self._plans.clear()
                self._planned = len(head)
            self._plans[head] = plan
        if plan is None or plan[1] != len(payload):
            return None
        values: list[Value] = []
        for kind, begin, end in plan[0]:
            if kind == _TEXT:
                try:
                    values.append(self.decode_text(payload[begin:end], "strict", True)[0])
                except UnicodeDecodeError:
                    values.append(RawText(payload[begin:end]))
            elif kind == _INT:
                values.append(int.from_bytes(payload[begin:end], "big", signed=True))
            elif kind == _NULL:
                values.append(None)
            elif kind == _CONSTANT:
                values.append(begin)
            elif kind == _BLOB:
                values.append(payload[begin:end])
            else:
                real = _DOUBLE.unpack_from(payload, begin)[0]
                values.append(None if real != real else real)
        return values

    def pointers_of_trunk(self, number: int) -> tuple[int, list[int]] | None:
        """What a page says as a trunk of the freelist: the next trunk or 0, and its leaves. None if it cannot be one."""
        base = self.start(number)
        following, count = _TWO_U32.unpack_from(self.data, base)
        if count > self.usable // 4 - 2:
            return None
        return following, list(struct.unpack_from(f">{count}I", self.data, base + 8))

    def map_pages(self) -> frozenset[int]:
        """Where an auto-vacuumed database keeps its pointer map."""
        if not self.header.auto_vacuum:
            return frozenset()
        step = self.usable // 5 + 1
        pending = _PENDING_BYTE // self.page_size + 1
        return frozenset(n + 1 if n == pending else n for n in range(2, self.pages + 1, step))

    def mapped_free(self) -> Iterator[int]:
        """The pages that the pointer map calls free."""
        for number in sorted(self.map_pages()):
            if not self.has(number):
                continue
            base = self.start(number)
            for entry in range(min(self.usable // 5, self.pages - number)):
                if self.data[base + 5 * entry] == 2:
                    yield number + 1 + entry


class _PageReader:
    """How one page is read; see the top of this file for what is believed."""

    __slots__ = (
        "_base",
        "_content",
        "_count",
        "_first",
        "_fragments",
        "_free",
        "_free_known",
        "_image",
        "_kind",
        "_number",
        "_right",
    )

    def __init__(self, image: Image, number: int, kind: int, base: int, head: int) -> None:
        data = image.data
        self._image, self._number, self._kind, self._base = image, number, kind, base
        self._count: int = _U16.unpack_from(data, base + head + 3)[0]
        self._content: int = _U16.unpack_from(data, base + head + 5)[0] or 65536
        self._fragments = data[base + head + 7]
        interior = kind in INTERIORS
        self._right: int = _U32.unpack_from(data, base + head + 8)[0] if interior else 0
        self._first = head + (12 if interior else 8)
        self._free: list[tuple[int, int]] = []
        self._free_known = self._read_freeblocks(_U16.unpack_from(data, base + head + 1)[0])

    def _read_freeblocks(self, at: int) -> bool:
        data, base, usable = self._image.data, self._base, self._image.usable
        least = self._first
        while at:
            if at < least or at + 4 > usable:
                self._free.clear()
                return False
            following, size = struct.unpack_from(">HH", data, base + at)
            if size < 4 or at + size > usable:
                self._free.clear()
                return False
            self._free.append((at, at + size))
            least, at = at + size, following
        return True

    def read(self) -> Page:
        room = max(0, (self._image.usable - self._first) // 2)
        pointers = list(dict.fromkeys(self._pointers(min(self._count, room))))
        cells = [self._at(at) for at in pointers]
        whole = [cell for cell in cells if cell is not None]
        if self._count <= room and len(whole) == self._count and self._accounts(whole, self._content):
            return self._page(whole, 0, True)
        believed = self._believable(whole)
        exact = None if len(believed) == self._count and self._nearly_accounts(believed) else self._exact_count(room)
        if exact is not None:
            return self._page(exact, 0, False)
        return self._page(believed, max(0, len(pointers) - len(believed)), False)

    def _page(self, cells: list[Cell], bad: int, sound: bool) -> Page:
        return Page(self._number, self._kind, cells, bad, self._right, sound)

    def _pointers(self, count: int) -> tuple[int, ...]:
        return struct.unpack_from(f">{count}H", self._image.data, self._base + self._first)

    def _at(self, at: int) -> Cell | None:
        return self._image.cell(self._base, self._kind, at) if at >= self._first else None

    def _accounts(self, cells: list[Cell], content: int) -> bool:
        """Whether cells, freeblocks and fragments fill the content area, each byte once."""
        if not self._free_known or content < self._first + 2 * len(cells):
            return False
        taken = self._fragments + sum(end - start for start, end in self._free) + sum(cell.end - cell.start for cell in cells)
        if taken != self._image.usable - content:
            return False
        parts = sorted([(cell.start, cell.end) for cell in cells] + self._free)
        last = content
        for start, end in parts:
            if start < last:
                return False
            last = end
        return True

    def _nearly_accounts(self, cells: list[Cell]) -> bool:
        """Whether no more than fragments are missing, however many the page says there are."""
        taken = sum(end - start for start, end in self._free) + sum(cell.end - cell.start for cell in cells)
        return 0 <= self._image.usable - self._content - taken <= _MOST_FRAGMENTS

    def _exact_count(self, room: int) -> list[Cell] | None:
        """The cells, if another number of them than the page says makes it account for its bytes."""
        if not self._free_known or self._fragments > _MOST_FRAGMENTS:
            return None
        wanted = self._image.usable - self._content - self._fragments - sum(end - start for start, end in self._free)
        cells: list[Cell] = []
        for at in dict.fromkeys(self._pointers(room)):
            if wanted <= 0:
                break
            cell = self._at(at)
            if cell is None:
                return None
            cells.append(cell)
            wanted -= cell.end - cell.start
        return cells if wanted == 0 and self._accounts(cells, self._content) else None

    def _is_record(self, cell: Cell) -> bool:
        if cell.overflow or self._kind == TABLE_INTERIOR:
            return True
        begin = self._base + cell.local
        return self._image.record(self._image.data[begin : begin + cell.payload]) is not None

    def _believable(self, cells: list[Cell]) -> list[Cell]:
        parts = [cell.start for cell in cells] + [start for start, _ in self._free]
        lowest = self._first + 2 * len(cells)
        # A cell below the content area is one that was deleted, unless it is the area's own beginning that is wrong.
        if not parts or not self._accounts(cells, min(parts)):
            lowest = max(lowest, self._content if self._content < self._image.usable else 0)
        taken = bytearray(self._image.usable)
        for start, end in self._free:
            taken[start:end] = b"\1" * (end - start)
        believed: list[Cell] = []
        for cell in filter(self._is_record, cells):
            if cell.start >= lowest and taken.find(1, cell.start, cell.end) < 0:
                taken[cell.start : cell.end] = b"\1" * (cell.end - cell.start)
                believed.append(cell)
        return believed


def _plan(head: bytes, length: int) -> Plan | None:
    if len(head) != length or not length:
        return None
    _, position = _varint(head, 0)
    at = length
    fields: list[tuple[int, int, int]] = []
    while position < length and len(fields) <= MAX_FIELDS:
        serial = head[position]
        if serial < 0x80:
            position += 1
        else:
            serial, position = _varint(head, position)
        if serial >= 12:
            size = (serial - 12) >> 1
            fields.append((_TEXT if serial & 1 else _BLOB, at, at + size))
        elif serial == 0:
            fields.append((_NULL, at, at))
            size = 0
        elif serial <= 6:
            size = _INT_BYTES[serial]
            fields.append((_INT, at, at + size))
        elif serial == 7:
            size = 8
            fields.append((_REAL, at, at + 8))
        elif serial <= 9:
            size = 0
            fields.append((_CONSTANT, serial - 8, 0))
        else:
            return None
        at += size
    return (tuple(fields), at) if position == length and len(fields) <= MAX_FIELDS else None


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number there and where it ends; beyond the end of the data there are zeros."""
    value = 0
    for _ in range(8):
        byte = data[position] if position < len(data) else 0
        position += 1
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, position
    return value << 8 | (data[position] if position < len(data) else 0), position + 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


# --- the rollback journal

_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
_JOURNAL_HEADER = struct.Struct(">8sIIIII")
_UNCOUNTED = 0xFFFFFFFF
_SECTOR = 512


def rolled_back(data: bytes, journal: bytes) -> bytes:
    """The file as it is when SQLite has rolled back what the journal holds, by the rules of SQLite's pager."""
    if not data or not journal or not journal[0] or _names_another(journal):
        return data
    restored: bytearray | None = None
    position, sector, page_size = 0, _SECTOR, 0
    while True:
        position = -(-position // sector) * sector
        if position + sector > len(journal) or len(journal) < position + _JOURNAL_HEADER.size:
            break
        magic, count, nonce, pages, own_sector, own_size = _JOURNAL_HEADER.unpack_from(journal, position)
        if magic != _JOURNAL_MAGIC:
            break
        if restored is None:
            page_size, sector = own_size or Header(data).page_size or PAGE_SIZES[0], own_sector
            if not (_is_power(page_size, 512) and _is_power(sector, 32)) or pages * page_size > _ROLLED_BACK_BYTES:
                break
            restored = bytearray(data[: pages * page_size].ljust(pages * page_size, b"\0"))
        position += sector
        record = page_size + 8
        if count == _UNCOUNTED:
            count = (len(journal) - sector) // record
        position, whole = _play_back(journal, position, count, nonce, page_size, restored)
        if not whole:
            break
    return data if restored is None else bytes(restored)


_ROLLED_BACK_BYTES = 1 << 31


def _play_back(journal: bytes, position: int, count: int, nonce: int, page_size: int, restored: bytearray) -> tuple[int, bool]:
    """Where the records end, and whether all of them were good."""
    record = page_size + 8
    for _ in range(count):
        if position + record > len(journal):
            return position, False
        number = _U32.unpack_from(journal, position)[0]
        if number == 0 or number == _PENDING_BYTE // page_size + 1:
            return position, False
        if number * page_size <= len(restored):
            page = journal[position + 4 : position + 4 + page_size]
            if checksum(nonce, page) != _U32.unpack_from(journal, position + 4 + page_size)[0]:
                return position, False
            restored[(number - 1) * page_size : number * page_size] = page
        position += record
    return position, True


def checksum(nonce: int, page: bytes) -> int:
    """Of a page in a journal: every 200th byte from its end, but for the first ones."""
    return (nonce + sum(page[len(page) - 200 : 0 : -200])) & 0xFFFFFFFF


def _is_power(number: int, least: int) -> bool:
    return least <= number <= 65536 and number & (number - 1) == 0


def _names_another(journal: bytes) -> bool:
    """Whether it is part of a transaction over several files, which do not exist here: SQLite leaves it alone then."""
    if len(journal) < 16 or journal[-8:] != _JOURNAL_MAGIC:
        return False
    length, total = _TWO_U32.unpack_from(journal, len(journal) - 16)
    if not 0 < length <= len(journal) - 16:
        return False
    name = journal[len(journal) - 16 - length : len(journal) - 16]
    return bool(sum(name) & 0xFFFFFFFF == total)


def undoing(data: bytes, most: int) -> bytes | None:
    """A journal that puts `data` back, whatever the file becomes; None if it would be longer than `most` bytes.

    The database's own page size does not matter to SQLite here: large pages make a short journal. What is missing to whole pages
    comes back as zeros.
    """
    sizes = sorted((-len(data) % size, -size) for size in PAGE_SIZES)
    for missing, negative in sizes:
        size = -negative
        pages = (len(data) + missing) // size
        if _SECTOR + pages * (size + 8) > most:
            continue
        whole = data.ljust(pages * size, b"\0")
        parts: list[Any] = [_JOURNAL_HEADER.pack(_JOURNAL_MAGIC, pages, 0, pages, _SECTOR, size).ljust(_SECTOR, b"\0")]
        for number in range(pages):
            page = whole[number * size : (number + 1) * size]
            parts += (_U32.pack(number + 1), page, _U32.pack(checksum(0, page)))
        return b"".join(parts)
    return None
