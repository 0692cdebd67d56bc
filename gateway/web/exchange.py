"""What one HTTP request gathers on its way: its id, its instance, the headers its answer will carry."""

from __future__ import annotations

import secrets
import uuid
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

    @property
    def request_id_bytes(self) -> bytes:
        return bytes.fromhex(self.request_id)


EXCHANGE: web.RequestKey[Exchange] = web.RequestKey("exchange", Exchange)
