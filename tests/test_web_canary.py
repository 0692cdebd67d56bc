"""Nothing that a caller sends, and nothing of a token, is in any byte that the web process leaves behind, at log level DEBUG.

A whole process serves requests that carry a canary in every place a caller can write to. Then everything is read: its terminal, its
state folder, and the objects it shipped. Of the caller only the address and the user agent are there, in the access log alone.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gateway.protocol import Verdict
from gateway.web.access_log import file_of

from .fake_launcher import EVERY_TEST_SECONDS, FakeLauncher, FakeRun, frame, ok, replying, until
from .moto_server import REGION

REPO = Path(__file__).parent.parent
CANARY = "kanarienvogel"
AGENT = "Visitor/1.0 (seen in the access log)"
FORGED = "wkn_" + "kanarienvogel" * 8 + "abc"
assert len(FORGED) == 111


class Web:
    def __init__(self, launcher: FakeLauncher, port: int, metrics_port: int, process: asyncio.subprocess.Process) -> None:
        self.launcher = launcher
        self.port = port
        self.metrics_port = metrics_port
        self.process = process

    async def raw(self, sent: bytes, answered: bool = True, port: int = 0) -> bytes:
        """Send bytes that need not be HTTP; read until the process closes, or hang up at once."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port or self.port)
        try:
            writer.write(sent)
            await writer.drain()
            return await reader.read() if answered else b""
        finally:
            writer.close()

    async def post(self, body: str, *headers: str, target: str = "/sql", method: str = "POST") -> bytes:
        return await self.raw(request(body, *headers, target=target, method=method))


def request(body: str, *headers: str, target: str = "/sql", method: str = "POST") -> bytes:
    raw = body.encode("utf-8", "surrogateescape")
    head = [f"{method} {target} HTTP/1.1", "Host: h", f"User-Agent: {AGENT}", "Connection: close", f"Content-Length: {len(raw)}"]
    return "\r\n".join([*head, *headers, "", ""]).encode("utf-8", "surrogateescape") + raw


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@asynccontextmanager
async def web(state_dir: Path, terminal: Path, **variables: str) -> AsyncIterator[Web]:
    launcher = FakeLauncher(state_dir / "run" / "launcher.sock")
    await launcher.start()
    port, metrics_port = free_port(), free_port()
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAYFLY_")}
    settings = {
        "MAYFLY_STATE_DIR": str(state_dir),
        "MAYFLY_LISTEN": f"127.0.0.1:{port}",
        "MAYFLY_METRICS_LISTEN": f"127.0.0.1:{metrics_port}",
        "MAYFLY_LOG_LEVEL": "DEBUG",
        "MAYFLY_RATE_REQUESTS_PER_MINUTE": "0",
        "MAYFLY_RATE_CREATES_PER_MINUTE": "0",
    }
    with terminal.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway.web", cwd=REPO, env={**own, **settings, **variables}, stdout=output, stderr=output
        )
    try:
        async with asyncio.timeout(2 * EVERY_TEST_SECONDS):
            while b"listening on" not in terminal.read_bytes():
                assert process.returncode is None, terminal.read_text()
                await asyncio.sleep(0.02)
            yield Web(launcher, port, metrics_port, process)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await launcher.stop()


