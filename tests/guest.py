"""A Debian 12 of its own: its kernel, systemd, AppArmor and Docker, in a virtual machine, with this tree in /opt/mayfly.

It reaches no network: packages and wheels are fetched on this machine, and both images are brought along.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .conftest import eventually
from .deployment import REPO

PACKAGES = (
    "systemd systemd-sysv dbus udev kmod linux-image-cloud-amd64 initramfs-tools apparmor iproute2 iptables procps"
    " docker.io docker-compose python3-venv ca-certificates curl mmdebstrap debian-archive-keyring"
)
LEFT_OUT = (".git", ".venv", ".venv-bench", "build", "__pycache__", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache")
# Runs a script, gives what it prints, and its status as the last line.
AGENT = """
import socketserver, subprocess
class Run(socketserver.StreamRequestHandler):
    def handle(self):
        script = self.rfile.read(int(self.rfile.readline())).decode()
        done = subprocess.run(["bash", "-ec", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.wfile.write(done.stdout + b"\\n%d" % done.returncode)
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("0.0.0.0", 7000), Run).serve_forever()
"""
FILES = {
    "root/agent.py": AGENT,
    "etc/systemd/system/agent.service": (
        "[Service]\nExecStart=/usr/bin/python3 /root/agent.py\n[Install]\nWantedBy=multi-user.target\n"
    ),
    "etc/systemd/network/guest.network": "[Match]\nName=e*\n[Network]\nAddress=10.0.2.15/24\n",
    "etc/fstab": "/dev/vda / ext4 defaults 0 1\n",
    "etc/hostname": "guest\n",
    "etc/pip.conf": "[global]\nno-index = true\nfind-links = /opt/wheels\n",
}


@dataclass
class Guest:
    folder: Path
    port: int

    def run(self, script: str, seconds: float = 300) -> str:
        """What the script prints; raises RuntimeError with it if the script, run with -e, fails, and OSError without a guest."""
        told = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(f"{len(script.encode())}\n{script}".encode())
            while part := connection.recv(65536):
                told += part
        text, _, status = told.decode().rpartition("\n")
        if not status:
            raise ConnectionError("the guest went away")
        if status != "0":
            raise RuntimeError(f"{script}\n{text}")
        return text

    def answers(self) -> bool:
        try:
            return self.run("echo", 5) is not None
        except OSError:
            return False

    def boot_id(self) -> str:
        return self.run("cat /proc/sys/kernel/random/boot_id")

    def reboot(self) -> None:
        before = self.boot_id()
        self.run("systemctl reboot --no-block")

        def again() -> bool:
            try:
                return self.boot_id() != before
            except OSError:
                return False

        eventually(again, 300)


@contextmanager
def guest() -> Iterator[Guest]:
    folder = Path(tempfile.mkdtemp(prefix="mayfly-guest-"))
    machine = None
    try:
        tree = make_tree(folder)
        disk = folder / "disk"
        with disk.open("wb") as file:
            file.truncate(8 << 30)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, disk], check=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (kernel,), (initrd,) = (tree / "boot").glob("vmlinuz-*"), (tree / "boot").glob("initrd.img-*")
        command = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "4096", "-smp", "2", "-display", "none"]
        if has_kvm():
            command[2] = "kvm"
        command += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", "root=/dev/vda rw console=ttyS0"]
        command += ["-serial", f"file:{folder / 'console'}", "-drive", f"file={disk},format=raw,if=virtio,cache=unsafe"]
        command += ["-nic", f"user,restrict=on,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{port}-:7000"]
        machine = subprocess.Popen(command)
        found = Guest(folder, port)
        eventually(found.answers, 300)
        yield found
    finally:
        if machine is not None:
            machine.kill()
            machine.wait()
        shutil.rmtree(folder)


def has_kvm() -> bool:
    """Whether KVM runs on this processor's own support; a KVM without, in a machine that is virtual itself, boots nothing."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return os.access("/dev/kvm", os.W_OK) and ("vmx" in flags or "svm" in flags)


def make_tree(folder: Path) -> Path:
    tree = folder / "tree"
    include = ",".join(PACKAGES.split())
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", f"--include={include}", "bookworm", tree], check=True)
    for name, text in FILES.items():
        (tree / name).write_text(text)
    shutil.copytree(REPO, tree / "opt/mayfly", ignore=shutil.ignore_patterns(*LEFT_OUT))
    pip = [REPO / ".venv/bin/python", "-m", "pip", "download", "--quiet", f"--dest={tree / 'opt/wheels'}"]
    subprocess.run([*pip, "setuptools", "wheel", REPO], check=True)
    for image in ((), ("gateway",)):
        subprocess.run([REPO / "infra/image", *image], check=True, capture_output=True)
    images = ["mayfly-runner:latest", "mayfly-gateway:latest"]
    subprocess.run(["docker", "save", "--output", tree / "root/images.tar", *images], check=True)
    ready = "systemctl --quiet enable agent systemd-networkd docker; . /opt/mayfly/infra/lib.sh; install_python"
    subprocess.run(["chroot", tree, "bash", "-ec", ready], check=True, capture_output=True)
    return tree
