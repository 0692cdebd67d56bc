"""`python -m gateway.web` as an operator starts it: its own process, uvloop, signals, exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from gateway.protocol import Verb, Verdict
from gateway.settings import SettingsError
from gateway.web.__main__ import split_address

from .fake_launcher import EVERY_TEST_SECONDS, FakeLauncher, FakeRun, ok, replying, replying_after, until

REPO = Path(__file__).parent.parent


class Web:
    def __init__(
        self, process: asyncio.subprocess.Process, launcher: FakeLauncher, url: str, client: aiohttp.ClientSession
    ) -> None:
        self.process = process
        self.launcher = launcher
        self.url = url
        self.port = int(url.rsplit(":", 1)[1])
        self.client = client

    async def sql(self, token: str | None = None) -> aiohttp.ClientResponse:
        headers = {"X-Walkin-Session": token} if token else {}
        async with self.client.post(self.url + "/sql", json={"sql": "SELECT 1"}, headers=headers) as response:
            await response.read()
            return response


async def start(state_dir: Path, program: tuple[str, ...] = ("-m", "gateway.web"), **variables: str) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAYFLY_")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *program,
        cwd=REPO,
        env={
            **environment,
            "MAYFLY_STATE_DIR": str(state_dir),
            "MAYFLY_LISTEN": "127.0.0.1:0",
            "MAYFLY_METRICS_LISTEN": "",
            **variables,
        },
        stderr=asyncio.subprocess.PIPE,
    )


@asynccontextmanager
async def web(state_dir: Path, program: tuple[str, ...] = ("-m", "gateway.web"), **variables: str) -> AsyncIterator[Web]:
    launcher = FakeLauncher(state_dir / "run" / "launcher.sock")
    await launcher.start()
    process = await start(state_dir, program, **variables)
    try:
        async with asyncio.timeout(EVERY_TEST_SECONDS), aiohttp.ClientSession() as client:
            assert process.stderr is not None
            line = (await process.stderr.readline()).decode()
            port = int(line.rsplit("port ", 1)[1])
            yield Web(process, launcher, f"http://127.0.0.1:{port}", client)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        await launcher.stop()


async def test_the_process_serves_large_answers_and_outlives_callers_that_hang_up(tmp_path):
    async with web(tmp_path) as running:
        wide = ok(["a"], [["x" * 1000]] * 1900)
        running.launcher.script = replying(wide)
        response = await running.sql()
        assert response.status == 200
        assert len((await response.json())["rows"]) == 1900
        token = response.headers["X-Walkin-Session"]

        async def busy(run: FakeRun) -> None:
            run.started()
            await run.read_request()
            await run.hung_up()
            run.ended(Verdict.CANCELLED)

        for _ in range(5):
            running.launcher.script = busy
            seen = len(running.launcher.requests)
            request = asyncio.ensure_future(running.sql(token))
            await until(lambda seen=seen: len(running.launcher.requests) > seen)
            request.cancel()
            await until(lambda: running.launcher.running == 0)
        running.launcher.script = replying(ok(["a"], [[1]]))
        assert (await running.sql(token)).status == 200


WITHOUT_A_BREAKER = """
from gateway.web import __main__, breaker

async def watch(self):
    await self._awake.wait()
    raise RuntimeError("wkn_secret")

