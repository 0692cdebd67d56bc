"""What one HTTP request gathers on its way: its id, its instance, the headers its answer will carry."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass, field

from aiohttp import web


@dataclass(slots=True)
class Exchange:
    request_id: str = field(default_factory=lambda: secrets.token_hex(16))
    instance: uuid.UUID | None = None
    sql_bytes: int = 0
    headers: dict[str, str] = field(default_factory=dict)


EXCHANGE: web.RequestKey[Exchange] = web.RequestKey("exchange", Exchange)
