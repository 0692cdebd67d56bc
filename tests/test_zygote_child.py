"""A zygote's children: nothing passes from one to the next, each leaves its slot clean, each step stops what it is for.

What every container must show is in test_conformance. Here are the attacks that only a child could make: it is born with every
capability over its own namespaces, with the zygote's descriptors, and with the zygote's memory.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import signal
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.launcher.errors import RefusedError
from gateway.launcher.specification import RUNNER_UID
from gateway.protocol import Verdict
from gateway.settings import Settings
from runner import child, zygote

from .containers import SLOT_PROFILE, profile_with
from .engines import Contained, Opened, Run, contained, leaving_out, processes_that_see, processes_where
from .launcher_harness import eventually, frame, unframe
from .probes.looks import mounts

FRESH = ("user", "mnt", "pid", "ipc", "uts")
OF_THE_SLOT = ("net", "cgroup")
EVERY_STEP = [name for name, _ in child.STEPS][1:]
SEAL = {"nosuid", "nodev", "noexec"}
UNCONFINED = ["volume", "descriptors", "capabilities"]


@pytest.fixture(scope="module")
def here() -> Iterator[Contained]:
    with contained("zygote") as (found, _):
        yield found


@pytest.fixture(scope="module")
def production() -> Iterator[Contained]:
    """With the runner's own image."""
    with contained("zygote", image=Settings.from_environment().image) as (found, _):
        yield found


def left_out(*names: str) -> Any:
    """A change of the slot: its zygote leaves these out."""

    def change(body: dict[str, Any]) -> dict[str, Any]:
        return body | {"Env": [*body["Env"], *(f"{name}={value}" for name, value in leaving_out(*names).items())]}

    return change


def request(sql: str) -> bytes:
    return frame(v=1, sql=sql, args=None, int64="number")


# --- one child and the next


async def test_two_runs_of_one_slot_have_no_namespace_in_common_but_the_slots_network(here: Contained) -> None:
    async with here.open() as slot:
        with ExitStack() as held:

            def hold(_: str) -> None:
                """Else the kernel would give the next child the same numbers for other namespaces."""
                for kind in FRESH:
                    held.callback(os.close, os.open(f"/proc/{slot.child()}/ns/{kind}", os.O_RDONLY))

            runs = [await slot.run({"do": "idle"}, meanwhile=hold) for _ in range(2)]
            of_the_zygote = {kind: os.readlink(f"/proc/{slot.zygote()}/ns/{kind}") for kind in (*FRESH, *OF_THE_SLOT)}
        first, second = (run.seen["idle"]["namespaces"] for run in runs)
    for kind in FRESH:
        assert len({first[kind], second[kind], of_the_zygote[kind]}) == 3, kind
    for kind in OF_THE_SLOT:
        assert first[kind] == second[kind] == of_the_zygote[kind] != os.readlink(f"/proc/self/ns/{kind}"), kind


@pytest.mark.parametrize(("without", "differs"), [((), True), (("fresh seed",), False)])
async def test_no_child_draws_the_random_numbers_of_another(here: Contained, without: tuple[str, ...], differs: bool) -> None:
    sql = "SELECT random(), hex(randomblob(16))"
    async with here.open(left_out(*without)) as slot:
        first, second = [(await slot.run({"do": "draw", "sql": sql})).report for _ in range(2)]
    assert (first["SQLite"] != second["SQLite"]) is differs
    assert first["the kernel"] != second["the kernel"]


async def test_the_runners_own_children_draw_different_numbers(production: Contained) -> None:
    async with production.open() as slot:
        replies = [unframe((await slot.run(request("SELECT random()"))).output) for _ in range(3)]
    assert len({reply["rows"][0][0] for reply in replies}) == 3


def memory_of(pid: int) -> bytes:
    """Everything that is mapped and can be read; the host can, the child could."""
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, flags = line.split()[:2]
            if flags.startswith("r") and "[v" not in line:
                start, end = (int(part, 16) for part in span.split("-"))
                memory.seek(start)
                found.append(memory.read(end - start))
    return b"".join(found)


