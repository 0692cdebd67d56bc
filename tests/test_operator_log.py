"""The operator's log: its two forms, the id by which a request is found in both processes' logs, and what never gets into it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gateway.operator_log import about

from .conftest import eventually
from .deployment import FASTEST, Answer, Deployment, client_of, deployed
from .test_web_canary import CANARY, assert_silent
from .test_web_process import start

REPO = Path(__file__).resolve().parent.parent
REQUEST_ID = "0123456789abcdef" * 2
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c"
PREAMBLE = """
import logging, sys, threading
from gateway.operator_log import about, configure, last_words
from gateway.settings import Settings
settings = Settings(log_format=sys.argv[1], log_level="DEBUG")
configure(settings, "launcher")
log = logging.getLogger("gateway.test")
"""


def said(form: str, script: str, code: int = 0) -> str:
    """What a process of its own writes to its stderr."""
    done = subprocess.run([sys.executable, "-c", PREAMBLE + script, form], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    return done.stderr


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_is_one_object_with_these_keys():
    (line,) = lines(said("json", f'log.warning("%d rows\\nand \\u2028 more", 7, extra=about("{REQUEST_ID}"))'))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {
        "level": "WARNING",
        "logger": "gateway.test",
        "process": "launcher",
        "message": "7 rows\nand \u2028 more",
        "request_id": REQUEST_ID,
    }


def test_as_text_the_id_ends_the_line():
    text = said("text", f'log.info("run ended", extra=about(bytes.fromhex("{REQUEST_ID}"))); log.debug("nobody\'s")')
    first, second = text.splitlines()
    assert re.fullmatch(r"\S+ \S+ INFO gateway\.test run ended request=" + REQUEST_ID, first)
    assert second.endswith(" DEBUG gateway.test nobody's")


def test_the_id_of_no_request_is_left_out():
    assert about(bytes(16)) is None
    assert about("0" * 32) is None
    assert about(REQUEST_ID) == about(bytes.fromhex(REQUEST_ID)) == {"request_id": REQUEST_ID}


FAULTS = {
    "logged": ("try:\n    int(canary)\nexcept ValueError:\n    log.exception('failed')", 0),
    "uncaught": ("int(canary)", 1),
    "in a thread": ("thread = threading.Thread(target=int, args=(canary,)); thread.start(); thread.join()", 0),
    "in a destructor": ("class Late:\n    def __del__(self):\n        int(canary)\nLate()", 0),
}


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("where", FAULTS)
def test_an_exception_is_its_class_and_its_places_and_never_its_message(form, where):
    script, code = FAULTS[where]
    text = said(form, f"canary = '{CANARY}'\n{script}", code)
    assert_silent(where, text.encode(), [])
    (line,) = text.splitlines()
    assert "ValueError at " in (line if form == "text" else json.loads(line)["exc"])
    # The control: Python's own words quote it.
    plain = subprocess.run(
        [sys.executable, "-c", f"import logging, threading\nlog = logging\ncanary = '{CANARY}'\n{script}"], capture_output=True
    )
    assert CANARY.encode() in plain.stderr


def test_a_warning_of_pythons_is_a_line_too():
    (line,) = lines(said("json", "import warnings\nwarnings.warn('old')"))
    assert line["logger"] == "py.warnings"


LIBRARIES = """
import asyncio, http.server, threading
import boto3, botocore.config, docker
class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = b'{"SecretString": "kanarienvogel"}'
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *args): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = boto3.client("secretsmanager", region_name="eu-west-1", endpoint_url=f"http://127.0.0.1:{server.server_port}",
    aws_access_key_id="kanarienvogel", aws_secret_access_key="kanarienvogel")
