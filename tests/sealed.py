"""A temporary state folder that is, as the launcher demands, a mount of itself with nosuid,nodev,noexec. Needs root."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def sealed_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mayfly-state-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,nosuid,nodev,noexec", folder], check=True)
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)


@contextmanager
def sealed_disk(*options: str) -> Iterator[Path]:
    """The same as a small file system of its own, for tests that fill it; `options` are tmpfs's, such as size=1m."""
    with tempfile.TemporaryDirectory(prefix="mayfly-state-") as name:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(("nosuid,nodev,noexec,mode=755", *options)), "mayfly", name], check=True
        )
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)
