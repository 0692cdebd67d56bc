"""Import: rows of an upload into one table, all of them or none.

    lines     CSV, JSON or NDJSON → records, each with the line on which it begins, one at a time
    batches   some hundred records that have the same columns, so that what is asked for each of them is asked seldom
    load      finds the table, or reads the whole upload once to see what the columns hold and makes it; then inserts

The parser of CSV is our own, in linear time on any text: `_csv` would be one more extension module for an attacker and could not
tell "" from an empty field, and it would gain little (10 MB are read in 0.15 s without quotes and 0.7 s with quotes everywhere,
against its 0.13 s; the whole import takes 0.9 s and 2 s).

No value is changed. A column gets a type only where every value comes out of it as it went in; otherwise it gets none, or TEXT
where the upload is text. In CSV that means: 12 is an INTEGER, 1.50 a REAL (it is the number 1.5), and 007, +1 and .5 are text.
"""

from __future__ import annotations

import io
import json
import math
import re

import apsw

from .wire import INT64_MAX, INT64_MIN, TAGS, ImportInvalidError, Verdict, VerdictError, is_unicode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, NoReturn

    from .wire import Value

    Names = tuple[str, ...]
    Record = tuple[int, Names | None, list[Value] | None]
    """The line on which it begins, the columns if they are named, and a value for each; no values at all in a heading."""
    Parser = Callable[[bytes, "ImportOrder", int], Iterator[Record]]
    """The number is that of the columns that a table may have."""

TYPES = ("INTEGER", "REAL", "TEXT", "BLOB", "NUMERIC")
"""What may be asked for as the type of a column. Whoever wants more makes the table before."""

_BATCH_ROWS = 500
_WINDOW_CHARACTERS = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_SPACE = " \t\r\n"
_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


class ImportOrder:
    """What is asked for; the keys of `import` in docs/wire.md.

    `columns` names the columns of rows that name none themselves, in order. For those that do it says what type is given to which.
    A table that exists keeps the types it has.
    """

    __slots__ = ("columns", "delimiter", "format", "header", "null", "table")

    def __init__(
        self,
        table: str,
        format: str,
        columns: list[tuple[str, str | None]] | None = None,
        header: bool = True,
        delimiter: str = ",",
        null: str | None = None,
    ) -> None:
        self.table = table
        self.format = format
        self.columns = columns
        self.header = header
        self.delimiter = delimiter
        self.null = null


class Loaded:
    """What is in the database now. `rows` counts those of the upload; a table may drop some of them (ON CONFLICT IGNORE)."""

    __slots__ = ("columns", "created", "rows", "table")

    def __init__(self, table: str, created: bool, columns: list[tuple[str, str]], rows: int) -> None:
        self.table = table
        self.created = created
        self.columns = columns
        self.rows = rows


def load(
    connection: apsw.Connection, upload: bytes, order: ImportOrder, limits: Mapping[str, int], expired: Callable[[], bool]
) -> Loaded:
    """Insert every row of the upload, in one transaction. `limits` are SQLite's, by their names without `SQLITE_LIMIT_`.

    Raises ImportInvalidError; VerdictError `timeout` when `expired` says so; apsw.Error for what has nothing to do with one row, in
    SQLite's words. After any of them the database is what it was.
    """
    _check(order)
    connection.execute("BEGIN IMMEDIATE")
    try:
        loaded = _load(connection, upload, order, limits, expired)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a constraint or a trigger can have rolled back already
            connection.execute("ROLLBACK")
        raise
    return loaded


def _load(
    connection: apsw.Connection, upload: bytes, order: ImportOrder, limits: Mapping[str, int], expired: Callable[[], bool]
) -> Loaded:
    def batches() -> Iterator[_Batch]:
        return _batches(_PARSERS[order.format](upload, order, most), expired)

    most = limits["COLUMN"]
    columns, reals = _columns_of(connection, order.table), frozenset[str]()
    created = not columns
    if created:
        columns, reals = _inferred(batches(), order, most)
        definitions = ", ".join(f"{_quoted(name)} {kind}".rstrip() for name, kind in columns)
        connection.execute(f"CREATE TABLE {_quoted(order.table)}({definitions})")
    rows = 0
    target = _Target(connection, order, columns, reals)
    for batch in batches():
        target.insert(batch)
        rows += len(batch.rows)
    return Loaded(order.table, created, columns, rows)


