"""Each layer of the runner's confinement, alone and together, against the same attempts made without it.

The attempts are in tests/probes/attempts.py. "Alone" means: no container profile and only the named steps, so nothing else
can be what refuses; that a test fails when its layer goes needs no faith, as its control is the same attempt with the layer
gone.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from runner import confine, landlock, seccomp, syscalls

from .containers import SEALED_TMPFS, Ended, Probes, probes_beside_the_runner, profile_with

KILLED_BY_FILTER = 128 + signal.SIGSYS

BY_LANDLOCK = {
    "read_elsewhere": "EACCES",
    "write_elsewhere": "EACCES",
    "truncate_elsewhere": "EACCES",
    "list_the_volume": "EACCES",
    "list_the_root": "EACCES",
    "create_in_the_volume": "EACCES",
    "unlink_the_journal": "EACCES",
    "symlink_in_the_volume": "EACCES",
    "link_elsewhere": "EACCES",
    "rename_in_the_volume": "EACCES",
    "make_a_folder": "EACCES",
    "bind_tcp": "EACCES",
    "connect_tcp": "EACCES",
    "connect_to_an_abstract_socket": "EPERM",
    "signal_the_parent": "EPERM",
}

BY_SECCOMP = {
    "open_a_socket": "SIGSYS",
    "fork": "SIGSYS",
    "start_a_thread": "SIGSYS",
    "execute": "SIGSYS",
    "make_anonymous_file": "SIGSYS",
    "trace": "SIGSYS",
    "set_up_io_uring": "SIGSYS",
    "signal_itself": "SIGSYS",
    "map_executable": "SIGSYS",
    "map_shared": "SIGSYS",
    "make_executable": "SIGSYS",
    "merge_pages": "SIGSYS",
    "requeue_with_priority_inheritance": "SIGSYS",
    "move_memory": "SIGSYS",
    "duplicate_a_descriptor": "SIGSYS",
    "open_a_path_handle": "SIGSYS",
    "open_beside_a_descriptor": "SIGSYS",
    "symlink_in_the_volume": "SIGSYS",
    "rename_in_the_volume": "SIGSYS",
    "make_a_folder": "SIGSYS",
    "call_as_i386": "SIGSYS",
    "call_as_x32": "SIGSYS",
    "open_a_socket_in_the_thread": "SIGSYS",
    "unlink_the_journal": "EPERM",
}

WITHOUT_LAYERS = {"execute": "SIGSEGV", "open_beside_a_descriptor": "EBADF", "call_as_x32": "ENOSYS"}
"""What shows that an attempt got through, where that is not its success: the program that ran, the kernel's own answer."""


@pytest.fixture(scope="module")
def probes() -> Iterator[Probes]:
    with probes_beside_the_runner() as probes:
        yield probes


def outcomes(probes: Probes, steps: list[str], attempts: list[str], **order: Any) -> dict[str, str]:
    """Each attempt in a child of its own, with these steps and no profile on the container."""
    ended = probes.run({"fork": True, "steps": steps, "attempts": attempts, **order}, seccomp=None, host={"NetworkMode": "none"})
    report: dict[str, str] = ended.report
    return report


# --- the whole


def test_production_confinement_applies_every_step_and_leaves_few_system_calls(probes: Probes) -> None:
    report = probes.run({}).report
    assert report["steps"] == ["process", "privileges", "descriptors", "limits", "landlock", "watchdog", "threads", "seccomp"]
    assert report["landlock_abi"] >= 3
    assert report["seccomp_syscalls"] <= 40
    assert report["rlimits"] == {
        "FSIZE": 10 << 20, "NOFILE": 64, "CPU": 4, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0, "NPROC": 0,
    }  # fmt: skip


def test_a_broad_sql_workload_never_meets_the_filter(probes: Probes) -> None:
    told = [probes.run({"attempts": ["run_the_workload"], "configuration": {"deadline_ms": 20_000}}).report for _ in range(2)]
    for report in told:
        assert report["outcomes"] == {"run_the_workload": "done"}
        assert report["told"]["rows"] == 16_000
        assert report["told"]["health"] == "ok"
    assert len(report["told"]["random"]) == 32


@pytest.mark.parametrize("attempt", ["open_a_socket", "fork", "execute", "make_anonymous_file", "trace", "set_up_io_uring"])
def test_a_forbidden_call_ends_the_production_container_by_sigsys(probes: Probes, attempt: str) -> None:
    ended = probes.run({"attempts": [attempt]})
    assert (ended.exit_code, ended.output) == (KILLED_BY_FILTER, b"")


def test_both_files_stay_usable_under_everything(probes: Probes) -> None:
    report = probes.run({"attempts": ["read_write_and_truncate_both_files", "read_elsewhere", "unlink_the_journal"]}).report
    assert report["outcomes"] == {
        "read_write_and_truncate_both_files": "done",
        "read_elsewhere": "EACCES",
        "unlink_the_journal": "EPERM",
    }