async def test_nothing_of_an_earlier_request_is_in_a_childs_memory(here: Contained) -> None:
    half = secrets.token_bytes(16)
    found: dict[str, int] = {}

    def search(pause: str) -> None:
        found[pause] = memory_of(slot.child()).count(half + half)

    async with here.open() as slot:
        await slot.run({"do": "mark", "mark": half.hex()}, meanwhile=search)
        assert (half + half) not in memory_of(slot.zygote())
        assert (half + half) not in memory_of(await waiting_child(slot))
        await slot.run({"do": "idle"}, meanwhile=search)
    assert found["marked"] > 1 << 16
    assert found["idle"] == 0


async def test_nothing_is_left_in_the_root_for_the_next_child(here: Contained) -> None:
    async def outcomes(*without: str) -> list[str]:
        found = []
        async with here.open(left_out(*without)) as slot:
            for name in ("leave_something_for_the_next", "find_what_was_left"):
                order = {"do": "attempt", "steps": UNCONFINED, "attempts": [name]}
                found += (await slot.run(order)).report.values()
        return found

    assert await outcomes("read-only root") == ["done", "done"]
    assert await outcomes() == ["EROFS", "ENOENT"]


# --- what a child is given


def faults_of_children(zygote_pid: int) -> int:
    """Pages that those that have ended had to be given."""
    return int(Path(f"/proc/{zygote_pid}/stat").read_text().rpartition(")")[2].split()[8])


async def faults_of_a_child(here: Contained, *without: str) -> float:
    async with here.open(left_out("orders", *without)) as slot:
        zygote_pid = slot.zygote()
        await slot.run(request("SELECT 1"))
        await waiting_child(slot)
        before = faults_of_children(zygote_pid)
        for _ in range(10):
            assert unframe((await slot.run(request("SELECT 1"))).output)["rows"] == [[1]]
        await waiting_child(slot)
        return (faults_of_children(zygote_pid) - before) / 10


async def test_a_child_that_looks_at_what_its_zygote_has_made_does_not_copy_it(here: Contained) -> None:
    assert await faults_of_a_child(here) < 0.7 * await faults_of_a_child(here, "immortal objects")


def huge_pages_in_the_heap(pid: int) -> int:
    """Of 2 MiB that lie side by side, but for what has been written to meanwhile."""
    found = 0
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/pagemap", "rb", 0) as pages:
        spans = [[int(part, 16) for part in line.split()[0].split("-")] for line in maps if "[heap]" in line]
        for start, end in spans:
            for page in range(-(-start >> 21) << 21, end - (1 << 21) + 1, 1 << 21):
                pages.seek(page >> 9)
                frames = [entry & (1 << 55) - 1 for (entry,) in struct.iter_unpack("=Q", pages.read(8 * 512))]
                place, count = Counter(frame - number for number, frame in enumerate(frames)).most_common(1)[0]
                found += place > 0 and place % 512 == 0 and count > 450
    return found


async def test_what_a_zygote_has_made_lies_on_huge_pages_where_the_host_has_them(production: Contained) -> None:
    host_has_them = "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    async with production.open() as slot:
        for _ in range(3):
            await slot.run(request("CREATE TABLE t(a); INSERT INTO t VALUES (1)"))
        await waiting_child(slot)
        assert huge_pages_in_the_heap(slot.zygote()) >= (2 if host_has_them else 0)


# --- what a child leaves


async def waiting_child(slot: Opened) -> int:
    """The one that is cloned ahead, once it waits for its run."""
    zygote_pid = slot.zygote()

    def waits() -> bool:
        children = Path(f"/proc/{zygote_pid}/task/{zygote_pid}/children").read_text().split()
        return len(children) == 1 and Path(f"/proc/{children[0]}/wchan").read_text() not in ("", "0")

    await eventually(waits)
    return slot.child()


