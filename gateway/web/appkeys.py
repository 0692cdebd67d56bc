"""The typed keys under which the application holds its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from ..settings import Settings
from .access_log import AccessLog
from .body import Bodies
from .breaker import Breaker
from .bulk import BulkGate
from .callers import Callers
from .drain import Drain
from .health import Health
from .keys import KeyRing
from .launcher import Launcher
from .rates import Rate
from .replays import Replays
from .room import Room
from .runs import Runs
from .tokens import Tokens
from .traffic import Traffic

if TYPE_CHECKING:
    from .shipping import Shipping  # and boto3 with it

ANSWERS: web.AppKey[Room] = web.AppKey("answers", Room)
BODIES: web.AppKey[Bodies] = web.AppKey("bodies", Bodies)
BREAKER: web.AppKey[Breaker] = web.AppKey("breaker", Breaker)
BULK_GATE: web.AppKey[BulkGate] = web.AppKey("bulk_gate", BulkGate)
CALLERS: web.AppKey[Callers] = web.AppKey("callers", Callers)
SETTINGS: web.AppKey[Settings] = web.AppKey("settings", Settings)
KEYS: web.AppKey[KeyRing] = web.AppKey("keys", KeyRing)
TOKENS: web.AppKey[Tokens] = web.AppKey("tokens", Tokens)
REQUEST_RATE: web.AppKey[Rate] = web.AppKey("request_rate", Rate)
CREATE_RATE: web.AppKey[Rate] = web.AppKey("create_rate", Rate)
LAUNCHER: web.AppKey[Launcher] = web.AppKey("launcher", Launcher)
REPLAYS: web.AppKey[Replays] = web.AppKey("replays", Replays)
ROOM: web.AppKey[Room] = web.AppKey("room", Room)
RUNS: web.AppKey[Runs] = web.AppKey("runs", Runs)
HEALTH: web.AppKey[Health] = web.AppKey("health", Health)
ACCESS_LOG: web.AppKey[AccessLog] = web.AppKey("access_log", AccessLog)
SHIPPING: web.AppKey[Shipping] = web.AppKey("shipping")
DRAIN: web.AppKey[Drain] = web.AppKey("drain", Drain)
TRAFFIC: web.AppKey[Traffic] = web.AppKey("traffic", Traffic)