# --- each layer alone, with its control


def test_without_any_layer_every_attempt_gets_through(probes: Probes) -> None:
    attempts = sorted({*BY_LANDLOCK, *BY_SECCOMP})
    assert outcomes(probes, [], attempts) == {name: WITHOUT_LAYERS.get(name, "done") for name in attempts}


def test_W6a_landlock_alone_leaves_two_files(probes: Probes) -> None:
    honest = "read_write_and_truncate_both_files"
    assert outcomes(probes, ["privileges", "landlock"], [honest, *BY_LANDLOCK]) == {honest: "done", **BY_LANDLOCK}


def test_landlock_confines_at_every_abi_that_a_kernel_may_have(probes: Probes) -> None:
    assert outcomes(probes, [], ["restrict_at_every_abi"]) == {"restrict_at_every_abi": "done"}


def test_seccomp_alone_ends_the_process(probes: Probes) -> None:
    honest = "read_write_and_truncate_both_files"
    found = outcomes(probes, ["privileges", "watchdog", "seccomp"], [honest, *BY_SECCOMP])
    assert found == {honest: "done", **BY_SECCOMP}


def test_seccomp_reaches_a_thread_that_already_runs(probes: Probes) -> None:
    attempt = "open_a_socket_in_the_thread"
    assert outcomes(probes, ["privileges", "watchdog"], [attempt]) == {attempt: "done"}
    assert outcomes(probes, ["privileges", "watchdog", "seccomp"], [attempt]) == {attempt: "SIGSYS"}


def test_landlock_reaches_the_watchdog_because_it_comes_before() -> None:
    order = [name for name, _ in confine.STEPS]
    assert order.index("landlock") < order.index("watchdog") < order.index("threads") < order.index("seccomp")


def test_no_process_and_no_thread_can_be_added_once_the_threads_step_ran(probes: Probes) -> None:
    attempts = ["fork", "start_a_thread"]
    assert outcomes(probes, [], attempts) == {"fork": "done", "start_a_thread": "done"}
    assert outcomes(probes, ["threads"], attempts) == {"fork": "EAGAIN", "start_a_thread": "EAGAIN"}


def test_file_sizes_descriptors_and_locked_memory_are_limited(probes: Probes) -> None:
    # No ulimits from Docker here, so that only the step can be what limits.
    attempts = ["grow_the_database_past_its_cap", "open_hundred_descriptors", "lock_memory"]
    order = {"fork": True, "attempts": attempts}
    host = {"Ulimits": [{"Name": "nofile", "Soft": 1024, "Hard": 1024}]}
    free = probes.run(order | {"steps": []}, seccomp=None, host=host).report
    limited = probes.run(order | {"steps": ["limits"]}, seccomp=None, host=host).report
    assert free == dict.fromkeys(attempts, "done")
    assert limited == dict(zip(attempts, ["EFBIG", "EMFILE", "EPERM"], strict=True))


def test_limits_hold_for_soft_and_hard(probes: Probes) -> None:
    told = probes.run({"steps": ["limits", "threads"], "attempts": ["tell_limits"]}, host={"Ulimits": []}).report["told"]
    wanted = {"FSIZE": 10 << 20, "NOFILE": 64, "CPU": 4, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0, "NPROC": 0}
    assert told["rlimits"] == {name: [value, value] for name, value in wanted.items()}


def test_a_lower_limit_of_the_container_is_kept(probes: Probes) -> None:
    host = {"Ulimits": [{"Name": "nofile", "Soft": 20, "Hard": 20}]}
    assert probes.run({}, host=host).report["rlimits"]["NOFILE"] == 20


def test_privileges_can_never_be_gained_and_the_process_cannot_be_looked_into(probes: Probes) -> None:
    def told(steps: list[str]) -> dict[str, int]:
        order = {"steps": steps, "attempts": ["tell_privileges"]}
        found: dict[str, int] = probes.run(order, seccomp=None, no_new_privileges=False).report["told"]
        return found

    assert told([]) == {"dumpable": 1, "no_new_privs": 0}
    assert told(["privileges"]) == {"dumpable": 0, "no_new_privs": 1}


def test_own_memory_cannot_be_rewritten_through_proc(probes: Probes) -> None:
    assert outcomes(probes, [], ["write_own_memory"]) == {"write_own_memory": "done"}
    assert outcomes(probes, ["privileges"], ["write_own_memory"]) == {"write_own_memory": "EACCES"}


def test_inherited_descriptors_are_closed_and_standard_error_leads_nowhere(probes: Probes) -> None:
    attempts = ["read_an_inherited_descriptor", "reach_standard_error"]
    assert outcomes(probes, [], attempts) == dict.fromkeys(attempts, "done")
    assert outcomes(probes, ["descriptors"], attempts) == dict.fromkeys(attempts, "EBADF")