async def canaries_in_every_place(running: Web) -> list[str]:
    """The tokens that were given out. Each answer is looked at, so that no request was lost on its way."""
    launcher = running.launcher
    statement = f'{{"sql": "SELECT \'{CANARY}\' AS {CANARY}", "args": ["{CANARY}", {{"$blob": "{encoded(CANARY)}"}}]}}'

    launcher.script = replying(ok([CANARY], [[CANARY]]))
    answer = await running.post(statement)
    assert answer.startswith(b"HTTP/1.1 200")
    assert CANARY.encode() in answer
    (token,) = re.findall(r"X-Walkin-Session: (\S+)", answer.decode())
    session = f"X-Walkin-Session: {token}"
    assert (await running.post(statement, session)).startswith(b"HTTP/1.1 200")

    # What a runner says.
    for verdict in ("sql_error", "forbidden", "args_invalid", "too_complex"):
        launcher.script = replying(frame({"v": 1, "verdict": verdict, "message": f"near {CANARY}"}))
        assert (await running.post(statement, session)).startswith((b"HTTP/1.0 4", b"HTTP/1.1 4"))
    for reply in (
        frame({"v": 1, "verdict": "internal", "message": f"near {CANARY}"}),
        frame({"v": 1, "verdict": CANARY, CANARY: CANARY}),
        frame({"v": 1, "verdict": "ok", "columns": [CANARY], "rows": [[{CANARY: CANARY}]], "rows_affected": 0, "truncated": False}),
        frame(CANARY.encode()),
        frame(b"\xff" + CANARY.encode()),
        CANARY.encode(),
        ok([CANARY], [[1]]) + CANARY.encode(),
    ):
        launcher.script = replying(reply)
        assert (await running.post(statement, session)).startswith(b"HTTP/1.1 500")
    launcher.script = replying(ok([CANARY], [[CANARY]]))

    # Tokens, good and forged, where they belong and where they do not.
    for there in (token, FORGED):
        for headers in (
            (f"X-Walkin-Session: {there}x",),
            (f"X-Walkin-Session: {there}", f"X-Walkin-Session: {there}"),
            (f"Cookie: session={there}",),
            (f"Authorization: Bearer {there}",),
            (f"{there}: 1",),
            (f"X-Request-ID: {there}",),
            (f"X-Forwarded-For: {there}", f"Forwarded: for={there}"),
            (f"Referer: http://h/{there}", f"Origin: http://{there}"),
            (f"Accept: {there}", f"Content-Type: application/json; {there}={there}"),
            (f"Content-Encoding: {there}",),
            (f"Transfer-Encoding: {there}",),
            (f"Expect: {there}",),
            (f"Upgrade: {there}", "Connection: upgrade"),
            (f"Content-Length: {there}",),
            (f"{there} {there}",),
            (f"X-Long: {there * 100}",),
        ):
            assert (await running.post(statement, *headers)).startswith(b"HTTP/1.")
        for target in (
            f"/{there}",
            f"/sql/{there}",
            f"/sql?token={there}",
            f"/sql#{there}",
            f"http://{there}/{there}",
            f"/%zz{there}",
        ):
            for method in ("POST", "GET", "OPTIONS"):
                assert (await running.post(statement, target=target, method=method)).startswith(b"HTTP/1.")
        for method in (there, there[:20], f"GET {there}"):
            assert (await running.post(statement, method=method)).startswith(b"HTTP/1.")
        for body in (
            f'{{"{there}": 1}}',
            f'{{"sql": {there}}}',
            there,
            f"\udcff{there}",
            f'{{"sql": "", "x": "{there}"}}',
            f"[{there}]",
        ):
            assert (await running.post(body)).startswith((b"HTTP/1.0 4", b"HTTP/1.1 4"))
        assert (await running.raw(f"{there}\r\n\r\n".encode())).startswith((b"HTTP/1.0 4", b"HTTP/1.1 4"))
        assert (await running.raw(f"GET / {there}/1.1\r\n\r\n".encode())).startswith((b"HTTP/1.0 4", b"HTTP/1.1 4"))
        chunked = f"POST /sql HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5;{there}\r\n{{\r\n{there}\r\n\r\n"
        assert (await running.raw(chunked.encode())).startswith((b"HTTP/1.0 4", b"HTTP/1.1 4"))
        await running.raw(request(statement, f"X-Walkin-Session: {there}")[:-20], answered=False)
        await running.raw(request(statement, f"X-Walkin-Session: {there}", target=f"/{there}")[:200], answered=False)

    # A caller that leaves while its statement runs, and a launcher that does.
    async def busy(run: FakeRun) -> None:
        run.started()
        await run.read_request()
        await run.hung_up()
        run.ended(Verdict.CANCELLED)

    launcher.script = busy
    seen = len(launcher.requests)
    leaving = asyncio.ensure_future(running.raw(request(statement, session)))
    await until(lambda: len(launcher.requests) > seen)
    leaving.cancel()
    await until(lambda: launcher.running == 0)
    left = asyncio.ensure_future(running.raw(request(statement, session)))
    await until(lambda: launcher.running == 1)
    launcher.drop_connections()
    assert (await left).startswith(b"HTTP/1.1 50")
    return [token]


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def assert_silent(where: str, written: bytes, tokens: list[str]) -> None:
    """No canary, as it was or encoded, and of no token any part that is secret."""
    for text in (CANARY, encoded(CANARY), CANARY.encode().hex(), "wkn_"):
        assert text.lower().encode() not in written.lower(), f"{text} in {where}"
    for token in tokens:
        raw = base64.urlsafe_b64decode(token.removeprefix("wkn_") + "=")
        for part in (token[30:60], token[-40:], raw[16:48].hex(), raw[48:].hex()):
            assert part.encode() not in written, f"part of a token in {where}"


