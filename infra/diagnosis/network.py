"""The addresses that Mayfly listens on, and who stands before them."""

from __future__ import annotations

import ipaddress
import os
from contextlib import suppress

from .finding import Finding, failure, ok, warning
from .host import REPO, Host

_LISTENING = "0A"
_FRONT = f"{REPO}/infra/tls # docs/runbook.md has the set-up; then MAYFLY_LISTEN=127.0.0.1:8080"


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: Host) -> Finding:
    found = host.settings.listen
    if _is_loopback(found):
        return ok(found)
    return warning(f"{found} is reached without TLS: tokens can be read on the way", f"# {_FRONT}")


def metrics(host: Host) -> Finding:
    found = host.settings.metrics_listen
    if not found or _is_loopback(found):
        return ok(found or "off")
    return warning(f"{found}: whoever reaches it sees how much is going on", "export MAYFLY_METRICS_LISTEN=127.0.0.1:9464")


def front(host: Host) -> Finding:
    """Behind a proxy that is not trusted every caller is the proxy, and one rate limit is everybody's."""
    if "FRONT_MAYFLY" not in (host.read("/etc/haproxy/haproxy.cfg") or ""):
        return ok("infra/tls is not in use here")
    if host.settings.trusted_proxies:
        return ok(f"infra/tls, trusted as {host.settings.trusted_proxies}")
    return warning("infra/tls, and MAYFLY_TRUSTED_PROXIES is empty", "export MAYFLY_TRUSTED_PROXIES=127.0.0.1/32,::1/128")


def ports(host: Host) -> Finding:
    """Those of the HTTP API and of the metrics, free or Mayfly's."""
    wanted = {
        "MAYFLY_LISTEN": (host.settings.listen, "127.0.0.1:8081"),
        "MAYFLY_METRICS_LISTEN": (host.settings.metrics_listen, "127.0.0.1:9465"),
    }
    found = []
    for name, (address, another) in wanted.items():
        port = address.rpartition(":")[2]
        if not address and name == "MAYFLY_METRICS_LISTEN":
            continue
        if not port.isdigit():
            return failure(f"{name}={address} has no port", f"export {name}={another}")
        inodes = _listening(host, int(port))
        owners = _owners(host, {f"socket:[{inode}]" for inode in inodes})
        if inodes and not owners and host.uid:
            return warning(f"{port} is in use, by whom only root sees", f"sudo {REPO}/infra/doctor")
        if inodes and not (owners and all("gateway.web" in line for line in owners.values())):
            who = ", ".join(f"{pid} ({line.partition(' ')[0]})" for pid, line in owners.items()) or "a process elsewhere"
            return failure(f"{port} is in use by {who}", f"export {name}={another} # a port that is free")
        found.append(f"{port} is Mayfly's" if inodes else f"{port} is free")
    return ok(", ".join(found))


def _listening(host: Host, port: int) -> list[str]:
    """The inodes of the sockets that listen there, on whatever address."""
    return [line.split()[9] for line in _sockets(host) if line.split()[3] == _LISTENING and _port_of(line) == port]


def _sockets(host: Host) -> list[str]:
    return [line for table in ("tcp", "tcp6") for line in (host.read(f"/proc/net/{table}") or "").splitlines()[1:]]


def _port_of(line: str) -> int:
    return int(line.split()[1].rpartition(":")[2], 16)


def _owners(host: Host, sockets: set[str]) -> dict[str, str]:
    """The command line of each process that has one of the sockets, as far as we may look."""
    found = {}
    for process in host.path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(descriptor) in sockets for descriptor in (process / "fd").iterdir()):
                found[process.name] = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    return found
