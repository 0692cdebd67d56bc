"""infra/compose as an operator calls it: launcher and web as two containers, over real HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from .conftest import eventually
from .deployment import ENGINES, REPO, UNLIMITED, free_address

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="infra/compose needs root")

CAP_SYS_ADMIN = 1 << 21
SUBNET = "10.213.64.8/29"
# What the launcher's profile denies, whoever asks: errno of each call, 0 if it went well.
PROBE = """
import ctypes, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def called(name, *arguments):
    return ctypes.get_errno() if getattr(libc, name)(*arguments) else 0
def network():
    try:
        socket.socket(socket.AF_INET).close()
    except OSError as error:
        return error.errno
    return 0
print(json.dumps({
    "mount": called("mount", b"none", b"/tmp", b"tmpfs", 0, None),
    "unshare": called("unshare", 0x20000),
    "network": network(),
}))
"""


@dataclass
class Composed:
    environment: dict[str, str]
    state: Path
    address: str
    token: str = ""

    def compose(self, *arguments: str) -> str:
        done = subprocess.run([REPO / "infra/compose", *arguments], env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return done.stdout

    def inspect(self, service: str) -> dict[str, Any]:
        (found,) = json.loads(subprocess.check_output(["docker", "inspect", self.compose("ps", "-q", service).strip()]))
        return found

    def process(self, service: str) -> dict[str, str]:
        """/proc/PID/status of a container's first process."""
        text = Path(f"/proc/{self.inspect(service)['State']['Pid']}/status").read_text()
        return dict(line.split(":\t", 1) for line in text.splitlines())

    def healthz(self) -> dict[str, Any]:
        with urlopen(f"http://{self.address}/healthz", timeout=60) as answer:
            return json.load(answer)

    def rows(self, sql: str) -> list[list[Any]] | None:
        headers = {"Content-Type": "application/json", **({"X-Walkin-Session": self.token} if self.token else {})}
        request = Request(f"http://{self.address}/sql", json.dumps({"sql": sql}).encode(), headers)
        with urlopen(request, timeout=60) as answer:
            self.token = answer.headers.get("X-Walkin-Session", self.token)
            return json.load(answer).get("rows")

    def serves(self) -> bool:
        try:
            return self.healthz()["status"] == "ok"
        except (OSError, HTTPError):
            return False

    def has_the_row(self) -> bool:
        try:
            return self.rows("SELECT x FROM t") == [[42]]
        except (OSError, HTTPError):
            return False

    def kill(self, service: str) -> None:
        """kill -9 of the process: `docker kill` would count as the operator's wish that it stays down."""
        before = self.inspect(service)["State"]["Pid"]
        os.kill(before, signal.SIGKILL)
        eventually(lambda: self.inspect(service)["State"]["Pid"] not in (0, before), 60)


@contextmanager
def composed(engine: str) -> Iterator[Composed]:
    folder = Path(tempfile.mkdtemp(prefix="mayfly-compose-"))
    folder.chmod(0o755)
    address = free_address()
    settings = {
        **UNLIMITED,
        "MAYFLY_STATE_DIR": str(folder),
        "MAYFLY_LISTEN": address,
        "MAYFLY_METRICS_LISTEN": free_address(),
        "MAYFLY_MIN_FREE_BYTES": "0",
        "MAYFLY_ENGINE": engine,
        "COMPOSE_PROJECT_NAME": folder.name,
        "COMPOSE_SUBNET": SUBNET,
    }
    deployment = Composed({**os.environ, **settings}, folder, address)
    try:
        deployment.compose("up", "-d")
        eventually(deployment.serves, 60)
        yield deployment
    finally:
        deployment.compose("down")
        shutil.rmtree(folder)


@pytest.fixture(scope="module", params=ENGINES)
def stack(request: pytest.FixtureRequest) -> Iterator[Composed]:
    with composed(request.param) as deployment:
        deployment.rows("CREATE TABLE t(x); INSERT INTO t VALUES (42)")
        yield deployment


@pytest.fixture(scope="module")
def image() -> str:
    subprocess.run([REPO / "infra/image", "gateway"], check=True, capture_output=True)
    return "mayfly-gateway:latest"


def engine_of(stack: Composed) -> str:
    return stack.environment["MAYFLY_ENGINE"]


def test_requests_are_answered_by_the_engine_that_was_asked_for(stack):
    assert stack.rows("SELECT x FROM t") == [[42]]
    told = stack.healthz()
    assert (told["engine"], told["separation"]) == (engine_of(stack), True)


