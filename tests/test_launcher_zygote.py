"""Engine zygote against a zygote that misbehaves on request, with real sockets, mounts and processes; then in real containers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from gateway.launcher.__main__ import SLOT_SECCOMP_PROFILE, read_seccomp_profile
from gateway.launcher.engines import EngineFacts
from gateway.launcher.engines import slot as protocol
from gateway.launcher.engines.auto import AutoEngine
from gateway.launcher.engines.host import remedy
from gateway.launcher.engines.zygote import ZygoteEngine
from gateway.launcher.errors import ContainerRefusedError, EngineDownError, RefusedError
from gateway.launcher.mounts import detached
from gateway.launcher.registry import Registry
from gateway.launcher.specification import LABEL_ROLE, LABEL_SLOT, RUNNER_UID, Command, slot_specification
from gateway.protocol import Status, Verdict
from gateway.settings import Settings

from .launcher_harness import Client, Launcher, containers_of, eventually, inspect, launched, read_all, unframe, uuid7, wire
from .sealed import sealed_directory

STUB = (Path(__file__).parent / "stub_zygote.py").read_text()
SEAL = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
LONG = 60.0


class Containers:
    """Processes in the place of slot containers. What SlotContainers promises, and what can go wrong with it."""

    def __init__(self, *, user: int = RUNNER_UID, first: bytes | None = None, program: str = STUB) -> None:
        self.user = user
        self.first = first
        self.program = program
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.started = 0
        self.most = 0
        self.down = False
        self.hold = asyncio.Event()
        self.hold.set()
        self.closed = False

    def _require(self) -> None:
        if self.down:
            raise EngineDownError("cut off", nothing_sent=True)

    async def survey(self) -> EngineFacts:
        self._require()
        return EngineFacts("0", "none", "sha256:0")

    async def ping(self) -> None:
        self._require()

    async def start(self, slot: str, path: Path) -> str:
        self._require()
        await self.hold.wait()
        self.started += 1
        # The stub's user can enter neither this folder nor, maybe, the clone: it gets a descriptor, as a container gets a mount.
        place = os.open(path, os.O_PATH)
        try:
            first = [] if self.first is None else [self.first.hex()]
            self.processes[slot] = subprocess.Popen(
                ["/usr/bin/python3", "-I", "-S", "-c", self.program, f"/proc/self/fd/{place}", *first],
                pass_fds=(place,),
                cwd="/",
                user=self.user,
                extra_groups=[],
            )
        finally:
            os.close(place)
        self.most = max(self.most, len(self.processes))
        return slot

    async def exit_code(self, container: str) -> int:
        await eventually(lambda: self.processes[container].poll() is not None, LONG)
        return self.processes[container].returncode

    async def remove(self, slot: str) -> None:
        self._require()
        process = self.processes.pop(slot, None)
        if process is not None:
            process.kill()
            process.wait()

    async def sweep(self, owned: set[str]) -> int:
        self._require()
        orphans = [slot for slot in self.processes if slot not in owned]
        for slot in orphans:
            await self.remove(slot)
        return len(orphans)

    def close(self) -> None:
        self.closed = True

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture
def state() -> Iterator[Path]:
    with sealed_directory() as folder:
        for name in ("instances", "launcher"):
            (folder / name).mkdir(mode=0o700)
        yield folder


def descriptors() -> list[str]:
    return sorted(
        os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")
    )


class Deployed:
    def __init__(self, engine: ZygoteEngine, containers: Containers, registry: Registry) -> None:
        self.engine = engine
        self.containers = containers
        self.registry = registry
        self.instance = uuid7()
        registry.create(self.instance)

    @contextmanager
    def run(self, command: Command = "serve", **order: object) -> Iterator[tuple[socket.socket, asyncio.Task[Verdict]]]:
        """Our end of a run's socket, its order sent, and what will be its verdict."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        with ours:
            ours.send(json.dumps(order).encode() + b"\n")
            volume = self.registry.volume(self.instance)
            running = asyncio.create_task(self.engine.run(self.instance, volume, theirs, lambda: None, command))
            yield ours, running

    async def do(self, command: Command = "serve", **order: object) -> tuple[Verdict, bytes]:
        with self.run(command, **order) as (ours, running):
            output = b""
            with suppress(ConnectionError):
                output = await read_all(ours)
            return await running, output


