"""What "container" means: facts of the kernel, seen from the inside, the same for every engine.

`FACTS` is the definition. Each fact is checked on one survey made by a probe in the runner's place, in a container that the engine
itself made, and its control is the same check on a container without any of it, where it must fail. An engine conforms when its
name stands in `ENGINES`, with an adapter in tests/engines.py. `OF_A_CHILD` has what a fact means in a zygote's child, where that is
more than in a Docker container, or where a child shows it in another way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from gateway.launcher.specification import runner_configuration
from gateway.protocol import Verdict
from gateway.settings import Settings
from runner import child

from .containers import Probes
from .engines import ENTRY, Contained, contained

ENGINES = ("docker", "zygote")
NAMESPACES = ("mnt", "pid", "ipc", "uts", "net", "cgroup")
INTERPRETER = "/usr/bin/python3.13"
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
    return lo_is_all_there_is(seen) and set(seen.before["sockets_to_be_had"].values()) == {"EPERM"}


def lo_is_all_there_is(seen: Seen) -> bool:
    return set(seen.before["interfaces"]) <= {"lo"} and not seen.before["routes"]


def no_capability_in_any_set(seen: Seen) -> bool:
    return all(int(status[name], 16) == 0 for status in (seen.before["status"], seen.after["status"]) for name in CAPABILITIES)


def no_new_privileges_from_the_start(seen: Seen) -> bool:
    return seen.before["status"]["NoNewPrivs"] == "1"


def a_filter_of_the_container_and_one_of_the_runner(seen: Seen) -> bool:
    first, second = (int(status["Seccomp_filters"]) for status in (seen.before["status"], seen.after["status"]))
    modes = {seen.before["status"]["Seccomp"], seen.after["status"]["Seccomp"]}
    return modes == {"2"} and first >= 1 and second == first + 1


def landlock_is_in_force(seen: Seen) -> bool:
    """What opened before, nothing but the confinement closes."""
    paths = (INTERPRETER, "/proc/self/mountinfo", "/")
    return {seen.before[path] for path in paths} == {"done"} and {seen.after[path] for path in paths} == {"EACCES"}


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


def standard_error_leads_nowhere(seen: Seen) -> bool:
    """Else it would be a way to fill the host's disk, or a thing that two requests of a slot have in common."""
    return bool(seen.after["standard_error"] == "c 1:3")


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


# --- what differs in a zygote's child


def its_root_is_empty_and_read_only(seen: Seen) -> bool:
    options = {mount["point"]: mount["options"] for mount in seen.before["mounts"]}
    sealed = {"ro", "nosuid", "nodev", "noexec"} <= {*options["/"]}
    return sealed and options.keys() == {"/", "/data"} and seen.before["root"] == ["data"]


def nothing_of_the_image_can_be_opened(seen: Seen) -> bool:
    gone = {seen.before[path] for path in (INTERPRETER, "/proc/self/mountinfo")} == {"ENOENT"}
    return gone and seen.before["paths"] == ["/", *sorted(FILES)]


def no_interface_but_lo_no_route_and_no_socket_but_a_local_one(seen: Seen) -> bool:
    """The zygote connects to the launcher, so the slot's profile allows AF_UNIX; the child's own filter allows none."""
    return lo_is_all_there_is(seen) and seen.before["sockets_to_be_had"] == {"AF_UNIX": "done", "AF_INET": "EPERM"}


def landlock_closes_the_root(seen: Seen) -> bool:
    """In an empty root there is not much more for it to close."""
    return (seen.before["/"], seen.after["/"]) == ("done", "EACCES")


def three_descriptors_and_then_the_databases(seen: Seen) -> bool:
    return seen.before["descriptors"] == [0, 1, 2] and seen.after["descriptors"] == [0, 1, 2, child.DATABASE]


def its_environment_is_empty(seen: Seen) -> bool:
    return bool(seen.before["environment"] == {})


def it_is_alone_in_its_pid_namespace(seen: Seen) -> bool:
    """As the host sees it; the child has nothing to look with. Its number is 1 there, and another in the slot."""
    *outside, own = seen.before["status"]["NSpid"].split()
    return seen.before["processes"] == [1] == [int(own)] and len(outside) == 2


def there_is_no_device(seen: Seen) -> bool:
    return not seen.before["devices"]