def _check(order: ImportOrder) -> None:
    if order.format not in _PARSERS:
        _refuse("the format is none of csv, json, ndjson")
    if len(order.delimiter) != 1 or order.delimiter in '"\r\n\0' or not is_unicode(order.delimiter):
        _refuse("the delimiter is not one character, or is a quote, a line's end or NUL")
    if order.null is not None and any(character in order.null for character in f'{order.delimiter}"\r\n'):
        _refuse("the text for NULL holds a delimiter, a quote or a line's end")
    _check_name(order.table)
    if order.columns is not None:
        _check_names(tuple(name for name, _ in order.columns))
        if not order.columns:
            _refuse("columns is empty")
        for name, kind in order.columns:
            if kind is not None and kind.upper() not in TYPES:
                _refuse(f"the type of column {name} is none of {', '.join(TYPES)}")


def _refuse(message: str) -> NoReturn:
    raise ImportInvalidError(None, message)


def _check_name(name: str) -> None:
    if "\0" in name or not is_unicode(name):
        _refuse("a name holds a NUL, or is not UTF-8")


def _check_names(names: Names) -> None:
    for name in names:
        _check_name(name)
    _check_distinct(names)


def _check_distinct(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if _folded(name) in seen:
            _refuse(f"column {name} is there twice")
        seen.add(_folded(name))


def _folded(name: str) -> str:
    """Equal for names that are the same to SQLite."""
    return name.translate(_LOWER)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


# ── The table ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _columns_of(connection: apsw.Connection, table: str) -> list[tuple[str, str]]:
    """Names and declared types of what can be inserted into; empty when there is no such table or view."""
    found = connection.execute("SELECT name, type FROM pragma_table_xinfo(?) WHERE hidden = 0", (table,)).fetchall()
    return [(str(name), str(kind)) for name, kind in found]


class _Target:
    """A table that exists, and the statements that fill it."""

    __slots__ = ("_connection", "_names", "_order", "_own", "_reals")

    def __init__(
        self, connection: apsw.Connection, order: ImportOrder, columns: list[tuple[str, str]], reals: frozenset[str]
    ) -> None:
        self._connection = connection
        self._order = order
        self._own = {_folded(name): name for name, _ in columns}
        self._names = tuple(name for name, _ in order.columns or columns)
        self._reals = reals
        """Columns whose texts are numbers: Python reads them, since SQLite's own conversion need not give the nearest."""

    def insert(self, batch: _Batch) -> None:
        names = self._names if batch.names is None else batch.names
        own = [self._own_name(name, batch.lines[0]) for name in names]
        _check_width(batch, len(own))
        self._read_reals(own, batch.rows)
        reached = 0

        def rows() -> Iterator[list[Value]]:
            nonlocal reached
            for reached, row in enumerate(batch.rows):  # noqa: B007 -- the one at hand when a statement fails
                yield row

        try:
            self._connection.cursor().executemany(self._statement(own), rows())
        except (apsw.ConstraintError, apsw.MismatchError, apsw.TooBigError) as error:
            raise ImportInvalidError(batch.lines[reached], str(error)) from error

    def _own_name(self, name: str, line: int) -> str:
        own = self._own.get(_folded(name))
        if own is None:
            raise ImportInvalidError(line, f"the table has no column {name}")
        return own

    def _read_reals(self, names: list[str], rows: list[list[Value]]) -> None:
        for place, name in enumerate(names):
            if name in self._reals:
                for row in rows:
                    if (text := row[place]) is not None:
                        row[place] = float(text)

    def _statement(self, names: list[str]) -> str:
        table = _quoted(self._order.table)
        if not names:
            return f"INSERT INTO {table} DEFAULT VALUES"
        columns, values = ",".join(map(_quoted, names)), ",".join("?" * len(names))
        return f"INSERT INTO {table}({columns}) VALUES ({values})"  # noqa: S608 -- names are quoted, values are bound


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Batch:
    """Records next to each other with the same columns; of a heading the line alone."""

    __slots__ = ("lines", "names", "rows")

    def __init__(self, names: Names | None, *lines: int) -> None:
        self.names = names
        self.lines = list(lines)
        self.rows: list[list[Value]] = []


def _batches(records: Iterator[Record], expired: Callable[[], bool]) -> Iterator[_Batch]:
    batch = _Batch(None)
    lines, rows, names = batch.lines, batch.rows, batch.names
    for line, own, row in records:
        if row is None:
            yield _Batch(own, line)
            continue
        if len(rows) == _BATCH_ROWS or (own is not names and own != names):
            if rows:
                yield batch
            if expired():
                raise VerdictError(Verdict.TIMEOUT)
            batch = _Batch(own)
            lines, rows, names = batch.lines, batch.rows, own
        lines.append(line)
        rows.append(row)
    if rows:
        yield batch


def _check_width(batch: _Batch, width: int) -> None:
    if set(map(len, batch.rows)) - {width}:
        line, row = next((line, row) for line, row in zip(batch.lines, batch.rows, strict=True) if len(row) != width)
        raise ImportInvalidError(line, f"{_count(len(row), 'value')}, and there are {_count(width, 'column')}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# ── What the columns hold ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _inferred(batches: Iterable[_Batch], order: ImportOrder, most: int) -> tuple[list[tuple[str, str]], frozenset[str]]:
    """Names and types for a new table, and which columns have numbers that are still text."""
    make = _TextColumn if order.format == "csv" else _TypedColumn
    columns: dict[str, tuple[str, _TextColumn | _TypedColumn]] = {}
    for batch in batches:
        names = _positional(order, batch) if batch.names is None else batch.names
        _check_width(batch, len(names))
        for name in names:
            if _folded(name) not in columns:
                columns[_folded(name)] = (name, make())
        if len(columns) > most:
            raise _too_wide(batch.lines[0], most)
        for name, values in zip(names, zip(*batch.rows, strict=True), strict=False):  # a heading has no rows
            columns[_folded(name)][1].see(values)
    if not columns:
        columns = {_folded(name): (name, make()) for name, _ in order.columns or ()}
    if not columns:
        _refuse("nothing says which columns the table is to have")
    given = {_folded(name): kind for name, kind in order.columns or () if kind is not None}
    if absent := [name for name, _ in order.columns or () if _folded(name) not in columns]:
        _refuse(f"column {absent[0]} is not in the upload")
    inferred = {folded: column for folded, (_, column) in columns.items() if folded not in given}
    reals = frozenset(columns[folded][0] for folded, column in inferred.items() if column.is_text_of_reals())
    kinds = {folded: given[folded].upper() if folded in given else column.kind() for folded, (_, column) in columns.items()}
    return [(name, kinds[folded]) for folded, (name, _) in columns.items()], reals


def _positional(order: ImportOrder, batch: _Batch) -> Names:
    if order.columns is not None:
        return tuple(name for name, _ in order.columns)
    return tuple(f"column{place}" for place in range(1, len(batch.rows[0]) + 1))


class _TypedColumn:
    """A column of JSON's values, whose types are known."""

    __slots__ = ("_has_minus_zero", "_types")

    def __init__(self) -> None:
        self._types: set[type] = set()
        self._has_minus_zero = False

    def see(self, values: Sequence[Value]) -> None:
        self._types.update(map(type, values))
        if 0.0 in values and any(type(value) is float and _is_minus_zero(value) for value in values):
            self._has_minus_zero = True

    def kind(self) -> str:
        types = self._types - {type(None)}
        if len(types) != 1 or self._has_minus_zero:  # a REAL column keeps -0.0 as 0.0
            return ""
        return _KINDS[types.pop()]

    def is_text_of_reals(self) -> bool:
        return False


_KINDS: dict[type, str] = {int: "INTEGER", float: "REAL", str: "TEXT", bytes: "BLOB"}


class _TextColumn:
    """A column of CSV's texts: what else all of them are."""

    __slots__ = ("_has_minus_zero", "_integers", "_reals", "_seen")

    def __init__(self) -> None:
        self._seen = False
        self._integers = True
        self._reals = True
        self._has_minus_zero = False

    def see(self, values: Sequence[Value]) -> None:
        if not self._integers and not self._reals:
            return
        texts = [str(value) for value in values if value is not None]
        self._seen = self._seen or bool(texts)
        ordinary = _ORDINARY_INTEGER if self._integers else _ORDINARY_REAL
        if not all(map(ordinary.fullmatch, texts)):
            for text in texts:
                self._look(text)

    def _look(self, text: str) -> None:
        if _ORDINARY_INTEGER.fullmatch(text):
            return
        if _INTEGER.fullmatch(text) and INT64_MIN <= int(text) <= INT64_MAX:
            self._reals = False  # too long to be certain that a REAL can be it
            return
        self._integers = False
        self._reals = self._reals and _is_real(text)
        self._has_minus_zero = self._has_minus_zero or (self._reals and _is_minus_zero(float(text)))

    def kind(self) -> str:
        if not self._seen:
            return ""
        if self._integers:
            return "INTEGER"
        if not self._reals:
            return "TEXT"
        return "" if self._has_minus_zero else "REAL"

    def is_text_of_reals(self) -> bool:
        return self._seen and self._reals and not self._integers


# Of 15 characters, such that a REAL is exactly it too.
_ORDINARY_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,13}")
_ORDINARY_REAL = re.compile(r"(?!-0(?:\.0+)?\Z)(?=[-0-9.]{1,15}\Z)-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?")
_INTEGER = re.compile(r"-?[1-9][0-9]{0,18}")
_REAL = re.compile(r"(?=[^.eE]*[.eE])(-?)(0|[1-9][0-9]*+)(?:\.([0-9]++))?(?:[eE]([+-]?[0-9]{1,4}))?")


def _is_real(text: str) -> bool:
    """Whether it is a number with a fraction or exponent, and the float that is nearest to it is written as the same number."""
    parts = _decimal(text)
    return parts is not None and parts == _decimal(repr(float(text)))


def _decimal(text: str) -> tuple[str, str, int] | None:
    """Sign, digits without zeros at either end, and the power of ten of the last one."""
    match = _REAL.fullmatch(text)
    if match is None:
        return None
    sign, whole, fraction, exponent = match.groups("")
    digits = (whole + fraction).lstrip("0")
    kept = digits.rstrip("0")
    return sign, kept, int(exponent or 0) - len(fraction) + len(digits) - len(kept) if kept else 0


def _is_minus_zero(value: float) -> bool:
    return value == 0 and math.copysign(1, value) < 0


# ── Records ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _text_of(upload: bytes, newline: str | None) -> io.TextIOWrapper:
    """The upload as text, piece by piece, since all of it can take four times its bytes. What is not UTF-8 is a surrogate."""
    stream = io.BytesIO(upload)
    if upload.startswith(_BYTE_ORDER_MARK):
        stream.seek(len(_BYTE_ORDER_MARK))
    return io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline)


