"""The state folder, its owners, and the users of the two processes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .finding import Finding, failure, ok, warning
from .host import REPO, Host

WEB, LAUNCHER = "mayfly-web", "mayfly-launcher"
_SEAL = {"nosuid", "nodev", "noexec"}
_INODES_OF_AN_INSTANCE = 5
_UP = f"{REPO}/infra/up -d"
_ESCAPES = (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\"))

# Below the state folder, made by infra/up as root: owner, group, mode.
FOLDERS = {
    "instances": (LAUNCHER, LAUNCHER, 0o700),
    "launcher": (LAUNCHER, LAUNCHER, 0o700),
    "run": (LAUNCHER, WEB, 0o2750),
    "keys": (WEB, WEB, 0o700),
    "log": (WEB, WEB, 0o700),
    "operator": ("root", "root", 0o700),
}


def _ids(host: Host, table: str) -> dict[str, int]:
    lines = [line.split(":") for line in (host.read(f"/etc/{table}") or "").splitlines()]
    return {line[0]: int(line[2]) for line in lines if len(line) > 2 and line[2].isdigit()}


def _groups_of(host: Host, user: str) -> set[str]:
    lines = [line.split(":") for line in (host.read("/etc/group") or "").splitlines()]
    return {line[0] for line in lines if len(line) > 3 and user in line[3].split(",")}


def users(host: Host) -> Finding:
    known = _ids(host, "passwd")
    missing = [user for user in (WEB, LAUNCHER) if user not in known]
    if missing:
        make = " && ".join(f"useradd --system --user-group --no-create-home --shell /usr/sbin/nologin {user}" for user in missing)
        return warning(f"no {' and no '.join(missing)}: one user would be both, and there is no engine zygote", make)
    if "docker" in _groups_of(host, WEB):
        return failure(f"{WEB} is in the group docker, which is root", f"gpasswd -d {WEB} docker")
    if "docker" not in _groups_of(host, LAUNCHER):
        return failure(f"{LAUNCHER} is not in the group docker", f"usermod -aG docker {LAUNCHER}")
    return ok(f"{WEB}, {LAUNCHER} in the group docker")


def folder(host: Host) -> Finding:
    found = host.path(host.state)
    if not found.is_dir():
        return failure(f"no {host.state}", _UP)
    status = found.stat()
    if status.st_uid == _ids(host, "passwd").get("root", 0) and stat.S_IMODE(status.st_mode) != 0o755:
        return failure(f"mode {stat.S_IMODE(status.st_mode):o} of {host.state}", f"chmod 755 {host.state}")
    return ok(str(host.state))


def owners(host: Host) -> Finding:
    top = host.path(host.state)
    if not top.is_dir():
        return _not_yet(host)
    user, group = _ids(host, "passwd"), _ids(host, "group")
    separate = (
        host.path(host.state / "operator").is_dir() and WEB in user and LAUNCHER in user and _owner(top) == user.get("root", 0)
    )
    for name, (owner, of, mode) in FOLDERS.items():
        path = top / name
        if not path.is_dir():
            return failure(f"no {host.state}/{name}", _UP)
        status = path.lstat()
        found = (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))
        if separate and found != (user.get(owner, 0), group.get(of, 0), mode):
            remedy = f"chown {owner}:{of} {host.state}/{name} && chmod {mode:o} {host.state}/{name}"
            return failure(f"{host.state}/{name} is {found[0]}:{found[1]} {found[2]:o}, not {owner}:{of} {mode:o}", remedy)
        if not separate and (found[0], found[2]) != (_owner(top), 0o700):
            remedy = f"chown {_owner(top)} {host.state}/{name} && chmod 700 {host.state}/{name}"
            return failure(f"{host.state}/{name} is {found[0]} {found[2]:o}, not {_owner(top)} 700", remedy)
    return ok("as infra/up makes them" if separate else f"all of user {_owner(top)}")


def _owner(path: Path) -> int:
    return path.stat().st_uid


def sealed(host: Host) -> Finding:
    if not host.path(host.state).is_dir():
        return _not_yet(host)
    over = [(point, flags) for point, flags in _mounts(host) if point == host.state or point in host.state.parents]
    flags = max(over, key=lambda mount: len(mount[0].parts))[1] if over else set()
    if flags >= _SEAL:
        return ok("nosuid,nodev,noexec")
    seal = f"mount --bind {host.state} {host.state} && mount -o remount,bind,nosuid,nodev,noexec {host.state}"
    return failure(f"mounted without {','.join(sorted(_SEAL - flags))}", seal)


def one_file_system(host: Host) -> Finding:
    """An instance is made beside its place and renamed, and a volume has the flags of the mount that it lies in."""
    below = [str(point) for point, _ in _mounts(host) if host.state in point.parents]
    if not below:
        return ok("one")
    return failure(f"mounts below it: {', '.join(below)}", " && ".join(f"umount {point}" for point in reversed(below)))


def _mounts(host: Host) -> list[tuple[Path, set[str]]]:
    """Mount point and flags; of several on one point the last, which is on top, comes last."""
    found = []
    for line in (host.read("/proc/self/mountinfo") or "").splitlines():
        point, flags = line.split()[4:6]
        for escaped, char in _ESCAPES:
            point = point.replace(escaped, char)
        found.append((Path(point), set(flags.split(","))))
    return list(dict(found).items())


def space(host: Host) -> Finding:
    if not host.path(host.state).is_dir():
        return _not_yet(host)
    status = os.statvfs(host.path(host.state))
    free, wanted = status.f_bavail * status.f_frsize, host.settings.min_free_bytes
    if free < wanted:
        return failure(
            f"{free >> 20} MB free, and MAYFLY_MIN_FREE_BYTES is {wanted >> 20} MB", f"du -xsh {host.state}/* # runbook: disk full"
        )
    full = host.settings.instances * 2 * host.settings.instance_bytes
    if full and free < full:
        held = f"{free >> 20} MB free, and {host.settings.instances} instances may hold {full >> 20} MB"
        return warning(held, f"export MAYFLY_INSTANCES={free // (2 * host.settings.instance_bytes)}")
    return ok(f"{free >> 20} MB free")


def inodes(host: Host) -> Finding:
    if not host.path(host.state).is_dir():
        return _not_yet(host)
    status = os.statvfs(host.path(host.state))
    wanted = (host.settings.instances or 1) * _INODES_OF_AN_INSTANCE
    if status.f_files == 0 or status.f_favail >= wanted:  # btrfs counts none
        return ok(f"{status.f_favail} free")
    remedy = f"export MAYFLY_INSTANCES={status.f_favail // _INODES_OF_AN_INSTANCE}"
    return warning(f"{status.f_favail} free, and {host.settings.instances} instances take {wanted}", remedy)


def _not_yet(host: Host) -> Finding:
    return warning(f"no {host.state} yet", _UP)