def it_is_nobody_even_to_itself(seen: Seen) -> bool:
    """Its user namespace maps no user, so it can name none; to the host it is the runner's."""
    return the_user_is_nobody_in_particular(seen) and seen.before["identity"] == [65534]


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
        standard_error_leads_nowhere,
        no_other_process_is_visible,
        no_device_but_the_harmless,
        no_socket_in_the_file_system,
        no_setuid_file,
        the_host_name_is_not_the_hosts,
        the_user_is_nobody_in_particular,
    )
}
OF_A_CHILD: dict[str, Callable[[Seen], bool]] = {
    "own_user_namespace": own_namespace("user"),
    "nothing_of_the_image_can_be_opened": nothing_of_the_image_can_be_opened,
    root_is_read_only.__name__: its_root_is_empty_and_read_only,
    no_interface_but_lo_no_route_and_no_socket.__name__: no_interface_but_lo_no_route_and_no_socket_but_a_local_one,
    landlock_is_in_force.__name__: landlock_closes_the_root,
    the_environment_is_the_configuration_alone.__name__: its_environment_is_empty,
    three_descriptors_and_no_more.__name__: three_descriptors_and_then_the_databases,
    no_other_process_is_visible.__name__: it_is_alone_in_its_pid_namespace,
    no_device_but_the_harmless.__name__: there_is_no_device,
    the_user_is_nobody_in_particular.__name__: it_is_nobody_even_to_itself,
}
FACTS_OF = {"docker": FACTS, "zygote": FACTS | OF_A_CHILD}
SHOWN = [(name, fact) for name in ENGINES for fact in FACTS_OF[name]]


# --- the two containers


def namespaces_here() -> dict[str, str]:
    return {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in (*NAMESPACES, "user")}


@pytest.fixture(scope="module")
def grounds() -> Iterator[dict[str, tuple[Contained, Probes]]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(contained(name)) for name in ENGINES}


@pytest.fixture
def engine(request: pytest.FixtureRequest, grounds: dict[str, tuple[Contained, Probes]]) -> Contained:
    here, _ = grounds[request.param]
    return here


@pytest.fixture(scope="module")
async def seen(grounds: dict[str, tuple[Contained, Probes]]) -> dict[str, Seen]:
    return {name: Seen(*await here.survey(), namespaces_here(), here.settings) for name, (here, _) in grounds.items()}


@pytest.fixture(scope="module")
async def exposed(grounds: dict[str, tuple[Contained, Probes]]) -> Seen:
    """The same survey where nothing is in force: root, the host's namespaces, Docker's socket, a secret, no limit, no filter."""
    here, probes = grounds["docker"]
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
        "Entrypoint": ["/usr/bin/python3.13", "-I", "-S", "-B", "-c", code, *ENTRY, "serve"],
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


@pytest.mark.parametrize(("name", "fact"), SHOWN)
def test_a_container_shows_the_fact(seen: dict[str, Seen], name: str, fact: str) -> None:
    found = seen[name]
    assert FACTS_OF[name][fact](found), json.dumps({"before": found.before, "after": found.after}, indent=1)


@pytest.mark.parametrize(("name", "fact"), SHOWN)
def test_the_fact_is_not_seen_where_its_layer_is_not(exposed: Seen, name: str, fact: str) -> None:
    assert not FACTS_OF[name][fact](exposed)


# --- limits by their effect

every_engine = pytest.mark.parametrize("engine", ENGINES, indirect=True)


@every_engine
async def test_memory_past_the_limit_ends_the_container_and_the_engine_says_so(engine: Contained) -> None:
    order = {"do": "eat", "mebibytes": 96}
    assert (await engine.run(order, container_memory_bytes=64 << 20)).verdict is Verdict.OUT_OF_MEMORY
    assert (await engine.run(order, container_memory_bytes=256 << 20)).report == {"mebibytes": 96}


@every_engine
async def test_processes_past_the_limit_do_not_start(engine: Contained) -> None:
    order = {"do": "multiply", "most": 40}
    few = (await engine.run(order)).report
    assert 2 <= few["threads"] <= engine.settings.container_pids
    assert few["fork"] == "EPERM"  # the profile lets threads start, and no process
    assert (await engine.run(order, container_pids=64)).report["threads"] == 41


@every_engine
async def test_a_share_of_a_processor_is_all_there_is(engine: Contained) -> None:
    order = {"do": "burn", "seconds": 1.0}
    slow = (await engine.run(order, container_cpus=0.05)).report["share"]
    free = (await engine.run(order, container_cpus=1.0)).report["share"]
    assert slow < 0.1
    assert slow < free


@every_engine
async def test_a_run_past_its_deadline_is_killed_from_outside(engine: Contained) -> None:
    ended = await engine.run({"do": "burn", "seconds": 600}, deadline_seconds=0.5, grace_seconds=0.2)
    assert (ended.verdict, ended.output) == (Verdict.DEADLINE, b"")


@every_engine
async def test_each_container_is_another(engine: Contained) -> None:
    """Two at the same time; two of one slot, one after the other, are in test_zygote_child."""
    surveys = await asyncio.gather(engine.survey(), engine.survey())
    namespaces = [before["namespaces"] for before, _ in surveys]
    assert all(namespaces[0][kind] != namespaces[1][kind] for kind in NAMESPACES)