def _check_text(text: str, line: int) -> None:
    if "\0" in text:
        raise ImportInvalidError(line, "a NUL character")
    if not is_unicode(text):
        raise ImportInvalidError(line, "not UTF-8")


def _csv(upload: bytes, order: ImportOrder, most: int) -> Iterator[Record]:
    names: Names | None = None
    wanted = order.header
    for line, row in _csv_rows(upload, order, most):
        if wanted:
            wanted, names = False, _heading(row, line, order.null or "")
            yield line, names, None
        else:
            yield line, names, row
    if wanted:
        raise ImportInvalidError(1, "no header")


def _csv_rows(upload: bytes, order: ImportOrder, most: int) -> Iterator[tuple[int, list[Value]]]:
    delimiter, null = order.delimiter, order.null or ""
    quoted = _Quoted(delimiter, null, most)
    lines, is_clean, number = _text_of(upload, ""), upload.isascii() and b"\0" not in upload, 0
    for text in lines:
        number += 1
        begin = number
        if '"' in text and text.count('"') & 1:
            parts = [text, *_rest_of_record(lines)]
            number += len(parts) - 1
            text = "".join(parts)
        if not is_clean:
            _check_text(text, begin)
        content = text.rstrip("\r\n")
        if '"' in content:
            yield begin, quoted.row(content, begin)
            continue
        if content.count(delimiter) >= most:  # before there are as many objects
            raise _too_wide(begin, most)
        row: list[Value] = [*content.split(delimiter)]
        yield begin, [None if field == null else field for field in row] if null in row else row


