"""What a runner's container is, a slot's and the command's: pure functions from settings to the body of `POST /containers/create`.

Nothing else in the launcher decides anything about a container, and nothing a caller sends takes part. Golden files pin them.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any, Literal

from ..settings import Settings

Command = Literal["serve", "serve-read", "serve-bulk", "serve-bulk-read", "selftest"]
READ_ONLY: frozenset[Command] = frozenset({"serve-read", "serve-bulk-read"})
BULK: frozenset[Command] = frozenset({"serve-bulk", "serve-bulk-read"})

# An id that no account of a host has. Every runner has it, so there is no nproc among the limits: it counts across containers.
RUNNER_UID = 64700
RUNNER_USER = f"{RUNNER_UID}:{RUNNER_UID}"

APPARMOR_PROFILE = "mayfly-slot"  # infra/apparmor

# Docker's own list, which naming any path replaces, and two places that anybody in a container could write to: POSIX message
# queues, and the triggers of the host's pressure statistics.
MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/dev/mqueue",
    "/proc/pressure",
)

# Docker's own list, which naming any path replaces.
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

LABEL_ROLE = "org.mayfly.role"
LABEL_DEPLOYMENT = "org.mayfly.deployment"
LABEL_INSTANCE = "org.mayfly.instance"
LABEL_SLOT = "org.mayfly.slot"


def runner_configuration(settings: Settings) -> str:
    """The one environment variable that a runner reads, as JSON."""
    configuration = {
        "deadline_ms": round(settings.deadline_seconds * 1000),
        "bulk_deadline_ms": round(settings.bulk_deadline_seconds * 1000),
        "max_request_bytes": settings.max_request_frame_bytes,
        "max_rows": settings.max_rows,
        "max_result_bytes": settings.max_result_bytes,
        "max_stream_bytes": settings.max_stream_bytes,
        "instance_bytes": settings.instance_bytes,
        "heap_bytes": settings.heap_bytes,
        "nofile": settings.container_nofile,
        "min_landlock_abi": settings.min_landlock_abi,
        "sqlite_limits": settings.sqlite_limits,
    }
    return json.dumps(configuration, separators=(",", ":"))


def container_specification(
    settings: Settings,
    instance: uuid.UUID,
    volume: Path,
    deployment: str,
    seccomp_profile: str,
    command: Command = "serve",
) -> dict[str, Any]:
    """The exact body of one run's container. `seccomp_profile` is the profile's JSON text: the Engine API takes no path."""
    body = _body(
        settings,
        command,
        {LABEL_ROLE: "runner", LABEL_DEPLOYMENT: deployment, LABEL_INSTANCE: str(instance)},
        [f"seccomp={seccomp_profile}"],
        {
            "Type": "bind",
            "Source": str(volume),
            "Target": "/data",
            "BindOptions": {"Propagation": "rprivate", "NonRecursive": True},
        },
        talks=True,
    )
    if command in READ_ONLY:
        # Not the mount's own `ReadOnly`: runc 1.1 remounts for that without nosuid, nodev and noexec. For this it keeps them.
        body["HostConfig"]["ReadonlyPaths"] = [*READONLY_PATHS, "/data"]
    return body


def slot_specification(
    settings: Settings, slot: str, socket: Path, deployment: str, seccomp_profile: str, *, apparmor: bool
) -> dict[str, Any]:
    """The exact body of a slot container: a runner's, without a volume. Its way to the world is the launcher's socket."""
    body = _body(
        settings,
        "zygote",
        {LABEL_ROLE: "slot", LABEL_DEPLOYMENT: deployment, LABEL_SLOT: slot},
        # Docker's own AppArmor profile denies every mount.
        [f"seccomp={seccomp_profile}", *([f"apparmor={APPARMOR_PROFILE}"] if apparmor else [])],
        {
            "Type": "bind",
            "Source": str(socket),
            "Target": "/slot.sock",
            "ReadOnly": True,
            "BindOptions": {"Propagation": "rprivate", "NonRecursive": True},
        },
        talks=False,
    )
    # Else each child would look up anew, in every library, each function that its zygote has not called.
    body["Env"].append("LD_BIND_NOW=1")
    # All of the zygote's objects come to lie in one place, which it puts onto huge pages.
    body["Env"].append("PYTHONMALLOC=malloc")
    return body


def command_specification(settings: Settings, seccomp_profile: str) -> dict[str, Any]:
    """The container of `mayfly verify` and `mayfly salvage`: a runner's, whose volume is memory of its own, for two files.

    It is nobody's instance and no launcher's to sweep, so it goes by itself when it has ended.
    """
    volume_bytes = 2 * settings.instance_bytes
    body = _body(settings, "file", {LABEL_ROLE: "command"}, [f"seccomp={seccomp_profile}"], None, talks=True)
    host = body["HostConfig"]
    host["Tmpfs"] = {"/data": f"rw,nosuid,nodev,noexec,uid={RUNNER_UID},gid={RUNNER_UID},size={volume_bytes}"}
    host["AutoRemove"] = True
    host["Memory"] = host["MemorySwap"] = settings.container_memory_bytes + volume_bytes
    return body


def _body(
    settings: Settings, command: str, labels: dict[str, str], security: list[str], mount: dict[str, Any] | None, *, talks: bool
) -> dict[str, Any]:
    """What both have in common, and that is every limit. `talks` by its stdin and stdout."""
    host: dict[str, Any] = {
        "ReadonlyRootfs": True,
        "Privileged": False,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges", *security],
        "MaskedPaths": [*MASKED_PATHS],
        "NetworkMode": "none",
        "IpcMode": "none",
        "CgroupnsMode": "private",
        "Memory": settings.container_memory_bytes,
        "MemorySwap": settings.container_memory_bytes,  # memory and swap together: no swap
        "OomKillDisable": False,
        "OomScoreAdj": 1000,  # when the host itself runs short, a runner goes before anything else
        "PidsLimit": settings.container_pids,
        "NanoCpus": round(settings.container_cpus * 1e9),
        "Ulimits": [
            {"Name": "core", "Soft": 0, "Hard": 0},
            {"Name": "fsize", "Soft": settings.instance_bytes, "Hard": settings.instance_bytes},
            {"Name": "nofile", "Soft": settings.container_nofile, "Hard": settings.container_nofile},
        ],
        "LogConfig": {"Type": "none", "Config": {}},  # the reply is the tenant's data: the daemon must not keep it
        "Mounts": [] if mount is None else [mount],
        "AutoRemove": False,  # how it ended is read before it goes
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        "Init": False,
    }
    if settings.docker_runtime:
        host["Runtime"] = settings.docker_runtime
    return {
        "Image": settings.image,
        "Cmd": [command],
        "User": RUNNER_USER,
        "Env": [f"MAYFLY_RUNNER={runner_configuration(settings)}"],
        "WorkingDir": "/",
        "Hostname": "runner",
        "OpenStdin": talks,
        "StdinOnce": talks,
        "AttachStdin": talks,
        "AttachStdout": talks,
        "AttachStderr": False,
        "Tty": False,
        "NetworkDisabled": True,
        "StopSignal": "SIGKILL",
        "Healthcheck": {"Test": ["NONE"]},
        "Labels": labels,
        "HostConfig": host,
    }
