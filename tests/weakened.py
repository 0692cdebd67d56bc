"""Containers in which nothing stands in an attack's way, and the same with chosen layers put back as production has them.

A zygote's child is never root, so there is no such container of it; what an attack is after is the runner's user's there.

`WEAKENINGS` says how each layer of the container is taken away. What a run keeps comes from the launcher's own specification, so
that a layer lost there is lost here too. The runner's layers are named as in runner.confine.STEPS, runner.database.PREPARING
and READING.

no-new-privileges stays everywhere. Without it runc cannot start anything under our profile, and Landlock is for the privileged
alone; it takes nothing from a process that is root already.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.launcher.registry import Registry
from gateway.launcher.specification import RUNNER_UID, container_specification
from gateway.launcher.state import prepare_folders
from gateway.protocol import Status
from gateway.settings import Settings
from gateway.uuid7 import uuid7
from runner.confine import FILES

from .containers import PROFILE, ROOT, Ended, Probes, probes_beside_the_runner
from .engines import ENTRIES, Change, Contained, leaving_out
from .launcher_harness import launched
from .sealed import sealed_directory

PROBE = "/layers.py"
ENTRY = ["/usr/bin/python3.13", "-I", "-S", "-B", f"/opt/mayfly/probes{PROBE}"]
OPEN_TMPFS = "rw,suid,dev,exec,uid=64700,size=64m"

WEAKENINGS: Mapping[str, Mapping[str, Any]] = {
    "user": {"top": {"User": "0:0"}},
    "capabilities": {"host": {"CapDrop": []}},
    "profile": {"seccomp": None},
    "read-only root": {"host": {"ReadonlyRootfs": False}},
    "network": {"host": {"NetworkMode": "host"}, "top": {"NetworkDisabled": False}},
    "cgroup": {"host": {"PidsLimit": -1, "Memory": 0, "MemorySwap": 0, "NanoCpus": 0}},
    "ulimits": {"host": {"Ulimits": []}},
}

OF_A_SLOT = ("profile", "network", "cgroup", "ulimits")
"""The weakenings under which a zygote still works, if it does not look."""
OF_A_ZYGOTE = ("process", "limits", "empty root", "read-only root")
"""What a probe's zygote can do without: names from runner.zygote.STEPS, or what probes/clone.py calls them."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What the attacks are after, all of it on the host, and the images that they start from."""

    images: Mapping[str, Probes]
    """`hardened`: the real one. `stock`: with the ready-made wheel of apsw, whose SQLite has everything compiled in."""
    instances: Path
    registry: Registry
    other: uuid.UUID
    """An instance whose database holds "content"."""
    host: Path
    """A folder with `secret.sqlite`, a database that its owner alone may read."""
    open: Path
    """The like of `instances` and `host`, for everybody to read."""
    port: int
    """Of the host's loopback: says "content" to whoever connects."""

    def mount(self, name: str) -> list[dict[str, Any]]:
        """Mounts by their name here. `own volume`, new each time, is what the specification gives; the others it never gives."""
        if name == "own volume":
            own = uuid7()
            self.registry.create(own)
            body = container_specification(Settings(), own, Path(self.registry.volume(own)), "tests", PROFILE)
            mounts: list[dict[str, Any]] = body["HostConfig"]["Mounts"]
            return mounts
        source, target = {
            "instances": (self.instances, "/instances"),
            "host's folder": (self.host, "/host"),
            "host's passwd": (Path("/etc/passwd"), "/etc/passwd"),
            "open instances": (self.open / "instances", "/instances"),
            "open host's folder": (self.open / "host", "/host"),
            "open host's passwd": (Path("/etc/passwd"), "/etc/passwd"),
        }[name]
        return [{"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": True}]

    def run(self, image: str, order: Mapping[str, Any], keeps: Iterable[str], mounts: Iterable[str]) -> Any:
        """The outcome of the order in a container that keeps the named layers: the probe's report, or the signal that ended it."""
        changes: dict[str, Any] = {"host": {}, "top": {}}
        for layer in WEAKENINGS.keys() - set(keeps):
            for key, value in WEAKENINGS[layer].items():
                changes[key] = {**changes[key], **value} if key in ("host", "top") else value
        wanted = [mount for name in mounts for mount in self.mount(name)]
        covered = {mount["Target"] for mount in wanted}
        changes["host"] |= {"Mounts": wanted, "Tmpfs": {} if "/data" in covered else {"/data": OPEN_TMPFS}}
        return outcome_of(self.images[image].run(order, probe=PROBE, **changes))

    async def launch(self, order: Mapping[str, Any], **settings: Any) -> Any:
        """The outcome of the order in a container that a real launcher started; the verdict's name where there is no report."""
        tag = f"{self.images['hardened'].image}-entry"
        client = self.images["hardened"].client
        recipe = io.BytesIO(f"FROM {self.images['hardened'].image}\nENTRYPOINT {json.dumps(ENTRY)}\n".encode())
        client.images.build(fileobj=recipe, tag=tag, rm=True, network_mode="none")
        try:
            with sealed_directory() as state:
                async with launched(state, image=tag, **settings) as (_, caller):
                    replies, output = await caller.do(await caller.create(), **order)
        finally:
            client.images.remove(tag, force=True)
        assert replies[-1].status is Status.ENDED
        return json.loads(output)["outcome"] if output else replies[-1].verdict.name

    def weaker_slot(self, image: str, keeps: Iterable[str], mounts: Iterable[str]) -> Change:
        """A slot that keeps the named layers, of OF_A_SLOT and OF_A_ZYGOTE, and has the named mounts besides its own."""

        def change(body: dict[str, Any]) -> dict[str, Any]:
            host, top = dict(body["HostConfig"]), {}
            for layer in {*OF_A_SLOT} - {*keeps}:
                host |= WEAKENINGS[layer].get("host", {})
                top |= WEAKENINGS[layer].get("top", {})
            if "profile" not in keeps:
                host["SecurityOpt"] = ["no-new-privileges", "seccomp=unconfined"]
            host["Mounts"] = [*host["Mounts"], *(mount for name in mounts for mount in self.mount(f"open {name}"))]
            told = leaving_out(*({*OF_A_ZYGOTE} - {*keeps}))
            environment = [*body["Env"], *(f"{name}={value}" for name, value in told.items())]
            own = {"Image": self.images[image].image, "Entrypoint": ENTRIES["zygote"], "Env": environment, "HostConfig": host}
            return body | top | own

        return change

    async def run_in_a_child(
        self, here: Contained, image: str, order: Mapping[str, Any], keeps: Iterable[str], mounts: Iterable[str], **settings: Any
    ) -> Any:
        """As `run`, by a zygote's child, on a volume that is its user's own; the verdict's name where there is no report."""
        settings = {"deadline_seconds": 60.0, **settings}
        with tempfile.TemporaryDirectory(prefix="mayfly-volume-") as name:
            volume = Path(name)
            for path in (volume, *(volume / path.rpartition("/")[2] for path in FILES)):
                path.touch()
                os.chown(path, RUNNER_UID, RUNNER_UID)
            async with here.open(self.weaker_slot(image, keeps, mounts), sealed=False, **settings) as slot:
                run = await slot.run({"do": "layer", **order}, volume=volume)
        return run.report["outcome"] if run.output else run.verdict.name