breaker.Breaker.watch = watch
raise SystemExit(__main__.main())
"""


async def test_a_process_whose_background_work_has_failed_stops_and_says_where(tmp_path):
    async with web(tmp_path, program=("-c", WITHOUT_A_BREAKER)) as running:
        assert (await running.sql()).status == 200
        _, said = await running.process.communicate()
        assert running.process.returncode == 0
        assert b"CRITICAL gateway.web.app the process stops: RuntimeError at <string>" in said
        assert b"wkn_secret" not in said


async def test_sigterm_finishes_what_runs_refuses_what_comes_and_exits_cleanly(tmp_path):
    async with web(tmp_path) as running:
        finish = asyncio.Event()
        running.launcher.script = replying_after(finish)
        request = asyncio.ensure_future(running.sql())
        await until(lambda: len(running.launcher.requests) == 1)
        running.process.send_signal(signal.SIGTERM)
        while True:
            async with running.client.get(running.url + "/healthz") as response:
                if response.status == 503:
                    break
        refused = await running.sql()
        assert (refused.status, (await refused.json())["code"]) == (503, "shutting_down")
        finish.set()
        assert (await request).status == 200
        assert await running.process.wait() == 0
        (log,) = (tmp_path / "log").iterdir()
        assert 200 in [json.loads(line)["http_status"] for line in log.read_text().splitlines() if '"POST"' in line]


async def test_a_second_signal_ends_it_at_once(tmp_path):
    # A deadline beyond the test: nothing but the second signal can end this run.
    async with web(tmp_path, MAYFLY_DEADLINE_SECONDS="600") as running:

        async def busy(run: FakeRun) -> None:
            run.started()
            await run.read_request()
            await run.hung_up()
            run.ended(Verdict.CANCELLED)

        running.launcher.script = busy
        request = asyncio.ensure_future(running.sql())
        await until(lambda: len(running.launcher.requests) == 1)
        running.process.send_signal(signal.SIGTERM)
        while True:
            async with running.client.get(running.url + "/readyz") as response:
                if response.status == 503:
                    break
        running.process.send_signal(signal.SIGTERM)
        assert await running.process.wait() == 0
        with pytest.raises(aiohttp.ClientError):
            await request


async def test_stopping_closes_connections_that_wait_for_their_next_request(tmp_path):
    async with web(tmp_path) as running:
        finish = asyncio.Event()
        running.launcher.script = replying_after(finish)
        request = asyncio.ensure_future(running.sql())
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b'{"status":"ok"}')
        await until(lambda: len(running.launcher.requests) == 1)
        running.process.send_signal(signal.SIGTERM)
        assert await reader.read() == b""
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nConnection: close\r\n" in answer
        writer.close()
        finish.set()
        assert (await request).status == 200
        assert await running.process.wait() == 0


async def test_too_few_descriptors_for_all_connections_are_a_refusal_to_start(tmp_path):
    process = await start(tmp_path, MAYFLY_CONNECTIONS="1000000000")
    _, said = await process.communicate()
    assert process.returncode == 2
    assert b"MAYFLY_CONNECTIONS=1000000000 needs 1000000264 open files" in said


async def test_an_interrupted_idle_process_exits_cleanly(tmp_path):
    async with web(tmp_path) as running:
        running.process.send_signal(signal.SIGINT)
        assert await running.process.wait() == 0


async def test_tokens_outlive_a_restart(tmp_path):
    async with web(tmp_path) as running:
        response = await running.sql()
        token = response.headers["X-Walkin-Session"]
        known = dict(running.launcher.instances)
        running.process.send_signal(signal.SIGKILL)
        await running.process.wait()
    async with web(tmp_path) as running:
        running.launcher.instances = known
        assert (await running.sql(token)).status == 200
        assert running.launcher.count(Verb.CREATE) == 0


async def test_nothing_that_the_process_writes_is_readable_by_others(tmp_path):
    async with web(tmp_path) as running:
        await running.sql()
        running.process.send_signal(signal.SIGTERM)
        await running.process.wait()
    written = [path for folder in ("keys", "log") for path in (tmp_path / folder, *(tmp_path / folder).iterdir())]
    assert len(written) == 4
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in written)


async def test_a_key_file_that_others_can_read_is_a_refusal_to_start(tmp_path):
    async with web(tmp_path) as running:
        running.process.send_signal(signal.SIGTERM)
        await running.process.wait()
    (tmp_path / "keys" / "token-keys.json").chmod(0o644)
    process = await start(tmp_path)
    _, said = await process.communicate()
    assert process.returncode == 1
    assert b"mode 0644" in said
    assert b"Traceback" not in said


@pytest.mark.parametrize("variables", [{"MAYFLY_NO_SUCH": "1"}, {"MAYFLY_LISTEN": "nowhere"}, {"MAYFLY_SLOTS": "0"}])
async def test_a_wrong_setting_is_a_refusal_to_start(tmp_path, variables):
    process = await start(tmp_path, **variables)
    _, said = await process.communicate()
    assert process.returncode == 2
    assert next(iter(variables)).encode() in said


@pytest.mark.parametrize(
    ("listen", "address"),
    [("127.0.0.1:8080", ("127.0.0.1", 8080)), ("[::1]:0", ("::1", 0)), ("localhost:65535", ("localhost", 65535))],
)
def test_an_address_is_a_host_and_a_port(listen, address):
    assert split_address(listen) == address


@pytest.mark.parametrize("listen", ["", "8080", ":8080", "host:", "host:x", "host:65536", "host:-1", "host:²"])
def test_what_is_no_address_is_refused(listen):
    with pytest.raises(SettingsError):
        split_address(listen)