def _rest_of_record(lines: Iterator[str]) -> Iterator[str]:
    """Lines up to the one whose quote ends the field: until then quotes are odd in number, as those inside it come in pairs."""
    for text in lines:
        yield text
        if text.count('"') & 1:
            return


class _Quoted:
    """Takes a record apart in which there are quotes."""

    __slots__ = ("_delimiter", "_field", "_most", "_null")

    def __init__(self, delimiter: str, null: str, most: int) -> None:
        between = re.escape(delimiter)
        self._field = re.compile(rf'(?:^|{between})("(?:[^"]++|"")*+"|[^"{between}\r\n]*+)')
        self._delimiter = delimiter
        self._null = null
        self._most = most

    def row(self, text: str, line: int) -> list[Value]:
        if text.count(self._delimiter) >= self._most:  # some may be inside of the quotes
            for number, _ in enumerate(self._field.finditer(text)):
                if number == self._most:
                    raise _too_wide(line, self._most)
        fields, null = self._field.findall(text), self._null
        if self._delimiter.join(fields) != text:  # there is something that belongs to none
            raise ImportInvalidError(line, "a quote in a field that does not begin with one, or a quoted field that does not end")
        return [field[1:-1].replace('""', '"') if field[:1] == '"' else None if field == null else field for field in fields]


