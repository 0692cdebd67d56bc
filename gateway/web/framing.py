"""What aiohttp's parser lets through and this service refuses: requests that two programs could read differently."""

from __future__ import annotations

import re
from functools import lru_cache

from aiohttp import hdrs
from aiohttp.http import HttpVersion10, HttpVersion11, RawRequestMessage

# RFC 9112, 3.2 and RFC 3986, 3.2.2: a name or an IPv4 address, or an IPv6 address in brackets, and a port.
_HOST = re.compile(r"([\w.~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?", re.ASCII)


def is_faulty(message: RawRequestMessage) -> bool:
    """Whether the request is to be refused as no HTTP/1.1 or 1.0."""
    version, path, headers = message.version, message.path, message.headers
    if (version is not HttpVersion11 and version != HttpVersion10) or "#" in path or not _is_host(headers.get(hdrs.HOST, "")):
        return True
    if path[0] != "/" and not _is_other_target(message):
        return True
    # The parser lets no other coding pass that does not end in this one.
    if message.chunked and (version is not HttpVersion11 or headers[hdrs.TRANSFER_ENCODING].lower() != "chunked"):
        return True
    return hdrs.EXPECT in headers and headers[hdrs.EXPECT].lower() != "100-continue"


def ends_connection(message: RawRequestMessage) -> bool:
    """Whether nothing may be read behind this request.

    The parser hands the trailer fields of a chunked body to the next request, as its headers, and loses what follows a refused
    upgrade; what follows CONNECT may be anything.
    """
    return message.chunked or message.upgrade or message.method == "CONNECT"


def _is_other_target(message: RawRequestMessage) -> bool:
    """Absolute form, `*` of OPTIONS, or authority form of CONNECT: the parser lets no other pass."""
    return message.url.scheme in ("http", "https", "") and message.url.user is None


@lru_cache(maxsize=1024)
def _is_host(value: str) -> bool:
    return _HOST.fullmatch(value) is not None
