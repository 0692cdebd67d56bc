"""The typed keys under which the application holds its parts."""

from __future__ import annotations

from aiohttp import web

from ..settings import Settings
from .access_log import AccessLog
from .drain import Drain
from .health import Health
from .keys import KeyRing
from .launcher import Launcher
from .rates import Rate
from .runs import Runs
from .tokens import Tokens

SETTINGS: web.AppKey[Settings] = web.AppKey("settings", Settings)
KEYS: web.AppKey[KeyRing] = web.AppKey("keys", KeyRing)
TOKENS: web.AppKey[Tokens] = web.AppKey("tokens", Tokens)
REQUEST_RATE: web.AppKey[Rate] = web.AppKey("request_rate", Rate)
CREATE_RATE: web.AppKey[Rate] = web.AppKey("create_rate", Rate)
LAUNCHER: web.AppKey[Launcher] = web.AppKey("launcher", Launcher)
RUNS: web.AppKey[Runs] = web.AppKey("runs", Runs)
HEALTH: web.AppKey[Health] = web.AppKey("health", Health)
ACCESS_LOG: web.AppKey[AccessLog] = web.AppKey("access_log", AccessLog)
DRAIN: web.AppKey[Drain] = web.AppKey("drain", Drain)