async def test_a_child_that_waits_has_its_capabilities_and_could_never_have_them_again(production: Contained) -> None:
    async with production.open() as slot:
        status = dict(line.split(":\t") for line in Path(f"/proc/{await waiting_child(slot)}/status").read_text().splitlines())
    assert int(status["CapBnd"], 16) == 0
    assert int(status["CapEff"], 16) != 0


def test_a_bounding_set_that_stays_ahead_is_emptied_later_or_refused() -> None:
    bounding = child.Bounding()
    dropped: list[int] = []
    hindered = True

    def drop(capability: int, *_: int) -> int:
        dropped.append(capability)
        return -1 if hindered and capability == 21 else 0

    bounding._drop = drop
    assert (bounding.empty_ahead(), bounding.empty()) == (0, -1)
    hindered = False
    dropped.clear()
    assert bounding.empty() == 0
    assert dropped == [*range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1)]
    dropped.clear()
    assert (bounding.empty(), dropped) == (0, [])
    order: Any = SimpleNamespace(bounding=bounding)
    assert next(child._capabilities(order)) == (bounding.empty, 0)


class Traces:
    """Of a slot, as the host sees them."""

    def __init__(self, slot: Opened) -> None:
        zygote_pid = slot.zygote()
        self.in_the_slots_cgroup = len(processes_where("ns/cgroup", os.readlink(f"/proc/{zygote_pid}/ns/cgroup")))
        self.descriptors_of_the_zygote = sorted(os.listdir(f"/proc/{zygote_pid}/fd"), key=int)
        self.mounts_of_the_zygote = len(Path(f"/proc/{zygote_pid}/mountinfo").read_text().splitlines())
        self.descriptors_of_the_launcher = [link for link in links("/proc/self/fd") if not link.startswith("socket:")]


def links(folder: str) -> list[str]:
    """But for the one with which the folder is read."""
    return sorted(os.readlink(path) for path in map(str, Path(folder).iterdir()) if os.path.lexists(path))


CONFINED = ["volume", "descriptors", "capabilities", "landlock"]
ENDS = {
    "answers": ({"do": "idle"}, Verdict.EXITED),
    "throws": ({"do": "throw"}, Verdict.EXITED),
    "comes back into the zygote's code": ({"do": "come_back"}, Verdict.EXITED),
    "never ends": ({"do": "linger", "steps": EVERY_STEP}, Verdict.DEADLINE),
    "never ends, and has children that do not": ({"do": "linger", "steps": CONFINED, "children": 5}, Verdict.DEADLINE),
    "calls what the filter forbids": ({"do": "die", "steps": EVERY_STEP, "by": "SIGSYS"}, Verdict.SIGNALLED),
    "crashes": ({"do": "die", "steps": EVERY_STEP, "by": "SIGSEGV"}, Verdict.SIGNALLED),
    "runs out of memory": ({"do": "die", "steps": EVERY_STEP, "by": "memory"}, Verdict.OUT_OF_MEMORY),
}


@pytest.mark.parametrize("end", ENDS)
async def test_however_a_child_ends_its_slot_is_clean(here: Contained, end: str) -> None:
    order, verdict = ENDS[end]
    instance, _ = here.new_volume()
    processes: list[int] = []
    mounts: list[int] = []

    def look_around(_: str) -> None:
        processes.extend(processes_where("ns/pid", os.readlink(f"/proc/{slot.child()}/ns/pid")))
        mounts.extend(processes_that_see(str(instance)))

    async with here.open(deadline_seconds=0.5, container_memory_bytes=64 << 20) as slot:
        zygote_pid = slot.zygote()
        await waiting_child(slot)
        before = vars(Traces(slot))
        run = await slot.run(order, instance=instance, meanwhile=look_around)
        await waiting_child(slot)
        assert run.verdict is verdict, run
        assert vars(Traces(slot)) == before
        assert processes_that_see(str(instance)) == []
        assert slot.zygote() == zygote_pid
        again = await slot.run({"do": "ask", "sql": "SELECT 1"}, instance=instance)
        assert again.report == [[1]]
    if order["do"] not in ("throw", "come_back"):
        assert len(processes) == 1 + order.get("children", 0)
        assert sorted(mounts) == sorted(processes)