@asynccontextmanager
async def deployed(state: Path, containers: Containers | None = None, **settings: object) -> AsyncIterator[Deployed]:
    """An open engine; afterwards no process and no descriptor is left."""
    containers = containers or Containers()
    before = descriptors()
    registry = Registry(state / "instances", ttl_seconds=600, min_free_bytes=0)
    engine = ZygoteEngine(Settings(**{"state_dir": state, "slots": 1, "deadline_seconds": LONG, **settings}), containers)
    try:
        await engine.open()
        yield Deployed(engine, containers, registry)
    finally:
        await engine.close()
        left = dict(containers.processes)
        containers.end()
        registry.close()
    assert not left or containers.down
    assert containers.closed
    assert list((state / "launcher" / "slots").iterdir()) == []
    assert descriptors() == before


# --- runs


async def test_a_run_gets_its_socket_and_a_sealed_mount_of_its_volume(state):
    async with deployed(state) as it:
        verdict, output = await it.do(stat=["db.sqlite", "db.sqlite-journal", "volume", "instance.json"])
        flags, names, command = json.loads(output)
        assert verdict is Verdict.EXITED
        assert (names, command) == (["db.sqlite", "db.sqlite-journal"], 0)
        assert flags & SEAL == SEAL
        assert not flags & os.ST_RDONLY


@pytest.mark.parametrize(("command", "byte"), [("serve-read", 2), ("serve-bulk", 4), ("serve-bulk-read", 6)])
async def test_a_run_of_another_kind_is_told_so_and_one_that_only_reads_has_a_mount_that_nobody_can_write_to(state, command, byte):
    async with deployed(state) as it:
        verdict, output = await it.do(command, stat=["db.sqlite"])
        flags, names, told = json.loads(output)
        assert (verdict, names, told) == (Verdict.EXITED, ["db.sqlite"], byte)
        assert flags & SEAL == SEAL
        assert bool(flags & os.ST_RDONLY) is command.endswith("-read")


async def test_a_bulk_run_has_its_own_deadline(state):
    async with deployed(state, deadline_seconds=0.05, grace_seconds=0.05) as it:
        assert (await it.do(wait=signal.SIGKILL))[0] is Verdict.DEADLINE, "the control"
        with it.run("serve-bulk", wait=signal.SIGKILL, reply="runs") as (ours, running):
            assert await asyncio.get_running_loop().sock_recv(ours, 64) == b"runs"
            (slot,) = it.engine._slots.alive
            assert slot.run.kill_at - asyncio.get_running_loop().time() > 5
            ours.close()
            assert await running is Verdict.CANCELLED
    async with deployed(state, bulk_deadline_seconds=0.05, grace_seconds=0.05) as it:
        for command in ("serve-bulk", "serve-bulk-read"):
            assert (await it.do(command, wait=signal.SIGKILL))[0] is Verdict.DEADLINE


async def test_started_is_called_once_and_before_the_end(state):
    async with deployed(state) as it:
        ours, theirs = socket.socketpair()
        calls = []
        with ours:
            ours.setblocking(False)
            ours.send(b'{"reply": "x"}\n')
            assert (
                await it.engine.run(it.instance, it.registry.volume(it.instance), theirs, lambda: calls.append(1)) is Verdict.EXITED
            )
        assert calls == [1]
        assert theirs.fileno() == -1


@pytest.mark.parametrize(
    ("status", "flags", "verdict"),
    [
        (0, 0, Verdict.EXITED),
        (0, 1, Verdict.EXITED),
        (7 << 8, 0, Verdict.EXITED),
        (signal.SIGSYS, 0, Verdict.SIGNALLED),
        (signal.SIGSEGV | 0x80, 0, Verdict.SIGNALLED),
        (signal.SIGSEGV, 1, Verdict.SIGNALLED),
        (signal.SIGKILL, 0, Verdict.SIGNALLED),
        (signal.SIGKILL, 1, Verdict.OUT_OF_MEMORY),
    ],
)
async def test_a_wait_status_becomes_a_verdict(state, status, flags, verdict):
    async with deployed(state) as it:
        assert (await it.do(status=status, flags=flags))[0] is verdict
        assert (await it.do(status=0))[0] is Verdict.EXITED
        assert it.containers.started == 1