def test_each_process_is_an_ordinary_user_with_no_capability_but_the_one_that_detached_mounts_need(stack):
    capability = CAP_SYS_ADMIN if engine_of(stack) == "zygote" else 0
    for service, held in (("launcher", capability), ("web", 0)):
        status = stack.process(service)
        user = subprocess.check_output(["id", "-u", f"mayfly-{service}"], text=True).strip()
        assert set(status["Uid"].split()) == {user}
        assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {held}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_containers_are_closed_but_for_what_each_needs(stack):
    state = str(stack.state)
    launcher, web = stack.inspect("launcher"), stack.inspect("web")
    for container, memory in ((launcher, 1 << 30), (web, 2 << 30)):
        host = container["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert not host["Privileged"]
        assert host["CapDrop"] == ["ALL"]
        assert 0 < host["PidsLimit"] <= 128
        assert 0 < host["Memory"] <= memory
        assert host["RestartPolicy"]["Name"] == "unless-stopped"
        assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "5"}
    targets = {name: {mount["Destination"] for mount in item["Mounts"]} for name, item in (("launcher", launcher), ("web", web))}
    assert targets["launcher"] == {f"{state}/instances", f"{state}/launcher", f"{state}/run", "/run/docker.sock"}
    assert targets["web"] == {f"{state}/keys", f"{state}/log", f"{state}/run"}
    assert launcher["HostConfig"]["NetworkMode"] == "none"
    assert web["HostConfig"]["CapAdd"] in (None, [])
    published = [place["HostIp"] for places in web["NetworkSettings"]["Ports"].values() for place in places or []]
    assert set(published) == {"127.0.0.1"}


def test_image_has_no_program_beside_interpreter_loader_and_setpriv(image):
    container = subprocess.check_output(["docker", "create", image], text=True).strip()
    try:
        listed = subprocess.run(
            f"docker export {container} | tar tv", shell=True, check=True, capture_output=True, text=True
        ).stdout
    finally:
        subprocess.run(["docker", "rm", container], check=True, capture_output=True)
    programs = {line.split()[5] for line in listed.splitlines() if line.startswith("-rwx")}
    of_dockers_own = {name for name in programs if name.startswith(("dev/", "etc/", ".dockerenv"))}
    assert programs - of_dockers_own == {"lib64/ld-linux-x86-64.so.2", "usr/bin/python3.13", "usr/bin/setpriv"}


def test_launchers_seccomp_profile_denies_mounts_namespaces_and_networks(image):
    assert probe(image, f"seccomp={REPO}/infra/seccomp-launcher.json") == {"mount": 1, "unshare": 1, "network": 1}


def test_control_dockers_own_profile_with_the_same_capability_allows_them(image):
    # Without AppArmor, which denies mounts itself where a host has it.
    assert probe(image, "apparmor=unconfined") == {"mount": 0, "unshare": 0, "network": 0}


def probe(image: str, security: str) -> dict[str, int]:
    command = ["docker", "run", "--rm", "--network=none", "--cap-drop=ALL", "--cap-add=SYS_ADMIN", "--user=0:0"]
    command += ["--security-opt=no-new-privileges", f"--security-opt={security}", image, "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("service", ["launcher", "web"])
def test_what_is_killed_is_started_again_and_the_instance_is_still_there(stack, service):
    stack.kill(service)
    eventually(stack.has_the_row, 60)


@pytest.mark.parametrize("stack", ["zygote"], indirect=True)
def test_control_launcher_without_the_capability_refuses_engine_zygote_and_says_why(stack):
    arguments = [part.replace(",+sys_admin", "") for part in stack.inspect("launcher")["Args"]]
    stack.compose("stop", "launcher")
    try:
        with pytest.raises(RuntimeError, match="engine zygote: the launcher has no CAP_SYS_ADMIN"):
            stack.compose("run", "--rm", "-T", "--no-deps", "--entrypoint", "/usr/bin/setpriv", "launcher", *arguments)
    finally:
        stack.compose("start", "launcher")
    eventually(stack.has_the_row, 60)


def test_down_leaves_nothing_but_the_state(stack):
    deployment = (stack.state / "launcher" / "deployment-id").read_text().strip()
    stack.compose("down")
    try:
        labels = (f"com.docker.compose.project={stack.state.name}", f"org.mayfly.deployment={deployment}")
        for label in labels:
            for what in (("ps", "-aq"), ("network", "ls", "-q"), ("volume", "ls", "-q")):
                assert subprocess.check_output(["docker", *what, "--filter", f"label={label}"]) == b""
        assert str(stack.state) not in Path("/proc/self/mounts").read_text()
        assert (stack.state / "keys").exists()
    finally:
        stack.compose("up", "-d")
    eventually(stack.has_the_row, 60)


def test_who_trusts_a_proxy_listens_on_loopback_alone():
    """Docker relays what comes from outside from an address of its own, which would be trusted to name any caller."""
    environment = {**os.environ, "MAYFLY_TRUSTED_PROXIES": "10.213.64.1/32", "MAYFLY_LISTEN": "0.0.0.0:8080"}
    done = subprocess.run([REPO / "infra/compose", "up", "-d"], env=environment, capture_output=True, text=True)
    assert done.returncode
    assert "listen on 127.0.0.1 alone" in done.stderr
