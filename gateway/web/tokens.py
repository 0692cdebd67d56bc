"""Session tokens: `wkn_` and unpadded base64url of UUIDv7 (16 bytes), nonce (32) and HMAC-SHA256 over both (32).

A read-only token has the same form and another MAC: its key is derived from the token key, so that neither kind can be made into
the other, and nobody sees from a token which kind it is.

Nothing of a token is parsed before its MAC verifies, every key is tried every time, and a token that fails yields a random
instance id: what follows, a look-up at the launcher that finds nothing, is then the same for whatever was not issued here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import uuid
from typing import Literal, NamedTuple

from ..uuid7 import uuid7
from .keys import Key, KeyRing
from .secret import Secret

PREFIX = "wkn_"
_NONCE_BYTES = 32
_SIGNED_BYTES = 16 + _NONCE_BYTES
_TOKEN_BYTES = _SIGNED_BYTES + hashlib.sha256().digest_size
_TOKEN_CHARS = len(PREFIX) + -(-_TOKEN_BYTES * 8 // 6)
_READ_ONLY_LABEL = b"mayfly read-only token"

Access = Literal["full", "read-only"]


class Resolved(NamedTuple):
    """What a token is worth. Of one that did not verify the id is random and exists nowhere, and the access is the least."""

    instance: uuid.UUID
    verified: bool
    access: Access


class _Keys(NamedTuple):
    """Of one token key: what signs a full token and what signs a read-only one, as MACs of nothing yet.

    Each MAC goes on from a copy of these, which takes half the time of one from the key.
    """

    of: Key
    full: Secret[hmac.HMAC]
    read_only: Secret[hmac.HMAC]


class Tokens:
    def __init__(self, keys: KeyRing) -> None:
        self._ring = keys
        self._decoy = secrets.token_bytes(_TOKEN_BYTES)
        self._current: _Keys | None = None
        self._previous: _Keys | None = None

    def issue(self, instance: uuid.UUID, access: Access = "full") -> Secret[str]:
        """A new token for an instance; its nonce makes every token differ."""
        keys = self._current = _derived(self._ring.current, self._current)
        signed = instance.bytes + secrets.token_bytes(_NONCE_BYTES)
        raw = signed + _mac(keys.full if access == "full" else keys.read_only, signed)
        return Secret(PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("="))

    def resolve(self, presented: Secret[str]) -> Resolved:
        """The instance a token names, whether it verified, and what it may do."""
        current = self._current = _derived(self._ring.current, self._current)
        previous = self._previous = _derived(self._ring.previous, self._previous)
        decoded = _decode(presented.reveal())
        raw = self._decoy if decoded is None else decoded
        signed, mac = raw[:_SIGNED_BYTES], raw[_SIGNED_BYTES:]
        # `|` and not `or`: every digest is computed and compared whatever the ones before say.
        full = hmac.compare_digest(_mac(current.full, signed), mac) | hmac.compare_digest(_mac(previous.full, signed), mac)
        read_only = hmac.compare_digest(_mac(current.read_only, signed), mac) | hmac.compare_digest(
            _mac(previous.read_only, signed), mac
        )
        if not (full | read_only) or decoded is None:
            return Resolved(uuid7(), False, "read-only")
        # A MAC verified: these are bytes that issue() wrote.
        return Resolved(uuid.UUID(bytes=signed[:16]), True, "full" if full else "read-only")


def _derived(key: Key, known: _Keys | None) -> _Keys:
    """Derived once for each key: what is presented makes no difference to that."""
    if known is not None and known.of is key:
        return known
    full = key.value.reveal()
    read_only = hmac.digest(full, _READ_ONLY_LABEL, "sha256")
    return _Keys(key, Secret(hmac.new(full, digestmod="sha256")), Secret(hmac.new(read_only, digestmod="sha256")))


def _mac(key: Secret[hmac.HMAC], signed: bytes) -> bytes:
    mac = key.reveal().copy()
    mac.update(signed)
    return mac.digest()


def _decode(text: str) -> bytes | None:
    """80 bytes, or None unless the text is exactly what encoding them gives (the last character has two spare bits)."""
    if len(text) != _TOKEN_CHARS or not text.isascii() or not text.startswith(PREFIX):
        return None
    encoded = text[len(PREFIX) :].encode()
    try:
        raw = base64.b64decode(encoded + b"=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        return None
    if len(raw) != _TOKEN_BYTES or base64.urlsafe_b64encode(raw).rstrip(b"=") != encoded:
        return None
    return raw
