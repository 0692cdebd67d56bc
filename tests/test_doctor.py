"""infra/doctor: every check on a machine made of files, where it is content and where it is not, and once on the real one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings
from infra.diagnosis import engine, state, sysctls
from infra.diagnosis.daemon import Docker, ask
from infra.diagnosis.finding import Level
from infra.diagnosis.host import Host
from infra.diagnosis.table import CHECKS

from .deployment import REPO, Deployment
from .private_docker import PrivateDocker, private_docker

NEEDS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="about folders and mounts of root's")
STATE = "/var/lib/mayfly"
LISTENING = (
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0\n"
)
MOUNTS = (
    "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
    f"23 22 8:1 {STATE} {STATE} rw,nosuid,nodev,noexec,relatime - ext4 /dev/sda1 rw\n"
)
BELOW = f"24 23 8:1 / {STATE}/instances rw,nosuid,nodev,noexec - ext4 /dev/sda2 rw\n"


@dataclass
class Machine:
    """Files below a folder, and what a system call or Docker would say. `host` is what the checks see of it."""

    root: Path
    settings: Settings = field(default_factory=lambda: Settings(instances=10, min_free_bytes=0))
    facts: dict[str, Any] = field(default_factory=dict)
    docker: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def sysctl(self, name: str, value: str) -> None:
        self.write("/proc/sys/" + name.replace(".", "/"), value + "\n")

    def remove(self, path: str) -> None:
        shutil.rmtree(self.root / path.lstrip("/"))

    def mode(self, name: str, mode: int) -> None:
        (self.root / STATE.lstrip("/") / name).chmod(mode)

    def set(self, **settings: Any) -> None:
        self.settings = replace(self.settings, **settings)

    def daemon(self, *arguments: str) -> None:
        self.write("/proc/55/cmdline", "\0".join(("/usr/sbin/dockerd", *arguments, "")))

    @property
    def host(self) -> Host:
        return Host(self.settings, Docker(info=self.info, **self.docker), self.root, **self.facts)

    def finds(self, check: str) -> tuple[Level, str]:
        [found] = [one.of(self.host) for one in CHECKS if one.name == check]
        assert bool(found.remedy) is (found.level is not Level.OK)
        return found.level, f"{found.found} -- {found.remedy}"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """One on which there is nothing to say."""
    made = Machine(tmp_path)
    made.facts = {"uid": 0, "machine": "x86_64", "landlock_abi": 3, "clock_synchronised": True, "python": (3, 11), "has_venv": True}
    for name, (value, _) in sysctls.recommended().items():
        made.sysctl(name, value)
    made.sysctl("kernel.osrelease", "6.2.0-1-amd64")
    made.sysctl("kernel.seccomp.actions_avail", "kill_process kill_thread trap errno allow")
    made.sysctl("user.max_user_namespaces", "100")
    made.sysctl("kernel.unprivileged_userns_clone", "1")
    made.write("/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    made.write("/sys/devices/system/cpu/vulnerabilities/meltdown", "Mitigation: PTI\n")
    made.write("/sys/devices/system/cpu/smt/active", "0\n")
    made.write("/proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n")
    made.write("/proc/self/limits", "Max open files            1024                 524288               files\n")
    made.write("/proc/self/mountinfo", MOUNTS)
    me, ours = os.getuid(), os.getgid()
    users = "".join(f"{name}:x:{me}:{ours}::/:/bin/false\n" for name in ("root", state.WEB, state.LAUNCHER))
    groups = "".join(f"{name}:x:{ours}:\n" for name in ("root", state.WEB, state.LAUNCHER))
    made.write("/etc/passwd", users)
    made.write("/etc/group", f"{groups}docker:x:7777:{state.LAUNCHER}\n")
    for name, (_, _, mode) in state.FOLDERS.items():
        made.write(f"{STATE}/{name}/.made", "")
        made.mode(name, mode)
    made.mode("", 0o755)
    (tmp_path / "docker").mkdir()
    made.write("/usr/sbin/dockerd", "")
    made.write("/etc/docker/daemon.json", engine.FILE.read_text())
    made.docker = {
        "version": {"Version": "20.10.24", "ApiVersion": "1.41"},
        "bridge": {"Options": {"com.docker.network.bridge.enable_icc": "false"}},
        "image": True,
        "pid": 55,
    }
    made.daemon("-H", "fd://", "--containerd=/run/containerd/containerd.sock")
    made.info = {
        "CgroupVersion": "2", "MemoryLimit": True, "PidsLimit": True, "CpuCfsQuota": True, "SwapLimit": True, "Driver": "overlay2",
        "SecurityOptions": ["name=seccomp,profile=default", "name=cgroupns"], "DockerRootDir": "/docker", "Warnings": None,
        "LiveRestoreEnabled": True, "LoggingDriver": "local",
    }  # fmt: skip
    return made


@pytest.mark.parametrize("check", [check.name for check in CHECKS])
def test_a_machine_that_has_everything_is_ok(machine: Machine, check: str) -> None:
    assert machine.finds(check)[0] is Level.OK


@dataclass(frozen=True, slots=True)
class Ill:
    """A change, and what it makes the check say."""

    change: Callable[[Machine], object]
    level: Level
    words: str


def warns(change: Callable[[Machine], object], words: str) -> Ill:
    return Ill(change, Level.WARNING, words)


def fails(change: Callable[[Machine], object], words: str) -> Ill:
    return Ill(change, Level.FAILURE, words)


def for_zygote(change: Callable[[Machine], object], words: str) -> list[Ill]:
    """What engine docker does without, and `auto` with a warning."""
    return [
        Ill(lambda machine, engine=engine: (change(machine), machine.set(engine=engine)), level, words)
        for engine, level in (("zygote", Level.FAILURE), ("auto", Level.WARNING), ("docker", Level.OK))
    ]


def sysctl(name: str, *values: str) -> dict[str, list[Ill]]:
    return {f"sysctl {name}": [warns(lambda machine, to=value: machine.sysctl(name, to), f"{value}, and not") for value in values]}


def no_docker(machine: Machine) -> None:
    machine.docker = {"trouble": "unix:///var/run/docker.sock: No such file or directory"}
    machine.info = {}


def apparmor(machine: Machine) -> None:
    machine.write("/sys/module/apparmor/parameters/enabled", "Y\n")


def listening(machine: Machine, command: str = "") -> None:
    machine.write("/proc/net/tcp", LISTENING)
    if command:
        machine.write("/proc/99/cmdline", command)
        (machine.root / "proc/99/fd").mkdir()
        (machine.root / "proc/99/fd/7").symlink_to("socket:[4711]")


def metrics_on_a_port_in_use(machine: Machine) -> None:
    listening(machine, "nginx")
    machine.set(listen="127.0.0.1:80", metrics_listen="[::1]:8080")


def configured(machine: Machine, **settings: Any) -> None:
    machine.write("/etc/docker/daemon.json", json.dumps({**engine.recommended(), **settings}))


def old_bookworm(machine: Machine) -> None:
    machine.facts["landlock_abi"] = 2
    machine.set(min_landlock_abi=3)
    machine.sysctl("kernel.osrelease", "6.1.0-40-amd64")
    machine.write("/etc/os-release", "VERSION_CODENAME=bookworm\n")


def no_state(machine: Machine) -> None:
    machine.remove(STATE)


def another_configuration(machine: Machine) -> None:
    machine.remove("/etc/docker")
    machine.write("/other.json", '{"userland-proxy": false}')
    machine.daemon("--config-file", "/other.json")


def another_web_user(machine: Machine) -> None:
    me = os.getuid()
    machine.write("/etc/passwd", f"root:x:{me}:0:::\n{state.WEB}:x:4000001:0:::\n{state.LAUNCHER}:x:{me}:0:::\n")


UNKNOWN = warns(no_docker, "not known while Docker does not answer")
NO_STATE = warns(no_state, "no /var/lib/mayfly yet")

ILL: dict[str, list[Ill]] = {
    "architecture": [fails(lambda m: m.facts.update(machine="riscv64"), "riscv64")],
    "kernel": for_zygote(lambda m: m.sysctl("kernel.osrelease", "5.10.0-30-amd64"), "needs 5.12"),
    "landlock": [
        fails(old_bookworm, "bookworm-backports"),
        fails(lambda m: m.facts.update(landlock_abi=0), "lsm=landlock"),
        fails(lambda m: m.set(min_landlock_abi=4), "MAYFLY_MIN_LANDLOCK_ABI is 4"),
    ],
    "seccomp": [fails(lambda m: m.remove("/proc/sys/kernel/seccomp"), "not there")],
    "user namespaces": [
        *for_zygote(lambda m: m.sysctl("user.max_user_namespaces", "0"), "0 of them, for 8"),
        *for_zygote(lambda m: m.sysctl("kernel.unprivileged_userns_clone", "0"), "for root alone"),
    ],
    "apparmor": for_zygote(apparmor, "profile is not loaded"),
    "huge pages": [
        warns(lambda m: m.write("/sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never"), "always"),
        warns(lambda m: m.write("/sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]"), "never"),
    ],
    "processor": [warns(lambda m: m.write("/sys/devices/system/cpu/vulnerabilities/mds", "Vulnerable; SMT on"), "open: mds")],
    "smt": [Ill(lambda m: m.write("/sys/devices/system/cpu/smt/active", "1\n"), Level.OK, "two callers may share a core")],
    "swap": [warns(lambda m: m.write("/proc/swaps", "Filename\n/dev/sda2 partition 1 0 -2\n"), "swapoff -a")],
    "clock": [warns(lambda m: m.facts.update(clock_synchronised=False), "timesyncd")],
    "python": [
        fails(lambda m: m.facts.update(python=(3, 10)), "3.10"),
        fails(lambda m: m.facts.update(has_venv=False), "python3-venv"),
    ],
    "open files": [
        warns(lambda m: m.write("/proc/self/limits", "Max open files  1024  4096  files\n"), "4096 at most"),
        warns(lambda m: m.write("/proc/self/limits", ""), "not to be seen"),
    ],
    **sysctl("net.core.somaxconn", "128"),
    **sysctl("net.ipv4.tcp_max_syn_backlog", "512"),
    **sysctl("net.ipv4.tcp_syncookies", "0"),
    **sysctl("kernel.core_pattern", "|/usr/lib/systemd/systemd-coredump %P"),
    **sysctl("fs.suid_dumpable", "1", "2"),
    **sysctl("kernel.yama.ptrace_scope", "0"),
    **sysctl("kernel.kptr_restrict", "0", "1"),
    **sysctl("kernel.dmesg_restrict", "0"),
    **sysctl("kernel.unprivileged_bpf_disabled", "0"),
    **sysctl("kernel.io_uring_disabled", "0", "1"),
    **sysctl("vm.overcommit_memory", "1", "2"),
    **sysctl("vm.swappiness", "60"),
    "docker": [fails(no_docker, "No such file"), fails(lambda m: (no_docker(m), m.remove("/usr")), "apt-get install -y docker.io")],
    "docker version": [UNKNOWN, fails(lambda m: m.docker["version"].update(ApiVersion="1.40"), "API 1.40")],
    "docker limits": [
        UNKNOWN,
        *(
            fails(lambda m, name=name: m.info.update({name: False}), f"without {name}")
            for name in ("MemoryLimit", "PidsLimit", "CpuCfsQuota")
        ),
    ],
    "docker swap limit": [UNKNOWN, warns(lambda m: m.info.update(SwapLimit=False), "swapaccount=1")],
    "docker security": [
        UNKNOWN,
        fails(lambda m: m.info.update(SecurityOptions=["name=cgroupns"]), "no seccomp"),
        warns(apparmor, "no AppArmor"),
    ],
    "docker users": [
        UNKNOWN,
        *for_zygote(lambda m: m.info["SecurityOptions"].append("name=userns"), "mapped (userns)"),
        *for_zygote(lambda m: m.info["SecurityOptions"].append("name=rootless"), "mapped (rootless)"),
    ],
    "docker exposure": [
        fails(lambda m: m.daemon("-H", "tcp://0.0.0.0:2375"), "anybody is root by tcp://0.0.0.0:2375"),
        fails(lambda m: m.daemon("--host=tcp://0.0.0.0:2376", "--tls"), "anybody is root"),
        fails(lambda m: configured(m, hosts=["unix:///var/run/docker.sock", "tcp://[::]:2375"]), "jq 'del(.hosts)'"),
        fails(lambda m: m.info.update(Warnings=["WARNING: API is accessible on http://0.0.0.0:2375 without encryption."]), "2375"),
        Ill(lambda m: m.daemon("-H", "tcp://0.0.0.0:2376", "--tlsverify"), Level.OK, "by certificate"),
        Ill(lambda m: m.daemon("-H=tcp://0.0.0.0:2376", "--tlsverify=true", "--tlscacert", "ca.pem"), Level.OK, "by certificate"),
    ],
    "docker storage": [UNKNOWN, warns(lambda m: m.info.update(Driver="vfs"), "vfs copies")],
    "docker space": [UNKNOWN, warns(lambda m: m.set(min_free_bytes=1 << 60), "MB free in /docker")],
    "docker icc": [
        UNKNOWN,
        warns(lambda m: m.docker["bridge"]["Options"].update({"com.docker.network.bridge.enable_icc": "true"}), "true"),
        Ill(lambda m: m.docker.update(bridge={}), Level.OK, "false"),
    ],
    "docker live-restore": [UNKNOWN, warns(lambda m: m.info.update(LiveRestoreEnabled=False), "daemon.json")],
    "docker log-driver": [UNKNOWN, warns(lambda m: m.info.update(LoggingDriver="json-file"), '"json-file", and not "local"')],
    "docker no-new-privileges": [
        UNKNOWN,
        warns(lambda m: configured(m, **{"no-new-privileges": False}), "false, and not true"),
        Ill(lambda m: (configured(m, **{"no-new-privileges": False}), m.daemon("--no-new-privileges")), Level.OK, "true"),
    ],
    "docker userland-proxy": [
        UNKNOWN,
        warns(lambda m: m.remove("/etc/docker"), "true, and not false"),
        Ill(lambda m: (m.remove("/etc/docker"), m.daemon("--userland-proxy=false", "--debug")), Level.OK, "false"),
        Ill(another_configuration, Level.OK, "false"),
    ],
    "image": [fails(lambda m: m.docker.update(image=False), "infra/image"), UNKNOWN],
    "users": [
        warns(lambda m: m.write("/etc/passwd", "root:x:0:0::/:/bin/sh\n"), "useradd --system"),
        fails(lambda m: m.write("/etc/group", f"docker:x:7:{state.LAUNCHER},{state.WEB}\n"), f"gpasswd -d {state.WEB} docker"),
        fails(lambda m: m.write("/etc/group", "docker:x:7:\n"), f"usermod -aG docker {state.LAUNCHER}"),
    ],
    "state": [fails(no_state, "infra/up -d"), fails(lambda m: m.mode("", 0o777), "chmod 755 /var/lib/mayfly")],
    "state owners": [
        NO_STATE,
        fails(lambda m: m.mode("keys", 0o750), "chmod 700 /var/lib/mayfly/keys"),
        fails(lambda m: m.mode("run", 0o700), "chmod 2750 /var/lib/mayfly/run"),
        fails(lambda m: m.remove(f"{STATE}/log"), "no /var/lib/mayfly/log"),
        fails(another_web_user, f"chown {state.WEB}:"),
        # Without the users it is one user's, and everything is closed.
        fails(lambda m: m.write("/etc/passwd", ""), "chmod 700 /var/lib/mayfly/run"),
    ],
    "state seal": [
        NO_STATE,
        fails(lambda m: m.write("/proc/self/mountinfo", MOUNTS.replace(",noexec", "")), "mounted without noexec"),
        fails(lambda m: m.write("/proc/self/mountinfo", MOUNTS.splitlines()[0]), "mount --bind /var/lib/mayfly"),
        fails(lambda m: m.write("/proc/self/mountinfo", MOUNTS + MOUNTS.splitlines()[1].replace(",nosuid", "")), "without nosuid"),
    ],
    "state file system": [fails(lambda m: m.write("/proc/self/mountinfo", MOUNTS + BELOW), "umount /var/lib/mayfly/instances")],
    "state space": [
        NO_STATE,
        fails(lambda m: m.set(min_free_bytes=1 << 60), "MAYFLY_MIN_FREE_BYTES is"),
        warns(lambda m: m.set(instances=1 << 40), "export MAYFLY_INSTANCES="),
    ],
    "state inodes": [NO_STATE, warns(lambda m: m.set(instances=1 << 60), "export MAYFLY_INSTANCES=")],
    "ports": [
        fails(lambda m: listening(m, "nginx\0-g"), "8080 is in use by 99 (nginx)"),
        fails(listening, "a process elsewhere"),
        warns(lambda m: (listening(m), m.facts.update(uid=1000)), "only root sees"),
        fails(lambda m: m.set(listen="localhost"), "has no port"),
        Ill(lambda m: listening(m, "python\0-m\0gateway.web"), Level.OK, "8080 is Mayfly's, 9464 is free"),
        Ill(lambda m: m.set(metrics_listen=""), Level.OK, "8080 is free -- "),
        fails(metrics_on_a_port_in_use, "MAYFLY_METRICS_LISTEN="),
        Ill(lambda m: (listening(m), m.set(listen="127.0.0.1:8081")), Level.OK, "8081 is free"),
    ],
    "listen": [warns(lambda m, to=to: m.set(listen=to), "infra/tls") for to in ("0.0.0.0:8080", "[::]:80", "203.0.113.5:8080")],
    "metrics": [
        warns(lambda m: m.set(metrics_listen="0.0.0.0:9464"), "MAYFLY_METRICS_LISTEN"),
        Ill(lambda m: m.set(metrics_listen=""), Level.OK, "off"),
    ],
    "front": [
        warns(lambda m: m.write("/etc/haproxy/haproxy.cfg", "FRONT_MAYFLY"), "MAYFLY_TRUSTED_PROXIES is empty"),
        Ill(
            lambda m: (m.write("/etc/haproxy/haproxy.cfg", "FRONT_MAYFLY"), m.set(trusted_proxies="127.0.0.1/32")),
            Level.OK,
            "trusted as 127.0.0.1/32",
        ),
    ],
}  # fmt: skip


def test_every_check_is_shown_where_it_is_not_content() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert set(ILL) == set(names)


@pytest.mark.parametrize(("check", "case"), [(check, number) for check, cases in ILL.items() for number in range(len(cases))])
def test_what_is_missing_is_found_and_said(machine: Machine, check: str, case: int) -> None:
    ill = ILL[check][case]
    ill.change(machine)
    level, said = machine.finds(check)
    assert (level, ill.words in said) == (ill.level, True), (level, said)


def every_remedy(machine: Machine) -> Iterator[str]:
    for check, cases in ILL.items():
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                copy = replace(machine, root=Path(shutil.copytree(machine.root, f"{folder}/copy", symlinks=True)))
                copy.facts, copy.info, copy.docker = (
                    dict(machine.facts),
                    json.loads(json.dumps(machine.info)),
                    json.loads(json.dumps(machine.docker)),
                )
                case.change(copy)
                yield copy.finds(check)[1].partition(" -- ")[2]


def test_every_remedy_is_a_command_line_and_names_programs_of_ours_that_exist(machine: Machine) -> None:
    for remedy in every_remedy(machine):
        subprocess.run(["bash", "-n", "-c", remedy], check=True)
        for path in re.findall(rf"{REPO}/[\w/.-]*\w", remedy):
            assert Path(path).exists(), remedy


def test_the_files_that_the_checks_compare_with_are_the_ones_for_the_host() -> None:
    assert set(sysctls.recommended()) == set(sysctls.WHY)
    lines = [line for line in sysctls.FILE.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(sysctls.WHY)
    assert set(engine.recommended()) == set(engine.WHY)


def test_M15_the_documented_table_equals_the_code() -> None:
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \|$", (REPO / "docs" / "doctor.md").read_text(), re.MULTILINE)
    assert rows == [(check.name, check.why) for check in CHECKS]


def test_the_operators_pages_name_settings_that_exist() -> None:
    known = {f"MAYFLY_{name.upper()}" for name in Settings.__dataclass_fields__}
    for page in ("runbook.md", "doctor.md"):
        assert set(re.findall(r"\bMAYFLY_[A-Z0-9_]+", (REPO / "docs" / page).read_text())) <= known


@pytest.mark.parametrize("before", [None, {"data-root": "/srv/docker", "icc": True}])
def test_the_recommendation_for_docker_is_merged_into_what_is_there(
    machine: Machine, tmp_path: Path, before: dict[str, Any] | None
) -> None:
    """The remedy as it is printed, up to the restart, with a folder in the place of /etc/docker and nothing to install."""
    machine.info["LiveRestoreEnabled"] = False
    remedy = machine.finds("docker live-restore")[1].partition(" -- ")[2].partition(f" && {machine.host.restart}")[0]
    folder = tmp_path / "merged"
    if before is not None:
        folder.mkdir()
        (folder / "daemon.json").write_text(json.dumps(before))
    command = "apt-get() { :; }; " + remedy.replace("/etc/docker", str(folder))
    subprocess.run(["bash", "-ec", command], check=True)
    assert json.loads((folder / "daemon.json").read_text()) == {**(before or {}), **engine.recommended()}


def test_what_a_user_may_not_see_is_a_warning_that_asks_for_root(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", "/sys/kernel/security/apparmor/profiles")

    monkeypatch.setattr(Path, "read_text", closed)
    level, said = machine.finds("apparmor")
    assert (level, "closed to user 0" in said, "sudo" in said) == (Level.WARNING, True, True)


def doctor(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [REPO / "infra" / "doctor", *options]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, cwd="/")


def test_it_needs_nothing_that_is_not_in_python() -> None:
    loaded = "import sys; before = set(sys.modules); import infra.diagnosis.table; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=REPO, capture_output=True, text=True, check=True)
    roots = {name.partition(".")[0] for name in done.stdout.split()}
    assert roots <= {*sys.stdlib_module_names, "gateway", "infra"}


def test_a_wrong_setting_is_not_looked_past() -> None:
    done = doctor(MAYFLY_TLL_SECONDS="5")
    assert (done.returncode, done.stderr) == (
        1,
        "mayfly doctor: MAYFLY_TLL_SECONDS is not a setting; docs/operations.md lists them all\n",
    )


def test_on_a_host_with_mayfly_at_work_nothing_fails(mayfly: Deployment) -> None:
    done = subprocess.run([REPO / "infra/doctor", "--json"], env=mayfly.environment, capture_output=True, text=True, cwd="/")
    report = json.loads(done.stdout)
    failed = [check for check in report["checks"] if check["level"] == "failure"]
    assert (done.returncode, report["failures"], failed) == (0, 0, []), done.stderr
    assert [check["name"] for check in report["checks"]] == [check.name for check in CHECKS]
    found = {check["name"]: check["found"] for check in report["checks"]}
    assert found["ports"].startswith(f"{mayfly.address.partition(':')[2]} is Mayfly's")
    assert found["state owners"] == ("as infra/up makes them" if os.getuid() == 0 else f"all of user {os.getuid()}")
    lines = subprocess.run([REPO / "infra/doctor"], env=mayfly.environment, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == len(CHECKS) + 1
    assert lines[-1] == f"0 failures, {report['warnings']} warnings"


def test_a_host_without_docker_fails_and_says_so() -> None:
    done = doctor(MAYFLY_DOCKER_SOCKET="unix:///nowhere/docker.sock")
    assert done.returncode == 2
    assert re.search(r"^failure docker: unix:///nowhere/docker.sock: .*No such file", done.stdout, re.MULTILINE)
    assert "not known while Docker" in done.stdout


def test_an_image_that_is_not_there_is_missed() -> None:
    assert not ask(Settings().docker_socket, "mayfly-nobody-has-this:latest").image


@NEEDS_ROOT
def test_the_remedies_for_a_state_folder_heal_it(tmp_path: Path) -> None:
    """What infra/lib.sh makes is broken in each way, and mended by the lines that doctor prints, pasted into a shell."""
    folder = Path(tempfile.mkdtemp(prefix="mayfly-"))
    environment = {**os.environ, "MAYFLY_STATE_DIR": str(folder), "MAYFLY_MIN_FREE_BYTES": "0", "MAYFLY_INSTANCES": "1"}
    try:
        subprocess.run(["bash", "-c", '. "$0/infra/lib.sh" && make_users && make_state', REPO], env=environment, check=True)
        os.chmod(folder / "keys", 0o755)
        os.chown(folder / "instances", 0, 0)
        os.chmod(folder, 0o700)
        (folder / "launcher" / "below").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "mayfly", folder / "launcher" / "below"], check=True)
        for _ in range(8):
            done = subprocess.run([REPO / "infra/doctor", "--json"], env=environment, capture_output=True, text=True)
            ill = [
                check
                for check in json.loads(done.stdout)["checks"]
                if check["level"] == "failure" and check["name"].startswith("state")
            ]
            if not ill:
                break
            subprocess.run(["bash", "-ec", ill[-1]["remedy"]], check=True)
        assert not ill
    finally:
        for mount in (folder / "launcher" / "below", folder):
            subprocess.run(["umount", mount], check=False, capture_output=True)
        shutil.rmtree(folder)


@NEEDS_ROOT
def test_the_recommended_configuration_is_one_that_this_docker_takes() -> None:
    """In a network of its own, because its rules are the daemon's to write; the packet filter of the machine stays as it is."""
    with private_docker(engine.FILE) as docker:
        found = ask(docker.url, "mayfly-runner:latest")
        host = Host(Settings(docker_socket=docker.url), found)
        for check in CHECKS:
            if check.name in {f"docker {name}" for name in engine.WHY}:
                assert check.of(host).level is Level.OK, check.name
        assert found.pid == running(docker)


def running(docker: PrivateDocker) -> int:
    assert docker.daemon is not None
    return docker.daemon.pid
