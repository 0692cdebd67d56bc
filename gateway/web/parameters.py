"""What a request says beside its body, read strictly: whatever is unknown, repeated or malformed is a BadParameterError.

A query is at most as long as a request line (server.MAX_LINE_BYTES), and so is a header.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NoReturn, TypedDict, TypeVar
from urllib.parse import parse_qsl

from multidict import MultiMapping

from .errors import BadParameterError

SESSION = "X-Walkin-Session"
TTL = "X-Walkin-TTL"
ON_DAMAGE = "X-Mayfly-On-Damage"
IDEMPOTENCY_KEY = "Idempotency-Key"

MAX_FIELDS = 256
MAX_KEY_CHARS = 255
# Columns that an import may name; SQLITE_LIMIT_COLUMN is the runner's to check.
MAX_IMPORT_COLUMNS = 100
# Of the name of a table or a column to import into.
MAX_NAME_CHARS = 255

T = TypeVar("T")

OnDamage = Literal["strict", "salvage"]
Format = Literal["csv", "json", "ndjson"]

_FORMATS: Mapping[str, Format] = {"csv": "csv", "json": "json", "ndjson": "ndjson"}
_FORMAT_OF_TYPE: Mapping[str, Format] = {"text/csv": "csv", "application/json": "json", "application/x-ndjson": "ndjson"}
IMPORT_TYPES = frozenset({*_FORMAT_OF_TYPE, "application/octet-stream", ""})
"""Media types of POST /import; "" is none."""
FILE_TYPES = frozenset({"application/vnd.sqlite3", "application/x-sqlite3", "application/octet-stream", ""})
"""Of PUT /db."""
_MODES: Mapping[str, OnDamage] = {"strict": "strict", "salvage": "salvage"}
IMPORT_COLUMN_TYPES = ("INTEGER", "REAL", "TEXT", "BLOB", "NUMERIC")
_NO_DELIMITER = frozenset('"\r\n\0')
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_KEY = re.compile(rf"[!-~]{{1,{MAX_KEY_CHARS}}}", re.ASCII)


class ImportKeys(TypedDict):
    """Where the rows of an upload go, and how they are written. `columns`: names with a type or None; None takes the data's own."""

    table: str
    format: Format
    columns: list[tuple[str, str | None]] | None
    header: bool
    delimiter: str
    null: str | None


def read_query(raw: str, *, once: Collection[str] = (), repeatable: Collection[str] = ()) -> dict[str, list[str]]:
    """The values of each parameter of a query as it was sent, without its question mark."""
    if not raw:
        return {}
    if not raw.isascii() or _BROKEN_ESCAPE.search(raw):
        _refuse("the query is not percent-encoded UTF-8")
    try:
        pairs = parse_qsl(raw, keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=MAX_FIELDS)
    except UnicodeDecodeError:
        _refuse("the query is not percent-encoded UTF-8")
    except ValueError:
        _refuse(f"the query is not name=value&…, or of more than {MAX_FIELDS} parameters")
    values: dict[str, list[str]] = {}
    for name, value in pairs:
        if name not in once and name not in repeatable:
            _refuse(f"{_shown(name)} is none of {', '.join([*once, *repeatable]) or 'this route: it takes no parameters'}")
        values.setdefault(name, []).append(value)
    for name in once:
        if len(values.get(name, ())) > 1:
            _refuse(f"{name} is there more than once")
    return values


def read_import(raw: str, declared: str) -> ImportKeys:
    """Of POST /import. The format is the parameter's or that of the declared media type, which may not contradict it."""
    values = read_query(raw, once=("table", "format", "header", "delimiter", "null"), repeatable=("column",))
    written = _import_format(_first(values, "format"), declared)
    only_csv = [name for name in ("header", "delimiter", "null") if name in values]
    if written != "csv" and only_csv:
        _refuse(f"{only_csv[0]} is for format=csv")
    delimiter = _first(values, "delimiter") or ("," if "delimiter" not in values else "")
    if len(delimiter) != 1 or delimiter in _NO_DELIMITER:
        _refuse("delimiter is one character, and no quote or line end")
    return ImportKeys(
        table=_name("table", _first(values, "table")),
        format=written,
        columns=_columns(values.get("column", [])),
        header=_choice("header", _first(values, "header"), {"yes": True, "no": False}, True),
        delimiter=delimiter,
        null=_first(values, "null"),
    )


