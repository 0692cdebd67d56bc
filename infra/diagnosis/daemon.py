"""Asks the Docker daemon, over its socket, what the checks want to know. Five questions, none of which changes anything."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

_SECONDS = 10.0
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Docker:
    """What the daemon answered; `trouble` says why it did not."""

    trouble: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    version: Mapping[str, Any] = field(default_factory=dict)
    bridge: Mapping[str, Any] = field(default_factory=dict)
    """The default network; empty where there is none."""
    image: bool = False
    """Whether it has MAYFLY_IMAGE."""
    pid: int = 0
    """Who listens on the socket: dockerd, or systemd for it."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_SECONDS)
        self.sock.connect(self._path)


def ask(url: str, image: str) -> Docker:
    """`url` is MAYFLY_DOCKER_SOCKET."""
    scheme, _, path = url.partition("://")
    if scheme != "unix":
        return Docker(f"{url} is not the address of a unix socket")
    connection = _Connection(path)
    try:
        connection.connect()
        pid, _, _ = _CREDENTIALS.unpack(connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return Docker(
            info=_get(connection, "/info"),
            version=_get(connection, "/version"),
            bridge=_get(connection, "/networks/bridge"),
            image=bool(_get(connection, f"/images/{quote(image, safe='')}/json")),
            pid=pid,
        )
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Docker(f"{url}: {error}")
    finally:
        connection.close()


def _get(connection: http.client.HTTPConnection, path: str) -> dict[str, Any]:
    """Empty for what the daemon does not have. Raises OSError, HTTPException or ValueError."""
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    if response.status == 404:
        return {}
    if response.status != 200:
        raise ValueError(f"{path} is answered {response.status}")
    found = json.loads(body)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is answered by no object")
    return found
