"""The commands an operator types, where something is in their way."""

from __future__ import annotations

import os
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


def test_an_unknown_setting_is_refused_by_its_name(stopped):
    stopped.environment["MAYFLY_TLL_SECONDS"] = "5"
    with pytest.raises(RuntimeError, match="MAYFLY_TLL_SECONDS is not a setting"):
        stopped.start()


def test_the_scripts_are_valid_bash():
    for name in ("up", "down", "test", "bench", "lib.sh"):
        subprocess.run(["bash", "-n", REPO / "infra" / name], check=True)