def _too_wide(line: int, most: int) -> ImportInvalidError:
    return ImportInvalidError(line, f"more than {_count(most, 'column')}")


def _heading(row: list[Value], line: int, null: str) -> Names:
    names = tuple(null if name is None else str(name) for name in row)
    with _At(line):
        _check_distinct(names)
    return names


class _At:
    """Whatever is invalid inside of the block without a line of its own is so on this one."""

    __slots__ = ("_line",)

    def __init__(self, line: int) -> None:
        self._line = line

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ImportInvalidError) and error.line is None:
            raise ImportInvalidError(self._line, error.message) from error.__cause__


def _json(upload: bytes, order: ImportOrder, most: int) -> Iterator[Record]:
    return _json_records(_elements(_Window(upload)))


def _ndjson(upload: bytes, order: ImportOrder, most: int) -> Iterator[Record]:
    values = _lines(upload)
    first = next(values, None)
    if first is None:
        return iter(())
    line, value = first
    if type(value) is dict and value.keys() == {"columns"} and type(value["columns"]) in (list, type(None)):
        return _answer(line, value["columns"], values)
    return _json_records(_again(first, values))


def _again(first: tuple[int, Any], values: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    yield first
    yield from values


def _answer(line: int, columns: Any, values: Iterator[tuple[int, Any]]) -> Iterator[Record]:
    """What an answer of POST /sql is as NDJSON: the columns, arrays, and an object that says that nothing is missing."""
    if columns is None or not all(type(name) is str for name in columns):
        raise ImportInvalidError(line, "columns are not an array of names")
    names = tuple(columns)
    with _At(line):
        _check_names(names)
    yield line, names, None
    rows = 0
    for line, value in values:
        if type(value) is dict:
            _check_trailer(line, value, rows)
            if next(values, None) is not None:
                raise ImportInvalidError(line, "something follows the answer's last line")
            return
        if type(value) is not list:
            raise ImportInvalidError(line, "a row is not an array")
        with _At(line):
            row = _row(value)
        yield line, names, row
        rows += 1  # noqa: SIM113 -- the last value is no row
    raise ImportInvalidError(line, 'the answer\'s last line, {"complete":true,…}, is missing')


def _check_trailer(line: int, trailer: dict[str, Any], rows: int) -> None:
    if trailer.get("complete") is not True:
        raise ImportInvalidError(line, "the answer is not complete")
    if trailer.get("rows") != rows:
        raise ImportInvalidError(line, f"the answer is not complete: {trailer.get('rows')!r} rows were sent, {rows} are here")


def _json_records(values: Iterable[tuple[int, Any]]) -> Iterator[Record]:
    """Of objects or of arrays, all of the same kind."""
    names: Names | None = None
    kind: type | None = None
    for line, value in values:
        with _At(line):
            if type(value) is not kind:
                kind = _kind_of_rows(value, kind)
            if kind is dict and (own := tuple(value)) != names:
                _check_names(own)
                names = own
            row = _row(value if kind is list else value.values())
        yield line, names, row


def _kind_of_rows(value: Any, kind: type | None) -> type:
    if type(value) not in (dict, list):
        _refuse("a row is neither an object nor an array")
    if kind is not None:
        _refuse("some rows are objects and some are arrays")
    return type(value)


def _lines(upload: bytes) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(_text_of(upload, None), 1):
        content = text.strip(_JSON_SPACE)
        if not content:
            continue
        with _At(line):
            try:
                value, end = _scan(content, 0)
            except (StopIteration, json.JSONDecodeError):
                _refuse("not JSON")
            if end != len(content):
                _refuse("more than one JSON value")
        yield line, value


def _elements(window: _Window) -> Iterator[tuple[int, Any]]:
    """Those of the one array."""
    if window.next_character() != "[":
        raise ImportInvalidError(window.line, "not a JSON array")
    window.take(1)
    if window.next_character() != "]":
        while True:
            window.next_character()
            yield window.line, window.value()
            if (separator := window.next_character()) != ",":
                break
            window.take(1)
        if separator != "]":
            raise ImportInvalidError(window.line, "not JSON: neither a comma nor the array's end")
    window.take(1)
    if window.next_character():
        raise ImportInvalidError(window.line, "something follows the array")


class _Window:
    """JSON text of which a part is in memory: a value at a time, however long."""

    __slots__ = ("_place", "_source", "_text", "line")

    def __init__(self, upload: bytes) -> None:
        self._source = _text_of(upload, None)
        self._text = ""
        self._place = 0
        self.line = 1
        """On which the next character is."""

    def next_character(self) -> str:
        """The next one that is no white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._place)
            self.take(space.end() - self._place if space else 0)
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._grow():
                return ""

    def take(self, length: int) -> None:
        end = self._place + length
        self.line += self._text.count("\n", self._place, end)
        self._place = end

    def value(self) -> Any:
        """The value that begins here; its line is that of its beginning."""
        with _At(self.line):
            while True:
                try:
                    value, end = _scan(self._text, self._place)
                    break
                except (StopIteration, json.JSONDecodeError):  # or it goes on behind the window
                    if not self._grow():
                        _refuse("not JSON")
        self.take(end - self._place)
        return value

    def _grow(self) -> bool:
        rest = self._text[self._place :]
        more = self._source.read(max(_WINDOW_CHARACTERS, len(rest)))  # twice as much each time, so that all tries are linear
        self._text, self._place = rest + more, 0
        return bool(more)


_SPACE = re.compile(f"[{_JSON_SPACE}]++")


# ── JSON's values ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _row(values: Iterable[Any]) -> list[Value]:
    return [_FROM_JSON[type(value)](value) for value in values]


def _same(value: Value) -> Value:
    return value


def _int(value: int) -> int:
    if not INT64_MIN <= value <= INT64_MAX:
        _refuse("an integer is outside of 64 bits")
    return value


def _float(value: float) -> float:
    if math.isinf(value):
        _refuse("a number is too large for a REAL")
    return value


def _str(value: str) -> str:
    if not is_unicode(value):
        _refuse("a string is not UTF-8, or holds a lone surrogate; other bytes go in $text")
    return value


def _object(value: dict[str, Any]) -> Value:
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag in TAGS:
            return _tagged(tag, content)
    return _nested(value)


def _tagged(tag: str, content: Any) -> Value:
    if type(content) is not str:
        _refuse(f"{tag} has no string")
    try:
        return TAGS[tag](content)
    except VerdictError as error:
        _refuse(error.message)


def _nested(value: dict[str, Any] | list[Any]) -> str:
    try:
        return _str(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    except ValueError:
        _refuse("a number is too large for a REAL")
    except RecursionError:
        _refuse("nested too deeply")


_FROM_JSON: dict[type, Callable[[Any], Value]] = {
    type(None): _same,
    bool: int,
    int: _int,
    float: _float,
    str: _str,
    dict: _object,
    list: _nested,
}


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        _refuse("a key is repeated")
    return document


def _no_constant(name: str) -> NoReturn:
    _refuse(f"{name} is not JSON")


_scanner = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_no_constant)


def _scan(text: str, place: int) -> tuple[Any, int]:
    """The value that begins there and where it ends. Raises StopIteration or JSONDecodeError unless there is one, all of it."""
    try:
        found: tuple[Any, int] = _scanner.scan_once(text, place)  # type: ignore[attr-defined]  # the stubs lack it
    except json.JSONDecodeError:
        raise
    except ValueError:  # CPython refuses to convert more than 4,300 digits
        _refuse("an integer is outside of 64 bits")
    except RecursionError:
        _refuse("nested too deeply")
    return found


_PARSERS: dict[str, Parser] = {"csv": _csv, "json": _json, "ndjson": _ndjson}
