"""infra/tls: HAProxy itself with the configuration as it is shipped, between callers on loopback and what stands for Mayfly."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pytest

from gateway.settings import Settings
from gateway.uuid7 import uuid7
from gateway.web import openapi
from gateway.web.appkeys import ACCESS_LOG, TOKENS
from gateway.web.routes import ROUTES

from .conftest import eventually
from .deployment import REPO, free_address
from .exploits.raw_http import SECONDS, SENTINEL, Response, converse
from .exploits.test_request_smuggling import AMBIGUOUS, BODY, SMUGGLED, post, was_answered
from .fake_launcher import gateway

CONFIGURATION = REPO / "infra" / "tls" / "haproxy.cfg"
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
CLOSE = b"Connection: close\r\n\r\n"
IPV6_FREEBIND = 78
CHUNKS = ("-H", "Transfer-Encoding: chunked", "-H", "Content-Type: application/json")
SQL = b'{"sql":"SELECT 1"}'


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it left the front."""

    connection: int
    line: str
    headers: list[tuple[str, str]]
    body: bytes

    def all_of(self, name: str) -> list[str]:
        return [value for found, value in self.headers if found == name]


@dataclass
class Echo:
    """Stands for Mayfly and keeps every request that reaches it. What it cannot read to the letter of the RFC fails the test."""

    address: str
    status: int = 200
    seen: list[Seen] = field(default_factory=list)
    wrong: list[bytes] = field(default_factory=list)
    connections: int = 0

    @property
    def requests(self) -> list[Seen]:
        """Without the front's own health checks."""
        return [seen for seen in self.seen if seen.all_of("x-forwarded-for")]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.seen.append(await self._read(number, head, reader))
                answer = json.dumps({"seen": len(self.seen)}).encode()
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (self.status, len(answer)) + answer)
                if self.seen[-1].all_of("connection") == ["close"]:
                    break
        writer.close()

    async def _read(self, connection: int, head: bytes, reader: asyncio.StreamReader) -> Seen:
        line, *rest = head[:-4].split(b"\r\n")
        headers = [re.fullmatch(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)", item) for item in rest]
        if not re.fullmatch(rb"[A-Z]+ \S+ HTTP/1\.[01]", line) or not all(headers):
            self.wrong.append(head)
        pairs = [(found[1].decode().lower(), found[2].decode("latin-1")) for found in headers if found]
        seen = Seen(connection, line.decode("latin-1"), pairs, b"")
        lengths, codings = seen.all_of("content-length"), seen.all_of("transfer-encoding")
        if len(lengths) + len(codings) > 1 or codings not in ([], ["chunked"]):
            self.wrong.append(head)
        body = await reader.readexactly(int(lengths[0])) if lengths else await _chunks(reader) if codings else b""
        return Seen(connection, seen.line, pairs, body)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readuntil(b"\r\n"))[:-2], 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")
    return body


