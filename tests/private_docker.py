"""A Docker daemon of the test's own, which it may kill. It shares nothing with the machine's daemon but the kernel."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .conftest import eventually


@dataclass
class PrivateDocker:
    folder: Path
    daemon: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        return f"unix://{self.folder}/docker.sock"

    def answers(self) -> bool:
        return subprocess.run(["docker", "-H", self.url, "version"], capture_output=True).returncode == 0

    def start(self) -> None:
        options = {
            "--host": self.url,
            "--data-root": self.folder / "data",
            "--exec-root": self.folder / "exec",
            "--pidfile": self.folder / "docker.pid",
            "--bridge": "none",
            "--group": "docker",
        }
        command = ["dockerd", "--iptables=false", *(str(part) for pair in options.items() for part in pair)]
        with open(self.folder / "log", "ab") as log:
            self.daemon = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        eventually(self.answers, 60)

    def kill(self) -> None:
        """kill -9, as the machine's memory killer would; the daemon's containerd is its child and dies with it."""
        assert self.daemon is not None
        containerd = self.folder / "exec" / "containerd" / "containerd.pid"
        for pid in (self.daemon.pid, int(containerd.read_text())):
            os.kill(pid, signal.SIGKILL)
        self.daemon.wait()

    def stop(self) -> None:
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.terminate()
            self.daemon.wait(60)


@contextmanager
def private_docker() -> Iterator[PrivateDocker]:
    folder = Path(tempfile.mkdtemp(prefix="mayfly-docker-"))
    folder.chmod(0o755)
    docker = PrivateDocker(folder)
    docker.start()
    try:
        yield docker
    finally:
        docker.stop()
        for mount in reversed([line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]):
            if mount.startswith(str(folder)):
                subprocess.run(["umount", mount], check=False)
        shutil.rmtree(folder)
