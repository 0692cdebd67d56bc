"""Where processor time and memory go: by process, from /proc, and by container, from the counters of its cgroup.

A deployment is `web`, `launcher` and its `containers`. Beside it stand `docker` (dockerd, containerd and, of memory, this
deployment's shims), `client` (the load generator), and `rest`: busy time of the machine that nobody above accounts for. That is
softirqs, kernel threads that clean up after namespaces and mounts, and whatever else the machine was doing; it is counted by ticks.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .deployments import Deployment
from .figures import rounded
from .floor import Docker
from .load import Phase, machine_cpu_seconds

WEB, LAUNCHER, CONTAINERS, DOCKER, CLIENT, REST, MACHINE = "web", "launcher", "containers", "docker", "client", "rest", "machine"

_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
_DAEMONS = ("dockerd", "containerd")
_SHIM = "containerd-shim"
_ALL_CONTAINERS = tuple(Path("/sys/fs/cgroup", *parts) for parts in (("cpuacct", "docker"), ("cpu,cpuacct", "docker"), ("docker",)))
_GONE = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True, slots=True)
class Used:
    """Processor seconds."""

    user: float = 0.0
    system: float = 0.0

    def __add__(self, other: Used) -> Used:
        return Used(self.user + other.user, self.system + other.system)

    def __sub__(self, other: Used) -> Used:
        return Used(self.user - other.user, self.system - other.system)

    @property
    def total(self) -> float:
        return self.user + self.system


@dataclass(frozen=True, slots=True)
class _Members:
    """Who belongs where at one moment: process ids, and by a container's id the folder of its processor time."""

    pids: dict[str, list[int]]
    containers: dict[str, Path]

    def read(self) -> _Sample:
        own = resource.getrusage(resource.RUSAGE_SELF)
        return _Sample(
            processes={name: sum((_process_used(pid) for pid in pids), Used()) for name, pids in self.pids.items()},
            containers=sum((_group_used(group) for group in self.containers.values()), Used()),
            all_containers=next((_group_used(group) for group in _ALL_CONTAINERS if group.is_dir()), None),
            client=Used(own.ru_utime, own.ru_stime),
            machine=machine_cpu_seconds(),
        )


@dataclass(frozen=True, slots=True)
class _Sample:
    processes: dict[str, Used]
    containers: Used
    all_containers: Used | None
    """Of the whole host, those that are gone included; None where they share no cgroup."""
    client: Used
    machine: float


class Accounting:
    """Of one deployment."""

    def __init__(self, deployment: Deployment, docker: Docker) -> None:
        self._deployment = deployment
        self._docker = docker

    async def around(self, work: Callable[[], Awaitable[Phase]]) -> tuple[Phase, dict[str, Any]]:
        """A window, and the microseconds per request that each part used in it: user, system, and both together."""
        members = await self._members()
        before = members.read()
        phase = await work()
        after = members.read()
        used = {name: after.processes[name] - before.processes[name] for name in (WEB, LAUNCHER)}
        if (await self._members()).containers.keys() == members.containers.keys():
            used[CONTAINERS] = after.containers - before.containers
        elif before.all_containers is not None and after.all_containers is not None:
            # Containers came and went; what they used is only in the sum that all containers of this host share.
            used[CONTAINERS] = after.all_containers - before.all_containers
        used[DOCKER] = after.processes[DOCKER] - before.processes[DOCKER]
        used[CLIENT] = after.client - before.client
        machine = after.machine - before.machine
        rest = machine - sum(part.total for part in used.values())
        return phase, {
            **{name: _microseconds(part, phase.answers) for name, part in used.items()},
            REST: {"us": rounded(1e6 * rest / phase.answers)},
            MACHINE: {"us": rounded(1e6 * machine / phase.answers)},
        }

    async def _members(self) -> _Members:
        containers = await self._docker.pids(self._deployment.label)
        pids = {name: _family(self._deployment.pid(name)) for name in (WEB, LAUNCHER)}
        pids[DOCKER] = [pid for pid in _pids() if _name(pid) in _DAEMONS]
        return _Members(pids, {container: group for container, pid in containers.items() if (group := _cgroup(pid, "cpuacct"))})

    async def memory(self) -> dict[str, Any]:
        """Bytes. `service_bytes` is the sum of the proportional set sizes of web, launcher and all processes in the containers."""
        containers = await self._docker.pids(self._deployment.label)
        groups = [group for pid in containers.values() if (group := _cgroup(pid, "memory"))]
        inside = [int(pid) for group in groups for pid in _read(group / "cgroup.procs").split()]
        shims = [
            pid for pid in _pids() if _name(pid).startswith(_SHIM) and any(container in _line(pid) for container in containers)
        ]
        parts = {
            WEB: _memory(_family(self._deployment.pid(WEB))),
            LAUNCHER: _memory(_family(self._deployment.pid(LAUNCHER))),
            CONTAINERS: _memory(inside),
        }
        return {
            "service_bytes": sum(parts.values()),
            **{f"{name}_bytes": value for name, value in parts.items()},
            "containers": len(containers),
            "processes_in_containers": len(inside),
            "container_cgroups_bytes": sum(_group_memory(group) for group in groups),
            "not_counted": {
                **{f"{name}_bytes": _memory(pid for pid in _pids() if _name(pid) == name) for name in _DAEMONS},
                "shims_bytes": _memory(shims),
            },
        }


