"""The containers' seccomp profiles and the runner's filter, compared with what a process can really call and with libseccomp."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker.errors
import pytest

from gateway.launcher.errors import RefusedError
from gateway.protocol import Verdict
from gateway.settings import Settings
from runner import syscalls

from .containers import PROFILE, SLOT_PROFILE, Probes, probes_beside_the_runner, profile_with
from .engines import Contained, contained
from .launcher_harness import frame, unframe
from .probes.looks import parse_status, read

MACHINE = syscalls.machine()
FOR_CHILDREN = ("wait4", "clone")  # what the survey needs beyond the profile: each call is tried in a child
LIBSECCOMP_ABSENT = -1  # and below: names that exist elsewhere

UNFILTERED = {335, 336} if MACHINE == "x86_64" else set()
"""uretprobe and uprobe: seccomp itself lets them pass, from Linux 6.14 on. Called by anything but a probe they raise SIGILL."""


@pytest.fixture(scope="module")
def probes() -> Iterator[Probes]:
    with probes_beside_the_runner() as probes:
        yield probes


def number(name: str, machine: str) -> int | None:
    """libseccomp's number, None where the architecture has no such call. An unknown name is None on every architecture."""
    library = ctypes.CDLL("libseccomp.so.2")
    found: int = library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(syscalls.AUDIT_ARCH[machine]), name.encode())
    return found if found > LIBSECCOMP_ABSENT else None


