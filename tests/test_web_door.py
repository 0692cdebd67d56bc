"""Who comes in, who gives way, who waits, and when a connection's time is up: over real sockets, from many loopback addresses."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from contextlib import suppress
from types import SimpleNamespace

import pytest

from gateway.protocol import Verdict
from gateway.settings import Settings
from gateway.uuid7 import uuid7
from gateway.web import door as door_module
from gateway.web.appkeys import ANSWERS, DRAIN, ROOM, RUNS, TOKENS
from gateway.web.connection import MAX_CHUNKING_BYTES, MAX_PIPELINED
from gateway.web.door import MAX_UNREAD_BYTES
from gateway.web.room import ANSWERS_BYTES, ROOM_BYTES, Room
from gateway.web.turnstile import PIECES_PER_TOKEN, Acquaintances, Turnstile

from .fake_launcher import FakeRun, answering, frame, gateway, ok, replying, replying_after, rows_reply, until

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
LINES = b"Accept: application/x-ndjson\r\n"
SELECT = b"POST /sql HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\n%b\r\n" + b'{"sql":"SELECT 1"}'


class Caller:
    """One connection, from an address of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def at(cls, web, address: str = "127.0.0.1", receive_bytes: int = 0) -> Caller:
        connection = socket.socket()
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.setblocking(False)
        connection.bind((address, 0))
        try:
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", web.port))
        except OSError:
            connection.close()
            raise
        return cls(*await asyncio.open_connection(sock=connection))

    def send(self, sent: bytes) -> None:
        self.writer.write(sent)

    async def status(self, sent: bytes) -> int:
        """Of one whole answer."""
        self.send(sent)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        await self.reader.readexactly(length)
        return int(head.split()[1])

    async def rest(self) -> bytes:
        """What comes until the connection is closed or reset."""
        received = b""
        try:
            while chunk := await self.reader.read(1 << 16):
                received += chunk
        except ConnectionError:
            pass
        return received


@pytest.fixture
async def callers():
    """Makes callers, and hangs up for them."""
    made: list[Caller] = []

    async def call(web, address: str = "127.0.0.1", receive_bytes: int = 0) -> Caller:
        made.append(await Caller.at(web, address, receive_bytes))
        return made[-1]

    yield call
    for caller in made:
        caller.writer.transport.abort()


async def is_turned_away(web, callers) -> bool:
    """Comes, asks, and hears nothing."""
    try:
        caller = await callers(web)
        caller.send(LIVEZ)
        return await caller.rest() == b""
    except ConnectionError:
        return True


def door(web) -> door_module.Door:
    assert web.server.door is not None
    return web.server.door


def genuine(web) -> bytes:
    """The header of an instance that lives."""
    instance = uuid7()
    web.launcher.instances[instance] = 1 << 31
    return b"X-Walkin-Session: " + web.app[TOKENS].issue(instance).reveal().encode() + b"\r\n"


# ── caps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_address_has_so_many_connections_and_its_next_one_is_reset(tmp_path, callers):
    async with gateway(tmp_path, connections_per_address=2) as web:
        first, second = await callers(web), await callers(web)
        assert [await first.status(LIVEZ), await second.status(LIVEZ)] == [200, 200]
        assert await is_turned_away(web, callers)
        assert await (await callers(web, "127.0.0.2")).status(LIVEZ) == 200
        first.writer.transport.abort()
        await until(lambda: door(web).connections == 2)
        assert await (await callers(web)).status(LIVEZ) == 200


async def test_without_a_cap_an_address_has_as_many_as_it_likes(tmp_path, callers):
    async with gateway(tmp_path, connections_per_address=0) as web:
        assert {await (await callers(web)).status(LIVEZ) for _ in range(100)} == {200}


async def test_a_trusted_proxy_has_as_many_as_it_likes(tmp_path, callers):
    async with gateway(tmp_path, connections_per_address=1, trusted_proxies="127.0.0.9/32") as web:
        assert {await (await callers(web, "127.0.0.9")).status(LIVEZ) for _ in range(20)} == {200}


async def test_a_64_is_one_address_and_another_port_is_the_same(tmp_path):
    async with gateway(tmp_path) as web:
        held = door(web)
        for peer, address in (("2001:db8::1", "2001:db8::/64"), ("2001:db8::2", "2001:db8::/64"), ("::ffff:10.0.0.1", "10.0.0.1")):
            ours, theirs = socket.socketpair()
            held._admit(ours, peer)
            assert address in held._addresses
            theirs.close()
        assert held._addresses["2001:db8::/64"] == 2
        await until(lambda: not held._addresses)


