"""The Docker daemon: what it gives a container, how it is set, and who can command it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from .finding import Finding, failure, ok, warning
from .host import REPO, Host

FILE = REPO / "infra" / "docker" / "daemon.json"
_CONFIGURATION = "/etc/docker/daemon.json"
_DEFAULT_PID_FILE = "/run/docker.pid"
_JQ = "apt-get install -y jq && "
_REPLACE = f" >{_CONFIGURATION}.new && mv {_CONFIGURATION}.new {_CONFIGURATION}"
_MERGE = f"{_JQ}mkdir -p /etc/docker && touch {_CONFIGURATION} && jq -s add {_CONFIGURATION} {FILE}{_REPLACE}"
_SWAP_ACCOUNTING = (
    "echo 'GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX cgroup_enable=memory swapaccount=1\"' >/etc/default/grub.d/cgroup.cfg"
    " && update-grub && reboot"
)

WHY = {
    "icc": "containers of the default network cannot reach one another; Mayfly's have no network",
    "live-restore": "a restart of dockerd ends no request and no slot",
    "log-driver": "the default keeps the logs of other containers without a bound",
    "no-new-privileges": "no container gains a privilege by a setuid program; Mayfly's never do",
    "userland-proxy": "a process of root's for each port of a container, for nothing",
}


def recommended() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def options(host: Host) -> dict[str, Any]:
    """By the names of daemon.json: what stands there, and in dockerd's command line, which repeats none of it but `hosts`."""
    arguments = _command_line(host)
    path = str(arguments.pop("config-file", _CONFIGURATION))
    file = json.loads(host.read(path) or "{}")
    return {**file, **arguments, "hosts": [*file.get("hosts", []), *arguments.get("hosts", [])]}


def _command_line(host: Host) -> dict[str, Any]:
    pids = (host.docker.pid, host.read(_DEFAULT_PID_FILE))  # under systemd it is systemd that listens
    lines = [(host.read(f"/proc/{pid}/cmdline") or "").strip("\0").split("\0") for pid in pids if pid]
    words = next((line[1:] for line in lines if os.path.basename(line[0]) == "dockerd"), [])
    found: dict[str, Any] = {}
    for position, word in enumerate(words):
        if not word.startswith("-"):
            continue
        after = "".join(words[position + 1 : position + 2]) or "-"
        name, _, value = word.lstrip("-").partition("=")
        given: Any = value or ("true" if after.startswith("-") else after)
        if name in ("H", "host"):
            found.setdefault("hosts", []).append(given)
        else:
            found[name] = {"true": True, "false": False}.get(given, given)
    return found


def asked(look: Callable[[Host], Finding]) -> Callable[[Host], Finding]:
    """Of a daemon that does not answer nothing is known."""

    def looks(host: Host) -> Finding:
        return warning("not known while Docker does not answer", _start(host)) if host.docker.trouble else look(host)

    return looks


def _start(host: Host) -> str:
    """infra/up starts a daemon where nothing else does."""
    if not any(host.path(folder).joinpath("dockerd").exists() for folder in ("/usr/sbin", "/usr/bin", "/usr/local/bin")):
        return "apt-get install -y docker.io"
    return "systemctl start docker" if host.path("/run/systemd/system").is_dir() else f"{REPO}/infra/up -d"


def reachable(host: Host) -> Finding:
    if host.docker.trouble:
        return failure(host.docker.trouble, _start(host))
    return ok(host.settings.docker_socket)


@asked
def version(host: Host) -> Finding:
    found, api = str(host.docker.version.get("Version")), str(host.docker.version.get("ApiVersion"))
    if tuple(map(int, api.split("."))) >= (1, 41):
        return ok(f"{found}, API {api}")
    return failure(f"{found}, API {api}", "apt-get install -y docker.io # 20.10 or newer, for private cgroup namespaces")


@asked
def limits(host: Host) -> Finding:
    lacking = [name for name in ("MemoryLimit", "PidsLimit", "CpuCfsQuota") if not host.docker.info.get(name)]
    found = f"cgroup version {host.docker.info.get('CgroupVersion', '1')}"
    if not lacking:
        return ok(found)
    return failure(f"{found} without {', '.join(lacking)}", _SWAP_ACCOUNTING)