def outcome_of(ended: Ended) -> Any:
    if ended.exit_code > 128:
        return signal.Signals(ended.exit_code - 128).name
    return ended.report["outcome"]


@contextmanager
def ground() -> Iterator[Ground]:
    with ExitStack() as stack:
        images = {"hardened": stack.enter_context(probes_beside_the_runner()), "stock": stack.enter_context(stock_probes())}
        state = stack.enter_context(sealed_directory())
        prepare_folders(state)
        registry = Registry(state / "instances", ttl_seconds=600, min_free_bytes=0)
        stack.callback(registry.close)
        other = uuid7()
        registry.create(other)
        Path(registry.volume(other), "db.sqlite").write_text("content")
        host = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mayfly-host-")))
        host.chmod(0o755)
        write_secret(host / "secret.sqlite")
        open_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mayfly-open-")))
        shutil.copytree(state / "instances", open_folder / "instances")
        shutil.copytree(host, open_folder / "host")
        for path in (open_folder, *open_folder.rglob("*")):
            path.chmod(0o755)
        yield Ground(images, state / "instances", registry, other, host, open_folder, stack.enter_context(talkative_port()))


@contextmanager
def stock_probes() -> Iterator[Probes]:
    """The probes in the image as infra/image builds it with MAYFLY_IMAGE_SQLITE=stock."""
    tag = f"mayfly-stock:{uuid.uuid4().hex[:12]}"
    environment = {**os.environ, "MAYFLY_IMAGE": tag, "MAYFLY_IMAGE_SQLITE": "stock"}
    done = subprocess.run([ROOT / "infra" / "image"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    try:
        with probes_beside_the_runner(tag) as probes:
            yield probes
    finally:
        subprocess.run(["docker", "rmi", "-f", tag], check=True, stdout=subprocess.DEVNULL)


def write_secret(path: Path) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("CREATE TABLE secret(a)")
        connection.execute("INSERT INTO secret VALUES ('content')")
    connection.close()
    path.chmod(0o600)


@contextmanager
def talkative_port() -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))

    def talk() -> None:
        with suppress(OSError):  # the listener is shut down
            while True:
                caller, _ = listener.accept()
                with caller:
                    caller.sendall(b"content")

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
