"""The state folder at start: it must carry the mount flags every volume inherits, belong to us alone, and have no second launcher.

Docker's bind mounts take no nosuid,nodev,noexec of their own: not as a mount option, and not through the local volume driver
with `type=none,o=bind` (measured on Docker 20.10). They do inherit the flags of the mount that they are taken from.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from pathlib import Path

from .errors import RefusedError

_SEAL = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
_DEPLOYMENT = re.compile(r"[0-9a-f]{32}")


def prepare_folders(state: Path) -> None:
    """Make what is missing; raises RefusedError unless the volumes' folder is sealed and ours alone."""
    for folder in (state / "instances", state / "launcher", state / "run"):
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            continue
        except OSError as error:
            raise RefusedError(f"cannot make {folder}: {error.strerror}") from error
    for folder in (state / "instances", state / "launcher"):
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
            raise RefusedError(f"{folder} must be a folder of mode 700 of user {os.getuid()}; chown and chmod 700 it")
    if os.statvfs(state / "instances").f_flag & _SEAL != _SEAL:
        raise RefusedError(
            f"{state} is not mounted nosuid,nodev,noexec; as root: "
            f"mount --bind {state} {state} && mount -o remount,bind,nosuid,nodev,noexec {state}"
        )


def lock(state: Path) -> int:
    """Hold `<state>/launcher/lock` until the descriptor closes: two launchers on one state would each lease the same volume."""
    descriptor = os.open(state / "launcher" / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RefusedError(f"another launcher serves {state}") from None
    return descriptor


def deployment_id(state: Path) -> str:
    """Random, made once and kept: it labels our containers, so that two deployments on one host never reap each other's."""
    path = state / "launcher" / "deployment-id"
    if not path.exists():
        draft = path.with_name(".deployment-id")
        draft.write_text(secrets.token_hex(16))
        draft.rename(path)
    text = path.read_text().strip()
    if not _DEPLOYMENT.fullmatch(text):
        raise RefusedError(f"{path} does not hold a deployment id; remove it if no container of this deployment is left")
    return text
