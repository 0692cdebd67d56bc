"""Any route of the web process, called with what a test gives; and all that take a session, with what gets past their checks."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import aiohttp
from multidict import CIMultiDict

from .fake_launcher import Gateway


async def call(
    web: Gateway, method: str, path: str, token: str | None = None, data: Any = None, headers: Mapping[str, str] | None = None
) -> aiohttp.ClientResponse:
    """The answer, read to its end."""
    sent = CIMultiDict(headers or {})
    if token is not None:
        sent["X-Walkin-Session"] = token
    async with web.client.request(method, web.url + path, data=data, headers=sent, skip_auto_headers=("Content-Type",)) as response:
        await response.read()
        return response


def content(response: aiohttp.ClientResponse) -> bytes:
    """The bytes of an answer that was read to its end: `read()` gives them only once."""
    assert response._body is not None
    return response._body


class Request(NamedTuple):
    method: str
    path: str
    data: bytes | None = None
    headers: Mapping[str, str] = MappingProxyType({})
    writes: bool = False
    """Whether it is refused to a read-only token."""

    async def __call__(self, web: Gateway, token: str | None) -> aiohttp.ClientResponse:
        return await call(web, self.method, self.path, token, self.data, self.headers)

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


OF_INSTANCES = (
    Request("POST", "/sql", b'{"sql":"SELECT 1"}'),
    Request("POST", "/sql", b'{"sql":"SELECT 1"}', {"Accept": "application/x-ndjson"}),
    Request("POST", "/batch", b'{"statements":[{"sql":"SELECT 1"}]}'),
    Request("POST", "/import?table=t&format=csv", b"a\n" + b"1\n" * 200_000, writes=True),
    Request("GET", "/db"),
    Request("HEAD", "/db"),
    Request("PUT", "/db", b"SQLite format 3\0" + bytes(1_000_000), writes=True),
    Request("GET", "/schema"),
    Request("POST", "/fork"),
    Request("POST", "/share", writes=True),
    Request("POST", "/extend", b'{"seconds":60}', writes=True),
    Request("DELETE", "/session", writes=True),
    Request("POST", "/salvage", writes=True),
)
"""Every route that takes a session, and every form of answer."""
