"""The launcher's socket under a hostile gateway: whatever is sent, it lives, leaks nothing, and its containers stay the same."""

import asyncio
import os
import random
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid

import pytest

from gateway.launcher.server import Server
from gateway.protocol import (
    BULK,
    KEEP,
    MAX_REPLY_BYTES,
    NO_INSTANCE,
    NOBODY,
    QUIET,
    READ_ONLY,
    REQUEST_BYTES,
    SALVAGE,
    MalformedPacketError,
    Reply,
    Request,
    Status,
    Verb,
    Verdict,
)

from .launcher_harness import Client, containers_of, eventually, frame, inspect, launched, unframe, uuid7

PACKETS = 10_000


def connect(path):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(20)
    sock.connect(str(path))
    return sock


async def closed_by_the_launcher(sock):
    """Whether the connection ends without another packet."""
    sock.setblocking(False)
    async with asyncio.timeout(20):
        try:
            return await asyncio.get_running_loop().sock_recv(sock, 65536) == b""
        except ConnectionError:
            return True


async def specification_seen(client, deployment):
    """What Docker was told about a live container, without what differs from run to run."""
    instance = await client.create()
    async with client.run(instance) as (ours, replies):
        await asyncio.get_running_loop().sock_sendall(ours, frame(do="hang"))
        assert (await replies.get()).status is Status.STARTED
        (listed,) = containers_of(deployment)
        live = inspect(listed["Id"])
        ours.close()
        assert (await replies.get()).status is Status.ENDED
    await client.ask(Verb.REMOVE, instance)
    return repr((live["Config"], live["HostConfig"], live["Path"], live["Args"])).replace(str(instance), "<instance>")


