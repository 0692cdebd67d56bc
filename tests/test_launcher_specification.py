"""The container specification, pinned byte for byte. A change here is a change of the sandbox and wants a reason."""

import json
import uuid
from pathlib import Path

import pytest

from gateway.launcher.__main__ import read_seccomp_profile
from gateway.launcher.errors import RefusedError
from gateway.launcher.specification import container_specification
from gateway.settings import Settings

GOLDEN = Path(__file__).parent / "golden" / "container_specification.json"
INSTANCE = uuid.UUID("0198f0c4-7a10-7c3e-9d52-3b1f0e6a8d21")
VOLUME = Path("/var/lib/mayfly/instances/0198f0c4-7a10-7c3e-9d52-3b1f0e6a8d21/volume")
DEPLOYMENT = "0123456789abcdef0123456789abcdef"
PROFILE = '{"defaultAction":"SCMP_ACT_ERRNO"}'


def specification(settings=None, **changes):
    return container_specification(settings or Settings(), INSTANCE, VOLUME, DEPLOYMENT, PROFILE, **changes)


def test_the_specification_is_the_golden_one():
    assert specification() == json.loads(GOLDEN.read_text())


def test_the_self_test_differs_from_a_run_in_its_command_alone():
    assert specification(command="selftest") == specification() | {"Cmd": ["selftest"]}


def test_a_runtime_is_named_only_when_one_is_set():
    assert "Runtime" not in specification()["HostConfig"]
    assert specification(Settings(docker_runtime="runsc"))["HostConfig"]["Runtime"] == "runsc"


def test_two_instances_differ_in_their_volume_and_label_alone():
    other = uuid.UUID("0198f0c4-7a10-7c3e-9d52-3b1f0e6a8d22")
    text = json.dumps(
        container_specification(Settings(), other, Path(str(VOLUME).replace(str(INSTANCE), str(other))), DEPLOYMENT, PROFILE)
    )
    assert text.replace(str(other), str(INSTANCE)) == json.dumps(specification())


def test_the_shipped_seccomp_profile_denies_by_default():
    assert json.loads(read_seccomp_profile())["defaultAction"] in ("SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"defaultAction": "SCMP_ACT_ALLOW"}', '{"defaultAction": "SCMP_ACT_LOG"}'])
def test_a_profile_that_does_not_deny_by_default_is_refused(tmp_path, text):
    path = tmp_path / "seccomp.json"
    path.write_text(text)
    with pytest.raises(RefusedError):
        read_seccomp_profile(path)
