"""What one HTTP request gathers on its way: its id, its instance, the headers its answer will carry."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web


@dataclass(slots=True)
class Exchange:
    address: str
    """Who is calling."""
    request_id: str = field(default_factory=lambda: secrets.token_hex(16))
    instance: uuid.UUID | None = None
    sql_bytes: int = 0
    code: str = ""
    """Of the error that it is answered with."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of the answer, whatever it is."""
    hung_up: bool = False
    """Whether the caller left while its answer was sent."""

    @property
    def request_id_bytes(self) -> bytes:
        return bytes.fromhex(self.request_id)

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Around what a handler writes itself: a caller that hangs up ends that, and is nobody's error."""
        try:
            yield
        except ConnectionError:
            self.hung_up = True


EXCHANGE: web.RequestKey[Exchange] = web.RequestKey("exchange", Exchange)