assert client.get_secret_value(SecretId="x")["SecretString"] == "kanarienvogel"
api = docker.APIClient(base_url="unix:///var/run/docker.sock")
api.containers(filters={"label": "kanarienvogel"})
api.close()
asyncio.run(asyncio.sleep(0))
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_libraries_say_nothing_below_a_warning(form):
    assert said(form, LIBRARIES) == ""
    assert "urllib3" in said(form, "logging.getLogger('urllib3').warning('of the network')")
    # The control: at DEBUG each of them writes what it sends and gets.
    loud = subprocess.run(
        [sys.executable, "-c", "import logging; logging.basicConfig(level=logging.DEBUG)" + LIBRARIES],
        capture_output=True,
        text=True,
    )
    assert loud.returncode == 0, loud.stderr
    for name in ("botocore", "urllib3", "asyncio"):
        assert f":{name}" in loud.stderr
    assert CANARY in loud.stderr


@pytest.mark.parametrize(("form", "last"), [("text", "mayfly web: "), ("json", '{"timestamp": ')])
async def test_why_a_process_does_not_start_is_its_last_line_in_the_logs_form(tmp_path, form, last):
    (tmp_path / "log").write_text("in the way")
    process = await start(tmp_path, MAYFLY_LOG_FORMAT=form)
    _, text = await process.communicate()
    assert process.returncode == 1
    line = text.decode().splitlines()[-1]
    assert line.startswith(last)
    assert "access log" in (line if form == "text" else json.loads(line)["message"])


# ── a whole deployment


def log_of(deployment: Deployment, process: str) -> list[str]:
    return (deployment.state / "operator" / f"{process}.log").read_text().splitlines()


def about_it(deployment: Deployment, process: str, answer: Answer) -> list[str]:
    """The messages of the lines that belong to the request of this answer."""
    wanted, found = answer.headers["X-Request-ID"], []
    for line in log_of(deployment, process):
        if deployment.settings["MAYFLY_LOG_FORMAT"] == "json":
            told = json.loads(line)
            assert told["process"] == process
            if told.get("request_id") == wanted:
                found.append(told["message"])
        elif line.endswith(f" request={wanted}"):
            found.append(line)
    return found


@pytest.mark.parametrize("form", ["text", "json"])
async def test_the_id_that_a_caller_got_finds_its_request_in_both_logs(form):
    settings = {"log_format": form, "deadline_seconds": "2", "grace_seconds": "0.1"}
    with deployed(engine=FASTEST, **settings) as deployment:
        async with client_of(deployment) as client:
            assert (await client.sql(f"CREATE TABLE {CANARY}(x)")).status == 200
            for _ in range(10):  # a slow machine may find it only when its deadline has passed
                running = asyncio.ensure_future(client.sql(f"{ENDLESS} -- {CANARY}"))
                while not running.done() and not (pids := [work.pid for work in deployment.at_work() if work.pid]):
                    await asyncio.sleep(0.02)
                with suppress(ProcessLookupError, IndexError):  # it can't answer in time then, and is killed
                    os.kill(pids[0], signal.SIGSTOP)
                killed = await running
                if about_it(deployment, "launcher", killed):
                    break
            token = client.token or ""
        assert killed.body["code"] == "query_timeout"
        eventually(lambda: bool(about_it(deployment, "launcher", killed)))
        (mine,), (its,) = (about_it(deployment, process, killed) for process in ("web", "launcher"))
        assert "verdict=DEADLINE" in mine
        assert "verdict=DEADLINE" in its

        deployment.stop()
        deployment.environment["MAYFLY_DEADLINE_SECONDS"] = "60"
        deployment.start()
        async with client_of(deployment) as client:
            running = asyncio.ensure_future(client.sql(ENDLESS))
            while not (pids := [work.pid for work in deployment.at_work() if work.pid]):
                await asyncio.sleep(0.02)
            os.kill(pids[0], signal.SIGKILL)
            failed = await running
        assert failed.body["code"] == "runner_failed"
        eventually(lambda: bool(about_it(deployment, "launcher", failed)))
        mine, its = (about_it(deployment, process, failed) for process in ("web", "launcher"))
        assert any("500 runner_failed" in line for line in mine)
        assert any("verdict=SIGNALLED" in line for line in its)
        assert failed.headers["X-Request-ID"] not in " ".join(about_it(deployment, "web", killed))
        for process in ("web", "launcher"):
            assert_silent(f"{process}'s log", "\n".join(log_of(deployment, process)).encode(), [token])
