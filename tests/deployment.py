"""A whole Mayfly, brought up by infra/up and taken down by infra/down as an operator would, and a client for its HTTP API."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import docker

from gateway.launcher.specification import LABEL_INSTANCE, LABEL_ROLE

REPO = Path(__file__).resolve().parent.parent
START_ONE = """
. "$0/infra/lib.sh"
eval "$2"
if is_root; then export MAYFLY_WEB_UID=$(id -u $web_user); fi
user=$1_user
spawn "$1" "${!user}" -m "gateway.$1"
"""
UNLIMITED = {
    "MAYFLY_RATE_REQUESTS_PER_MINUTE": "0",
    "MAYFLY_RATE_CREATES_PER_MINUTE": "0",
    "MAYFLY_INSTANCES_PER_ADDRESS": "0",
    "MAYFLY_QUERIES_PER_INSTANCE": "0",
}
# Nothing is started ahead unless a test is about that: a container that is seen then belongs to a request.
COLD = {"MAYFLY_NURSERY": "0", "MAYFLY_SUCCESSORS": "0"}
# Without root there is no engine zygote. Nothing here is left to `auto`.
ENGINES = ("docker", "zygote") if os.getuid() == 0 else ("docker",)
FASTEST = ENGINES[-1]
_VOLUME = re.compile(r"/instances/([0-9a-f-]{36})/volume /data ")


@dataclass(frozen=True)
class Work:
    """What one run, or what is left of it, is on the host: a container, or a child in a slot container."""

    instance: str
    pid: int
    """0 where nothing runs."""


@dataclass
class Deployment:
    """Settings as MAYFLY_* variables; `start` and `stop` may be called again and again."""

    settings: dict[str, str]
    state: Path
    address: str
    preset: str = ""
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        own = {
            "MAYFLY_STATE_DIR": str(self.state),
            "MAYFLY_LISTEN": self.address,
            "MAYFLY_METRICS_LISTEN": "",  # several deployments run at a time
            "MAYFLY_MIN_FREE_BYTES": "0",
        }
        self.environment = {**os.environ, "MAYFLY_ENGINE": FASTEST, **UNLIMITED, **COLD, **own, **self.settings}

    @property
    def engine(self) -> str:
        return self.environment["MAYFLY_ENGINE"]

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def start(self) -> None:
        preset = ["--preset", self.preset] if self.preset else []
        done = subprocess.run([REPO / "infra/up", "-d", *preset], env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr + self.logs())

    def stop(self) -> None:
        subprocess.run([REPO / "infra/down"], env=self.environment, check=True, capture_output=True)

    def start_one(self, name: str, but: str = "") -> None:
        """`web` or `launcher` as infra/up starts it, but alone, whatever is down; the one before has to be dead.

        `but` is shell that runs after infra/lib.sh, and may define one of its functions anew.
        """
        done = subprocess.run(["bash", "-c", START_ONE, REPO, name, but], env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)

    def wait_until_dead(self, name: str, seconds: float = 60) -> None:
        try:
            descriptor = os.pidfd_open(self.pid(name))
        except ProcessLookupError:
            return
        try:
            if not select.select([descriptor], [], [], seconds)[0]:
                raise TimeoutError(f"{name} lives on after {seconds} s")
        finally:
            os.close(descriptor)

    def signal(self, name: str, number: int) -> None:
        os.kill(self.pid(name), number)

    def pid(self, name: str) -> int:
        return int((self.state / "operator" / f"{name}.pid").read_text().split()[0])

    def kill(self, name: str) -> None:
        """kill -9, and wait until it is dead."""
        self.signal(name, signal.SIGKILL)
        self.wait_until_dead(name)

    def logs(self) -> str:
        return "\n".join(f"--- {path}\n{path.read_text()}" for path in sorted((self.state / "operator").glob("*.log")))

    def access_log(self) -> list[dict[str, Any]]:
        lines = [path.read_text() for path in sorted((self.state / "log").glob("access-*.jsonl"))]
        return [json.loads(line) for line in "".join(lines).splitlines()]

    def docker(self) -> contextlib.closing[docker.APIClient]:
        return contextlib.closing(docker.APIClient(self.settings.get("MAYFLY_DOCKER_SOCKET", "unix:///var/run/docker.sock")))

    def containers(self) -> list[dict[str, Any]]:
        """The inspected containers of this deployment, running or not."""
        label = (self.state / "launcher" / "deployment-id").read_text().strip()
        with self.docker() as client:
            found = client.containers(all=True, filters={"label": f"org.mayfly.deployment={label}"})
            inspected = []
            for container in found:
                try:
                    inspected.append(client.inspect_container(container["Id"]))
                except docker.errors.NotFound:
                    continue
            return inspected

    def at_work(self) -> list[Work]:
        """A container of an instance, in whatever state, and each slot's child from when it has its volume."""
        found = []
        for container in self.containers():
            pid, labels = container["State"]["Pid"], container["Config"]["Labels"]
            if LABEL_INSTANCE in labels:
                found.append(Work(labels[LABEL_INSTANCE], pid))
            elif pid:
                found += [Work(instance, child) for child in children_of(pid) if (instance := instance_of(child))]
        return found

    def slots(self) -> dict[str, int]:
        """The slot containers that run, by id, and the number of the zygote in each."""
        return {item["Id"]: item["State"]["Pid"] for item in self.containers() if item["State"]["Running"] and is_slot(item)}

    def instances(self) -> set[str]:
        return {path.name for path in (self.state / "instances").iterdir() if not path.name.startswith(".")}