async def test_the_zygote_keeps_its_fixed_descriptors_and_its_childs_in_place_of_the_databases(production: Contained) -> None:
    """Of the file on which the children's connection was prepared nothing is left that a tenant's byte could get into."""
    async with production.open() as slot:
        await slot.run(request("CREATE TABLE t(a); INSERT INTO t VALUES (1)"))
        await waiting_child(slot)
        folder = Path(f"/proc/{slot.zygote()}/fd")
        found = {int(path.name): os.readlink(path) for path in folder.iterdir()}
        kinds = [mount["type"] for mount in mounts(f"/proc/{slot.zygote()}")]
    assert found.keys() == {*range(zygote._FIRST_FREE)}
    assert found[child.DATABASE] == "anon_inode:[pidfd]"
    assert not any("db.sqlite" in link for link in found.values())
    assert kinds == ["tmpfs"]


async def test_a_child_without_a_tenants_file_has_none(here: Contained) -> None:
    """Its connection's descriptor is closed then, not the zygote's file or another tenant's."""
    order = {"do": "ask_early", "sql": "SELECT 1"}
    async with here.open() as slot:
        assert (await slot.run(order)).report == "internal"


async def test_a_run_that_is_killed_before_a_child_took_it_is_thrown_away_with_its_volume(here: Contained) -> None:
    instance, _ = here.new_volume()
    async with here.open(deadline_seconds=0.2, grace_seconds=0.1) as slot:
        stopped = await waiting_child(slot)
        before = vars(Traces(slot))
        os.kill(stopped, signal.SIGSTOP)
        assert (await slot.run({"do": "idle"}, instance=instance)).verdict is Verdict.DEADLINE
        await waiting_child(slot)
        assert vars(Traces(slot)) == before
        assert processes_that_see(str(instance)) == []
        assert (await slot.run({"do": "ask", "sql": "SELECT 2"})).report == [[2]]


# --- each step alone


LEFT_TO_A_CHILD: dict[str, tuple[str, list[str], list[str]]] = {
    # attempt → its refusal, the steps of the control, and those that refuse
    "make_the_volume_executable": ("EPERM", ["volume"], ["volume", "capabilities"]),
    "cover_the_volume": ("EPERM", ["volume"], ["volume", "capabilities"]),
    "unmount_the_volume": ("EPERM", ["volume"], ["volume", "capabilities"]),
    "read_the_zygotes_orders": ("EBADF", ["volume"], ["volume", "descriptors"]),
    "take_the_next_childs_run": ("EBADF", ["volume"], ["volume", "descriptors"]),
    "say_that_a_run_is_taken": ("EBADF", ["volume"], ["volume", "descriptors"]),
}


async def outcome(slot: Opened, steps: list[str], attempt: str) -> str:
    run = await slot.run({"do": "attempt", "steps": steps, "attempts": [attempt]})
    if run.verdict is Verdict.SIGNALLED:
        return "a signal"
    found: str = run.report[attempt]
    return found


@pytest.mark.parametrize("attempt", LEFT_TO_A_CHILD)
async def test_one_step_alone_takes_it_from_a_child(here: Contained, attempt: str) -> None:
    refusal, control, steps = LEFT_TO_A_CHILD[attempt]
    async with here.open() as slot:
        assert await outcome(slot, control, attempt) == "done"
        assert await outcome(slot, steps, attempt) == refusal


@pytest.mark.parametrize(
    ("attempt", "refusal"),
    [
        ("make_the_root_writable", "EPERM"),
        ("make_the_roots_file_system_writable", "EPERM"),
        ("uncover_what_is_below_the_root", "EINVAL"),
        ("mount_proc", "EPERM"),
        ("unshare_a_user_namespace", "EPERM"),
    ],
)
async def test_even_with_its_capabilities_it_is_not_a_childs_to_change(here: Contained, attempt: str, refusal: str) -> None:
    """The root is locked, as a mount of another user namespace; no /proc is there to be had anew; nobody has no user to map."""
    async with here.open() as slot:
        assert await outcome(slot, ["volume"], attempt) == refusal