async def test_a_run_past_deadline_and_grace_is_killed(state):
    async with deployed(state, deadline_seconds=0.05, grace_seconds=0.05) as it:
        assert (await it.do(wait=signal.SIGKILL))[0] is Verdict.DEADLINE
        assert it.containers.started == 1


async def test_a_run_that_ends_by_itself_just_as_it_is_killed_has_exited(state):
    async with deployed(state, deadline_seconds=0.05, grace_seconds=0.05) as it:
        assert (await it.do(wait=0))[0] is Verdict.EXITED


async def test_a_run_whose_caller_hangs_up_is_killed(state):
    async with deployed(state) as it:
        with it.run(wait=signal.SIGKILL, reply="half") as (ours, running):
            assert await asyncio.get_running_loop().sock_recv(ours, 64) == b"half"
            ours.close()
            assert await running is Verdict.CANCELLED


async def test_a_caller_that_only_stops_writing_has_not_hung_up(state):
    async with deployed(state, deadline_seconds=0.3, grace_seconds=0.05) as it:
        with it.run(wait=signal.SIGKILL) as (ours, running):
            ours.shutdown(socket.SHUT_WR)
            assert await running is Verdict.DEADLINE


async def test_a_cancelled_run_is_killed_and_waited_for(state):
    async with deployed(state) as it:
        with it.run(wait=signal.SIGKILL, reply="runs") as (ours, running):
            assert await asyncio.get_running_loop().sock_recv(ours, 64) == b"runs"
            running.cancel()
            await asyncio.sleep(0)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        assert (await it.do())[0] is Verdict.EXITED
        assert it.containers.started == 1


async def test_killing_a_run_that_has_ended_does_not_reach_the_next_one_on_its_slot(state):
    async with deployed(state) as it:
        (slot,) = it.engine._slots.alive
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        runs = []
        with ours:
            ours.send(b'{"reply": "first"}\n')
            volume = it.registry.volume(it.instance)
            assert await it.engine.run(it.instance, volume, theirs, lambda: runs.append(slot.run)) is Verdict.EXITED
        with it.run(wait=signal.SIGKILL, reply="second") as (ours, running):
            assert await loop.sock_recv(ours, 64) == b"second"
            slot.kill(runs[0], Verdict.CANCELLED)
            assert runs[0].killed_as is slot.run.killed_as is None
            slot.kill(slot.run, Verdict.DEADLINE)
            assert await running is Verdict.DEADLINE


