"""All that is known of a machine."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from gateway.settings import Settings

from .daemon import Docker, ask
from .finding import Finding, failure, ok, warning

REPO = Path(__file__).resolve().parents[2]
_LANDLOCK_CREATE_RULESET = 444
_TIME_ERROR = 5


@dataclass(frozen=True, slots=True)
class Host:
    settings: Settings
    docker: Docker
    root: Path = Path("/")
    uid: int = 0
    machine: str = "x86_64"
    landlock_abi: int = 0
    clock_synchronised: bool = True
    python: tuple[int, int] = (3, 11)
    has_venv: bool = True

    def path(self, name: str | Path) -> Path:
        return self.root / str(name).lstrip("/")

    def read(self, name: str | Path) -> str | None:
        """A file's text without the white space around it; None where there is no such file. Raises OSError."""
        try:
            return self.path(name).read_text(errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sysctl(self, name: str) -> str | None:
        return self.read("/proc/sys/" + name.replace(".", "/"))

    @property
    def state(self) -> Path:
        return self.settings.state_dir

    @property
    def kernel(self) -> tuple[int, int]:
        """(6, 1) of 6.1.0-18-amd64."""
        release = (self.read("/proc/sys/kernel/osrelease") or "0.0").split(".")
        digits = "".join(char for char in release[1] if char.isdigit())
        return int(release[0]), int(digits or 0)

    @property
    def has_apparmor(self) -> bool:
        return self.read("/sys/module/apparmor/parameters/enabled") == "Y"

    @property
    def restart(self) -> str:
        """Of dockerd, which takes up most of its configuration then only."""
        if self.path("/run/systemd/system").is_dir():
            return "systemctl restart docker"
        return f"{REPO}/infra/down && {REPO}/infra/up -d # and dockerd itself, where infra/up did not start it"

    def for_zygote(self, found: str, remedy: str) -> Finding:
        """What engine zygote lacks: nothing with engine docker, a warning with `auto`, which takes that engine then."""
        match self.settings.engine:
            case "zygote":
                return failure(found, remedy)
            case "auto":
                return warning(found, remedy)
            case _:
                return ok(f"{found}; engine docker does without")


def this_host(settings: Settings) -> Host:
    return Host(
        settings=settings,
        docker=ask(settings.docker_socket, settings.image),
        uid=os.getuid(),
        machine=platform.machine(),
        landlock_abi=_landlock_abi(),
        clock_synchronised=_clock_synchronised(),
        python=sys.version_info[:2],
        has_venv=all(importlib.util.find_spec(name) for name in ("ensurepip", "venv")),
    )


def _landlock_abi() -> int:
    """0 where the kernel has none, or has it switched off, or does not let us ask."""
    libc = ctypes.CDLL(None, use_errno=True)
    abi: int = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 0 and ctypes.get_errno() not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    return max(abi, 0)


def _clock_synchronised() -> bool:
    """The kernel's word: a program that keeps the time tells it."""
    timex = ctypes.create_string_buffer(256)  # struct timex is 208 bytes; mode 0 reads
    return bool(ctypes.CDLL(None).adjtimex(timex) != _TIME_ERROR)
