"""Which bytes of a file a GET or HEAD is answered with: If-None-Match, If-Range and Range of RFC 9110. Pure; nothing raises."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# RFC 9110, 8.8.3.
_ENTITY_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\U0010ffff]*)"')
_ONE_RANGE = re.compile(r"([0-9]*)-([0-9]*)", re.ASCII)
# Longer numbers are beyond every file, and Python refuses to read those of thousands of digits.
_MAX_DIGITS = 18


@dataclass(frozen=True, slots=True)
class Whole:
    """200 with all of it."""


@dataclass(frozen=True, slots=True)
class Unchanged:
    """304: the caller has this file."""


@dataclass(frozen=True, slots=True)
class Part:
    """206 with the bytes from `first` to `last`, both included."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Beyond:
    """416: the range begins behind the end."""


Decision = Whole | Unchanged | Part | Beyond


def decide(size: int, tag: str, *, if_none_match: Sequence[str], if_range: Sequence[str], ranges: Sequence[str]) -> Decision:
    """`tag` is the file's own, with its quotes; the rest are the values of each header's lines.

    What is not of the RFC's form is as if it were not there, and several ranges are answered with the whole file.
    """
    if _names(if_none_match, tag):
        return Unchanged()
    if not ranges or (if_range and list(if_range) != [tag]):
        return Whole()
    return _range(",".join(ranges), size)


def _names(lines: Sequence[str], tag: str) -> bool:
    """Whether If-None-Match names the tag, by weak comparison."""
    text = ",".join(lines).strip(" \t")
    return text == "*" or any(f'"{found[2]}"' == tag for found in _ENTITY_TAG.finditer(text))


def _range(text: str, size: int) -> Decision:
    unit, _, specs = text.partition("=")
    asked = [spec.strip(" \t") for spec in specs.split(",") if spec.strip(" \t")]
    if unit.strip(" \t").lower() != "bytes" or len(asked) != 1 or (found := _ONE_RANGE.fullmatch(asked[0])) is None:
        return Whole()
    first, last = _number(found[1]), _number(found[2])
    if first is None:
        return _suffix(last, size)
    if last is not None and last < first:
        return Whole()
    if first >= size:
        return Beyond()
    return Part(first, size - 1 if last is None else min(last, size - 1))


def _suffix(length: int | None, size: int) -> Decision:
    if length is None:
        return Whole()
    if length == 0:
        return Beyond()
    # No Content-Range can name a part of nothing.
    return Part(max(0, size - length), size - 1) if size else Whole()


def _number(digits: str) -> int | None:
    if not digits:
        return None
    significant = digits.lstrip("0")
    return int(significant or "0") if len(significant) <= _MAX_DIGITS else 10**_MAX_DIGITS
