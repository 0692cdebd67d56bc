"""`python -m infra.benchmark.blank`: one constant answer to whatever is sent, so what is measured is the load generator."""

from __future__ import annotations

import asyncio
from typing import cast

import uvloop

_BODY = b'{"columns":["1"],"rows":[[1]],"rows_affected":0}'
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)


class _Constant(asyncio.Protocol):
    """Takes every read for one whole request: those of the benchmark are smaller than a read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(_ANSWER)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Constant, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve())
