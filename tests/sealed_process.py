"""What a runner's confinement leaves to a process, for a test that gives itself up to it: no return, and no other file.

Without the container around it: no namespaces, no dropped capabilities.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import apsw

from runner import confine, landlock, seccomp, syscalls

from .runner_database import TenantDatabase

REPO = Path(__file__).parent.parent


def seal(tenant: TenantDatabase) -> None:
    """From here on a system call that a runner lacks is the end of the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    apsw.randomness(8)
    confine.renounce_privileges()
    confine.limit({"FSIZE": tenant.configuration.instance_bytes})
    landlock.restriction((str(tenant.path), str(tenant.journal)), landlock.abi())()
    seccomp.Filter(seccomp.build(syscalls.machine())).install()
    try:
        os.close(os.open("/etc/passwd", os.O_RDONLY))
    except PermissionError:
        return
    raise AssertionError("other files can still be opened")


def run_sealed(module: str, function: str, folder: Path, **environment: str) -> list[str]:
    """Lines printed by `function(folder)`, called in a process of its own that may `seal` itself."""
    program = f"import sys; from {module} import {function}; {function}(sys.argv[1])"
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, cwd=REPO, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-2000:])
    return done.stdout.splitlines()