def _microseconds(used: Used, requests: int) -> dict[str, float]:
    values = {"us": used.total, "user_us": used.user, "system_us": used.system}
    return {name: rounded(1e6 * seconds / requests) for name, seconds in values.items()}


def disk_bytes(folder: Path) -> int:
    """Allocated blocks of everything below, folders too."""
    total = folder.lstat().st_blocks
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(root, name)).st_blocks
    return 512 * total


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _family(ancestor: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        if fields := _stat(pid):
            children.setdefault(int(fields[1]), []).append(pid)
    found = [ancestor]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat behind the name; nothing when the process is gone."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(") ")[2].split()


def _process_used(pid: int) -> Used:
    """With its children that it has waited for."""
    fields = _stat(pid)
    if not fields:
        return Used()
    user, system, user_of_children, system_of_children = (int(value) * _TICK_SECONDS for value in fields[11:15])
    return Used(user + user_of_children, system + system_of_children)


def _name(pid: int) -> str:
    return _read(Path(f"/proc/{pid}/comm")).strip()


def _line(pid: int) -> str:
    return _read(Path(f"/proc/{pid}/cmdline"))


def _memory(pids: Iterable[int]) -> int:
    """Proportional set size, bytes. Another user's process counts as nothing: run as root."""
    total = 0
    for pid in pids:
        with suppress(PermissionError, *_GONE):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
    return total


def _cgroup(pid: int, controller: str) -> Path | None:
    """The folder of a process's cgroup in the hierarchy of a controller: cgroup v1, or v2 where v1 has none."""
    of_version_1 = of_version_2 = None
    for line in _read(Path(f"/proc/{pid}/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            of_version_1 = Path("/sys/fs/cgroup") / controllers / path.lstrip("/")
        elif not controllers:
            of_version_2 = Path("/sys/fs/cgroup") / path.lstrip("/")
    folder = of_version_1 or of_version_2
    return folder if folder is not None and folder.is_dir() else None


def _group_used(group: Path) -> Used:
    try:
        if (exact := group / "cpuacct.usage").exists():
            # Only the sum is exact; how it divides is known by ticks.
            total, user = (int(file.read_text()) / 1e9 for file in (exact, group / "cpuacct.usage_user"))
            return Used(user, total - user)
        counters = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
    except _GONE:
        return Used()
    return Used(int(counters["user_usec"]) / 1e6, int(counters["system_usec"]) / 1e6)


def _group_memory(group: Path) -> int:
    for name in ("memory.usage_in_bytes", "memory.current"):
        if text := _read(group / name):
            return int(text)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except _GONE:
        return ""