def read_on_damage(raw: str) -> OnDamage | None:
    """Of PUT /db: `on_damage`."""
    return _choice("on_damage", _first(read_query(raw, once=("on_damage",)), "on_damage"), _MODES, None)


def on_damage_header(headers: MultiMapping[str], *, creates: bool) -> OnDamage | None:
    """X-Mayfly-On-Damage, which says what a new instance is to be, and is refused where none is made."""
    if ON_DAMAGE not in headers:
        return None
    given = headers.getall(ON_DAMAGE)
    if not creates:
        _refuse(f"{ON_DAMAGE} is for the request that makes an instance")
    if len(given) > 1:
        _refuse(f"{ON_DAMAGE} is there more than once")
    return _choice(ON_DAMAGE, given[0].strip(" \t"), _MODES, None)


def idempotency_key(headers: MultiMapping[str]) -> str | None:
    """Idempotency-Key: 1 to 255 visible ASCII characters."""
    if IDEMPOTENCY_KEY not in headers:
        return None
    given = headers.getall(IDEMPOTENCY_KEY)
    if len(given) > 1 or _KEY.fullmatch(given[0]) is None:
        _refuse(f"{IDEMPOTENCY_KEY} is one key of 1 to {MAX_KEY_CHARS} visible ASCII characters")
    return given[0]


def wants_lines(accept: Sequence[str]) -> bool:
    """Whether Accept names application/x-ndjson, by its own name and not with a weight of 0."""
    for item in ",".join(accept).split(",") if accept else ():
        kind, *rest = (part.strip(" \t").lower() for part in item.split(";"))
        if kind == "application/x-ndjson":
            return not any(re.fullmatch(r"q=0(\.0{0,3})?", part, re.ASCII) for part in rest)
    return False


def _import_format(named: str | None, declared: str) -> Format:
    by_type = _FORMAT_OF_TYPE.get(declared)
    chosen = _choice("format", named, _FORMATS, by_type)
    if chosen is None:
        _refuse(f"format is one of {', '.join(_FORMATS)}, or say it with Content-Type")
    if by_type not in (None, chosen):
        _refuse(f"format is {chosen}, Content-Type says {declared}")
    return chosen


def _columns(given: list[str]) -> list[tuple[str, str | None]] | None:
    if len(given) > MAX_IMPORT_COLUMNS:
        _refuse(f"at most {MAX_IMPORT_COLUMNS} columns")
    return [_column(text) for text in given] or None


def _column(text: str) -> tuple[str, str | None]:
    name, colon, kind = text.rpartition(":")
    if not colon:
        return _name("column", kind), None
    if kind.upper() not in IMPORT_COLUMN_TYPES:
        _refuse(f"column is name or name:TYPE, TYPE one of {', '.join(IMPORT_COLUMN_TYPES)}")
    return _name("column", name), kind.upper()


def _name(parameter: str, text: str | None) -> str:
    if not text or len(text) > MAX_NAME_CHARS or "\0" in text:
        _refuse(f"{parameter} is a name of 1 to {MAX_NAME_CHARS} characters")
    return text


def _choice(parameter: str, text: str | None, choices: Mapping[str, T], default: T) -> T:
    if text is None:
        return default
    if text not in choices:
        _refuse(f"{parameter} is one of {', '.join(choices)}")
    return choices[text]


def _first(values: Mapping[str, list[str]], name: str) -> str | None:
    return values[name][0] if name in values else None


def _shown(name: str) -> str:
    return ascii(name[:40])


def _refuse(what: str) -> NoReturn:
    raise BadParameterError(what)