@asked
def swap_limit(host: Host) -> Finding:
    if host.docker.info.get("SwapLimit"):
        return ok("counted")
    return warning("not counted, so what a request swaps out is not limited", _SWAP_ACCOUNTING)


@asked
def security_options(host: Host) -> Finding:
    found = [option.partition(",")[0].removeprefix("name=") for option in host.docker.info.get("SecurityOptions") or ()]
    if "seccomp" not in found:
        return failure("no seccomp", "apt-get install -y docker.io # the distribution's, which has it")
    if host.has_apparmor and "apparmor" not in found:
        return warning("no AppArmor, which the host has", f"apt-get install -y apparmor && {host.restart}")
    return ok(", ".join(found))


@asked
def remapped_users(host: Host) -> Finding:
    """By its connection to the launcher a slot is known, and there a mapped user is another."""
    found = str(host.docker.info.get("SecurityOptions"))
    mapped = [name for name in ("rootless", "userns") if f"name={name}" in found]
    if not mapped:
        return ok("as they are")
    return host.for_zygote(f"mapped ({mapped[0]}), and a slot is known by its user", "export MAYFLY_ENGINE=docker")


def exposure(host: Host) -> Finding:
    """Whoever reaches the API is root. Certificates of callers are what stands before it, not TLS alone."""
    found = options(host)
    on_tcp = [address for address in found["hosts"] if address.startswith("tcp://")]
    told = [text for text in host.docker.info.get("Warnings") or () if "API is accessible on http" in text]
    if (on_tcp and not found.get("tlsverify")) or told:
        remedy = (
            f"{_JQ}jq 'del(.hosts)' {_CONFIGURATION}{_REPLACE} && {host.restart}"
            if "hosts" in json.loads(host.read(_CONFIGURATION) or "{}")
            else "systemctl edit --full docker # take -H tcp://... out of ExecStart; then: systemctl restart docker"
        )
        return failure(f"anybody is root by {', '.join(on_tcp) or told[0]}", remedy)
    return ok(f"{', '.join(on_tcp)} by certificate" if on_tcp else "no TCP")


@asked
def storage(host: Host) -> Finding:
    found = str(host.docker.info.get("Driver"))
    if found in ("overlay2", "overlayfs", "btrfs", "zfs", "fuse-overlayfs"):
        return ok(found)
    return warning(f"{found} copies the image for each container", f"# set storage-driver overlay2 in {_CONFIGURATION}")


@asked
def data_root(host: Host) -> Finding:
    folder = str(host.docker.info.get("DockerRootDir"))
    status = os.statvfs(host.path(folder))
    free, wanted = status.f_bavail * status.f_frsize, max(host.settings.min_free_bytes, 1 << 30)
    if free >= wanted:
        return ok(f"{free >> 20} MB free in {folder}")
    return warning(f"{free >> 20} MB free in {folder}", "docker system prune -f")


@asked
def image(host: Host) -> Finding:
    if host.docker.image:
        return ok(host.settings.image)
    return failure(f"no {host.settings.image}", f"MAYFLY_IMAGE={host.settings.image} {REPO}/infra/image")


def check_of(name: str) -> Callable[[Host], Finding]:
    """One setting of the recommended daemon.json. What the daemon tells of itself counts more than its configuration."""
    wanted = recommended()[name]

    @asked
    def look(host: Host) -> Finding:
        found = _in_force(host, name)
        if found == wanted:
            return ok(json.dumps(found))
        return warning(f"{json.dumps(found)}, and not {json.dumps(wanted)}", f"{_MERGE} && {host.restart}")

    return look


def _in_force(host: Host, name: str) -> Any:
    match name:
        case "live-restore":
            return bool(host.docker.info.get("LiveRestoreEnabled"))
        case "log-driver":
            return host.docker.info.get("LoggingDriver")
        case "icc":
            told = host.docker.bridge.get("Options") or {}
            return told.get("com.docker.network.bridge.enable_icc") == "true" if told else False
        case "userland-proxy":
            return options(host).get(name, True)
        case _:
            return options(host).get(name, False)
