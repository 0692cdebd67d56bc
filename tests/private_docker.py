"""A Docker daemon of the test's own, which it may kill. It shares nothing with the machine's daemon but the kernel."""

from __future__ import annotations

import contextlib
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
    configuration: Path | None = None
    """A daemon.json; with one the daemon has a network of its own to make its bridge and its rules in."""
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
            "--group": "docker",
        }
        how = [str(part) for pair in options.items() for part in pair]
        if self.configuration:
            command = ["unshare", "--net", "dockerd", "--config-file", str(self.configuration), *how]
        else:
            command = ["dockerd", "--iptables=false", "--bridge", "none", *how]
        with open(self.folder / "log", "ab") as log:
            self.daemon = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        eventually(self.answers, 60)

    def kill(self) -> None:
        """kill -9, as the machine's memory killer would; the daemon's containerd is its child and dies with it."""
        assert self.daemon is not None
        self.daemon.kill()
        containerd = self.folder / "exec" / "containerd" / "containerd.pid"
        # A daemon that was stopping has taken its containerd, and the file, along.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(containerd.read_text()), signal.SIGKILL)
            # Where process 1 reaps late, the next daemon would take the zombie of this number for a containerd at work.
            containerd.unlink()
        self.daemon.wait()

    def stop(self) -> None:
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.terminate()
            self.daemon.wait(60)

    def forgotten(self) -> list[int]:
        """Shims, and what runs below them, of containers that a daemon was starting when it was killed: nobody knows them now."""
        shims = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if b"containerd-shim" in (line := path.read_bytes()) and os.fsencode(self.folder) in line:
                    shims.append(int(path.parent.name))
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", ",".join(map(str, shims)) or "0"], capture_output=True, text=True)
        return shims + [int(pid) for pid in children.stdout.split()]


@contextmanager
def private_docker(configuration: Path | None = None) -> Iterator[PrivateDocker]:
    folder = Path(tempfile.mkdtemp(prefix="mayfly-docker-"))
    folder.chmod(0o755)
    docker = PrivateDocker(folder, configuration)
    try:
        docker.start()
        yield docker
    finally:
        docker.stop()
        for pid in docker.forgotten():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for mount in reversed([line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]):
            if mount.startswith(str(folder)):
                subprocess.run(["umount", mount], check=False)
        shutil.rmtree(folder)