async def test_nothing_that_a_caller_sends_is_in_what_the_process_writes_or_ships(tmp_path, aws):
    state, s3, secrets = tmp_path / "state", aws.client("s3"), aws.client("secretsmanager")
    async with web(state, tmp_path / "terminal-1") as running:
        tokens = await canaries_in_every_place(running)
        assert any(CANARY in str(seen) for seen in running.launcher.requests)
        for sent in (f"{CANARY}\r\n\r\n".encode(), request(CANARY, f"X-{CANARY}: {CANARY}", target=f"/metrics/{CANARY}?{CANARY}")):
            assert (await running.raw(sent, port=running.metrics_port)).startswith((b"HTTP/1.0 4", b"HTTP/1.1 4"))
        metrics = await running.raw(request("", target="/metrics", method="GET"), port=running.metrics_port)
    assert b'mayfly_requests_total{code="sql_error"' in metrics
    assert_silent("metrics", metrics, tokens)
    assert b"127.0.0.1" not in metrics
    assert AGENT.encode() not in metrics
    (log,) = (state / "log").iterdir()
    logged = log.read_bytes()
    assert logged.count(AGENT.encode()) > 50
    assert logged.count(b'"source_ip":"127.0.0.1"') == logged.count(b"\n")

    # The same file as that of a day which is over, for a process that ships it and has its keys from AWS.
    log.rename(file_of(state / "log", (datetime.now(UTC) - timedelta(days=1, hours=1)).date()))
    s3.create_bucket(Bucket="canary", CreateBucketConfiguration={"LocationConstraint": REGION})
    secrets.create_secret(Name="canary")
    clouded = {"MAYFLY_ACCESS_LOG_BUCKET": "canary", "MAYFLY_KEY_SOURCE": "aws", "MAYFLY_KEY_SECRET": "canary", **aws.environment()}
    async with web(state, tmp_path / "terminal-2", **clouded) as running:
        tokens += await canaries_in_every_place(running)
        while not (shipped := s3.list_objects_v2(Bucket="canary").get("Contents")):
            await asyncio.sleep(0.02)
    (item,) = shipped
    assert gzip.decompress(s3.get_object(Bucket="canary", Key=item["Key"])["Body"].read()) == logged
    key = json.loads(secrets.get_secret_value(SecretId="canary")["SecretString"])["key"]["key"]

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    written = {str(path): path.read_bytes() for path in files} | {"the object's name": item["Key"].encode()}
    for where, text in written.items():
        assert_silent(where, text, tokens)
        assert key.encode() not in text
        assert AGENT.encode() not in text or "access-" in where


def test_the_search_finds_what_it_looks_for():
    token = "wkn_" + base64.urlsafe_b64encode(bytes(range(80))).decode().rstrip("=")
    for leak in (CANARY, CANARY.upper(), encoded(CANARY), FORGED[:9], token, token[4:70], bytes(range(16, 48)).hex()):
        with pytest.raises(AssertionError, match="in the leak"):
            assert_silent("the leak", f"a line with {leak} in it".encode(), [token])
    assert_silent("the leak", b"nothing", [token])
