"""The container specifications, pinned byte for byte. A change here is a change of the sandbox and wants a reason."""

import json
import socket
import uuid
from pathlib import Path

import pytest

from gateway.launcher.__main__ import SLOT_SECCOMP_PROFILE, read_seccomp_profile
from gateway.launcher.errors import RefusedError
from gateway.launcher.specification import APPARMOR_PROFILE, READONLY_PATHS, container_specification, slot_specification
from gateway.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "container_specification.json"
SLOT_GOLDEN = ROOT / "tests" / "golden" / "slot_specification.json"
INSTANCE = uuid.UUID("0198f0c4-7a10-7c3e-9d52-3b1f0e6a8d21")
VOLUME = Path("/var/lib/mayfly/instances/0198f0c4-7a10-7c3e-9d52-3b1f0e6a8d21/volume")
DEPLOYMENT = "0123456789abcdef0123456789abcdef"
PROFILE = '{"defaultAction":"SCMP_ACT_ERRNO"}'
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
SLOT = "0f1e2d3c4b5a6978"
SOCKET = Path("/var/lib/mayfly/launcher/slots") / SLOT


def specification(settings=None, **changes):
    return container_specification(settings or Settings(), INSTANCE, VOLUME, DEPLOYMENT, PROFILE, **changes)


def slot(settings=None, *, apparmor=False):
    return slot_specification(settings or Settings(), SLOT, SOCKET, DEPLOYMENT, PROFILE, apparmor=apparmor)


def test_the_specification_is_the_golden_one():
    assert specification() == json.loads(GOLDEN.read_text())


def test_a_slots_specification_is_the_golden_one():
    assert slot() == json.loads(SLOT_GOLDEN.read_text())


def test_a_slot_differs_from_a_run_in_its_command_its_labels_its_mount_its_loader_and_in_having_no_stream():
    streams = ("OpenStdin", "StdinOnce", "AttachStdin", "AttachStdout")
    run = specification(Settings(docker_runtime="crun"))
    host = run["HostConfig"] | {"Mounts": slot()["HostConfig"]["Mounts"]}
    assert slot(Settings(docker_runtime="crun")) == run | {
        "Cmd": ["zygote"],
        "Env": [*run["Env"], "LD_BIND_NOW=1", "PYTHONMALLOC=malloc"],
        "Labels": slot()["Labels"],
        "HostConfig": host,
        **dict.fromkeys(streams, False),
    }


def test_a_slot_gets_its_own_apparmor_profile_where_there_is_apparmor():
    options = slot()["HostConfig"]["SecurityOpt"]
    assert slot(apparmor=True)["HostConfig"]["SecurityOpt"] == [*options, "apparmor=mayfly-slot"]
    assert f"profile {APPARMOR_PROFILE} " in (ROOT / "infra" / "apparmor" / APPARMOR_PROFILE).read_text()


def test_a_slots_seccomp_profile_is_the_runners_and_what_a_zygote_needs():
    runner, zygote = (
        [(tuple(group["names"]), group["action"], json.dumps(group["args"])) for group in json.loads(text)["syscalls"]]
        for text in (read_seccomp_profile(), read_seccomp_profile(SLOT_SECCOMP_PROFILE))
    )
    no_clone3 = (("clone3",), "SCMP_ACT_ERRNO", "[]")
    assert [group for group in runner if group not in zygote] == [no_clone3]
    more = [group for group in zygote if group not in runner]
    assert {action for _, action, _ in more} == {"SCMP_ACT_ALLOW"}
    namespaces = {"index": 0, "value": ~(CLONE_NEWUSER | CLONE_NEWNS) & (1 << 64) - 1, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
    unix = {"index": 0, "value": socket.AF_UNIX, "valueTwo": 0, "op": "SCMP_CMP_EQ"}
    arguments = {names: json.loads(args) for names, _, args in more}
    assert {names: args for names, args in arguments.items() if args} == {
        ("unshare",): [namespaces],
        ("socket",): [unix],
    }
    assert {name for names in arguments for name in names} == {
        *("clone3", "unshare", "chdir", "mkdir", "mount", "mount_setattr", "move_mount", "pivot_root", "umount2"),
        *(
            "socket",
            "connect",
            "eventfd2",
            "ppoll",
            "recvmsg",
            "sendto",
            "kill",
            "wait4",
            "capset",
            "pipe2",
            "unlink",
        ),
    }
    names = [name for names, _, _ in zygote for name in names]
    assert len(names) == len(set(names))
    assert all(group["comment"] for group in json.loads(SLOT_SECCOMP_PROFILE.read_text())["syscalls"])


def test_the_self_test_differs_from_a_run_in_its_command_alone():
    assert specification(command="selftest") == specification() | {"Cmd": ["selftest"]}


@pytest.mark.parametrize("command", ["serve-read", "serve-bulk-read"])
def test_a_run_that_only_reads_differs_in_its_command_and_in_its_volume_being_read_only(command):
    plain, reads = specification(), specification(command=command)
    assert "ReadonlyPaths" not in plain["HostConfig"], "the control: Docker's own list"
    host = plain["HostConfig"] | {"ReadonlyPaths": [*READONLY_PATHS, "/data"]}
    assert reads == plain | {"Cmd": [command], "HostConfig": host}


def test_a_bulk_run_differs_in_its_command_alone():
    assert specification(command="serve-bulk") == specification() | {"Cmd": ["serve-bulk"]}


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
