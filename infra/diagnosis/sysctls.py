"""The host's kernel settings against infra/sysctl/60-mayfly.conf, which has the values."""

from __future__ import annotations

import re
from collections.abc import Callable

from .finding import Finding, ok, warning
from .host import REPO, Host

FILE = REPO / "infra" / "sysctl" / "60-mayfly.conf"
_REMEDY = f"cp {FILE} /etc/sysctl.d/ && sysctl -e -p /etc/sysctl.d/{FILE.name}"

WHY = {
    "net.core.somaxconn": "a burst of callers waits to be accepted, and is not dropped",
    "net.ipv4.tcp_max_syn_backlog": "a burst of callers finds room while their connections are half open",
    "net.ipv4.tcp_syncookies": "a flood of half-open connections leaves room for real ones",
    "kernel.core_pattern": "a program that is named here gets the memory of what crashes, whatever the limit of cores",
    "fs.suid_dumpable": "no core of what changed its user",
    "kernel.yama.ptrace_scope": "one process of a user cannot read another's memory",
    "kernel.kptr_restrict": "the kernel's addresses help an exploit of the kernel",
    "kernel.dmesg_restrict": "the kernel's messages hold addresses, and tell whether an exploit was near",
    "kernel.unprivileged_bpf_disabled": "a large part of the kernel that no ordinary user needs",
    "kernel.io_uring_disabled": "a large part of the kernel, and seccomp filters do not see what is done by it",
    "vm.overcommit_memory": "clones ask for more memory than they touch",
    "vm.swappiness": "callers' data belongs into memory",
}
_EXACTLY = {"kernel.core_pattern", "vm.overcommit_memory"}
_AT_MOST = {"fs.suid_dumpable", "vm.swappiness"}


def recommended() -> dict[str, tuple[str, bool]]:
    """Each setting's value, and whether some kernels lack it."""
    lines = re.findall(r"^(-?)([a-z0-9_.]+) = (.+)$", FILE.read_text(), re.MULTILINE)
    return {name: (value, optional == "-") for optional, name, value in lines}


def check_of(name: str) -> Callable[[Host], Finding]:
    wanted, optional = recommended()[name]

    def look(host: Host) -> Finding:
        found = host.sysctl(name)
        if found is None:
            return ok("this kernel has none") if optional else warning("not there", "# is /proc/sys mounted?")
        if _holds(name, found, wanted):
            return ok(found)
        return warning(f"{found}, and not {wanted}", _REMEDY)

    return look


def _holds(name: str, found: str, wanted: str) -> bool:
    if name in _EXACTLY:
        return found == wanted
    return int(found) <= int(wanted) if name in _AT_MOST else int(found) >= int(wanted)