async def test_a_run_whose_start_cannot_be_told_is_killed(state):
    async with deployed(state) as it:
        ours, theirs = socket.socketpair()
        ours.send(json.dumps({"wait": signal.SIGKILL}).encode() + b"\n")
        with ours, pytest.raises(ZeroDivisionError):
            await it.engine.run(it.instance, it.registry.volume(it.instance), theirs, lambda: 1 // 0)
        assert (await it.do())[0] is Verdict.EXITED
        assert it.containers.started == 1


async def test_a_run_whose_volume_is_gone_is_refused_and_costs_no_slot(state):
    async with deployed(state) as it:
        it.registry.remove(it.instance)
        with it.run() as (_, running), pytest.raises(ContainerRefusedError, match="No such file"):
            await running
        it.registry.create(it.instance)
        assert (await it.do())[0] is Verdict.EXITED


async def test_many_runs_on_few_slots_leave_nothing_behind(state):
    async with deployed(state, slots=2) as it:
        outputs = await asyncio.gather(*(it.do(reply=str(number)) for number in range(50)))
        assert [output for _, output in outputs] == [str(number).encode() for number in range(50)]
        assert it.containers.started == 2


# --- a hostile zygote

GOOD = "060000 00{run}00000000".replace(" ", "")


async def test_the_control_of_the_malformed_packets_is_a_good_one(state):
    async with deployed(state) as it:
        assert (await it.do(reports=[GOOD]))[0] is Verdict.EXITED
        assert it.containers.started == 1


@pytest.mark.parametrize(
    "packet",
    [
        GOOD[:-2],
        GOOD + "00",
        "00" * 4000,
        "02" + GOOD[2:],
        "0602" + GOOD[4:],
        "06000100" + GOOD[8:],
        "06000000" + "00000000" + "00000000",
        "06000000" + "00000002" + "00000000",
        "06000000" + "{run}" + "0000137f",
        "06000000" + "{run}" + "0000ffff",
        "06000000" + "{run}" + "7fffffff",
    ],
)
async def test_a_packet_that_is_not_due_condemns_the_slot_and_the_next_run_gets_another(state, packet):
    async with deployed(state) as it:
        assert (await it.do(reports=[packet]))[0] is Verdict.LOST
        assert (await it.do(reply="next")) == (Verdict.EXITED, b"next")
        assert it.containers.started == 2
        assert len(it.containers.processes) == 1


async def test_a_report_of_no_run_condemns_the_slot(state):
    async with deployed(state) as it:
        (slot,) = it.engine._slots.alive
        assert (await it.do(reports=[GOOD, GOOD]))[0] is Verdict.EXITED
        await eventually(lambda: slot.condemned)
        assert (await it.do(reply="next")) == (Verdict.EXITED, b"next")
        assert it.containers.started == 2


async def test_a_zygote_that_ends_in_mid_run_costs_its_run_and_its_slot(state):
    async with deployed(state) as it:
        assert (await it.do(exit=3))[0] is Verdict.LOST
        assert (await it.do())[0] is Verdict.EXITED
        assert it.containers.started == 2


async def test_a_zygote_that_does_not_end_a_killed_run_loses_its_container(state, monkeypatch):
    monkeypatch.setattr(protocol, "_KILL_PATIENCE_SECONDS", 0.05)
    async with deployed(state, deadline_seconds=0.05, grace_seconds=0.05) as it:
        assert (await it.do(wait=None))[0] is Verdict.DEADLINE
        assert (await it.do())[0] is Verdict.EXITED
        assert it.containers.started == 2


async def test_the_verdict_of_a_lost_run_waits_for_its_container(state):
    async with deployed(state) as it:
        remove, gate = it.containers.remove, asyncio.Event()

        async def slowly(slot: str) -> None:
            await gate.wait()
            await remove(slot)

        it.containers.remove = slowly
        (slot,) = it.engine._slots.alive
        with it.run(exit=3) as (_, running):
            await eventually(lambda: slot.condemned)
            done, _ = await asyncio.wait((running,), timeout=0.05)
            assert not done
            gate.set()
            assert await running is Verdict.LOST
        assert it.engine.removal(it.instance) is None


async def test_with_the_daemon_down_a_lost_run_ends_and_its_removal_goes_on(state):
    async with deployed(state) as it:
        it.containers.down = True
        assert (await it.do(exit=3))[0] is Verdict.LOST
        removal = it.engine.removal(it.instance)
        assert removal is not None
        with pytest.raises(EngineDownError):
            await it.engine.ping()
        it.containers.down = False
        await removal
        assert it.engine.removal(it.instance) is None
        await eventually(lambda: it.engine._slots.alive)
        assert (await it.do())[0] is Verdict.EXITED
        await it.engine.ping()


async def test_a_daemon_that_is_down_stops_no_run(state):
    async with deployed(state) as it:
        it.containers.down = True
        await it.engine.ping()
        assert (await it.do())[0] is Verdict.EXITED
        it.containers.down = False


async def test_a_run_cancelled_on_a_slot_that_dies_ends_with_its_container(state):
    async with deployed(state) as it:
        with it.run(wait=None, reply="runs") as (ours, running):
            assert await asyncio.get_running_loop().sock_recv(ours, 64) == b"runs"
            next(iter(it.containers.processes.values())).kill()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        assert it.engine.removal(it.instance) is None


async def test_without_a_slot_a_run_waits_for_the_next_and_no_longer_than_a_start(state):
    async with deployed(state, start_timeout_seconds=1.0) as it:
        it.containers.hold.clear()
        assert (await it.do(exit=3))[0] is Verdict.LOST
        with it.run() as (_, running), pytest.raises(EngineDownError, match="no slot"):
            await running
        with it.run() as (_, running):
            await asyncio.sleep(0)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        with it.run(reply="at last") as (_, running):
            it.containers.hold.set()
            assert await running is Verdict.EXITED


# --- replacement


async def test_a_worn_slot_is_replaced_without_a_pause(state):
    async with deployed(state, slot_requests=3) as it:
        it.containers.hold.clear()
        for _ in range(10):  # far past its wear: it serves until the next one is ready
            assert (await it.do())[0] is Verdict.EXITED
        assert it.containers.started == 1
        it.containers.hold.set()
        await eventually(lambda: it.containers.started == 2 and len(it.containers.processes) == 1)
        assert it.containers.most == 2
        assert (await it.do())[0] is Verdict.EXITED


async def test_one_run_after_the_other_keeps_to_two_slots_and_not_to_the_one_that_was_used_last(state):
    async with deployed(state, slots=4) as it:
        await asyncio.gather(*(it.do() for _ in range(4)))
        await eventually(lambda: len(it.engine._idle) == 4)
        used = []
        for _ in range(6):
            assert (await it.do())[0] is Verdict.EXITED
            await eventually(lambda: len(it.engine._idle) == 4)
            used.append(it.engine._idle[-1])
        assert used[::2] == [used[0]] * 3
        assert used[1::2] == [used[1]] * 3
        assert used[0] is not used[1]


async def test_the_only_idle_slot_is_taken(state):
    async with deployed(state) as it:
        for _ in range(3):
            assert (await it.do())[0] is Verdict.EXITED
        assert it.containers.started == 1


async def test_a_slot_is_replaced_by_age_but_only_once_it_has_served(state):
    async with deployed(state, slot_seconds=1) as it:
        (first,) = it.engine._slots.alive
        assert (await it.do())[0] is Verdict.EXITED
        await eventually(lambda: first not in it.engine._slots.alive)
        (second,) = it.engine._slots.alive
        assert it.engine._slots._left(second) == 1.0


async def test_a_run_on_a_slot_that_is_being_replaced_goes_on_to_its_end(state):
    async with deployed(state, slot_requests=1) as it:
        it.containers.hold.clear()
        assert (await it.do())[0] is Verdict.EXITED
        with it.run(wait=signal.SIGKILL, reply="runs") as (ours, running):
            assert await asyncio.get_running_loop().sock_recv(ours, 64) == b"runs"
            (old,) = it.engine._slots.alive
            it.containers.hold.set()
            await eventually(lambda: len(it.engine._slots.alive) == 2)
            ours.close()
            assert await running is Verdict.CANCELLED
        await eventually(lambda: old not in it.engine._slots.alive and len(it.containers.processes) == 1)


async def test_an_idle_zygote_that_dies_is_replaced(state):
    async with deployed(state) as it:
        assert (await it.do())[0] is Verdict.EXITED
        next(iter(it.containers.processes.values())).kill()
        await eventually(lambda: it.containers.started == 2)
        assert (await it.do())[0] is Verdict.EXITED


async def test_opening_again_replaces_the_dead_and_keeps_the_living(state):
    async with deployed(state, slots=2) as it:
        await asyncio.gather(it.do(), it.do())
        kept, lost = it.engine._slots.alive
        it.containers.processes[lost.name].kill()
        await eventually(lambda: lost.condemned)
        await it.engine.open()
        await eventually(lambda: len(it.engine._slots.alive) == 2)
        assert kept in it.engine._slots.alive
        assert it.containers.started == 3


async def test_sweep_takes_what_is_nobodys_and_leaves_the_slots(state):
    async with deployed(state) as it:
        it.containers.processes["orphan"] = subprocess.Popen(["sleep", "60"])
        assert await it.engine.sweep() == 1
        assert await it.engine.sweep() == 0
        assert (await it.do())[0] is Verdict.EXITED


# --- opening


async def test_no_slot_is_served_to_another_user(state):
    containers = Containers(user=RUNNER_UID + 1)
    with pytest.raises(RefusedError, match="userns-remap"):
        async with deployed(state, containers):
            pass


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (bytes.fromhex("0300000000000000") + b"namespaces: unshare: No space left on device", "namespaces: unshare"),
        (bytes.fromhex("0200000100000000"), "first packet is"),
        (bytes.fromhex("0200000000000001"), "first packet is"),
        (bytes.fromhex("060000000000000100000000"), "first packet is"),
        (bytes.fromhex("02"), "1 bytes"),
        (bytes.fromhex("0200000000000000") + bytes(40000), "bytes"),
        (b"", "ended before it was ready, with exit code 0"),
    ],
)
async def test_a_zygote_that_does_not_say_ready_is_refused(state, first, words):
    containers = Containers(first=first)
    with pytest.raises(RefusedError, match=words):
        async with deployed(state, containers, slots=2):
            pass
    assert containers.most <= 2