@pytest.mark.parametrize("attempt", ["read_the_image", "read_the_slots_proc", "reach_the_slots_socket"])
async def test_the_empty_root_alone_closes_the_image(here: Contained, attempt: str) -> None:
    async with here.open(left_out("empty root")) as slot:
        # The launcher has taken its one connection, and takes no other.
        assert await outcome(slot, ["volume"], attempt) == ("ECONNREFUSED" if attempt == "reach_the_slots_socket" else "done")
    async with here.open() as slot:
        assert await outcome(slot, ["volume"], attempt) == "ENOENT"


@pytest.mark.parametrize("attempt", ["have_a_child", "open_a_local_socket", "signal_itself", "see_its_limits"])
async def test_the_second_filter_alone_takes_what_the_slots_profile_allows(here: Contained, attempt: str) -> None:
    async with here.open() as slot:
        assert await outcome(slot, ["volume"], attempt) == "done"
        assert await outcome(slot, ["volume", "seccomp"], attempt) == "a signal"


async def test_limits_alone_take_a_childs_children_and_end_its_processor_time(here: Contained) -> None:
    async with here.open(deadline_seconds=1) as slot:
        assert await outcome(slot, ["volume"], "have_a_child") == "done"
        assert await outcome(slot, ["volume", "limits"], "have_a_child") == "EAGAIN"


@pytest.mark.parametrize(
    ("of_the_launcher", "of_the_child", "outcome", "options"),
    [(False, False, "ENOEXEC", set()), (True, False, "EACCES", SEAL), (False, True, "EACCES", SEAL)],
    ids=["neither", "the launcher's", "the child's"],
)
async def test_either_seal_alone_holds_the_volume(
    here: Contained, tmp_path: Path, of_the_launcher: bool, of_the_child: bool, outcome: str, options: set[str]
) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    for name in ("db.sqlite", "db.sqlite-journal"):
        (tmp_path / name).write_text("no program")
        (tmp_path / name).chmod(0o777)
    order = {
        "do": "attempt",
        "pause": True,
        "steps": ["volume", "descriptors"] if of_the_child else ["descriptors"],
        "attempts": ["execute_from_the_volume"],
    }
    async with here.open(sealed=of_the_launcher) as slot:
        run = await slot.run(order, volume=tmp_path)
    assert run.report == {"execute_from_the_volume": outcome}
    (data,) = [mount for mount in run.seen["prepared"]["mounts"] if mount["point"] == "/data"]
    assert SEAL & {*data["options"]} == options


async def test_nobody_of_its_own_user_can_look_into_zygote_or_child(here: Contained) -> None:
    """What the kernel lets the same user do to a process shows in who owns its folder in /proc."""

    async def owners(*without: str) -> set[int]:
        async with here.open(left_out(*without)) as slot:
            return {os.stat(f"/proc/{pid}/mem").st_uid for pid in (slot.zygote(), await waiting_child(slot))}

    assert await owners("privileges") == {RUNNER_UID}
    assert await owners() == {0}


# --- the whole, and refusals


async def test_the_self_test_tells_every_step_in_its_order(production: Contained) -> None:
    async with production.open() as slot:
        confinement = json.loads((await slot.run(b"", command="selftest")).output)["confinement"]
    assert confinement["steps"] == [name for name, _ in (*zygote.STEPS, *child.STEPS)] == [
        *("process", "limits", "namespaces", "database", "root", "privileges"),
        *("run", "volume", "descriptors", "capabilities", "landlock", "database", "limits", "seccomp"),
    ]  # fmt: skip
    assert confinement["seccomp_syscalls"] <= 40
    assert confinement["landlock_abi"] >= 3
    assert confinement["rlimits"] == {"CPU": 32, "NPROC": 0}


