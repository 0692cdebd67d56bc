"""The tagged values of docs/wire.md: what JSON has no form for. Arguments and rows share the rules, not the set of tags."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from typing import Annotated

import msgspec

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
Int64 = Annotated[int, msgspec.Meta(ge=INT64_MIN, le=INT64_MAX)]

_DECIMAL = re.compile(r"-?[0-9]{1,19}", re.ASCII)


def _is_int(text: str) -> bool:
    return _DECIMAL.fullmatch(text) is not None and INT64_MIN <= int(text) <= INT64_MAX


def _is_real(text: str) -> bool:
    return text in ("Infinity", "-Infinity")


def _is_base64(text: str) -> bool:
    try:
        return base64.b64encode(base64.b64decode(text, validate=True)).decode() == text
    except (binascii.Error, ValueError):
        return False


_ROW_TAGS: Mapping[str, Callable[[str], bool]] = {"$real": _is_real, "$text": _is_base64, "$blob": _is_base64}
_ARGUMENT_TAGS: Mapping[str, Callable[[str], bool]] = {"$int": _is_int, **_ROW_TAGS}


def is_row_tag(value: dict[str, str]) -> bool:
    """Whether an object in a row is exactly one documented tag with a well-formed text."""
    return _is_tag(value, _ROW_TAGS)


def is_argument_tag(value: dict[str, str]) -> bool:
    """The same for an argument, where `$int` is allowed too."""
    return _is_tag(value, _ARGUMENT_TAGS)


def _is_tag(value: dict[str, str], tags: Mapping[str, Callable[[str], bool]]) -> bool:
    if len(value) != 1:
        return False
    ((tag, text),) = value.items()
    check = tags.get(tag)
    return check is not None and check(text)