async def test_a_zygote_that_never_connects_is_refused(state):
    containers = Containers(program="import time; time.sleep(60)")
    with pytest.raises(RefusedError, match=r"not ready within 1\.0 s"):
        async with deployed(state, containers, start_timeout_seconds=1.0):
            pass


async def test_without_cap_sys_admin_the_engine_is_refused_with_a_remedy(state):
    code = f"""
import asyncio
from pathlib import Path
from gateway.launcher.engines import host
from gateway.launcher.errors import RefusedError
try:
    host.require(Path({str(state)!r}))
except RefusedError as error:
    print(error)
"""

    def said(*prefix: str) -> str:
        done = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout

    assert said() == ""
    assert "CAP_SYS_ADMIN" in said("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all")


@pytest.mark.parametrize(
    ("switch", "value", "words"),
    [
        ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces="),
        ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "infra/apparmor/load"),
    ],
)
def test_the_remedy_for_a_host_without_user_namespaces_is_what_forbids_them(tmp_path, switch, value, words):
    path = tmp_path / switch
    path.parent.mkdir()
    path.write_text(f"{value}\n")
    assert words in remedy("namespaces: unshare: x", tmp_path)
    assert words in remedy("clone: x", tmp_path)
    path.write_text("7\n")
    assert words not in remedy("namespaces: unshare: x", tmp_path)


