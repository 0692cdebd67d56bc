"""How much memory is to be had: on the host, and below the limits of the launcher's own control groups if that is less."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = _MEMINFO, own_groups: Path = _OWN_GROUPS, groups: Path = _GROUPS) -> int:
    """Without swapping. What the page cache holds and would give back counts as to be had. Raises OSError."""
    return min([_host(meminfo), *_below_limits(own_groups, groups)])


def _host(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    raise OSError(f"{meminfo} has no MemAvailable")


def _below_limits(own_groups: Path, groups: Path) -> list[int]:
    left = []
    for line in own_groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cache = groups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage, cache = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(root) and (room := _room(group, limit, usage, cache)) is not None:
                left.append(room)
    return left


def _room(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """None where there is no limit, or the group is not to be seen from here."""
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        if most == "max":
            return None
        statistics = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
    except FileNotFoundError:
        return None
    return max(0, int(most) - used + int(statistics.get(cache, 0)))