async def test_a_48_has_four_times_the_connections_of_a_64(tmp_path):
    async with gateway(tmp_path, connections_per_address=2) as web:
        callers = []

        def is_let_in(peer: str) -> bool:
            ours, theirs = socket.socketpair()
            callers.append(theirs)
            return door(web)._admit(ours, peer)

        assert [is_let_in("2001:db8::1") for _ in range(3)] == [True, True, False]
        assert [is_let_in(f"2001:db8:0:{number}::1") for number in range(1, 8)] == [True] * 6 + [False]
        assert is_let_in("2001:db8:1::1")
        for caller in callers:
            caller.close()
        await until(lambda: not door(web)._addresses)


async def test_at_the_cap_strangers_give_way_before_those_with_a_token_and_the_oldest_first(tmp_path, callers):
    async with gateway(tmp_path, connections=5) as web:
        known = await callers(web, "127.0.1.1")
        assert await known.status(SELECT % genuine(web)) == 200
        answered = await callers(web, "127.0.1.2")
        assert await answered.status(LIVEZ) == 200
        silent = [await callers(web, f"127.0.1.{number}") for number in (3, 4, 5)]
        await until(lambda: door(web).connections == 5)
        silent[1].send(b"GET /livez HTTP/1.1\r\n")  # what is begun is no better than silence
        newcomers = []
        for gone in (silent[0], silent[1], silent[2], answered):
            newcomers.append(await callers(web, f"127.0.2.{len(newcomers) + 1}"))
            assert await newcomers[-1].status(LIVEZ) == 200
            assert await gone.rest() == b""
            assert door(web).connections == 5
        assert await known.status(SELECT % genuine(web)) == 200


