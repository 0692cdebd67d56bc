"""Where a request ends, and what is none: bytes on a real connection to the real process.

Behind every case a second request is sent, which must be answered by itself or not at all: never is one request read as two, or a
part of one as a part of the next.
"""

from __future__ import annotations

import asyncio
import re

import pytest

from gateway.protocol import Verb
from gateway.web.connection import MAX_PIPELINED

from .test_web_process import Web, web

BODY = b'{"sql":"SELECT 1"}'
POST = b"POST /sql HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"12\r\n" + BODY + b"\r\n0\r\n\r\n"
NEXT = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

# One answer, 400, and the connection is closed: nothing is run.
REFUSED = {
    "length and coding": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two equal lengths": POST + b"Content-Length: 18\r\nContent-Length: 18\r\n\r\n" + BODY,
    "two lengths": POST + b"Content-Length: 18\r\nContent-Length: 0\r\n\r\n" + BODY,
    "a list of lengths": POST + b"Content-Length: 18, 18\r\n\r\n" + BODY,
    "a negative length": POST + b"Content-Length: -18\r\n\r\n" + BODY,
    "a length with a plus": POST + b"Content-Length: +18\r\n\r\n" + BODY,
    "a hexadecimal length": POST + b"Content-Length: 0x12\r\n\r\n" + BODY,
    "a length with an underscore": POST + b"Content-Length: 1_8\r\n\r\n" + BODY,
    "a length of two words": POST + b"Content-Length: 1 8\r\n\r\n" + BODY,
    "no length": POST + b"Content-Length:\r\n\r\n",
    "a length beyond 64 bits": POST + b"Content-Length: 99999999999999999999999999\r\n\r\n" + BODY,
    "another coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS,
    "identity": POST + b"Transfer-Encoding: identity\r\n\r\n" + BODY,
    "chunked and then identity": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKS,
    "compressed and chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS,
    "chunked twice": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + CHUNKS,
    "two codings": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
    "two different codings": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + CHUNKS,
    "a coding behind a comma": POST + b"Transfer-Encoding: ,chunked\r\n\r\n" + CHUNKS,
    "a coding before a comma": POST + b"Transfer-Encoding: chunked,\r\n\r\n" + CHUNKS,
    "a coding with a parameter": POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n" + CHUNKS,
    "a quoted coding": POST + b'Transfer-Encoding: "chunked"\r\n\r\n' + CHUNKS,
    "a coding behind a vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + CHUNKS,
    "a folded coding": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNKS,
    "no coding": POST + b"Transfer-Encoding:\r\n\r\n" + CHUNKS,
    "a coding in HTTP/1.0": b"POST /sql HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
    "a space before the colon of a coding": POST + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKS,
    "a space before a colon": POST + b"Content-Length : 18\r\n\r\n" + BODY,
    "a folded header": POST + b"X: a\r\n b\r\nContent-Length: 18\r\n\r\n" + BODY,
    "a first header that is folded": b"POST /sql HTTP/1.1\r\n Host: x\r\nContent-Length: 18\r\n\r\n" + BODY,
    "bare line feeds": b"POST /sql HTTP/1.1\nHost: x\nContent-Length: 18\n\n" + BODY,
    "a bare line feed behind a header": POST + b"X: a\nContent-Length: 18\r\n\r\n" + BODY,
    "a bare line feed at the end": POST + b"Content-Length: 18\r\n\n" + BODY,
    "a bare carriage return": POST + b"X: a\rContent-Length: 5\r\nContent-Length: 18\r\n\r\n" + BODY,
    "two carriage returns": POST + b"X: a\r\r\nContent-Length: 18\r\n\r\n" + BODY,
    "NUL in a name": POST + b"X\x00: a\r\nContent-Length: 18\r\n\r\n" + BODY,
    "NUL in a value": POST + b"X: \x00\r\nContent-Length: 18\r\n\r\n" + BODY,
    "a control character in a value": POST + b"X: \x01\r\nContent-Length: 18\r\n\r\n" + BODY,
    "no name": POST + b": x\r\nContent-Length: 18\r\n\r\n" + BODY,
    "no colon": POST + b"X\r\nContent-Length: 18\r\n\r\n" + BODY,
    "65 headers": GET + b"X: x\r\n" * 64 + b"\r\n",
    "a chunk size in C": CHUNKED + b"0x" + CHUNKS,
    "a negative chunk size": CHUNKED + b"-" + CHUNKS,
    "a chunk size with a plus": CHUNKED + b"+" + CHUNKS,
    "a chunk size and a space": CHUNKED + b"12 \r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk size beyond 64 bits": CHUNKED + b"1" + b"0" * 16 + CHUNKS,
    "a chunk that is longer than its size": CHUNKED + b"11\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk that ends in line feeds": CHUNKED + b"12\n" + BODY + b"\n0\n\n",
    "a chunk extension and a line feed": CHUNKED + b"12;x\n" + BODY + b"\r\n0\r\n\r\n",
    "a length in a trailer": CHUNKED + CHUNKS[:-2] + b"Content-Length: 5\r\n\r\n",
    "a coding in a trailer": CHUNKED + CHUNKS[:-2] + b"Transfer-Encoding: chunked\r\n\r\n",
    "HTTP/0.9": b"GET /livez\r\n\r\n",
    "HTTP/1.2": b"GET /livez HTTP/1.2\r\nHost: x\r\n\r\n",
    "HTTP/2.0": b"GET /livez HTTP/2.0\r\nHost: x\r\n\r\n",
    "HTTP/2 itself": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/1.10": b"GET /livez HTTP/1.10\r\nHost: x\r\n\r\n",
    "another protocol": b"GET /livez RTSP/1.0\r\nHost: x\r\n\r\n",
    "an authority as a target": b"GET x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a target with a user": b"GET http://a@x/livez HTTP/1.1\r\nHost: x\r\n\r\n",
    "a target of another scheme": b"GET ftp://x/livez HTTP/1.1\r\nHost: x\r\n\r\n",
    "a target with a fragment": b"GET /livez#x HTTP/1.1\r\nHost: x\r\n\r\n",
    "a target with a space": b"GET /livez x HTTP/1.1\r\nHost: x\r\n\r\n",
    "a target with a control character": b"GET /livez\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a target that is not ASCII": b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "a star for GET": b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
    "tabs in the request line": b"GET\t/livez\tHTTP/1.1\r\nHost: x\r\n\r\n",
    "no host": b"GET /livez HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /livez HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "a list of hosts": b"GET /livez HTTP/1.1\r\nHost: x, y\r\n\r\n",
    "a host that is none": b"GET /livez HTTP/1.1\r\nHost: x/y\r\n\r\n",
    "another expectation": POST + b"Expect: 200-maybe\r\nContent-Length: 18\r\n\r\n" + BODY,
    "another expectation of a GET": GET + b"Expect: x\r\n\r\n",
    "a method of strange bytes": b"G\xffT /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    "an unknown method": b"FOO /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    "a method in small letters": b"get /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    "the end of an older websocket": GET + b"Sec-WebSocket-Key1: x\r\n\r\n",
    "something behind the last request": GET + b"Connection: close\r\n\r\n",
}

