"""Bytes through the launcher: headers taken out whatever the pieces, a closed end told from one that only stopped writing."""

import asyncio
import socket
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.launcher.engines.relay import Demultiplexer, End, GarbledStreamError, HangUp, Relay, RelayLimits


def piece(data, stream=1):
    return bytes([stream, 0, 0, 0]) + len(data).to_bytes(4, "big") + data


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40)), max_size=8), st.lists(st.integers(0, 400), max_size=20))
def test_stdout_comes_out_whole_however_the_stream_is_cut(pieces, cuts):
    stream = b"".join(piece(data, number) for number, data in pieces)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    demultiplexer = Demultiplexer()
    out = b"".join(bytes(part) for start, end in pairwise(edges) for part in demultiplexer.feed(stream[start:end]))
    assert out == b"".join(data for number, data in pieces if number == 1)


@pytest.mark.parametrize("header", [b"\x00\0\0\0\0\0\0\1", b"\x03\0\0\0\0\0\0\1", b"\x01\0\1\0\0\0\0\1", b"HTTP/1.1"])
def test_a_stream_that_is_not_dockers_is_refused(header):
    with pytest.raises(GarbledStreamError):
        list(Demultiplexer().feed(header + b"x"))


@pytest.fixture
def pair():
    one, other = socket.socketpair()
    one.setblocking(False)
    other.setblocking(False)
    with one, other:
        yield one, other


async def test_closing_is_hanging_up_and_shutting_for_writing_is_not(pair):
    ours, theirs = pair
    over = asyncio.Event()
    hang_up = HangUp(ours, over)
    theirs.shutdown(socket.SHUT_WR)
    await asyncio.sleep(0)
    assert await asyncio.get_running_loop().sock_recv(ours, 1) == b""
    assert not over.is_set()
    theirs.close()
    async with asyncio.timeout(5):
        await over.wait()
    hang_up.close()
    hang_up.close()


async def test_a_caller_already_gone_is_seen_without_waiting(pair):
    ours, theirs = pair
    theirs.close()
    over = asyncio.Event()
    hang_up = HangUp(ours, over)
    assert over.is_set()
    hang_up.close()


@pytest.fixture
def container_pair():
    one, other = socket.socketpair()
    one.setblocking(False)
    other.setblocking(False)
    with one, other:
        yield one, other


LIMITS = RelayLimits(request_bytes=10, reply_bytes=10, kill_after_seconds=30, idle_seconds=30)


async def carried(pair, container_pair, act, limits=LIMITS):
    caller, web = pair
    container, daemon = container_pair
    work = asyncio.create_task(Relay(caller, limits, asyncio.Event()).carry(container))
    async with asyncio.timeout(20):
        await act(web, daemon)
        return await work


async def test_a_request_past_its_cap_is_cut_there(pair, container_pair):
    loop = asyncio.get_running_loop()

    async def act(web, daemon):
        await loop.sock_sendall(web, b"0123456789abcdef")
        got = b""
        while data := await loop.sock_recv(daemon, 100):
            got += data
        assert got == b"0123456789"
        daemon.close()

    assert await carried(pair, container_pair, act) is End.OUTPUT_OVER


async def test_a_reply_past_its_cap_ends_the_relay_and_no_byte_more_is_passed(pair, container_pair):
    loop = asyncio.get_running_loop()

    async def act(web, daemon):
        await loop.sock_sendall(daemon, piece(b"01234") + piece(b"56789abc"))

    assert await carried(pair, container_pair, act) is End.TOO_LONG
    assert await loop.sock_recv(pair[1], 100) == b"0123456789"


async def test_the_clock_starts_with_the_first_byte(pair, container_pair):
    loop = asyncio.get_running_loop()

    async def act(web, daemon):
        await loop.sock_sendall(web, b"x")

    limits = RelayLimits(request_bytes=10, reply_bytes=10, kill_after_seconds=0.1, idle_seconds=3600)
    assert await carried(pair, container_pair, act, limits) is End.DEADLINE


async def test_a_garbled_stream_ends_the_relay(pair, container_pair):
    async def act(web, daemon):
        await asyncio.get_running_loop().sock_sendall(daemon, b"HTTP/1.1 500 no")

    assert await carried(pair, container_pair, act) is End.GARBLED


async def test_a_request_that_a_dead_container_did_not_take_is_carried_to_the_next(pair, container_pair):
    caller, web = pair
    dead, gone = socket.socketpair()
    dead.setblocking(False)
    gone.close()
    loop = asyncio.get_running_loop()
    relay = Relay(caller, LIMITS, asyncio.Event())
    await loop.sock_sendall(web, b"request")
    with dead:
        assert await relay.carry(dead) is End.OUTPUT_OVER
    assert relay.untouched
    container, daemon = container_pair
    work = asyncio.create_task(relay.carry(container))
    assert await loop.sock_recv(daemon, 100) == b"request"
    await loop.sock_sendall(daemon, piece(b"reply"))
    assert await loop.sock_recv(web, 100) == b"reply"
    daemon.close()
    assert await work is End.OUTPUT_OVER
    assert not relay.untouched


async def test_a_request_that_was_taken_is_not_carried_again(pair, container_pair):
    caller, web = pair
    container, daemon = container_pair
    loop = asyncio.get_running_loop()
    relay = Relay(caller, LIMITS, asyncio.Event())
    await loop.sock_sendall(web, b"x")
    work = asyncio.create_task(relay.carry(container))
    assert await loop.sock_recv(daemon, 100) == b"x"
    daemon.close()
    assert await work is End.OUTPUT_OVER
    assert not relay.untouched
