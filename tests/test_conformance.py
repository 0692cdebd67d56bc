"""What "container" means: facts of the kernel, seen from the inside, the same for every engine.

`FACTS` is the definition. Each fact is checked on one survey made by a probe in the runner's place, in a container that the engine
itself made, and its control is the same check on a container without any of it, where it must fail. A second engine conforms when
its name stands in `ENGINES`, with an adapter in tests/engines.py, and nothing here has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from gateway.launcher.specification import runner_configuration
from gateway.protocol import Verdict
from gateway.settings import Settings

from .containers import Probes
from .engines import ENTRY, Contained, contained

ENGINES = ("docker",)
NAMESPACES = ("mnt", "pid", "ipc", "uts", "net", "cgroup")
CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
HARMLESS_DEVICES = {"c 1:3", "c 1:5", "c 1:7", "c 1:8", "c 1:9", "c 5:0", "c 5:2"}  # null zero full random urandom tty ptmx
FILES = {"/data/db.sqlite", "/data/db.sqlite-journal"}
SECRET = "token-key-canary"


@dataclass(frozen=True, slots=True)
class Seen:
    """A survey from the inside, and what it is compared with."""

    before: dict[str, Any]
    after: dict[str, Any]
    host_namespaces: dict[str, str]
    settings: Settings


# --- the facts


def own_namespace(kind: str) -> Callable[[Seen], bool]:
    return lambda seen: seen.before["namespaces"][kind] != seen.host_namespaces[kind]


def root_is_read_only(seen: Seen) -> bool:
    (root,) = [mount for mount in seen.before["mounts"] if mount["point"] == "/"]
    return "ro" in root["options"]


def the_volume_is_the_one_writable_disk_and_sealed(seen: Seen) -> bool:
    pseudo = {"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs"}
    disks = [mount for mount in seen.before["mounts"] if mount["type"] not in pseudo and "ro" not in mount["options"]]
    return [mount["point"] for mount in disks] == ["/data"] and {"nosuid", "nodev", "noexec"} <= set(disks[0]["options"])


def nothing_but_the_two_files_can_be_written_even_unconfined(seen: Seen) -> bool:
    return set(seen.before["writable"]) == FILES


def nothing_but_the_two_files_can_be_written_confined(seen: Seen) -> bool:
    return set(seen.after["writable"]) == FILES


def no_interface_but_lo_no_route_and_no_socket(seen: Seen) -> bool:
    return set(seen.before["interfaces"]) <= {"lo"} and not seen.before["routes"] and seen.before["socket"] == "EPERM"


def no_capability_in_any_set(seen: Seen) -> bool:
    return all(int(status[name], 16) == 0 for status in (seen.before["status"], seen.after["status"]) for name in CAPABILITIES)


def no_new_privileges_from_the_start(seen: Seen) -> bool:
    return seen.before["status"]["NoNewPrivs"] == "1"


def a_filter_of_the_container_and_one_of_the_runner(seen: Seen) -> bool:
    first, second = (int(status["Seccomp_filters"]) for status in (seen.before["status"], seen.after["status"]))
    modes = {seen.before["status"]["Seccomp"], seen.after["status"]["Seccomp"]}
    return modes == {"2"} and first >= 1 and second == first + 1


def landlock_is_in_force(seen: Seen) -> bool:
    """The file opened before, so nothing but the confinement closes it."""
    return (seen.before["elsewhere"], seen.after["elsewhere"], seen.after["process_folder"]) == ("done", "EACCES", "EACCES")


def memory_is_limited_and_there_is_no_swap(seen: Seen) -> bool:
    memory, with_swap = seen.before["cgroup"]["memory"], seen.before["cgroup"]["memory_and_swap"]
    # Version 2 limits swap by itself; version 1 limits memory and swap together.
    return memory == str(seen.settings.container_memory_bytes) and with_swap in {"0", memory}


def the_number_of_processes_is_limited(seen: Seen) -> bool:
    return bool(seen.before["cgroup"]["pids"] == str(seen.settings.container_pids))


def processor_time_is_limited(seen: Seen) -> bool:
    quota, period = seen.before["cgroup"]["cpu"].split() if " " in seen.before["cgroup"]["cpu"] else (
        seen.before["cgroup"]["cpu"], seen.before["cgroup"]["cpu_period"],
    )  # fmt: skip
    return quota.isdigit() and int(quota) == seen.settings.container_cpus * int(period)


def resource_limits_hold_soft_and_hard(seen: Seen) -> bool:
    cpu_seconds = str(round(seen.settings.deadline_seconds) + 2)
    wanted = {
        "Max file size": str(seen.settings.instance_bytes),
        "Max open files": str(seen.settings.container_nofile),
        "Max cpu time": cpu_seconds,
        "Max core file size": "0",
        "Max locked memory": "0",
        "Max msgqueue size": "0",
        "Max processes": "0",
    }
    return all(seen.after["limits"][name] == [value, value] for name, value in wanted.items())


def the_environment_is_the_configuration_alone(seen: Seen) -> bool:
    environment = seen.before["environment"]
    # PATH, HOME and HOSTNAME are every Docker container's, and say nothing.
    ordinary = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/", "HOSTNAME": "runner"}
    rest = {name: value for name, value in environment.items() if ordinary.get(name) != value}
    return rest == {"MAYFLY_RUNNER": runner_configuration(seen.settings)}


def environment_and_command_line_hold_nothing_secret(seen: Seen) -> bool:
    everything = seen.before["started_with"]["environ"] + seen.before["started_with"]["cmdline"]
    return not any(word in everything for word in (SECRET, "wkn_", "MAYFLY_STATE_DIR", "docker.sock", "instances/"))


def three_descriptors_and_no_more(seen: Seen) -> bool:
    return seen.before["descriptors"] == seen.after["descriptors"] == [0, 1, 2]


def no_other_process_is_visible(seen: Seen) -> bool:
    return seen.before["processes"] == [1] == [int(seen.before["status"]["Pid"])]


def no_device_but_the_harmless(seen: Seen) -> bool:
    return set(seen.before["devices"].values()) <= HARMLESS_DEVICES


def no_socket_in_the_file_system(seen: Seen) -> bool:
    return seen.before["sockets"] == []


def no_setuid_file(seen: Seen) -> bool:
    return seen.before["privileged_files"] == []


def the_host_name_is_not_the_hosts(seen: Seen) -> bool:
    return bool(seen.before["hostname"] not in (socket.gethostname(), os.uname().nodename))


def the_user_is_nobody_in_particular(seen: Seen) -> bool:
    status = seen.before["status"]
    identities = {*status["Uid"].split(), *status["Gid"].split(), *status["Groups"].split()}
    return identities == {"64700"}


FACTS: dict[str, Callable[[Seen], bool]] = {f"own_{kind}_namespace": own_namespace(kind) for kind in NAMESPACES} | {
    fact.__name__: fact
    for fact in (
        root_is_read_only,
        the_volume_is_the_one_writable_disk_and_sealed,
        nothing_but_the_two_files_can_be_written_even_unconfined,
        nothing_but_the_two_files_can_be_written_confined,
        no_interface_but_lo_no_route_and_no_socket,
        no_capability_in_any_set,
        no_new_privileges_from_the_start,
        a_filter_of_the_container_and_one_of_the_runner,
        landlock_is_in_force,
        memory_is_limited_and_there_is_no_swap,
        the_number_of_processes_is_limited,
        processor_time_is_limited,
        resource_limits_hold_soft_and_hard,
        the_environment_is_the_configuration_alone,
        environment_and_command_line_hold_nothing_secret,
        three_descriptors_and_no_more,
        no_other_process_is_visible,
        no_device_but_the_harmless,
        no_socket_in_the_file_system,
        no_setuid_file,
        the_host_name_is_not_the_hosts,
        the_user_is_nobody_in_particular,
    )
}


# --- the two containers


def namespaces_here() -> dict[str, str]:
    return {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in NAMESPACES}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[Contained, Probes]]:
    with contained(request.param) as both:
        yield both


@pytest.fixture(scope="module")
async def seen(engine: tuple[Contained, Probes]) -> Seen:
    here, _ = engine
    report = (await here.run({"do": "survey", "confine": True})).report
    return Seen(report["before"], report["after"], namespaces_here(), here.settings)


@pytest.fixture(scope="module")
async def exposed(engine: tuple[Contained, Probes]) -> Seen:
    """The same survey where nothing is in force: root, the host's namespaces, Docker's socket, a secret, no limit, no filter."""
    here, probes = engine
    report = await asyncio.to_thread(survey_without_any_layer, probes, here.settings)
    # Docker can share every namespace but the mount namespace; that comparison is made with itself.
    host = namespaces_here() | {"mnt": report["before"]["namespaces"]["mnt"]}
    return Seen(report["before"], report["after"], host, here.settings)


def survey_without_any_layer(probes: Probes, settings: Settings) -> dict[str, Any]:
    code = (
        "import os, sys\n"
        "os.dup2(0, 9)\n"
        "open('/setuid', 'w').close(); os.chmod('/setuid', 0o4755)\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )
    body = {
        "Image": probes.image,
        "Entrypoint": ["/usr/bin/python3.11", "-I", "-S", "-B", "-c", code, *ENTRY, "serve"],
        "User": "0:0",
        "Env": [f"TOKEN_KEY={SECRET}"],
        "OpenStdin": True,
        "StdinOnce": True,
        "Labels": {"org.mayfly.test": "probes"},
        "HostConfig": {
            "NetworkMode": "host",
            "PidMode": "host",
            "IpcMode": "host",
            "UTSMode": "host",
            "CgroupnsMode": "host",
            "SecurityOpt": ["seccomp=unconfined"],
            "Binds": ["/var/run/docker.sock:/docker.sock"],
            "Devices": [{"PathOnHost": "/dev/kmsg", "PathInContainer": "/dev/kmsg", "CgroupPermissions": "r"}],
        },
    }
    api = probes.client.api
    container = api.create_container_from_config(body)["Id"]
    try:
        attached = api.attach_socket(container, params={"stdin": 1, "stdout": 1, "stream": 1})
        with contextlib.closing(attached._sock), attached:
            api.start(container)
            attached._sock.sendall(json.dumps({"do": "survey", "confine": False}).encode() + b"\n")
            api.wait(container)
            output = api.logs(container, stderr=False)
    finally:
        api.remove_container(container, force=True)
    report: dict[str, Any] = json.loads(output)
    return report


@pytest.mark.parametrize("fact", FACTS)
async def test_a_container_shows_the_fact(seen: Seen, fact: str) -> None:
    assert FACTS[fact](seen), json.dumps({"before": seen.before, "after": seen.after}, indent=1)


@pytest.mark.parametrize("fact", FACTS)
async def test_the_fact_is_not_seen_where_its_layer_is_not(exposed: Seen, fact: str) -> None:
    assert not FACTS[fact](exposed)


# --- limits by their effect


async def test_memory_past_the_limit_ends_the_container_and_the_engine_says_so(engine: tuple[Contained, Probes]) -> None:
    here, _ = engine
    order = {"do": "eat", "mebibytes": 96}
    assert (await here.run(order, container_memory_bytes=64 << 20)).verdict is Verdict.OUT_OF_MEMORY
    assert (await here.run(order, container_memory_bytes=256 << 20)).report == {"mebibytes": 96}


async def test_processes_past_the_limit_do_not_start(engine: tuple[Contained, Probes]) -> None:
    here, _ = engine
    order = {"do": "multiply", "most": 40}
    few = (await here.run(order)).report
    assert 2 <= few["threads"] <= here.settings.container_pids
    assert few["fork"] == "EPERM"  # the profile lets threads start, and no process
    assert (await here.run(order, container_pids=64)).report["threads"] == 41


async def test_a_share_of_a_processor_is_all_there_is(engine: tuple[Contained, Probes]) -> None:
    here, _ = engine
    order = {"do": "burn", "seconds": 1.0}
    slow = (await here.run(order, container_cpus=0.05)).report["share"]
    free = (await here.run(order, container_cpus=1.0)).report["share"]
    assert slow < 0.1
    assert slow < free


async def test_a_run_past_its_deadline_is_killed_from_outside(engine: tuple[Contained, Probes]) -> None:
    here, _ = engine
    ended = await here.run({"do": "burn", "seconds": 600}, deadline_seconds=0.5, grace_seconds=0.2)
    assert (ended.verdict, ended.output) == (Verdict.DEADLINE, b"")


async def test_each_container_is_another(engine: tuple[Contained, Probes]) -> None:
    """Nothing of one container is met in the next, though both serve the same instance."""
    here, _ = engine
    instance, _ = here.new_volume()
    runs = await asyncio.gather(
        *(here.run({"do": "survey", "confine": True}, instance=i) for i in (instance, here.new_volume()[0]))
    )
    namespaces = [run.report["before"]["namespaces"] for run in runs]
    assert all(namespaces[0][kind] != namespaces[1][kind] for kind in NAMESPACES)