def is_slot(container: dict[str, Any]) -> bool:
    return container["Config"]["Labels"].get(LABEL_ROLE) == "slot"


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def instance_of(pid: int) -> str | None:
    """Whose volume the process has at /data."""
    try:
        mounts = Path(f"/proc/{pid}/mountinfo").read_text()
    except OSError:
        return None
    found = _VOLUME.search(mounts)
    return found[1] if found else None


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def deployed(state: Path | None = None, preset: str = "", **settings: str) -> Iterator[Deployment]:
    """A running deployment in a folder of its own; `settings` are named without MAYFLY_."""
    own = state is None
    folder = Path(tempfile.mkdtemp(prefix="mayfly-")) if state is None else state
    folder.chmod(0o755)
    variables = {f"MAYFLY_{name.upper()}": value for name, value in settings.items()}
    deployment = Deployment(variables, folder, free_address(), preset)
    try:
        deployment.start()
        yield deployment
    finally:
        deployment.stop()
        if own:
            shutil.rmtree(folder)


@dataclass(frozen=True)
class Answer:
    status: int
    body: dict[str, Any]
    headers: Any
    raw: bytes


@dataclass
class Client:
    """One caller. Keeps its session token as an agent would."""

    http: aiohttp.ClientSession
    url: str
    token: str | None = None

    async def sql(self, sql: str, args: Any = None, **more: Any) -> Answer:
        body: dict[str, Any] = {"sql": sql, **more}
        if args is not None:
            body["args"] = args
        return await self.post(json.dumps(body).encode())

    async def post(self, body: bytes, **headers: str) -> Answer:
        headers = {"Content-Type": "application/json", **headers}
        if self.token:
            headers["X-Walkin-Session"] = self.token
        async with self.http.post(f"{self.url}/sql", data=body, headers=headers) as response:
            raw = await response.read()
            self.token = response.headers.get("X-Walkin-Session", self.token)
            return Answer(response.status, json.loads(raw), response.headers.copy(), raw)

    async def rows(self, sql: str, args: Any = None, **more: Any) -> list[list[Any]]:
        answer = await self.sql(sql, args, **more)
        assert answer.status == 200, answer.body
        return answer.body["rows"]

    def another(self) -> Client:
        return Client(self.http, self.url)


@asynccontextmanager
async def client_of(deployment: Deployment) -> AsyncIterator[Client]:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        yield Client(http, deployment.url)


def assert_error(answer: Answer, status: int, code: str, text: str | None = None) -> None:
    """The one envelope that every error has."""
    assert (answer.status, answer.body.get("code")) == (status, code), answer.body
    assert set(answer.body) <= {"error", "code", "request_id", "hint", "report", "line", "statement"}
    assert answer.body["request_id"] == answer.headers["X-Request-ID"]
    if text is not None:
        assert answer.body["error"] == text


def assert_away(answer: Answer, code: str) -> None:
    """A 503 with the code of the part that is away, or the circuit breaker's once that has noticed."""
    assert_error(answer, 503, "circuit_open" if answer.body.get("code") == "circuit_open" else code)