@dataclass(frozen=True, slots=True)
class Front:
    address: str
    plain: str
    acme: str
    tls: ssl.SSLContext
    certificate: Path

    async def __call__(self, *pieces: bytes, then: bytes = b"") -> list[Response]:
        return await converse(self.address, *pieces, then=then, tls=self.tls)

    async def curl(self, path: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = ["curl", "-sS", "-i", "--path-as-is", "--max-time", "30", "--cacert", self.certificate, *options]
        return await asyncio.to_thread(
            subprocess.run, [*command, f"https://{self.address}{path}"], capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def certificate() -> Iterator[Path]:
    """Of this address, signed by itself; with its key in one file, as HAProxy reads them."""
    with tempfile.TemporaryDirectory(prefix="mayfly-front-") as name:
        path = Path(name, "mayfly.pem")
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        subject = ["-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
        command = ["openssl", "req", "-x509", *curve, *subject, "-keyout", path, "-out", f"{path}.crt"]
        subprocess.run(command, check=True, capture_output=True)
        path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
        yield path


@contextmanager
def front_of(
    backend: str, certificate: Path, blocked: str = "", patience: str = "", instead: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Front]:
    """HAProxy at work; with the patience, if one is given, in the place of that for header and body, and unlimited for the idle.

    `instead`: what stands in the configuration, and what in its place.
    """
    text = CONFIGURATION.read_text()
    for shipped, changed in instead.items():
        assert shipped in text
        text = text.replace(shipped, changed)
    if patience:
        for wait in ("timeout http-request", "wait-for-body time"):
            text, count = re.subn(f"{wait} 10s", f"{wait} {patience}", text)
            assert count == 1
        text, count = re.subn("timeout (client|http-keep-alive) 30s", r"timeout \1 1000s", text)
        assert count == 2
    listening = [free_address() for _ in range(3)]
    (certificate.parent / "haproxy.cfg").write_text(text)
    (certificate.parent / "blocked").write_text(blocked)
    environment = {
        **os.environ,
        "FRONT_TLS": listening[0],
        "FRONT_HTTP": listening[1],
        "FRONT_ACME": listening[2],
        "FRONT_CERTIFICATE": str(certificate),
        "FRONT_BLOCKED": str(certificate.parent / "blocked"),
        "FRONT_MAYFLY": backend,
    }
    log = certificate.parent / "log"
    with open(log, "wb") as output:
        command = ["/usr/sbin/haproxy", "-db", "-f", certificate.parent / "haproxy.cfg"]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    trust = ssl.create_default_context(cafile=f"{certificate}.crt")
    front = Front(*listening, trust, certificate.with_name("mayfly.pem.crt"))
    try:
        eventually(lambda: process.poll() is not None or _accepts(listening[0]))
        assert process.poll() is None, log.read_text()
        yield front
    finally:
        process.kill()
        process.wait()


def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError):
        return subprocess.run(["bash", "-c", f"exec 3<>/dev/tcp/{host}/{port}"], capture_output=True).returncode == 0
    return False


@asynccontextmanager
async def echoing(address: str) -> AsyncIterator[Echo]:
    echo = Echo(address)
    host, _, port = address.rpartition(":")
    server = await asyncio.start_server(echo.serve, host, int(port))
    try:
        yield echo
    finally:
        server.close()
    assert not echo.wrong


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    async with echoing(free_address()) as echo:
        yield echo


@pytest.fixture
async def front(echo: Echo, certificate: Path) -> AsyncIterator[Front]:
    with front_of(echo.address, certificate) as front:
        yield front


async def until_up(front: Front) -> None:
    async with asyncio.timeout(SECONDS):
        while (await front(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n" + CLOSE))[0].status != 200:
            await asyncio.sleep(0.05)


def test_the_numbers_of_the_front_are_those_of_mayflys_settings() -> None:
    text, settings = CONFIGURATION.read_text(), Settings()
    assert f"too_large req.hdr_val(content-length) gt {settings.max_body_bytes}\n" in text
    assert settings.max_body_bytes < 10**7  # no number of eight digits
    assert f"too_large_a_file req.hdr_val(content-length) gt {settings.instance_bytes}\n" in text
    assert settings.instance_bytes < 10**8  # nor one of nine
    [files] = re.findall(r"acl files path (.*)", text)
    assert set(files.split()) == {route.path for route in ROUTES if route.max_body_bytes(settings) == settings.instance_bytes}
    [most, other] = re.findall(r"sc0_conn_cur gt (\d+) ", text)
    assert int(most) == int(other) <= settings.connections_per_address
    [server] = re.findall(r"timeout server (\d+)s", text)
    run = settings.start_timeout_seconds + settings.bulk_deadline_seconds + settings.grace_seconds
    assert int(server) > 2 * settings.queue_timeout_seconds + 3 * run
    [served] = re.findall(r"acl served path (.*)", text)
    assert set(served.split()) == set(json.loads(openapi.DOCUMENT)["paths"])


@pytest.mark.parametrize("version", ["1.1", "2"])
async def test_callers_of_either_version_reach_mayfly_over_tls(front: Front, echo: Echo, version: str) -> None:
    done = await front.curl("/sql", f"--http{version}", "-d", SQL.decode(), "-H", "X-Walkin-Session: wkn_x")
    assert done.stdout.startswith(f"HTTP/{version} 200"), done.stderr
    [seen] = echo.requests
    assert (seen.line, seen.body, seen.all_of("x-walkin-session")) == ("POST /sql HTTP/1.1", SQL, ["wkn_x"])


@pytest.mark.parametrize("version", ["1.1", "2"])
@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.77"])
async def test_what_a_caller_says_of_itself_is_dropped(front: Front, echo: Echo, version: str, source: str) -> None:
    forged = ["X-Forwarded-For: 10.9.8.7", "x-forwarded-for: 10.9.8.6, 10.9.8.5", "Forwarded: for=10.9.8.7", "X-Other: kept"]
    options = [option for header in forged for option in ("-H", header)]
    done = await front.curl("/healthz", f"--http{version}", "--interface", source, *options)
    assert done.stdout.startswith(f"HTTP/{version} 200"), done.stderr
    [seen] = echo.requests
    assert (seen.all_of("x-forwarded-for"), seen.all_of("forwarded"), seen.all_of("x-other")) == ([source], [], ["kept"])


async def test_without_the_front_the_forged_header_arrives(echo: Echo) -> None:
    await converse(echo.address, GET + b"X-Forwarded-For: 10.9.8.7\r\n" + CLOSE)
    assert echo.requests[0].all_of("x-forwarded-for") == ["10.9.8.7"]


@pytest.mark.parametrize("version", ["1.1", "2"])
@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/metrics/",
        "//metrics",
        "/%6detrics",
        "/METRICS",
        "/sql/../metrics",
        "/./metrics",
        "/metrics?x=/sql",
        "/sql/",
        "/healthz/../metrics",
        "/openapi.json;/../metrics",
        "/sql%2f..%2fmetrics",
        "/",
        "/nowhere",
    ],
)
async def test_no_path_but_the_apis_reaches_what_is_behind(front: Front, echo: Echo, version: str, path: str) -> None:
    done = await front.curl(path, f"--http{version}")
    assert done.stdout.startswith(f"HTTP/{version} 404"), done.stdout + done.stderr
    assert '"code":"not_found"' in done.stdout
    assert not echo.requests


async def test_a_path_in_a_whole_address_is_no_way_around(front: Front, echo: Echo) -> None:
    for target in (b"http://localhost/metrics", b"https://127.0.0.1:9464/metrics", b"*", b"localhost:9464"):
        for method in (b"GET", b"CONNECT"):
            for answer in await front(method + b" " + target + b" HTTP/1.1\r\nHost: localhost\r\n" + CLOSE):
                assert answer.status in (400, 404)
    assert not echo.requests


async def test_every_answer_tells_browsers_to_stay_with_tls(front: Front, echo: Echo) -> None:
    for path, status in (("/healthz", 200), ("/metrics", 404)):
        done = await front.curl(path)
        assert f" {status} " in done.stdout.splitlines()[0]
        assert "strict-transport-security: max-age=31536000\n" in done.stdout.lower().replace("\r", "")


async def test_port_80_serves_certificates_and_sends_readers_to_tls_and_takes_no_sql(front: Front, echo: Echo) -> None:
    [answer] = await converse(front.plain, b"GET /healthz?x HTTP/1.1\r\nHost: localhost\r\n" + CLOSE)
    assert (answer.status, answer.headers[b"location"]) == (301, b"https://localhost/healthz?x")
    [answer] = await converse(front.plain, post(b"Content-Length: %d" % len(SQL), b"Connection: close", body=SQL))
    assert (answer.status, json.loads(answer.body)["code"]) == (400, "bad_request")
    async with echoing(front.acme) as certbot:
        await converse(front.plain, b"GET /.well-known/acme-challenge/token HTTP/1.1\r\nHost: localhost\r\n" + CLOSE)
        assert [seen.line for seen in certbot.seen] == ["GET /.well-known/acme-challenge/token HTTP/1.1"]
    assert not echo.requests


@pytest.mark.parametrize(
    ("path", "most"),
    [
        (b"/sql", Settings().max_body_bytes),
        (b"/batch", Settings().max_body_bytes),
        (b"/import?table=t", Settings().instance_bytes),
        (b"/db", Settings().instance_bytes),
    ],
)
async def test_a_body_that_is_declared_too_large_is_refused_before_it_is_sent(
    front: Front, echo: Echo, path: bytes, most: int
) -> None:
    def put(size: int, body: bytes) -> bytes:
        return b"PUT " + path + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n" % size + CLOSE + body

    [answer] = await front(put(most + 1, b""))
    assert (answer.status, json.loads(answer.body)["code"]) == (413, "body_too_large")
    assert not echo.requests
    [answer] = await front(put(most, b"x" * most))
    assert (answer.status, len(echo.requests[0].body)) == (200, most)


async def test_mayflys_own_403_stays_one(certificate: Path, tmp_path: Path) -> None:
    async with gateway(tmp_path) as web:
        with front_of(f"127.0.0.1:{web.port}", certificate) as front:
            await until_up(front)
            instance = uuid7()
            web.launcher.instances[instance] = 1 << 40
            token = web.app[TOKENS].issue(instance, "read-only").reveal()
            done = await front.curl("/session", "-X", "DELETE", "-H", f"X-Walkin-Session: {token}")
            assert " 403" in done.stdout.splitlines()[0], done.stdout
            assert '"code":"read_only"' in done.stdout


async def test_a_body_that_is_not_declared_is_cut_by_mayfly(certificate: Path, tmp_path: Path) -> None:
    async with gateway(tmp_path) as web:
        with front_of(f"127.0.0.1:{web.port}", certificate) as front:
            (tmp_path / "body").write_bytes(b" " * 4 * web.settings.max_body_bytes)
            done = await front.curl("/sql", "--http1.1", *CHUNKS, "--data-binary", f"@{tmp_path}/body")
            assert "HTTP/1.1 413" in done.stdout, done.stdout + done.stderr
            assert "body_too_large" in done.stdout


async def test_what_does_not_fit_the_buffers_of_the_front_is_refused(front: Front, echo: Echo) -> None:
    for header in (b"X-A: " + b"a" * 20_000, b"\r\n".join(b"X-%d: a" % n for n in range(70))):
        [answer] = await front(GET + header + b"\r\n" + CLOSE)
        assert answer.status == 400
    assert not echo.requests


@pytest.mark.parametrize(
    "half", [b"", b"POST /sq", GET, post(b"Content-Length: 1000", body=b"{")], ids=["-", "line", "header", "body"]
)
@pytest.mark.parametrize(("patience", "ends"), [("1s", True), ("1000s", False)])
async def test_a_caller_that_takes_for_ever_is_hung_up_on(
    echo: Echo, certificate: Path, half: bytes, patience: str, ends: bool
) -> None:
    """However it drips. The control has the patience; an idle connection is another time-out's."""
    with front_of(echo.address, certificate, patience=patience) as front:
        host, _, port = front.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=front.tls)
        ended = asyncio.create_task(reader.read())
        writer.write(half)
        for _ in range(600 if ends else 50):
            await asyncio.wait({ended}, timeout=0.05)
            if ended.done():
                break
            writer.write(b"a" if half else b"")
        assert ended.done() is ends
        assert not echo.requests
        ended.cancel()
        writer.transport.abort()
        await asyncio.gather(ended, return_exceptions=True)


async def test_one_address_gets_64_connections_and_another_is_served_meanwhile(front: Front, echo: Echo) -> None:
    host, _, port = front.address.rpartition(":")
    held = [await asyncio.open_connection(host, int(port), ssl=front.tls) for _ in range(64)]
    try:
        with pytest.raises(OSError):  # noqa: PT011 -- reset or closed in the middle of the handshake
            await asyncio.open_connection(host, int(port), ssl=front.tls)
        done = await front.curl("/healthz", "--interface", "127.0.0.9")
        assert " 200" in done.stdout.splitlines()[0], done.stderr
    finally:
        for _, writer in held:
            writer.transport.abort()


@pytest.fixture
def ipv6_48() -> Iterator[str]:
    """A network all of whose addresses are this host's."""
    route = ["local", "2001:db8:77::/48", "dev", "lo"]
    subprocess.run(["ip", "-6", "route", "add", *route], check=True)
    yield "2001:db8:77"
    subprocess.run(["ip", "-6", "route", "del", *route], check=True)


async def test_a_48_gets_so_many_connections_and_others_are_served_meanwhile(echo: Echo, certificate: Path, ipv6_48: str) -> None:
    async def call(source: str) -> asyncio.StreamWriter:
        connection = socket.socket(socket.AF_INET6)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        connection.bind((source, 0))
        try:
            await asyncio.get_running_loop().sock_connect(connection, ("::1", port))
            return (await asyncio.open_connection(sock=connection, ssl=front.tls, server_hostname="127.0.0.1"))[1]
        except OSError:
            connection.close()
            raise

    with socket.create_server(("::1", 0), family=socket.AF_INET6) as free:
        port = free.getsockname()[1]
    instead = {"sc1_conn_cur gt 512": "sc1_conn_cur gt 3", '"${FRONT_TLS}"': f'"${{FRONT_TLS}},ipv6@::1:{port}"'}
    with front_of(echo.address, certificate, instead=instead) as front:
        held = [await call(f"{ipv6_48}:{number}::1") for number in range(3)]
        try:
            with pytest.raises(OSError):  # noqa: PT011 -- reset or closed in the middle of the handshake
                await call(f"{ipv6_48}:3::1")
            held.append(await call("::1"))
        finally:
            for writer in held:
                writer.transport.abort()


@pytest.mark.parametrize(("most", "statuses"), [(3, {200, 429}), (600, {200})])
async def test_an_address_gets_so_many_requests_and_another_is_served_meanwhile(
    echo: Echo, certificate: Path, most: int, statuses: set[int]
) -> None:
    """The control has as many as are shipped."""
    with front_of(echo.address, certificate, instead={"http_req_rate gt 600": f"http_req_rate gt {most}"}) as front:
        answers = await front(*[GET + b"\r\n"] * 9, GET + CLOSE)
        assert {answer.status for answer in answers} == statuses
        assert {json.loads(answer.body).get("code") for answer in answers if answer.status == 429} <= {"rate_limited"}
        assert all(answer.headers[b"retry-after"] == b"10" for answer in answers if answer.status == 429)
        assert len(echo.requests) == (most if 429 in statuses else 10)
        done = await front.curl("/healthz", "--interface", "127.0.0.9")
        assert " 200" in done.stdout.splitlines()[0], done.stderr


async def test_a_blocked_address_is_hung_up_on_and_others_are_served(echo: Echo, certificate: Path) -> None:
    with front_of(echo.address, certificate, blocked="127.0.0.7\n127.1.0.0/16\n") as front:
        for source, served in (("127.0.0.7", False), ("127.1.2.3", False), ("127.0.0.8", True)):
            done = await front.curl("/healthz", "--interface", source)
            assert (done.returncode == 0) is served, done.stderr


async def test_callers_never_share_a_connection_to_mayfly(front: Front, echo: Echo) -> None:
    await asyncio.gather(
        *(front(GET + b"X-Caller: %d\r\n\r\n" % caller, GET + b"X-Caller: %d\r\n" % caller + CLOSE) for caller in range(8))
    )
    assert len(echo.requests) == 16
    carried = {(seen.connection, seen.all_of("x-caller")[0]) for seen in echo.requests}
    assert len({connection for connection, _ in carried}) == len(carried)


async def test_while_mayfly_is_not_ready_the_front_says_so_and_lets_its_health_through(front: Front, echo: Echo) -> None:
    await until_up(front)
    echo.status = 503
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n" + CLOSE
    async with asyncio.timeout(SECONDS):
        while b"shutting_down" not in (await front(request))[0].body:
            await asyncio.sleep(0.05)
    [answer] = await front(request)
    assert (answer.status, answer.headers[b"retry-after"]) == (503, b"5")
    [answer] = await front(GET + CLOSE)
    assert (answer.status, b"seen" in answer.body) == (503, True)
    echo.status = 200
    await until_up(front)


async def test_a_mayfly_that_is_away_is_a_503(certificate: Path) -> None:
    with front_of(free_address(), certificate) as front:
        for path in (b"/sql", b"/healthz"):
            [answer] = await front(b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + CLOSE)
            assert (answer.status, json.loads(answer.body)["code"], answer.headers[b"retry-after"]) == (503, "shutting_down", b"5")


# RFC 9112 lets a server take a bare line feed for a line's end and equal lengths for one. HAProxy does, so these are two requests.
TWO = {
    "two equal lengths", "a list of equal lengths", "a chunk size and a bare line feed", "a chunk that ends by a line feed",
    "lines that end by line feeds", "a header that ends by a line feed", "headers that end by line feeds",
}  # fmt: skip
MESSAGES = {**AMBIGUOUS, **BODY}
del MESSAGES["another protocol"]  # it is the beginning of HTTP/2, and is taken for that


async def test_a_request_behind_the_first_ones_end_is_passed_on(front: Front, echo: Echo) -> None:
    """The control of the next one: this is how it looks if two go out."""
    await front(post(b"Content-Length: 2", body=b"{}") + SMUGGLED + SENTINEL)
    assert [seen.line.split()[1] for seen in echo.requests] == ["/sql", "/openapi.json"]


@pytest.mark.parametrize("name", sorted(MESSAGES.keys() - TWO))
async def test_one_message_in_is_at_most_one_request_out(front: Front, echo: Echo, name: str) -> None:
    answers = await front(MESSAGES[name], then=SENTINEL)
    assert len(echo.requests) <= 1
    assert not any(seen.line.startswith("GET /openapi.json") for seen in echo.requests)
    assert {answer.status for answer in answers} <= {100, 200, 400, 404, 413, 422}


@pytest.mark.parametrize("name", sorted(TWO))
async def test_what_the_front_reads_as_two_requests_goes_out_as_two_that_nobody_can_misread(
    front: Front, echo: Echo, name: str
) -> None:
    await front(MESSAGES[name], then=SENTINEL)
    first, second = echo.requests
    assert (first.line, first.body, second.line, second.body) == ("POST /sql HTTP/1.1", b"{}", "GET /openapi.json HTTP/1.1", b"")


async def test_mayfly_behind_the_front_answers_no_request_that_was_hidden_in_another(certificate: Path, tmp_path: Path) -> None:
    async with gateway(tmp_path) as web:
        with front_of(f"127.0.0.1:{web.port}", certificate) as front:
            assert was_answered(await front(post(b"Content-Length: 2", body=b"{}") + SMUGGLED + SENTINEL))
            for name in sorted(MESSAGES.keys() - TWO):
                assert not was_answered(await front(MESSAGES[name], then=SENTINEL)), name


@pytest.mark.parametrize(("trusted", "logged"), [("127.0.0.1/32,::1/128", "127.0.0.77"), ("", "127.0.0.1")])
async def test_mayfly_logs_who_connected_to_a_front_that_it_trusts(
    certificate: Path, tmp_path: Path, trusted: str, logged: str
) -> None:
    """The control trusts nobody: then every caller is the front."""
    async with gateway(tmp_path, trusted_proxies=trusted) as web:
        with front_of(f"127.0.0.1:{web.port}", certificate) as front:
            for version in ("--http1.1", "--http2"):
                forged = (
                    "-H",
                    "X-Forwarded-For: 10.9.8.7",
                    "-H",
                    "Forwarded: for=10.9.8.7",
                    "-H",
                    "Content-Type: application/json",
                )
                done = await front.curl("/sql", version, "--interface", "127.0.0.77", *forged, "-d", SQL.decode())
                assert " 200" in done.stdout.splitlines()[0], done.stderr
            await web.app[ACCESS_LOG].flush()
    [log] = (tmp_path / "log").glob("access-*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["source_ip"] for line in lines if line["http_method"] == "POST"] == [logged, logged]


async def test_certbots_hook_puts_chain_and_key_into_one_private_file(tmp_path: Path) -> None:
    programs, lineage = tmp_path / "bin", tmp_path / "live"
    programs.mkdir()
    lineage.mkdir()
    (programs / "systemctl").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/called\n')
    (programs / "systemctl").chmod(0o755)
    (lineage / "fullchain.pem").write_text("chain\n")
    (lineage / "privkey.pem").write_text("key\n")
    certificate = tmp_path / "mayfly.pem"
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RENEWED_LINEAGE": str(lineage),
        "FRONT_CERTIFICATE": str(certificate),
    }
    subprocess.run([REPO / "infra/tls/renewed"], env=environment, check=True)
    assert (certificate.read_text(), certificate.stat().st_mode & 0o777) == ("chain\nkey\n", 0o600)
    assert (tmp_path / "called").read_text() == "reload haproxy\n"