# Its own answer, and the connection is closed: what follows is not read.
LAST = {
    "chunked": (CHUNKED + CHUNKS, 200),
    "chunked in other letters": (POST + b"Transfer-Encoding:\tChunked \r\n\r\n" + CHUNKS, 200),
    "a chunk extension": (CHUNKED + b"12;a=b\r\n" + BODY + b"\r\n0\r\n\r\n", 200),
    "a long chunk extension": (CHUNKED + b"12;a=" + b"b" * 5000 + b"\r\n" + BODY + b"\r\n0\r\n\r\n", 200),
    "a chunk size with zeros": (CHUNKED + b"0" * 40 + CHUNKS, 200),
    "a trailer": (CHUNKED + CHUNKS[:-2] + b"X-Walkin-Session: wkn_from-the-trailer\r\n\r\n", 200),
    "an upgrade to HTTP/2": (POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 18\r\n\r\n" + BODY, 200),
    "an upgrade to a websocket": (POST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 18\r\n\r\n" + BODY, 200),
    "CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "CONNECT with a length": (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcde", 404),
}

# Its own answer, and then the next request has its own.
FOLLOWED = {
    "an ordinary one": (POST + b"Content-Length: 18\r\n\r\n" + BODY, 200),
    "a length with zeros": (POST + b"Content-Length: 0000018\r\n\r\n" + BODY, 200),
    "a body of GET": (GET + b"Content-Length: 18\r\n\r\n" + BODY, 200),
    "absolute form": (b"GET http://x/livez HTTP/1.1\r\nHost: x\r\n\r\n", 200),
    "a star": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "an empty host": (b"GET /livez HTTP/1.1\r\nHost:\r\n\r\n", 200),
    "a host in brackets": (b"GET /livez HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n", 200),
    "HTTP/1.0 that is kept alive": (b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200),
    "empty lines before": (b"\r\n\r\n" + GET + b"\r\n", 200),
    "64 headers": (GET + b"X: x\r\n" * 63 + b"\r\n", 200),
    "TRACE": (b"TRACE /livez HTTP/1.1\r\nHost: x\r\n\r\n", 405),
}


async def said(running: Web, sent: bytes) -> list[int]:
    """The status of every answer until the process hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    try:
        writer.write(sent)
        received = await reader.read()
    finally:
        writer.transport.abort()
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", received)]


@pytest.fixture(scope="module")
async def running(tmp_path_factory):
    async with web(
        tmp_path_factory.mktemp("state"), MAYFLY_RATE_REQUESTS_PER_MINUTE="0", MAYFLY_RATE_CREATES_PER_MINUTE="0"
    ) as web_:
        yield web_


@pytest.fixture(autouse=True)
def forgetful(running):
    running.launcher.verbs.clear()


@pytest.mark.parametrize("name", REFUSED)
async def test_what_could_be_read_in_two_ways_is_refused_and_nothing_runs(running, name):
    assert await said(running, REFUSED[name] + NEXT) == [400]
    assert running.launcher.count(Verb.RUN) <= name.endswith("trailer")  # its body was whole
    assert running.launcher.count(Verb.FIND) == 0


@pytest.mark.parametrize("name", LAST)
async def test_what_leaves_the_end_in_doubt_is_the_last_of_its_connection(running, name):
    sent, status = LAST[name]
    assert await said(running, sent + NEXT) == [status]
    assert running.launcher.count(Verb.FIND) == 0


@pytest.mark.parametrize("name", FOLLOWED)
async def test_what_ends_where_it_says_is_followed_by_the_next(running, name):
    sent, status = FOLLOWED[name]
    assert await said(running, sent + NEXT) == [status, 200]


async def test_a_trailer_is_never_a_header_of_the_next_request(running):
    """The parser alone gives the second request the first one's trailer, here a session."""
    first = CHUNKED + CHUNKS[:-2] + b"X-Walkin-Session: wkn_of-somebody-else\r\n\r\n"
    assert await said(running, first + POST + b"Content-Length: 18\r\n\r\n" + BODY) == [200]
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(first)
    await reader.read()
    writer.close()
    assert running.launcher.count(Verb.FIND) == 0


async def test_a_client_of_HTTP_1_0_is_never_told_to_continue(running):
    head = b"POST /sql HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 18\r\n\r\n"
    assert await said(running, head + BODY) == [200]


async def test_pipelined_requests_are_answered_in_order_and_bounded(running):
    assert await said(running, (GET + b"\r\n") * (MAX_PIPELINED - 1) + NEXT) == [200] * MAX_PIPELINED
    assert await said(running, (GET + b"\r\n") * 200 + NEXT) == [200] * MAX_PIPELINED
