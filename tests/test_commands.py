"""The commands an operator types, where something is in their way."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from .deployment import REPO, Deployment, free_address

NEEDS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="about folders and processes of root's")


@pytest.fixture
def stopped():
    folder = Path(tempfile.mkdtemp(prefix="mayfly-"))
    folder.chmod(0o755)
    deployment = Deployment({}, folder, free_address())
    yield deployment
    deployment.stop()
    subprocess.run(["rm", "-rf", folder], check=True)


def test_a_port_in_use_is_a_refusal_and_nobody_elses_health_is_taken_for_ours(stopped):
    host, port = stopped.address.split(":")
    with socket.create_server((host, int(port))), pytest.raises(RuntimeError, match="something else listens"):
        stopped.start()


def test_starting_and_stopping_twice_is_harmless(stopped):
    stopped.start()
    pids = stopped.pid("web"), stopped.pid("launcher")
    stopped.start()
    assert (stopped.pid("web"), stopped.pid("launcher")) == pids
    stopped.stop()
    stopped.stop()
    assert str(stopped.state) not in Path("/proc/self/mounts").read_text()


def test_a_process_that_took_over_a_number_from_before_a_reboot_is_left_alone(stopped):
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        (stopped.state / "operator").mkdir()
        (stopped.state / "operator" / "web.pid").write_text(f"{stranger.pid} 1\n")
        stopped.stop()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@NEEDS_ROOT
def test_a_folder_that_another_user_prepared_is_refused(stopped):
    (stopped.state / "operator").symlink_to("/etc")
    with pytest.raises(RuntimeError, match="must be folders of root's"):
        stopped.start()
    (stopped.state / "operator").unlink()


@NEEDS_ROOT
def test_a_folder_that_the_services_users_cannot_enter_is_refused(stopped):
    closed = stopped.state / "closed"
    closed.mkdir(mode=0o700)
    below = Deployment({}, closed / "state", stopped.address)
    try:
        with pytest.raises(RuntimeError, match="cannot enter"):
            below.start()
    finally:
        below.stop()


@NEEDS_ROOT
@pytest.mark.parametrize("closed", ["", "gateway", "gateway/web/app.py", ".venv"])
def test_a_clone_that_the_services_users_cannot_read_is_refused_with_the_remedy(tmp_path, closed):
    for name in ("gateway/web/app.py", ".venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    tmp_path.chmod(0o755)
    command = ["bash", "-ec", ". infra/lib.sh; repo=$0; check_clone", tmp_path]
    assert subprocess.run(command, cwd=REPO, check=False).returncode == 0
    (tmp_path / closed).chmod(0o700 if (tmp_path / closed).is_dir() else 0o600)
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"cannot read {tmp_path / closed}; " in done.stderr
    assert f"chmod -R o+rX {tmp_path}" in done.stderr


@NEEDS_ROOT
def test_up_refuses_such_a_clone_before_it_starts_anything(stopped, tmp_path):
    clone = tmp_path / "clone"
    for name in ("gateway", "infra", "runner"):
        shutil.copytree(REPO / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "Dockerfile.runner"):
        shutil.copy(REPO / name, clone)
    (clone / ".venv").symlink_to(REPO / ".venv")
    (clone / "gateway").chmod(0o700)
    done = subprocess.run([clone / "infra/up", "-d"], env=stopped.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert f"cannot read {clone / 'gateway'}; " in done.stderr
    assert not list((stopped.state / "operator").glob("*.pid"))


def test_an_unknown_setting_is_refused_by_its_name(stopped):
    stopped.environment["MAYFLY_TLL_SECONDS"] = "5"
    with pytest.raises(RuntimeError, match="MAYFLY_TLL_SECONDS is not a setting"):
        stopped.start()


def test_the_scripts_are_valid_bash():
    for name in ("up", "down", "test", "bench", "doctor", "lib.sh", "apparmor/load", "tls/renewed"):
        subprocess.run(["bash", "-n", REPO / "infra" / name], check=True)


def unit(name: str) -> configparser.SectionProxy:
    """The [Service] section; of a name that stands there more than once, what was written last."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes="#")
    parser.optionxform = str
    parser.read(REPO / "infra" / "systemd" / f"mayfly-{name}.service")
    return parser["Service"]


def test_the_units_give_a_capability_to_the_launcher_alone_and_two_calls_to_use_it():
    launcher, web = unit("launcher"), unit("web")
    for name, held in ((launcher, "CAP_SYS_ADMIN"), (web, "")):
        assert name["AmbientCapabilities"] == name["CapabilityBoundingSet"] == held
    assert (launcher["SystemCallFilter"], web["SystemCallFilter"]) == (
        "open_tree mount_setattr",
        "~@privileged @resources @keyring @aio",
    )


def test_the_units_take_the_same_users_as_infra_up_and_confine_both_processes():
    script = (REPO / "infra" / "lib.sh").read_text()
    for name in ("launcher", "web"):
        section = unit(name)
        assert f"\n{name}_user={section['User']}\n" in script
        assert section["ProtectSystem"] == "strict"
        assert all(section[switch] == "yes" for switch in ("NoNewPrivileges", "PrivateMounts", "RestrictNamespaces"))
        assert f"-m gateway.{name}" in section["ExecStart"]
    assert not {"SupplementaryGroups", "ExecStartPre"} & set(unit("web"))
    assert "-/run/docker.sock" in unit("web")["InaccessiblePaths"]


def test_the_apparmor_profile_of_a_slot_names_what_it_allows():
    profile = (REPO / "infra" / "apparmor" / "mayfly-slot").read_text()
    rules = [line.strip() for line in profile.splitlines() if line.strip().endswith(",")]
    assert not {"file,", "network,", "capability,", "mount,", "umount,", "pivot_root,", "ptrace,", "signal,"} & set(rules)
    assert [rule for rule in rules if rule.startswith("capability")] == ["capability sys_admin,", "capability setpcap,"]
    mounts = [rule for rule in rules if rule.startswith("mount")]
    assert mounts
    assert all(re.fullmatch(r"mount (fstype=tmpfs )?options=\([a-z, ]+\) -> /data/,", rule) for rule in mounts)
    assert not any(re.search(r"^/\S+ \S*[ixpu]x", rule) for rule in rules if not rule.startswith("deny"))


def test_an_older_apparmor_gets_the_same_profile_but_for_the_rule_that_it_does_not_know(tmp_path):
    folder = REPO / "infra" / "apparmor"
    [edit] = re.findall(r"sed '(.*)'", (folder / "load").read_text())
    older = subprocess.run(["sed", edit, folder / "mayfly-slot"], capture_output=True, text=True, check=True).stdout
    newer = (folder / "mayfly-slot").read_text()
    assert older.splitlines() == [line.replace("<abi/4.0>", "<abi/3.0>") for line in newer.splitlines() if line != "  userns,"]
    assert "abi <abi/3.0>," in older


@NEEDS_ROOT
def test_the_profile_is_loaded_where_apparmor_is_and_not_missed_where_it_is_not():
    subprocess.run([REPO / "infra/apparmor/load"], check=True)
    loaded = Path("/sys/kernel/security/apparmor/profiles")
    assert not loaded.exists() or "mayfly-slot (enforce)" in loaded.read_text()
