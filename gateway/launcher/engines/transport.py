"""How docker-py reaches a unix socket, with two of its habits (7.2) put right.

It keeps one connection pool per URL, that is per container and verb: nothing is ever reused, and a pool evicted by one thread
may be in another's hands. And the socket with which it could not connect stays open until the garbage collector comes by.
"""

from __future__ import annotations

import socket
from typing import Any

from docker.transport.unixconn import UnixHTTPAdapter, UnixHTTPConnection, UnixHTTPConnectionPool

SCHEME = "http+docker://"  # what docker-py makes of unix://


class _Connection(UnixHTTPConnection):
    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            sock.connect(self.unix_socket)
        except OSError:
            sock.close()
            raise
        self.sock = sock


class _Pool(UnixHTTPConnectionPool):
    def _new_conn(self) -> Any:
        timeout: Any = self.timeout
        return _Connection(self.base_url, self.socket_path, timeout)


class OnePoolAdapter(UnixHTTPAdapter):
    """Keeps up to `connections` open to the daemon and uses them again."""

    def __init__(self, socket_path: str, *, timeout_seconds: Any, connections: int) -> None:
        super().__init__(socket_path, timeout_seconds, 1, connections)
        self._pool = _Pool("http+docker://localhost", socket_path, timeout_seconds, connections)

    def get_connection(self, url: Any, proxies: Any = None) -> _Pool:
        return self._pool

    def close(self) -> None:
        self._pool.close()
        super().close()
