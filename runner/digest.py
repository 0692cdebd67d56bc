"""SHA-256, by the module that is compiled into the interpreter: `hashlib` would bring OpenSSL, which the image does not have."""

from __future__ import annotations

try:
    from _sha2 import sha256 as new  # type: ignore[import-not-found]
except ImportError:  # an interpreter older than the image's, on which only the command `mayfly` runs
    from hashlib import sha256 as new

__all__ = ("new", "sha256")


def sha256(data: bytes | bytearray | memoryview) -> str:
    """64 hexadecimal digits, lower case. A digest that grows piece by piece begins with `new()`, has `update` and `hexdigest`."""
    digits: str = new(data).hexdigest()
    return digits