async def test_an_upload_gives_way_and_a_request_at_work_does_not(tmp_path, callers):
    async with gateway(tmp_path, connections=2) as web:
        finish = asyncio.Event()
        web.launcher.script = replying_after(finish)
        running, uploading = await callers(web), await callers(web)
        running.send(SELECT % b"Connection: close\r\n")
        uploading.send(b"POST /sql HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        await until(lambda: len(web.launcher.requests) == 1)
        await until(lambda: any(each._body is not None for each in door(web)._open))
        second = await callers(web)
        second.send(SELECT % b"Connection: close\r\n")
        assert await uploading.rest() == b""
        await until(lambda: len(web.launcher.requests) == 2)
        assert await is_turned_away(web, callers)
        finish.set()
        assert [(await each.rest())[:13] for each in (running, second)] == [b"HTTP/1.1 200 "] * 2


@pytest.mark.parametrize("trusted", [False, True])
async def test_who_does_not_read_its_answer_gives_way_before_those_with_a_token(tmp_path, callers, trusted):
    async with gateway(tmp_path, connections=2) as web:
        known = await callers(web, "127.0.1.1")
        assert await known.status(SELECT % genuine(web)) == 200
        web.launcher.script = replying(ok(["a"], [["x" * 1000]] * 1900))
        door(web).sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        deaf = await callers(web, "127.0.1.2", receive_bytes=4096)
        deaf.writer.transport.pause_reading()
        deaf.send(SELECT % (genuine(web) if trusted else b""))
        await until(lambda: door(web)._unread)
        ours, theirs = socket.socketpair()
        with theirs:
            assert door(web)._admit(ours, "127.0.1.3")
            assert door(web).evicted["room"] == 1
            assert not door(web)._unread  # or the next one would evict it again
        await until(lambda: door(web).connections == 1)
        assert await (await callers(web, "127.0.1.4")).status(LIVEZ) == 200
        assert await known.status(LIVEZ) == 200


async def test_without_descriptors_the_door_rests_and_goes_on(tmp_path, callers, caplog):
    async with gateway(tmp_path) as web:
        waiting = socket.socket()
        waiting.setblocking(False)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        fillers = [os.dup(0)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[0] + 1, hard))
        try:
            while True:
                try:
                    fillers.append(os.dup(0))
                except OSError:
                    break
            await asyncio.get_running_loop().sock_connect(waiting, ("127.0.0.1", web.port))
            await until(lambda: "no connection can be taken up" in caplog.text)
            assert door(web).connections == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for filler in fillers:
                os.close(filler)
        caller = Caller(*await asyncio.open_connection(sock=waiting))
        assert await caller.status(LIVEZ) == 200
        caller.writer.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_every_address_of_the_host_is_listened_on(tmp_path, host):
    async with gateway(tmp_path) as web:
        port = await web.server.listen(host, 0)
        reader, writer = await asyncio.open_connection(web.server.addresses[-1][0], port)
        writer.write(LIVEZ.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()
        taken = SimpleNamespace(host=web.server.addresses[-1][0], port=port)
        with pytest.raises(OSError, match="in use"):
            await web.server.listen(taken.host, taken.port)


async def test_a_storm_of_connections_is_served_to_the_last(tmp_path, callers):
    async with gateway(tmp_path, connections_per_address=0) as web:
        storm = await asyncio.gather(*(callers(web, f"127.0.3.{1 + number % 250}") for number in range(500)))
        assert await asyncio.gather(*(caller.status(LIVEZ) for caller in storm)) == [200] * 500
        for caller in storm:
            caller.writer.transport.abort()
        await until(lambda: door(web).connections == 0)
        assert door(web)._addresses == {}
        assert not any(door(web)._lines)
        assert not door(web)._tasks


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", [LIVEZ, b""], ids=["second request", "first request"])
async def test_a_header_that_does_not_end_is_a_408_and_a_trickle_does_not_extend_it(tmp_path, callers, first):
    async with gateway(tmp_path, header_seconds=0.4, keepalive_seconds=60.0) as web:
        caller = await callers(web)
        if first:
            assert await caller.status(first) == 200
        caller.send(b"GET /livez HTTP/1.1\r\nX: ")
        answer = asyncio.ensure_future(caller.rest())
        while not answer.done():
            caller.send(b"a")
            await asyncio.sleep(0.02)
        head, _, body = (await answer).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"\r\nConnection: close" in head
        assert b"\r\nX-Content-Type-Options: nosniff" in head
        assert b'"code":"request_timeout"' in body


@pytest.mark.parametrize(("first", "settings"), [(b"", {"header_seconds": 0.2}), (LIVEZ, {"keepalive_seconds": 0.2})])
async def test_a_connection_that_says_nothing_is_closed_without_a_word(tmp_path, callers, first, settings):
    async with gateway(tmp_path, **settings) as web:
        caller = await callers(web)
        if first:
            assert await caller.status(first) == 200
        assert await caller.rest() == b""


async def test_a_connection_whose_408_does_not_fit_the_kernel_is_gone(tmp_path, callers):
    async with gateway(tmp_path) as web:
        door(web).sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        caller = await callers(web, receive_bytes=4096)
        caller.writer.transport.pause_reading()
        caller.send(b"GET /livez HTTP/1.1\r\n")
        await until(lambda: any(each._begun for each in door(web)._open))
        [connection] = door(web)._open
        kernel = connection.transport.get_extra_info("socket").fileno()

        def is_full() -> bool:
            with suppress(BlockingIOError):
                return not os.write(kernel, b"x" * 4096)
            return True

        await until(is_full)
        connection.expire()
        await until(lambda: door(web).connections == 0)


async def test_what_is_at_work_has_no_deadline_of_its_connection(tmp_path, callers):
    async with gateway(tmp_path, header_seconds=0.1, keepalive_seconds=0.1) as web:
        finish = asyncio.Event()
        web.launcher.script = replying_after(finish)
        caller = await callers(web)
        caller.send(SELECT % b"")
        await until(lambda: len(web.launcher.requests) == 1)
        for _ in range(3):
            assert await (await callers(web)).rest() == b""  # a silent one, whose time is up
        finish.set()
        assert (await caller.rest()).startswith(b"HTTP/1.1 200 ")


async def test_an_answer_that_is_not_read_is_given_up(tmp_path, callers):
    async with gateway(tmp_path, answer_seconds=0.2) as web:
        web.launcher.script = replying(ok(["a"], [["x" * 1000]] * 1900))
        caller = await callers(web, receive_bytes=4096)
        door(web).sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        slow = await callers(web, receive_bytes=4096)
        caller.writer.transport.pause_reading()
        slow.writer.transport.pause_reading()
        slow.send(SELECT % b"")
        await until(lambda: door(web)._unread)
        await until(lambda: not door(web)._unread)
        await until(lambda: door(web).connections == 1)


STREAMED = [[["x" * 1000]] * 100] * 40  # 4 MB


async def test_D4_a_streamed_answer_that_is_not_read_costs_no_slot_no_more_memory_than_its_loan_and_ends(tmp_path, callers):
    async with gateway(tmp_path, answer_seconds=0.2, slots=1) as web:
        web.launcher.script = answering({"rows": rows_reply(["a"], *STREAMED), "": ok()})
        door(web).sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        deaf, quick = await callers(web, receive_bytes=4096), await callers(web)
        deaf.writer.transport.pause_reading()
        deaf.send(SELECT % LINES)
        await until(lambda: door(web)._unread)
        await until(lambda: web.app[RUNS].leases.held == 0)
        assert await quick.status(SELECT % b"") == 200
        [connection] = door(web)._unread
        assert connection.unsent_bytes < 1 << 20
        await until(lambda: door(web).connections == 1)
        assert door(web).evicted["answer"] == 1
        await until(lambda: web.app[ANSWERS].free == ANSWERS_BYTES)


async def test_who_reads_a_little_of_a_streamed_answer_now_and_then_gets_no_more_time_for_each_mebibyte(tmp_path, callers):
    async with gateway(tmp_path, answer_seconds=0.3) as web:
        web.launcher.script = answering({"rows": rows_reply(["a"], *STREAMED)})
        door(web).sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        slow = await callers(web, receive_bytes=4096)
        slow.send(SELECT % LINES)
        received = 0
        with suppress(ConnectionError):
            while chunk := await slow.reader.read(1 << 14):
                received += len(chunk)
                await asyncio.sleep(0.02)
        assert received < 4_000_000
        assert door(web).evicted["answer"] == 1
        door(web).sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        quick = await callers(web)
        quick.send(SELECT % (LINES + b"Connection: close\r\n"))
        assert b'"complete":true' in await quick.rest()


async def test_a_large_answer_has_its_time_for_each_mebibyte_of_it(tmp_path, callers, monkeypatch):
    async with gateway(tmp_path, answer_seconds=100.0) as web:
        web.launcher.script = answering({"rows": rows_reply(["a"], *STREAMED), "": ok(["a"], [["x" * 1000]] * 1900)})
        door(web).sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for more, least, most in ((b"", 101, 200), (LINES, 50, 100)):
            deaf = await callers(web, receive_bytes=4096)
            deaf.writer.transport.pause_reading()
            deaf.send(SELECT % more)
            await until(lambda: door(web)._unread)
            [connection] = door(web)._unread
            assert least < connection._answer_seconds_left <= most
            connection._unread_for_long()  # too early: it goes on
            assert door(web).evicted["answer"] == 0
            connection.reset()
            await until(lambda: not door(web)._unread)


async def test_answers_that_are_not_read_take_bounded_memory(tmp_path, callers, monkeypatch):
    assert MAX_UNREAD_BYTES < 1 << 30
    monkeypatch.setattr(door_module, "MAX_UNREAD_BYTES", 3_000_000)
    async with gateway(tmp_path) as web:
        web.launcher.script = replying(ok(["a"], [["x" * 1000]] * 1900))
        door(web).sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        deaf = [await callers(web, receive_bytes=4096) for _ in range(3)]
        for number, caller in enumerate(deaf):
            caller.writer.transport.pause_reading()
            caller.send(SELECT % b"")
            await until(lambda number=number: len(web.launcher.requests) > number)
            await until(lambda: door(web)._unread)
        await until(lambda: len(web.launcher.requests) == 3 and door(web).connections == 1)


# ── whose turn it is ─────────────────────────────────────────────────────────────────────────────────────────────────


class Guest:
    def __init__(self, address: str, served: list[str]) -> None:
        self.address = address
        self._served = served

    def proceed(self) -> None:
        self._served.append(self.address)


async def test_strangers_take_turns_by_address():
    turnstile, served = Turnstile(), []
    turnstile.width = 0
    for address in ("a", "a", "a", "b", "b", "c"):
        turnstile.wait(Guest(address, served))
    turnstile.width = 1
    await until(lambda: len(served) == 6)
    assert served == ["a", "b", "c", "a", "b", "a"]


async def test_a_slow_loop_takes_up_fewer_strangers_and_a_quick_one_more():
    now = 0.0
    turnstile = Turnstile(lambda: now)
    first = turnstile.width
    served: list[str] = []
    for number in range(3):
        turnstile.turn()
        now += 1.0
        turnstile.wait(Guest(f"{number}", served))
        await until(lambda number=number: len(served) > number)
    assert turnstile.width < first
    narrow = turnstile.width
    for number in range(100):
        turnstile.wait(Guest(f"{number}", served))
    await until(lambda: len(served) == 103)
    assert turnstile.width > narrow


async def test_no_more_pass_in_one_turn_than_its_width_and_behind_one_that_waits_nobody_does():
    turnstile, served = Turnstile(), []
    turnstile.width = 3
    assert [turnstile.passes() for _ in range(5)] == [True, True, True, False, False]
    turnstile.wait(Guest("a", served))
    assert not turnstile.passes()
    await until(lambda: served == ["a"] and not turnstile._turning)
    assert turnstile.passes()


def test_acquaintances_are_bounded_and_last_for_a_while():
    now = 0.0
    known = Acquaintances(capacity=2, clock=lambda: now)
    for address in ("a", "b", "a", "c"):
        known.add(address)
    assert [address in known for address in "abc"] == [True, False, True]
    now = 601.0
    assert "a" not in known
    known.add("a")
    known.forget("a")
    assert "a" not in known


def test_a_token_vouches_for_so_many_pieces_and_another_for_as_many_again():
    now = 0.0
    known = Acquaintances(clock=lambda: now)
    assert not known.spend("a")
    for _ in range(2):
        known.add("a")
        assert [known.spend("a") for _ in range(PIECES_PER_TOKEN + 1)] == [True] * PIECES_PER_TOKEN + [False]
        assert "a" in known
    known.add("a")
    now = 601.0
    assert not known.spend("a")


@pytest.fixture
def blocked(monkeypatch):
    """No stranger's turn comes until `release` is called."""

    def block(web):
        turnstile = door(web).turnstile
        monkeypatch.setattr(turnstile, "passes", lambda: False)
        monkeypatch.setattr(turnstile, "turn", lambda: None)

        def release() -> None:
            monkeypatch.undo()
            turnstile.turn()

        return release

    return block


async def test_who_showed_a_genuine_token_is_served_while_strangers_wait(tmp_path, callers, blocked):
    async with gateway(tmp_path) as web:
        known, stranger = await callers(web, "127.0.4.1"), await callers(web, "127.0.4.2")
        assert await known.status(SELECT % genuine(web)) == 200
        release = blocked(web)
        waiting = asyncio.ensure_future(stranger.status(LIVEZ))
        await until(lambda: any(each._held for each in door(web)._open))
        assert await known.status(LIVEZ) == 200
        assert await (await callers(web, "127.0.4.1")).status(LIVEZ) == 200  # its next connection too
        assert not waiting.done()
        release()
        assert await waiting == 200


async def test_what_a_token_does_not_vouch_for_any_more_waits(tmp_path, callers, blocked):
    async with gateway(tmp_path) as web:
        caller = await callers(web)
        token = genuine(web)
        assert await caller.status(SELECT % token) == 200
        release = blocked(web)
        for _ in range(PIECES_PER_TOKEN):
            assert await caller.status(LIVEZ) == 200
        waiting = asyncio.ensure_future(caller.status(SELECT % token))
        await until(lambda: any(each._held for each in door(web)._open))
        release()
        assert await waiting == 200
        blocked(web)
        assert await caller.status(LIVEZ) == 200


async def test_pipelined_requests_beyond_a_few_have_no_part_in_the_turn_of_the_first(tmp_path, callers):
    async with gateway(tmp_path) as web:
        caller = await callers(web)
        caller.send(LIVEZ * 400)
        assert (await caller.rest()).count(b"HTTP/1.1 200 ") == MAX_PIPELINED


@pytest.mark.parametrize(
    "more",
    [b"X-Walkin-Session: wkn_forged\r\n", b"Expect: nothing\r\n"],
)
async def test_trust_ends_with_a_token_that_is_none_and_with_what_is_no_http(tmp_path, callers, more):
    async with gateway(tmp_path) as web:
        address = "127.0.5.1"
        assert await (await callers(web, address)).status(SELECT % genuine(web)) == 200
        assert address in door(web).acquaintances
        assert await (await callers(web, address)).status(SELECT % more) in (400, 404)
        assert address not in door(web).acquaintances


async def test_a_token_that_was_genuine_and_one_that_never_was_earn_the_same(tmp_path, callers):
    async with gateway(tmp_path) as web:
        for token in (genuine(web), b"X-Walkin-Session: wkn_forged\r\n"):
            web.launcher.instances.clear()
            caller = await callers(web)
            assert await caller.status(SELECT % token) == 404
            assert "127.0.0.1" not in door(web).acquaintances


async def test_nobody_vouches_for_a_proxy_and_nobody_behind_it_waits(tmp_path, callers, blocked):
    async with gateway(tmp_path, trusted_proxies="127.0.0.9/32") as web:
        blocked(web)
        caller = await callers(web, "127.0.0.9")
        assert await caller.status(SELECT % genuine(web)) == 200
        assert "127.0.0.9" not in door(web).acquaintances
        assert await caller.status(LIVEZ) == 200


async def test_a_stranger_that_waits_is_read_no_further(tmp_path, callers, blocked):
    async with gateway(tmp_path) as web:
        release = blocked(web)
        caller = await callers(web)
        head = b"POST /sql HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        body = b'{"sql":"SELECT 1"}'.ljust(1 << 20)
        caller.send(head % len(body) + body)
        await until(lambda: any(each._held for each in door(web)._open))
        for _ in range(50):
            await asyncio.sleep(0)
        assert all(len(each._held) <= 4 * door_module.RECEIVE_BYTES for each in door(web)._open)
        release()
        assert (await caller.rest()).startswith(b"HTTP/1.1 200 ")


# ── memory of what arrives ───────────────────────────────────────────────────────────────────────────────────────────


async def test_the_kernel_holds_little_of_what_a_connection_sends_and_an_answer_counts_as_sent_when_the_kernel_has_all(
    tmp_path, callers
):
    async with gateway(tmp_path) as web:
        await (await callers(web)).status(LIVEZ)
        [listener] = door(web).sockets
        [connection] = door(web)._open
        for each in (listener, connection.transport.get_extra_info("socket")):
            assert each.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == door_module.RECEIVE_BYTES
        assert connection.transport.get_write_buffer_limits() == (0, 0)
    with socket.socket() as control:
        assert control.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > door_module.RECEIVE_BYTES


async def test_a_header_is_bounded_as_a_whole(tmp_path, callers):
    async with gateway(tmp_path) as web:
        for fields, status in ((1, b"200"), (4, b"400")):
            caller = await callers(web)
            caller.send(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
            for _ in range(fields):
                caller.send(b"X: " + b"a" * 8000 + b"\r\n")
                await caller.writer.drain()
                await asyncio.sleep(0.01)
            caller.send(b"\r\n")
            assert (await caller.rest()).split()[1] == status


async def test_a_body_of_chunks_that_hold_nearly_nothing_is_a_400(tmp_path, callers):
    async with gateway(tmp_path) as web:
        for size, status in ((100, b"200"), (1, b"400")):
            caller = await callers(web)
            body = b'{"sql":"SELECT 1"}'.ljust(60_000)
            caller.send(b"POST /sql HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            for start in range(0, len(body), size):
                caller.send(b"%x\r\n%b\r\n" % (size, body[start : start + size]))
            caller.send(b"0\r\n\r\n")
            assert (await caller.rest()).split()[1] == status


async def test_a_large_body_is_allowed_more_chunking_and_one_of_nothing_but_chunking_is_not(tmp_path, callers):
    async with gateway(tmp_path, max_body_bytes=4 << 20) as web:
        size = 40
        body = b'{"sql":"SELECT 1"}'.ljust(1_600_000)
        assert len(body) // size * 6 > 3 * MAX_CHUNKING_BYTES
        whole = await callers(web)
        whole.send(b"POST /sql HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        # The first MiB in chunks that add less than what is allowed for it, the rest in small ones.
        chunks = [body[at : at + 10_000] for at in range(0, 1_200_000, 10_000)]
        chunks += [body[at : at + size] for at in range(1_200_000, 1_600_000, size)]
        whole.send(b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n")
        assert (await whole.rest()).split()[1] == b"200"


@pytest.mark.parametrize("size", [100, 20_000, 40_000, 1_000_000])
async def test_a_connection_goes_on_behind_a_body_of_any_size(tmp_path, callers, size):
    async with gateway(tmp_path) as web:
        caller = await callers(web)
        body = b'{"sql":"SELECT 1"}'.ljust(size)
        head = b"POST /sql HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
        for _ in range(3):
            assert await caller.status(head + body) == 200
        caller.send(head)
        await until(lambda: any(each._body is not None for each in door(web)._open))
        assert await caller.status(body) == 200
        caller.send(LIVEZ[:20])
        assert await caller.status(LIVEZ[20:]) == 200


async def test_what_waits_for_a_slot_counts_until_it_has_run(tmp_path, callers):
    async with gateway(tmp_path, slots=1) as web:
        web.app._state[ROOM] = room = Room(100_000, share=1)
        finish = asyncio.Event()
        web.launcher.script = replying_after(finish)
        body = b'{"sql":"SELECT 1 /*%b*/"}' % (b"x" * 15_000)
        request = b"POST /sql HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        waiting = []
        for number in range(3):
            waiting.append(await callers(web))
            waiting[-1].send(request)
            await until(lambda number=number: room.held("127.0.0.1") > (number + 1) * 15_000)
        refused = await callers(web)
        refused.send(request)
        assert b'"code":"overloaded"' in await refused.rest()
        other = await callers(web, "127.0.0.2")
        other.send(request)
        await until(lambda: room.held("127.0.0.2") > 15_000)
        finish.set()
        for caller in (*waiting, other):
            assert (await caller.rest()).split()[1] == b"200"
        await until(lambda: room.free == 100_000)


async def test_bodies_of_an_address_take_no_more_of_the_room_than_they_leave_free(tmp_path, callers):
    async with gateway(tmp_path, body_seconds=60.0) as web:
        assert web.app[ROOM].free == ROOM_BYTES
        web.app._state[ROOM] = room = Room(1000, share=1)
        head = b"POST /sql HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2000\r\n\r\n"
        holding = await callers(web)
        holding.send(head + b" " * 400)
        await until(lambda: room.held("127.0.0.1") == 400)
        for address, size, status in (("127.0.0.1", 101, b"503"), ("127.0.0.2", 301, b"503"), ("127.0.0.2", 300, b"200")):
            caller = await callers(web, address)
            caller.send(head + b" " * size)
            if status == b"200":
                await until(lambda: room.held("127.0.0.2") == 300)
                caller.writer.transport.abort()
            else:
                answer = await caller.rest()
                assert answer.split()[1] == status
                assert b'"code":"overloaded"' in answer
        holding.writer.transport.abort()
        await until(lambda: room.free == 1000)


# ── leaving ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_draining_closes_idle_connections_and_every_other_after_its_answer(tmp_path, callers):
    async with gateway(tmp_path) as web:
        finish = asyncio.Event()
        web.launcher.script = replying_after(finish)
        idle, running, fresh = await callers(web), await callers(web), await callers(web)
        assert await idle.status(LIVEZ) == 200
        running.send(SELECT % b"")
        await until(lambda: len(web.launcher.requests) == 1 and door(web).connections == 3)
        draining = asyncio.ensure_future(web.app[DRAIN].begin(60))
        web.server.close_idle()
        assert await idle.rest() == b""
        fresh.send(LIVEZ)
        assert b"\r\nConnection: close\r\n" in await fresh.rest()
        finish.set()
        assert (await running.rest()).startswith(b"HTTP/1.1 200 ")
        assert await draining


def test_the_defaults_let_ordinary_callers_live():
    settings = Settings()
    assert settings.connections_per_address >= 32
    assert settings.connections > settings.queue_length


async def test_a_caller_that_hangs_up_while_it_waits_is_forgotten(tmp_path, callers, blocked):
    async with gateway(tmp_path) as web:
        release = blocked(web)
        caller = await callers(web)
        caller.send(LIVEZ)
        await until(lambda: any(each._held for each in door(web)._open))
        caller.writer.transport.abort()
        release()
        await until(lambda: door(web).connections == 0 and not door(web).turnstile._waiting)


async def test_a_failed_run_vouches_for_nobody(tmp_path, callers):
    async with gateway(tmp_path) as web:

        async def failing(run: FakeRun) -> None:
            run.started()
            await run.read_request()
            await run.send(frame({"v": 1, "verdict": "sql_error", "message": "x"}))
            run.ended(Verdict.EXITED)

        web.launcher.script = failing
        assert await (await callers(web)).status(SELECT % genuine(web)) == 400
        assert "127.0.0.1" not in door(web).acquaintances