def fuzzed(random_, instances):
    """A packet and how many descriptors go with it: noise, or a real packet with something wrong, or a real one."""
    verb = random_.choice(list(Verb))
    named = verb not in (Verb.CREATE, Verb.HEALTH, Verb.METRICS) or random_.random() < 0.1
    instance, request_id = random_.choice(instances) if named else NO_INSTANCE, random_.randbytes(16)
    other = {Verb.REPLACE: random_.choice(instances).bytes, Verb.CREATE: random_.randbytes(16), Verb.RUN: random_.randbytes(16)}
    number = random_.getrandbits(64) if verb is Verb.EXTEND else 0
    packet = Request(verb, random_.getrandbits(64), instance, 0, request_id, other.get(verb, NOBODY), number).pack()
    match random_.randrange(6):
        case 0:
            packet = random_.randbytes(random_.randrange(1, 200))
        case 1:
            at = random_.randrange(len(packet))
            packet = packet[:at] + random_.randbytes(1) + packet[at + 1 :]
        case 2:
            packet = packet[: random_.randrange(1, len(packet))]
        case 3:
            packet += random_.randbytes(random_.randrange(1, 65536 // 2))
    return packet, random_.choice([0, 0, 0, 1, 1, 2, 3, 40])


async def test_M5_ten_thousand_fuzzed_packets_leave_the_launcher_as_it_was(state):
    random_ = random.Random(20260101)
    # Ids that do not exist: a fuzzed RUN must not cost a container start each; one that exists is run before and after.
    instances = [uuid7() for _ in range(20)]
    async with launched(state, deadline_seconds=50) as (launcher, client):
        before = await specification_seen(client, launcher.deployment)
        descriptors = launcher.descriptors()
        offered = [end for _ in range(10) for end in os.pipe()] + [end.detach() for _ in range(10) for end in socket.socketpair()]
        sock = connect(launcher.socket)
        accepted = malformed = 0
        for _ in range(PACKETS):
            packet, count = fuzzed(random_, instances)
            try:
                Request.unpack(packet)
            except MalformedPacketError:
                malformed += 1
            else:
                accepted += 1
                if packet[1] == Verb.CREATE:  # every create makes two files; a few are enough
                    packet = Request(Verb.FIND, 1, instances[0]).pack()
            try:
                socket.send_fds(sock, [packet], random_.choices(offered, k=count))
                answered = len(sock.recv(65536)) > 0
            except (BrokenPipeError, ConnectionResetError):
                answered = False
            if not answered:
                sock.close()
                sock = connect(launcher.socket)
        sock.close()
        for descriptor in offered:
            os.close(descriptor)
        assert min(accepted, malformed) > PACKETS // 4, "the fuzzer reaches both sides of the parser"
        assert launcher.process.poll() is None
        assert await specification_seen(client, launcher.deployment) == before
        await eventually(lambda: launcher.descriptors() <= descriptors)
        replies, output = await client.do(await client.create(), do="echo")
        assert (replies[-1].status, unframe(output)) == (Status.ENDED, {"do": "echo"})


async def test_another_user_is_cut_off_before_a_byte_is_read(state):
    attempt = (
        "import os, socket, sys\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.settimeout(20); s.connect(sys.argv[1])\n"
        "try:\n"
        "    s.send(bytes.fromhex(sys.argv[2])); answer = s.recv(65536)\n"
        "except (BrokenPipeError, ConnectionResetError):\n"
        "    answer = b''\n"
        "print(len(answer))\n"
    )

    def as_nobody(path):
        arguments = [sys.executable, "-I", "-S", "-c", attempt, str(path), Request(Verb.CREATE, 1, NO_INSTANCE).pack().hex()]
        return int(subprocess.run(arguments, check=True, capture_output=True, timeout=30).stdout)

    async with launched(state) as (launcher, client):
        assert await asyncio.to_thread(as_nobody, launcher.socket) == 0
        assert (await client.health())["instances"] == 0
        assert "refused a connection of user 65534" in launcher.log.read_text()
    # The control: the same attempt succeeds where the launcher serves that user, and root is then the stranger.
    launcher.environment["MAYFLY_WEB_UID"] = "65534"
    await launcher.start()
    try:
        assert await asyncio.to_thread(as_nobody, launcher.socket) > 0
        with connect(launcher.socket) as root:
            assert await closed_by_the_launcher(root)
    finally:
        await launcher.stop()


@pytest.mark.parametrize("kind", ["none", "two", "file", "pipe", "datagram", "internet", "listening", "unconnected"])
async def test_run_takes_one_connected_unix_stream_socket_and_nothing_else(state, kind):
    ends = list(socket.socketpair())
    if kind == "datagram":
        ends += socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    internet, listening = socket.socket(), socket.socket(socket.AF_UNIX)
    internet.bind(("127.0.0.1", 0))
    listening.bind("\0mayfly-" + uuid.uuid4().hex)
    listening.listen()
    with tempfile.TemporaryFile() as file:
        reading, writing = os.pipe()
        offered = {
            "none": [],
            "two": [ends[0].fileno(), ends[1].fileno()],
            "file": [file.fileno()],
            "pipe": [reading],
            "datagram": [ends[-1].fileno()],
            "internet": [internet.fileno()],
            "listening": [listening.fileno()],
            "unconnected": [internet.fileno()],
        }[kind]
        async with launched(state) as (launcher, client):
            instance = await client.create()
            before = launcher.descriptors()
            with connect(launcher.socket) as sock:
                socket.send_fds(sock, [Request(Verb.RUN, 1, instance).pack()], offered)
                assert await closed_by_the_launcher(sock)
            await eventually(lambda: launcher.descriptors() <= before)
            assert "malformed packet" in launcher.log.read_text()
    for descriptor in (reading, writing):
        os.close(descriptor)
    for sock in (*ends, internet, listening):
        sock.close()


async def test_who_knows_when_the_instance_ends_need_not_be_told_that_its_run_has_started(state):
    async with launched(state) as (launcher, client):
        instance = await client.create()
        ours, theirs = socket.socketpair()
        with ours, connect(launcher.socket) as sock:
            with theirs:
                socket.send_fds(sock, [Request(Verb.RUN, 1, instance, QUIET).pack()], [theirs.fileno()])
            ours.sendall(frame(do="echo"))
            assert Reply.unpack(sock.recv(MAX_REPLY_BYTES)).status is Status.ENDED


NAMELESS = (Verb.CREATE, Verb.HEALTH, Verb.METRICS)
FLAGS = {Verb.CREATE: SALVAGE, Verb.RUN: QUIET | READ_ONLY | BULK, Verb.REPLACE: KEEP}


def request_of(verb, **more):
    """One with all that the verb has."""
    other = {Verb.CREATE: os.urandom(16), Verb.FORK: os.urandom(16), Verb.RUN: os.urandom(16), Verb.REPLACE: uuid7().bytes}
    whole = {
        "instance": NO_INSTANCE if verb in NAMELESS else uuid7(),
        "flags": FLAGS.get(verb, 0),
        "request_id": os.urandom(16),
        "other": other.get(verb, NOBODY),
        "number": 1 << 63 if verb is Verb.EXTEND else 0,
    }
    return Request(verb, 7, **whole | more)


@pytest.mark.parametrize("verb", list(Verb))
def test_a_packet_comes_out_as_it_went_in(verb):
    request = request_of(verb)
    assert len(request.pack()) == REQUEST_BYTES == 68
    assert Request.unpack(request.pack()) == request


@pytest.mark.parametrize("verb", list(Verb))
def test_what_the_verb_has_not_is_malformed(verb):
    malformed = [{"flags": 1 << bit} for bit in range(16) if not FLAGS.get(verb, 0) >> bit & 1]
    malformed.append({"instance": uuid7() if verb in NAMELESS else NO_INSTANCE})
    if verb not in NAMELESS:
        malformed.append({"instance": uuid.uuid4()})
    if verb is not Verb.EXTEND:
        malformed.append({"number": 1})
    if verb is Verb.REPLACE:
        malformed += [{"other": NOBODY}, {"other": uuid.uuid4().bytes}]
    elif verb not in (Verb.CREATE, Verb.FORK, Verb.RUN):
        malformed.append({"other": b"x" * 16})
    for more in malformed:
        with pytest.raises(MalformedPacketError):
            Request.unpack(request_of(verb, **more).pack())


def test_the_bytes_of_a_request_are_those_of_the_page():
    instance, request_id, other = uuid7(), os.urandom(16), os.urandom(16)
    run = Request(Verb.RUN, 258, instance, QUIET | BULK, request_id, other)
    assert run.pack() == b"\x03\x02\0\x05" + b"\0\0\0\0\0\0\x01\x02" + instance.bytes + request_id + other + bytes(8)
    create = Request(Verb.CREATE, 1, flags=SALVAGE, request_id=request_id, other=other)
    assert create.pack() == b"\x03\x01\0\x08" + b"\0\0\0\0\0\0\0\x01" + bytes(16) + request_id + other + bytes(8)
    extend = Request(Verb.EXTEND, 1, instance, number=258)
    assert extend.pack() == b"\x03\x09\0\0" + b"\0\0\0\0\0\0\0\x01" + instance.bytes + bytes(32) + b"\0\0\0\0\0\0\x01\x02"


@pytest.mark.parametrize("status", list(Status))
def test_a_reply_comes_out_as_it_went_in_and_has_a_flag_only_if_it_is_done(status):
    reply = Reply(status, 7, 1 << 40, Verdict.LOST, "why", uuid7())
    assert Reply.unpack(reply.pack()) == reply
    flagged = reply._replace(flags=SALVAGE).pack()
    if status is Status.DONE:
        assert Reply.unpack(flagged).flags == SALVAGE
    else:
        with pytest.raises(MalformedPacketError):
            Reply.unpack(flagged)
    with pytest.raises(MalformedPacketError):
        Reply.unpack(reply._replace(flags=QUIET).pack())


async def test_every_line_about_a_request_names_it(state):
    request_id = os.urandom(16)
    async with launched(state, log_level="DEBUG", instances_per_address=1) as (launcher, client):
        made = await client.ask(Verb.CREATE, other=request_id, request_id=request_id)
        assert (await client.ask(Verb.CREATE, other=request_id, request_id=request_id)).status is Status.OWNER_FULL
        async with client.run(made.instance, request_id) as (ours, replies):
            await asyncio.get_running_loop().sock_sendall(ours, frame(do="echo"))
            while (await replies.get()).status is not Status.ENDED:
                pass
        await client.ask(Verb.REMOVE, made.instance, request_id=request_id)
        await client.ask(Verb.FIND, made.instance, request_id=request_id)
        about = ("created instance", "CREATE failed", "run ended", "removed instance", "FIND failed")
        lines = launcher.log.read_text().splitlines()
        for words in about:
            (line,) = [line for line in lines if words in line]
            assert f"request={request_id.hex()}" in line


async def test_metrics_are_told_at_once(state):
    async with launched(state) as (_, client):
        assert (await client.ask(Verb.METRICS)).status is Status.DONE


async def test_a_sequence_in_use_closes_the_connection_and_ends_its_runs(state):
    async with launched(state, deadline_seconds=50) as (launcher, client):
        instance = await client.create()
        ours, theirs = socket.socketpair()
        packet = Request(Verb.RUN, 7, instance).pack()
        with ours, theirs, connect(launcher.socket) as sock:
            ours.sendall(frame(do="hang"))
            socket.send_fds(sock, [packet], [theirs.fileno()])
            await eventually(lambda: len(containers_of(launcher.deployment)) == 1)
            socket.send_fds(sock, [packet], [theirs.fileno()])
            await eventually(lambda: "malformed packet: the sequence is in use" in launcher.log.read_text())
            await eventually(lambda: containers_of(launcher.deployment) == [])
        replies, _ = await client.do(instance, do="echo")
        assert replies[-1].status is Status.ENDED


async def test_a_gateway_that_dies_takes_its_runs_with_it(state):
    async with launched(state, deadline_seconds=50) as (launcher, client):
        instance = await client.create()
        other = Client(launcher.socket)
        async with other.run(instance) as (ours, replies):
            await asyncio.get_running_loop().sock_sendall(ours, frame(do="hang"))
            assert (await replies.get()).status is Status.STARTED
            await other.close()
            await eventually(lambda: containers_of(launcher.deployment) == [])
        assert (await client.do(instance, do="echo"))[0][-1].status is Status.ENDED


class CutOff:
    """A service whose peer is cut off after it was asked and before it has begun."""

    def __init__(self):
        self.caller = None

    def answer(self, request, caller, send):
        self.caller = caller
        asyncio.get_running_loop().call_soon(send.__self__.close, "cut off")
        return self.begin()

    async def begin(self):
        raise AssertionError("it has begun")


async def test_a_run_that_is_cut_off_before_it_begins_leaves_no_descriptor(tmp_path):
    service = CutOff()
    server = Server(tmp_path / "socket", os.getuid(), service, max_in_flight=1)
    server.listen()
    ours, theirs = socket.socketpair()
    with ours, theirs, connect(tmp_path / "socket") as sock:
        socket.send_fds(sock, [Request(Verb.RUN, 1, uuid7()).pack()], [theirs.fileno()])
        assert await closed_by_the_launcher(sock)
        await eventually(lambda: service.caller.fileno() == -1)
    await server.close(0, 0)


async def test_a_run_whose_volume_was_deleted_by_hand_is_told_that_there_is_no_such_instance(state):
    async with launched(state) as (_, client):
        instance = await client.create()
        assert (await client.do(instance, do="echo"))[0][-1].status is Status.ENDED
        shutil.rmtree(state / "instances" / str(instance))
        assert [reply.status for reply in (await client.do(instance, do="echo"))[0]] == [Status.UNKNOWN]
        other = await client.create()
        assert (await client.do(other, do="echo"))[0][-1].status is Status.ENDED


async def test_a_gateway_that_makes_a_passed_socket_block_holds_nobody_up(state):
    async with launched(state, deadline_seconds=50) as (launcher, client):
        instance = await client.create()
        ours, theirs = socket.socketpair()
        with ours, theirs, connect(launcher.socket) as sock:
            socket.send_fds(sock, [Request(Verb.RUN, 1, instance).pack()], [theirs.fileno()])
            assert Reply.unpack(sock.recv(MAX_REPLY_BYTES)).status is Status.STARTED
            theirs.setblocking(True)  # not of this descriptor alone: of what the launcher's descriptor stands for too
            ours.send(b"\0")
            await eventually(lambda: not select.select([theirs], [], [], 0)[0])  # it has read that, and looks for more
            async with asyncio.timeout(10):
                assert (await client.health())["daemon"] == "up"


async def test_a_gateway_that_makes_a_passed_socket_block_and_reads_nothing_holds_nobody_up(state):
    async with launched(state, deadline_seconds=50) as (launcher, client):
        instance = await client.create()
        ours, theirs = socket.socketpair()
        with ours, theirs, connect(launcher.socket) as sock:
            socket.send_fds(sock, [Request(Verb.RUN, 1, instance).pack()], [theirs.fileno()])
            assert Reply.unpack(sock.recv(MAX_REPLY_BYTES)).status is Status.STARTED
            theirs.setblocking(True)
            ours.sendall(frame(do="large", bytes=1 << 20))  # more than the socket holds
            await eventually(lambda: select.select([ours], [], [], 0)[0])
            async with asyncio.timeout(10):
                assert (await client.health())["daemon"] == "up"


async def test_a_peer_that_reads_nothing_is_not_read_from_for_ever(state):
    async with launched(state) as (launcher, client):
        with connect(launcher.socket) as sock:
            sock.setblocking(False)
            for sent in range(1, 100_000):
                try:
                    sock.send(Request(Verb.HEALTH, sent, uuid.UUID(int=0)).pack())
                except BlockingIOError:
                    break
                if sent % 50 == 0:
                    await client.health()  # the launcher has had its turn
            else:
                raise AssertionError("the launcher read everything")
        assert (await client.health())["daemon"] == "up"
