"""What the kernel says about a process: read by the process itself, or by the host about one that sees no /proc."""

from __future__ import annotations

import os
from typing import Any

NAMESPACES = ("mnt", "pid", "ipc", "uts", "net", "cgroup", "user")


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def look(process: str) -> dict[str, Any]:
    """`process` is its folder in /proc."""
    return {
        "status": parse_status(read(f"{process}/status")),
        "limits": parse_limits(read(f"{process}/limits")),
        "namespaces": {name: os.readlink(f"{process}/ns/{name}") for name in NAMESPACES},
        "mounts": mounts(process),
        "started_with": {name: read(f"{process}/{name}") for name in ("environ", "cmdline")},
        "interfaces": [line.split(":")[0].strip() for line in read(f"{process}/net/dev").splitlines()[2:]],
        "routes": routes(process),
    }


def parse_status(text: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def parse_limits(text: str) -> dict[str, list[str]]:
    return {line[:25].strip(): line[25:].split()[:2] for line in text.splitlines()[1:]}


def mounts(process: str) -> list[dict[str, Any]]:
    found = []
    for line in read(f"{process}/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        found.append({"point": fields[4], "options": fields[5].split(","), "type": right.split()[0]})
    return found


def routes(process: str) -> list[str]:
    """IPv4's table has a heading; IPv6's own routes on lo lead nowhere."""
    net = f"{process}/net"
    found = read(f"{net}/route").splitlines()[1:] if os.path.exists(f"{net}/route") else []
    if os.path.exists(f"{net}/ipv6_route"):
        found += [line for line in read(f"{net}/ipv6_route").splitlines() if line.split()[-1] != "lo"]
    return found
