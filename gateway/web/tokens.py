"""Session tokens: `wkn_` and unpadded base64url of UUIDv7 (16 bytes), nonce (32) and HMAC-SHA256 over both (32).

Nothing of a token is parsed before its MAC verifies, both keys are tried every time, and a token that fails yields a random
instance id: what follows, a look-up at the launcher that finds nothing, is then the same for whatever was not issued here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import uuid

from ..uuid7 import uuid7
from .keys import KeyRing
from .secret import Secret

PREFIX = "wkn_"
_NONCE_BYTES = 32
_SIGNED_BYTES = 16 + _NONCE_BYTES
_TOKEN_BYTES = _SIGNED_BYTES + hashlib.sha256().digest_size
_TOKEN_CHARS = len(PREFIX) + -(-_TOKEN_BYTES * 8 // 6)


class Tokens:
    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys
        self._decoy = secrets.token_bytes(_TOKEN_BYTES)

    def issue(self, instance: uuid.UUID) -> Secret[str]:
        """A new token for an instance; its nonce makes every token differ."""
        signed = instance.bytes + secrets.token_bytes(_NONCE_BYTES)
        raw = signed + _mac(self._keys.current.value, signed)
        return Secret(PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("="))

    def resolve(self, presented: Secret[str]) -> tuple[uuid.UUID, bool]:
        """The instance a token names, and whether it verified. An id that comes with False is random and exists nowhere."""
        decoded = _decode(presented.reveal())
        raw = self._decoy if decoded is None else decoded
        signed, mac = raw[:_SIGNED_BYTES], raw[_SIGNED_BYTES:]
        # `|` and not `or`: both digests are computed and compared whatever the first one says.
        by_current = hmac.compare_digest(_mac(self._keys.current.value, signed), mac)
        by_previous = hmac.compare_digest(_mac(self._keys.previous.value, signed), mac)
        if not (by_current | by_previous) or decoded is None:
            return uuid7(), False
        # The MAC verified: these are bytes that issue() wrote.
        return uuid.UUID(bytes=signed[:16]), True


def _mac(key: Secret[bytes], signed: bytes) -> bytes:
    return hmac.digest(key.reveal(), signed, "sha256")


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
