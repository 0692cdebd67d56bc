"""What the kernel and the processor must give, and Python."""

from __future__ import annotations

from .finding import Finding, failure, ok, warning
from .host import REPO, Host

_BACKPORTS = (
    "echo 'deb http://deb.debian.org/debian bookworm-backports main' >/etc/apt/sources.list.d/backports.list && apt-get update"
    " && apt-get install -y -t bookworm-backports linux-image-$(dpkg --print-architecture) && reboot"
)
_LANDLOCK_ON = (
    """echo "GRUB_CMDLINE_LINUX=\\"\\$GRUB_CMDLINE_LINUX lsm=landlock,$(cat /sys/kernel/security/lsm)\\"" """
    ">/etc/default/grub.d/landlock.cfg && update-grub && reboot"
)


def _newer_kernel(host: Host) -> str:
    old_debian = "VERSION_CODENAME=bookworm" in (host.read("/etc/os-release") or "")
    return _BACKPORTS if old_debian else "# boot a newer kernel of the distribution: 6.2 or newer"


def architecture(host: Host) -> Finding:
    if host.machine in ("x86_64", "aarch64"):
        return ok(host.machine)
    return failure(host.machine, "# use a machine of x86_64 or aarch64: the system call tables know no other")


def kernel(host: Host) -> Finding:
    found = f"Linux {host.read('/proc/sys/kernel/osrelease')}"
    if host.kernel >= (5, 12):
        return ok(found)
    return host.for_zygote(found + ", and engine zygote needs 5.12 for mount_setattr", _newer_kernel(host))


def landlock(host: Host) -> Finding:
    found, wanted = host.landlock_abi, host.settings.min_landlock_abi
    if found >= wanted:
        return ok(f"ABI {found}")
    if found == 0 and host.kernel >= (6, 2):
        return failure("not there: left out of the kernel's list of security modules", _LANDLOCK_ON)
    return failure(f"ABI {found}, and MAYFLY_MIN_LANDLOCK_ABI is {wanted}", _newer_kernel(host))


def seccomp(host: Host) -> Finding:
    if "kill_process" in (host.read("/proc/sys/kernel/seccomp/actions_avail") or ""):
        return ok("there")
    return failure("not there", "# boot a kernel with CONFIG_SECCOMP_FILTER, as every distribution's has")


def user_namespaces(host: Host) -> Finding:
    wanted = 2 * host.settings.slots
    most = host.sysctl("user.max_user_namespaces")
    if most is None or int(most) < wanted:
        return host.for_zygote(f"{most} of them, for {wanted}", "sysctl -w user.max_user_namespaces=15000")
    if host.sysctl("kernel.unprivileged_userns_clone") == "0":
        return host.for_zygote("for root alone", "sysctl -w kernel.unprivileged_userns_clone=1")
    return ok(f"{most} of them")


def apparmor(host: Host) -> Finding:
    if not host.has_apparmor:
        return ok("the host has none")
    profiles = host.read("/sys/kernel/security/apparmor/profiles") or ""
    if "mayfly-slot (enforce)" in profiles:
        return ok("the slots' profile is loaded")
    return host.for_zygote("the slots' profile is not loaded", f"{REPO}/infra/apparmor/load")


def huge_pages(host: Host) -> Finding:
    found = host.read("/sys/kernel/mm/transparent_hugepage/enabled") or "none"
    if "[always]" not in found and "[never]" not in found:
        return ok(found)
    return warning(found, "echo madvise >/sys/kernel/mm/transparent_hugepage/enabled")


def vulnerabilities(host: Host) -> Finding:
    folder = host.path("/sys/devices/system/cpu/vulnerabilities")
    told = {path.name: path.read_text() for path in sorted(folder.iterdir())} if folder.is_dir() else {}
    open_ones = [name for name, text in told.items() if text.startswith("Vulnerable")]
    if not open_ones:
        return ok("none is open")
    vendor = "amd64" if "AuthenticAMD" in (host.read("/proc/cpuinfo") or "") else "intel"
    remedy = f"apt-get install -y {vendor}-microcode && reboot # of a virtual machine: its provider's"
    return warning(f"open: {', '.join(open_ones)}", remedy)


def smt(host: Host) -> Finding:
    """A word and no warning: whether two tenants may share a core is the operator's to say."""
    if host.read("/sys/devices/system/cpu/smt/active") != "1":
        return ok("off")
    return ok("on: two callers may share a core at one time; echo off >/sys/devices/system/cpu/smt/control forbids it")


def swap(host: Host) -> Finding:
    if len((host.read("/proc/swaps") or "").splitlines()) < 2:
        return ok("none")
    return warning("there is some", r"swapoff -a && sed -i '/\sswap\s/d' /etc/fstab")


def clock(host: Host) -> Finding:
    if host.clock_synchronised:
        return ok("synchronised")
    return warning("nothing keeps it right", "apt-get install -y systemd-timesyncd && systemctl enable --now systemd-timesyncd")


def python(host: Host) -> Finding:
    found = ".".join(map(str, host.python))
    if host.python < (3, 11):
        return failure(found, "# use Debian 12, Ubuntu 24.04 or newer: 3.11 is needed")
    return ok(found) if host.has_venv else failure(f"{found} without venv", "apt-get install -y python3-venv")


def open_files(host: Host) -> Finding:
    wanted = (host.settings.connections or 65_536) + 1024
    for line in (host.read("/proc/self/limits") or "").splitlines():
        if line.startswith("Max open files"):
            most = line.split()[4]
            if most == "unlimited" or int(most) >= wanted:
                return ok(most)
            return warning(f"{most} at most, and every caller is one: {wanted}", "ulimit -n 524288")
    return warning("not to be seen", "ulimit -n 524288")
