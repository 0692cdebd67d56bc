"""Containers for tests of the sandbox: the real image and the launcher's own specification, with probes beside the runner.

`Probes.run` starts one container and returns how it ended. What it changes of the specification, its arguments say; what a
test does not name is as in production, but for two things: the entry point is a probe, and /data is a tmpfs (nosuid, nodev,
noexec, as the volume is), so that a run leaves nothing behind and needs no mount on the host.
"""

from __future__ import annotations

import copy
import io
import json
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
from docker.utils.socket import STDERR, STDOUT, frames_iter

from gateway.launcher.specification import RUNNER_USER, container_specification
from gateway.settings import Settings

ROOT = Path(__file__).parent.parent
PROFILE = (ROOT / "infra" / "seccomp.json").read_text()
SLOT_PROFILE = (ROOT / "infra" / "seccomp-slot.json").read_text()
SEALED_TMPFS = "rw,nosuid,nodev,noexec,uid=64700,size=32m"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a container ended. A process killed by signal N has exit code 128 + N."""

    exit_code: int
    output: bytes
    errors: bytes

    @property
    def report(self) -> dict[str, Any]:
        assert self.output.strip(), f"exit code {self.exit_code} and no report: {self.errors.decode(errors='replace')}"
        report: dict[str, Any] = json.loads(self.output)
        return report


def profile_with(
    *,
    added: tuple[str, ...] = (),
    removed: tuple[str, ...] = (),
    answered: Mapping[str, int] | None = None,
    base: str = PROFILE,
) -> str:
    """The container's seccomp profile, or `base`, with names added, taken away, or answered with an errno."""
    profile = json.loads(base)
    gone = {*removed, *(answered or {}), *added}
    for entry in profile["syscalls"]:
        entry["names"] = [name for name in entry["names"] if name not in gone]
    profile["syscalls"] = [entry for entry in profile["syscalls"] if entry["names"]]
    if added:
        profile["syscalls"].append({"names": [*added], "action": "SCMP_ACT_ALLOW", "args": []})
    for name, number in (answered or {}).items():
        profile["syscalls"].append({"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": number, "args": []})
    return json.dumps(profile)


def printed(client: docker.DockerClient, image: str, code: str, **options: Any) -> Any:
    """What a script prints in the image's interpreter, as JSON; `options` are more of Docker's."""
    container = client.containers.create(
        image,
        entrypoint=["/usr/bin/python3.13", "-s", "-P", "-S", "-B", "-c", code],
        network_mode="none",
        read_only=True,
        user=RUNNER_USER,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        **options,
    )
    try:
        container.start()
        status = container.wait(timeout=120)["StatusCode"]
        assert status == 0, container.logs().decode()
        return json.loads(container.logs(stderr=False))
    finally:
        container.remove(force=True)


@dataclass(frozen=True, slots=True)
class Probes:
    client: docker.DockerClient
    image: str

    def run(
        self,
        order: Mapping[str, Any] | list[str],
        *,
        probe: str = "",
        seccomp: str | None = PROFILE,
        no_new_privileges: bool = True,
        data: str = SEALED_TMPFS,
        host: Mapping[str, Any] | None = None,
        top: Mapping[str, Any] | None = None,
    ) -> Ended:
        """Run the probe with its order in one container.

        `seccomp=None` is no profile; `host` replaces keys of HostConfig, `top` of the specification's first level.
        """
        body = container_specification(Settings(image=self.image), uuid.UUID(int=0), Path("/unused"), "tests", PROFILE)
        body = copy.deepcopy(body)
        body |= {
            "Entrypoint": ["/usr/bin/python3.13", "-I", "-S", "-B", f"/opt/mayfly/probes{probe}"],
            "Cmd": [json.dumps(order)],
            "AttachStderr": True,
            "Labels": {"org.mayfly.test": "probes"},
            **(top or {}),
        }
        options = ["no-new-privileges"] if no_new_privileges else []
        body["HostConfig"] |= {
            "Mounts": [],
            "Tmpfs": {"/data": data, "/scratch": "rw,mode=1777,size=1m"},
            "SecurityOpt": [*options, "seccomp=" + (seccomp or "unconfined")],
            **(host or {}),
        }
        api = self.client.api
        container = api.create_container_from_config(body)["Id"]
        try:
            attached = api.attach_socket(container, params={"stdout": 1, "stderr": 1, "stream": 1})
            with closing(attached._sock), attached:
                api.start(container)
                frames = list(frames_iter(attached, tty=False))
            code = api.wait(container)["StatusCode"]
        finally:
            api.remove_container(container, force=True)
        output, errors = (b"".join(data for stream, data in frames if stream == wanted) for wanted in (STDOUT, STDERR))
        return Ended(code, output, errors)


@contextmanager
def probes_beside_the_runner(base: str | None = None) -> Iterator[Probes]:
    """The real image, or `base`, with tests/probes added as /opt/mayfly/probes, for as long as the context lasts."""
    base = base or Settings.from_environment().image
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        recipe = f"FROM {base}\nADD probes /opt/mayfly/probes\n".encode()
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(recipe)
        tar.addfile(entry, io.BytesIO(recipe))
        tar.add(ROOT / "tests" / "probes", "probes", filter=lambda item: None if "__pycache__" in item.name else item)
    context.seek(0)
    client = docker.from_env(timeout=120)
    tag = f"mayfly-probes:{uuid.uuid4().hex[:12]}"
    try:
        client.images.build(fileobj=context, custom_context=True, tag=tag, rm=True, network_mode="none")
        try:
            yield Probes(client, tag)
        finally:
            client.images.remove(tag, force=True)
    finally:
        client.close()
