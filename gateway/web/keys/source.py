"""What is stored, and what every place that stores it can do."""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass
from typing import Annotated, Protocol

import msgspec

from ..secret import Secret

KEY_BYTES = 32


class KeysError(RuntimeError):
    """The stored keys cannot be used; the message says what to change and holds no key."""


@dataclass(frozen=True, slots=True)
class Key:
    value: Secret[bytes]
    created_at: int
    """Unix seconds, by the clock of the gateway that made it."""

    @classmethod
    def fresh(cls, now: float) -> Key:
        return cls(Secret(secrets.token_bytes(KEY_BYTES)), int(now))


@dataclass(frozen=True, slots=True)
class Stored:
    """The two keys by which tokens are accepted."""

    newest: Key
    older: Key | None
    version: str = ""
    """The source's own name of this state. Empty: not stored yet."""


class KeySource(Protocol):
    """One place that several gateways share. Both calls block, may come from any thread, and raise KeysError."""

    def load(self) -> Stored | None:
        """What holds now, or None where nothing has ever been stored."""

    def rotate(self, old: Stored | None, new: Stored) -> Stored:
        """Put `new` where `old` still is, and return what holds now: of several gateways that replace the same `old` one gets
        its `new` back, with its version, the others get that of the one. When it returns, a crash does not forget it."""


class KeyForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A key as JSON."""

    key: str
    created_at: Annotated[int, msgspec.Meta(ge=0)]

    @classmethod
    def of(cls, key: Key) -> KeyForm:
        return cls(base64.b64encode(key.value.reveal()).decode(), key.created_at)

    def read(self) -> Key:
        """Raises ValueError."""
        value = base64.b64decode(self.key, validate=True)
        if len(value) != KEY_BYTES:
            raise ValueError("key length")
        return Key(Secret(value), self.created_at)