def weaker(**host: Any) -> Any:
    return lambda body: body | {"HostConfig": body["HostConfig"] | host}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda body: body | {"User": "64700:0"}, "runs as root: Gid"),
        (weaker(GroupAdd=["0"]), "is in root's group"),
        (weaker(CapDrop=[]), "holds capabilities: CapBnd"),
        (weaker(SecurityOpt=["no-new-privileges", "seccomp=unconfined"]), "without a seccomp profile"),
        (weaker(ReadonlyRootfs=False), "the root file system is writable"),
        (lambda body: weaker(NetworkMode="host")(body) | {"NetworkDisabled": False}, "a network is attached"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_zygote_in_a_weaker_slot_refuses(production: Contained, change: Any, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        async with production.open(change):
            pass


@pytest.mark.parametrize("missing", ["unshare", "mount", "pivot_root", "umount2", "landlock_create_ruleset", "prctl"])
async def test_a_zygote_that_cannot_seal_itself_refuses(production: Contained, missing: str) -> None:
    with pytest.raises(RefusedError, match="engine zygote: "):
        async with production.open(profile=profile_with(removed=(missing,), base=SLOT_PROFILE)):
            pass


async def test_a_zygote_whose_root_is_not_empty_refuses(here: Contained) -> None:
    with pytest.raises(RefusedError, match="the root is not empty"):
        async with here.open(left_out("clean root")):
            pass


async def refusal(production: Contained, **weakening: Any) -> Run:
    async with production.open(profile=profile_with(base=SLOT_PROFILE, **weakening)) as slot:
        return await slot.run(request("SELECT 1"))


@pytest.mark.parametrize(
    "missing", ["move_mount", "mount_setattr", "capset", "landlock_add_rule", "landlock_restrict_self", "seccomp"]
)
async def test_a_child_that_cannot_take_a_step_says_so_and_reads_nothing(production: Contained, missing: str) -> None:
    reply = unframe((await refusal(production, removed=(missing,))).output)
    assert reply["verdict"] == "unconfined"
    assert "Operation not permitted" in reply["message"]


async def test_a_child_that_cannot_have_its_socket_ends_without_a_word(production: Contained) -> None:
    run = await refusal(production, removed=("dup3",))
    assert (run.verdict, run.output) == (Verdict.EXITED, b"")


async def test_a_kernel_without_landlock_is_refused_by_the_zygote(production: Contained) -> None:
    without = profile_with(answered={"landlock_create_ruleset": errno.ENOSYS}, base=SLOT_PROFILE)
    with pytest.raises(RefusedError, match="the kernel has no Landlock"):
        async with production.open(profile=without):
            pass
    async with production.open(profile=without, min_landlock_abi=0) as slot:
        assert unframe((await slot.run(request("SELECT 1"))).output)["rows"] == [[1]]


async def test_a_planted_database_is_refused_by_the_child(production: Contained) -> None:
    instance, found = production.new_volume()
    volume = Path(found)
    (volume / "db.sqlite").unlink()
    (volume / "db.sqlite").symlink_to("db.sqlite-journal")
    async with production.open() as slot:
        reply = unframe((await slot.run(request("SELECT 1"), instance=instance)).output)
    assert reply["verdict"] == "unconfined"
    assert "db.sqlite" in reply["message"]


async def test_runs_one_after_the_other_leave_nothing_and_are_each_their_own(here: Contained) -> None:
    async with here.open() as slot:
        await waiting_child(slot)
        before, sockets = vars(Traces(slot)), len(links("/proc/self/fd"))
        for number in range(30):
            run = await slot.run({"do": "ask", "sql": f"CREATE TABLE t(a); INSERT INTO t VALUES ({number}); SELECT a FROM t"})
            assert run.report == [[number]]
        await waiting_child(slot)
        assert vars(Traces(slot)) == before
        assert len(links("/proc/self/fd")) < sockets + 30
