"""What engine zygote needs of the host, and what to do where it is missing."""

from __future__ import annotations

import os
from pathlib import Path

from .. import mounts
from ..errors import RefusedError

_CAP_SYS_ADMIN = 21
_OTHERWISE = "MAYFLY_ENGINE=docker needs none of this"

_SWITCHES = (
    ("user.max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
    ("kernel.unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    ("kernel.apparmor_restrict_unprivileged_userns", "1", "load the profile that allows it: infra/apparmor/load"),
)
_MOUNTS = "if the host has AppArmor, load the profile that allows mounts: infra/apparmor/load"
_CLONE3 = "clone3 needs Linux 5.3, and libseccomp 2.5 where Docker runs"
_SETTINGS = Path("/proc/sys")


def require(state: Path) -> None:
    """Raises RefusedError unless this process can make detached mounts of the state folder."""
    if not effective_capabilities() >> _CAP_SYS_ADMIN & 1:
        raise RefusedError(
            "engine zygote: the launcher has no CAP_SYS_ADMIN, which detached mounts need; started by root, infra/up gives it, "
            f"as do infra/systemd and infra/compose; {_OTHERWISE}"
        )
    try:
        os.close(mounts.detached(state))
    except OSError as error:
        raise RefusedError(f"engine zygote: no detached mount: {error.strerror}; they need Linux 5.12; {_OTHERWISE}") from error


def effective_capabilities() -> int:
    """As a set of bits."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.removeprefix("CapEff:"), 16)
    return 0


def remedy(refusal: str, settings: Path = _SETTINGS) -> str:
    """For the words of a zygote: the step that failed stands before the first colon."""
    match refusal.partition(":")[0]:
        case "namespaces":
            found = [cure for name, wrong, cure in _SWITCHES if _reads(settings / name.replace(".", "/"), wrong)]
        case "clone":
            found = [cure for name, wrong, cure in _SWITCHES if _reads(settings / name.replace(".", "/"), wrong)] or [_CLONE3]
        case "root" | "volume":
            found = [_MOUNTS]
        case _:
            found = []
    return "; ".join([*found, _OTHERWISE])


def _reads(path: Path, value: str) -> bool:
    try:
        return path.read_text().strip() == value
    except OSError:
        return False