def test_a_detached_mount_is_sealed_private_and_of_one_folder(state):
    with sealed_directory() as outside:
        (outside / "inside").mkdir()
        mount = detached(outside / "inside")
        try:
            assert os.fstatvfs(mount).f_flag & SEAL == SEAL
            assert os.listdir(f"/proc/self/fd/{mount}") == []
        finally:
            os.close(mount)
    folder = state.parent  # without the flags of its own
    mount = detached(folder)
    try:
        assert os.statvfs(folder).f_flag & SEAL != SEAL
        assert os.fstatvfs(mount).f_flag & SEAL == SEAL
    finally:
        os.close(mount)
    mount = detached(folder, read_only=True)
    try:
        assert os.fstatvfs(mount).f_flag & (SEAL | os.ST_RDONLY) == SEAL | os.ST_RDONLY
        with pytest.raises(OSError, match="Read-only file system"):
            os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=mount)
    finally:
        os.close(mount)
    (state / "link").symlink_to(state)
    mount = detached(state / "link")  # the link itself, which is nothing to enter
    with pytest.raises(NotADirectoryError):
        os.listdir(f"/proc/self/fd/{mount}")
    os.close(mount)


# --- auto


class Auto:
    """AutoEngine over two engines of stubs, of which the second goes for docker."""

    def __init__(self, state: Path, **first: object) -> None:
        (state / "launcher").mkdir(exist_ok=True)
        self.registry = Registry(state / "instances", ttl_seconds=600, min_free_bytes=0)
        self.containers = [Containers(**first), Containers()]
        settings = Settings(state_dir=state, slots=1)
        engines = [ZygoteEngine(settings, containers) for containers in self.containers]
        engines[1].name = "docker"
        engines[1].starts_ahead = True
        self.engine = AutoEngine(*engines, self.registry)

    async def __aenter__(self) -> Auto:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.engine.close()
        self.registry.close()
        assert [containers.processes for containers in self.containers] == [{}, {}]
        assert all(containers.closed for containers in self.containers)