# --- refusals


def refusal(ended: Ended) -> str:
    assert ended.exit_code == 1
    assert list(ended.report) == ["refused"]
    reason: str = ended.report["refused"]
    return reason


@pytest.mark.parametrize(
    ("weakening", "reason"),
    [
        ({"top": {"User": "0:64700"}}, "runs as root: Uid"),
        ({"top": {"User": "64700:0"}}, "runs as root: Gid"),
        ({"host": {"GroupAdd": ["0"]}}, "is in root's group"),
        ({"host": {"CapDrop": [], "CapAdd": []}}, "holds capabilities: CapBnd"),
        ({"no_new_privileges": False, "seccomp": None}, "without no-new-privileges"),
        ({"seccomp": None}, "without a seccomp profile"),
        ({"host": {"ReadonlyRootfs": False}}, "the root file system is writable"),
        ({"data": SEALED_TMPFS.replace("nosuid", "suid")}, "/data is not mounted nosuid"),
        ({"data": SEALED_TMPFS.replace("nodev", "dev")}, "/data is not mounted nodev"),
        ({"data": SEALED_TMPFS.replace("noexec", "exec")}, "/data is not mounted noexec"),
        ({"host": {"NetworkMode": "host"}, "top": {"NetworkDisabled": False}}, "a network is attached"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_weaker_container_is_refused(probes: Probes, weakening: dict[str, Any], reason: str) -> None:
    assert reason in refusal(probes.run({"volume": "empty"}, **weakening))


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ({"threads": 1}, "threads run already: Threads 2"),
        ({"volume": "empty"}, "landlock: [Errno 2]"),
        ({"volume": "symlink"}, "/data/db.sqlite is not a regular file"),
        ({"volume": "directory"}, "/data/db.sqlite is not a regular file"),
        ({"volume": "two links"}, "/data/db.sqlite is not a regular file with one link"),
        ({"configuration": {"min_landlock_abi": 999}}, "and MAYFLY_MIN_LANDLOCK_ABI asks for 999"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_confined_is_refused(probes: Probes, order: dict[str, Any], reason: str) -> None:
    for_the_volume = ("symlink", "symlinkat", "mkdir", "mkdirat", "link", "linkat")
    assert reason in refusal(probes.run(order, seccomp=profile_with(added=for_the_volume)))


def test_a_kernel_without_landlock_is_refused_unless_the_settings_allow_it(probes: Probes) -> None:
    without = profile_with(answered={"landlock_create_ruleset": errno.ENOSYS})
    assert "the kernel has no Landlock, and MAYFLY_MIN_LANDLOCK_ABI asks for 3" in refusal(probes.run({}, seccomp=without))
    allowed = probes.run({"configuration": {"min_landlock_abi": 0}}, seccomp=without).report
    assert allowed["landlock_abi"] == 0
    assert allowed["steps"] == [name for name, _ in confine.STEPS]


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("landlock_create_ruleset", "landlock: "),
        ("landlock_add_rule", "landlock: "),
        ("landlock_restrict_self", "landlock: "),
        ("seccomp", "seccomp: "),
        ("prctl", "privileges: "),
        ("close_range", "descriptors: "),
        ("prlimit64", "limits: "),
        ("clone", "watchdog: "),
        ("statfs", "process: "),
    ],
)
def test_a_layer_that_cannot_be_applied_is_a_refusal_whatever_the_settings_allow(probes: Probes, missing: str, reason: str) -> None:
    order = {"configuration": {"min_landlock_abi": 0}}
    assert refusal(probes.run(order, seccomp=profile_with(removed=(missing,)))).startswith(reason)


def test_an_architecture_without_a_table_is_refused(probes: Probes) -> None:
    linux32 = 0x0008  # PER_LINUX32: uname then names the 32-bit architecture
    reason = refusal(probes.run({"personality": linux32, "steps": ["privileges", "seccomp"]}, seccomp=None))
    assert "no table of system calls for the architecture" in reason


# --- the program itself


@pytest.mark.parametrize("machine", sorted(syscalls.AUDIT_ARCH))
def test_every_jump_of_the_filter_lands_inside_it_and_every_path_ends(machine: str) -> None:
    program = seccomp.build(machine)
    for position, (code, if_true, if_false, _) in enumerate(program):
        if code in (0x15, 0x35):
            assert position + 1 + max(if_true, if_false) < len(program)
    assert program[-1] == (0x06, 0, 0, seccomp.KILL_PROCESS)
    assert len(program) < 256


@pytest.mark.parametrize(("abi", "rights"), [(1, 13), (2, 14), (3, 15), (4, 15), (5, 16), (7, 16)])
def test_landlock_handles_every_right_that_an_abi_knows(abi: int, rights: int) -> None:
    assert landlock.handled(abi)[0] == (1 << rights) - 1
    assert landlock.handled(abi)[1:] == (0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