def entries(action: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [entry for entry in json.loads(PROFILE)["syscalls"] if entry["action"] == action]
    return found


def allowed_names() -> list[str]:
    return [name for entry in entries("SCMP_ACT_ALLOW") for name in entry["names"]]


def numbers_of(names: list[str]) -> set[int]:
    return {found for name in names if (found := number(name, MACHINE)) is not None}


def reached(survey: dict[str, str]) -> set[int]:
    return {int(call) for call, outcome in survey.items() if outcome == "reached"} - UNFILTERED


@pytest.fixture(scope="module")
def under_profile(probes: Probes) -> dict[str, str]:
    survey: dict[str, str] = probes.run([], probe="/survey.py", seccomp=profile_with(added=FOR_CHILDREN)).report
    return survey


@pytest.fixture(scope="module")
def under_filter(probes: Probes) -> dict[str, str]:
    survey: dict[str, str] = probes.run(["privileges", "seccomp"], probe="/survey.py", seccomp=None).report
    return survey


def test_W6b_the_container_reaches_exactly_the_profiles_system_calls(under_profile: dict[str, str]) -> None:
    assert reached(under_profile) == numbers_of([*allowed_names(), *FOR_CHILDREN])


def test_without_a_profile_hundreds_are_reached(probes: Probes) -> None:
    assert len(reached(probes.run([], probe="/survey.py", seccomp=None).report)) > 250


def test_W6b_the_filter_alone_leaves_exactly_the_tables_and_ends_all_else(under_filter: dict[str, str]) -> None:
    allowed = set(syscalls.numbers(syscalls.ALLOWED, MACHINE).values())
    refused = set(syscalls.numbers(syscalls.REFUSED, MACHINE).values())
    assert reached(under_filter) == allowed
    assert len(allowed) <= 40
    assert {int(call) for call, outcome in under_filter.items() if outcome == "EPERM"} == refused
    assert {int(call) for call, outcome in under_filter.items() if outcome == "SIGSYS"} - UNFILTERED == set(
        range(471)
    ) - allowed - refused - UNFILTERED


def test_no_child_process_is_possible_under_the_profile(probes: Probes) -> None:
    order = {"steps": [], "attempts": ["fork", "execute"]}
    assert probes.run({**order, "attempts": ["start_a_thread", "fork"]}).report["outcomes"] == {
        "start_a_thread": "done",
        "fork": "EPERM",
    }
    assert probes.run({**order, "attempts": ["fork"]}, seccomp=None).report["outcomes"] == {"fork": "done"}


@pytest.mark.parametrize(
    "name", ["socket", "io_uring_setup", "memfd_create", "ptrace", "unshare", "mount", "bpf", "keyctl", "userfaultfd"]
)
def test_the_profile_refuses_what_exploits_begin_with(under_profile: dict[str, str], name: str) -> None:
    assert under_profile[str(number(name, MACHINE))] in ("EPERM", "ENOSYS")


def test_i386_calls_do_not_exist_in_the_container(probes: Probes) -> None:
    order = {"fork": True, "steps": [], "attempts": ["call_as_i386"]}
    assert probes.run(order, seccomp=None).report == {"call_as_i386": "done" if MACHINE == "x86_64" else "SIGSYS"}
    assert probes.run(order, seccomp=profile_with(added=FOR_CHILDREN)).report == {"call_as_i386": "SIGSYS"}


@pytest.mark.parametrize(
    "name", ["execve", "fstatfs", "getdents64", "prlimit64", "uname", "statfs", "close_range", "prctl", "clone"]
)
def test_without_a_name_of_the_profile_no_runner_starts(probes: Probes, name: str) -> None:
    assert starts(probes, PROFILE)
    assert not starts(probes, profile_with(removed=(name,)))


@pytest.fixture(scope="module")
def slots() -> Iterator[Contained]:
    with contained("zygote", image=Settings.from_environment().image) as (found, _):
        yield found


def only_in_a_slot() -> list[str]:
    found = (name for entry in json.loads(SLOT_PROFILE)["syscalls"] for name in entry["names"])
    return [name for name in found if name not in allowed_names()]


@pytest.mark.parametrize("name", ["nothing", *only_in_a_slot()])
async def test_without_a_name_of_the_slots_profile_no_zygote_serves(slots: Contained, name: str) -> None:
    assert await serves(slots, profile_with(removed=(name,), base=SLOT_PROFILE)) is (name == "nothing")


async def serves(slots: Contained, profile: str) -> bool:
    """A request is answered and its process reaped; the next is killed past its deadline."""
    try:
        async with slots.open(profile=profile, deadline_seconds=0.5, grace_seconds=0.2) as slot:
            answered = await slot.run(frame(v=1, sql="SELECT 1", args=None, int64="number"))
            if answered.verdict is not Verdict.EXITED or not answered.output or unframe(answered.output)["verdict"] != "ok":
                return False
            zygote = slot.zygote()
            if zombies(zygote):
                return False
            return (await slot.run(b"")).verdict is Verdict.DEADLINE and Path(f"/proc/{zygote}").exists()
    except RefusedError:
        return False


def zombies(zygote: int) -> list[str]:
    children = Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()
    return [child for child in children if parse_status(read(f"/proc/{child}/status"))["State"].startswith("Z")]


def starts(probes: Probes, profile: str) -> bool:
    try:
        return probes.run({}, seccomp=profile).exit_code == 0
    except docker.errors.APIError:  # the OCI runtime gave up
        return False


def test_the_profile_is_about_seventy_names_each_once_each_group_with_its_reason() -> None:
    profile = json.loads(PROFILE)
    names = [name for entry in profile["syscalls"] for name in entry["names"]]
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert len(names) == len(set(names)) <= 75
    assert all(entry["comment"] for entry in profile["syscalls"])
    assert {entry["action"] for entry in profile["syscalls"]} == {"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"}
    assert "architectures" not in profile  # the native one alone: i386 and x32 calls end the process
    assert "archMap" not in profile


def test_what_the_runners_filter_allows_the_profile_allows_too() -> None:
    first = entries("SCMP_ACT_ALLOW")[0]
    assert set(first["names"]) == {name for group in syscalls.ALLOWED for name in group.names}


def test_every_name_of_the_profile_is_a_system_call() -> None:
    for name in allowed_names():
        assert any(number(name, machine) is not None for machine in syscalls.AUDIT_ARCH), name


@pytest.mark.parametrize("machine", sorted(syscalls.AUDIT_ARCH))
def test_the_tables_numbers_are_those_of_libseccomp(machine: str) -> None:
    assert {name: syscalls.number(name, machine) for name in syscalls.NUMBERS} == {
        name: number(name, machine) for name in syscalls.NUMBERS
    }


def test_every_name_of_the_tables_has_numbers_one_list_and_a_reason() -> None:
    groups = (*syscalls.ALLOWED, *syscalls.REFUSED)
    names = [name for group in groups for name in group.names]
    assert len(names) == len(set(names))
    assert set(names) <= set(syscalls.NUMBERS)
    assert set(syscalls.ARGUMENTS) <= {name for group in syscalls.ALLOWED for name in group.names}
    assert all(group.reason for group in groups)