async def test_auto_takes_the_zygote_where_its_self_test_passes(state):
    async with Auto(state) as it:
        await it.engine.open()
        assert (it.engine.name, it.engine.starts_ahead) == ("zygote", False)
        assert it.engine.choice == "auto: the self-test passed"
        assert it.containers[1].started == 0


async def test_auto_falls_back_where_the_zygote_is_refused_says_why_and_stays_there(state):
    async with Auto(state, first=bytes.fromhex("0300000000000000") + b"root: mount: Permission denied") as it:
        await it.engine.open()
        assert (it.engine.name, it.engine.starts_ahead) == ("docker", True)
        assert "root: mount: Permission denied" in it.engine.choice
        assert "infra/apparmor/load" in it.engine.choice
        await it.engine.open()
        assert it.containers[0].started == 1
        assert it.containers[0].processes == {}


async def test_a_daemon_that_is_down_settles_nothing(state):
    async with Auto(state) as it:
        for containers in it.containers:
            containers.down = True
        with pytest.raises(EngineDownError):
            await it.engine.open()
        assert it.engine.choice == "auto: not settled"
        it.containers[0].down = False
        await it.engine.open()
        assert it.engine.name == "zygote"
        it.containers[1].down = False


# --- real containers

REAL = Settings().image
SELECT = {"v": 1, "sql": "SELECT 1", "args": None, "int64": "number"}


def alive(launcher: Launcher) -> list[str]:
    found = containers_of(launcher.deployment)
    assert all(item["Labels"][LABEL_ROLE] == "slot" for item in found)
    return [item["Id"] for item in found if item["State"] == "running"]


async def select(client: Client, instance: uuid.UUID) -> None:
    replies, output = await client.do(instance, **SELECT)
    assert [reply.status for reply in replies] == [Status.STARTED, Status.ENDED]
    assert replies[-1].verdict is Verdict.EXITED
    assert unframe(output)["rows"] == [[1]]


async def test_auto_serves_from_standing_slots_which_are_what_the_specification_says(state):
    async with launched(state, image=REAL, engine="auto", slots=2, nursery=2, successors=4) as (launcher, client):
        health = await client.health()
        assert (health["engine"], health["engine_choice"]) == ("zygote", "auto: the self-test passed")
        instance = await client.create()
        await select(client, instance)
        before, descriptors = alive(launcher), launcher.descriptors()
        assert len(before) == 2
        for _ in range(30):
            await select(client, instance)
        assert alive(launcher) == before
        await eventually(lambda: launcher.descriptors() <= descriptors)  # connections to the daemon come and go
        health = await client.health()
        assert (health["nursery"], health["successors"], health["running"]) == (0, 0, 0)
        assert list((state / "launcher" / "slots").iterdir()) == []
        found = inspect(before[0])
        asked = slot_specification(
            Settings(image=REAL, slots=2, engine="auto"),
            found["Config"]["Labels"][LABEL_SLOT],
            state / "launcher" / "slots" / found["Config"]["Labels"][LABEL_SLOT],
            launcher.deployment,
            read_seccomp_profile(SLOT_SECCOMP_PROFILE),
            apparmor=False,
        )
        for key in (
            "ReadonlyRootfs",
            "CapDrop",
            "SecurityOpt",
            "Memory",
            "PidsLimit",
            "NanoCpus",
            "Ulimits",
            "Mounts",
            "NetworkMode",
        ):
            assert found["HostConfig"][key] == asked["HostConfig"][key], key
        assert found["Config"]["Cmd"] == ["zygote"]
        assert found["Config"]["User"] == asked["User"]


async def test_slots_of_a_launcher_that_was_killed_end_by_themselves_and_are_swept(state):
    launcher = Launcher(state, image=REAL, engine="zygote", slots=2)
    try:
        await launcher.start()
        left = alive(launcher)
        assert len(left) == 2
        launcher.kill()
        await eventually(lambda: alive(launcher) == [])
        async with launched(state, image=REAL, engine="zygote", slots=2) as (again, client):
            await select(client, await client.create())
            assert len(containers_of(again.deployment)) == 2
            assert not set(left) & set(alive(again))
    finally:
        if launcher.process.poll() is None:
            launcher.kill()


async def test_runs_go_on_while_the_daemon_is_out_of_reach(state, tmp_path):
    async with (
        wire(tmp_path, mended=True) as line,
        launched(state, image=REAL, engine="zygote", slots=1, docker_socket=line.url) as (launcher, client),
    ):
        instance = await client.create()
        await line.cut()
        await select(client, instance)
        subprocess.run(["docker", "kill", *alive(launcher)], check=True, stdout=subprocess.DEVNULL)
        await eventually(lambda: alive(launcher) == [])
        async with asyncio.timeout(LONG):
            while (await client.health())["daemon"] != "down":
                replies, _ = await client.do(instance, **SELECT)
                assert replies[-1].status in (Status.ENGINE_DOWN, Status.ENDED)
        await line.mend()
        async with asyncio.timeout(LONG):
            while (await client.health())["daemon"] != "up":
                await asyncio.sleep(0.05)
        await select(client, instance)


async def test_a_zygote_that_dies_before_it_serves_is_not_replaced_at_once_and_a_run_is_told(state):
    async with deployed(state, slots=2) as it:
        for process in list(it.containers.processes.values()):
            process.kill()
        await eventually(lambda: not it.engine._slots.alive)
        with it.run() as (_, running), pytest.raises(EngineDownError, match="before it had served"):
            await running
        with pytest.raises(EngineDownError, match="before it had served"):
            await it.engine.open()
        assert it.containers.started == 2
        await eventually(lambda: len(it.engine._slots.alive) == 2)
        assert it.containers.started == 4
        assert (await it.do())[0] is Verdict.EXITED


async def test_with_the_daemon_and_every_slot_gone_a_run_is_told_at_once(state):
    async with deployed(state) as it:
        it.containers.down = True
        with it.run(exit=3) as (_, lost), it.run() as (_, waiting):
            assert await lost is Verdict.LOST
            with pytest.raises(EngineDownError, match="cut off"):
                await waiting
        with it.run() as (_, running), pytest.raises(EngineDownError, match="cut off"):
            await running
        it.containers.down = False
        await eventually(lambda: it.engine._slots.alive)
        assert len(it.engine._slots._removals) <= 1


async def test_a_slot_is_replaced_under_load_and_no_request_sees_it(state):
    async with launched(state, image=REAL, engine="zygote", slots=2, slot_requests=20) as (launcher, client):
        before = set(alive(launcher))

        async def load() -> None:
            instance = await client.create()
            while before & set(alive(launcher)):
                await select(client, instance)

        async with asyncio.timeout(LONG):
            await asyncio.gather(load(), load())
        await eventually(lambda: len(containers_of(launcher.deployment)) == 2)


async def test_an_image_without_a_zygote_is_served_by_docker_and_the_operator_reads_why(state, image):
    async with launched(state, image=image, engine="auto", slots=1) as (_, client):
        health = await client.health()
        assert health["engine"] == "docker"
        assert "ended before it was ready, with exit code" in health["engine_choice"]
        replies, _ = await client.do(await client.create(), do="echo")
        assert replies[-1].verdict is Verdict.EXITED
    launcher = Launcher(state, image=image, engine="zygote", slots=1)
    process = launcher.spawn()
    assert await asyncio.to_thread(process.wait, LONG) == 1
    assert "refused to serve: engine zygote: the zygote ended" in launcher.log.read_text()
