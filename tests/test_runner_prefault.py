"""A child takes its request's pages before the request comes, if there is time, and is as right without."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings
from runner import prefault
from runner.child import HEADER

from .containers import SLOT_PROFILE, profile_with
from .engines import Contained, Opened, contained
from .launcher_harness import eventually, frame, unframe
from .test_zygote_child import waiting_child

REPO = Path(__file__).resolve().parent.parent
MOST_FAULTS_WITHOUT = 100

needs_the_kernel = pytest.mark.skipif(
    not prefault.Pages().can_be_populated(), reason="process_madvise takes no MADV_POPULATE_WRITE here"
)


@pytest.fixture(scope="module")
def slots() -> Iterator[Contained]:
    """With the runner's own image."""
    with contained("zygote", image=Settings.from_environment().image) as (found, _):
        yield found


def faults(pid: int) -> int:
    """Pages that the process has had to be given so far."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


async def serves(slot: Opened) -> bool:
    answered = await slot.run(
        frame(v=1, sql="CREATE TABLE t(a); INSERT INTO t VALUES (7); SELECT a FROM t", args=None, int64="number")
    )
    return bool(unframe(answered.output)["rows"] == [[7]])


@needs_the_kernel
async def test_each_child_that_waits_has_its_requests_pages_already(slots: Contained) -> None:
    async with slots.open() as slot:
        for _ in range(2):
            waits = await waiting_child(slot)
            await eventually(lambda waits=waits: faults(waits) > MOST_FAULTS_WITHOUT + 100)
            assert await serves(slot)


async def test_where_the_call_is_refused_a_slot_serves_all_the_same(slots: Contained) -> None:
    async with slots.open(profile=profile_with(removed=("process_madvise",), base=SLOT_PROFILE)) as slot:
        for _ in range(2):
            assert faults(await waiting_child(slot)) < MOST_FAULTS_WITHOUT
            assert await serves(slot)


POPULATED = """
import ctypes, json, mmap, os, resource, sys
from runner.prefault import Pages
room, other = (mmap.mmap(-1, 64 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2))
room.write(b"7" * len(room))

def write_to(memory):
    found = []
    for page in range(64):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        memory[page * 4096] = 8
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return found

start = ctypes.addressof(ctypes.c_char.from_buffer(room))
pages = Pages()
pages.become(start + number * 4096 for number in json.loads(sys.argv[1]))
reading, writing = os.pipe()
if os.fork() == 0:
    given = pages.populate()
    write_to(other)  # what is the interpreter's own to write is written then
    found = write_to(room)
    os.write(writing, json.dumps([given, found, set(room[:]) == {ord('7'), 8}]).encode())
    os._exit(0)
os.wait()
assert set(room[:]) == {ord('7')}
print(os.read(reading, 4096).decode())
"""


@needs_the_kernel
def test_exactly_the_named_pages_are_copied_and_hold_what_they_held() -> None:
    named = [1, 2, 3, 9, 40, 41, 63]
    done = subprocess.run(
        [sys.executable, "-c", POPULATED, json.dumps(named)], capture_output=True, text=True, check=True, cwd=REPO
    )
    given, found, unchanged = json.loads(done.stdout)
    assert given == len(named) * 4096
    assert [page for page, faulted in enumerate(found) if not faulted] == named
    assert unchanged


def test_a_packet_that_is_there_already_is_taken_without_a_wait() -> None:
    launcher, zygote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with launcher, zygote:
        inbox = prefault.WaitingInbox(zygote.fileno())
        waited: list[str] = []
        wait: Any = inbox.wait

        def wait_and_tell() -> int:
            waited.append("waited")
            launcher.send(HEADER.pack(4, 0, 2))
            given: int = wait()
            return given

        inbox.wait = wait_and_tell
        launcher.send(HEADER.pack(4, 0, 1))
        assert inbox.receive() == HEADER.size
        assert (bytes(inbox.packet[: HEADER.size]), waited) == (HEADER.pack(4, 0, 1), [])
        inbox.clear()
        assert inbox.receive() == HEADER.size
        assert (bytes(inbox.packet[: HEADER.size]), waited) == (HEADER.pack(4, 0, 2), ["waited"])


def test_a_kernel_that_cannot_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefault, "_MADV_POPULATE_WRITE", 99)
    open_before = os.listdir("/proc/self/fd")
    assert prefault.Rehearsal.of(0, 64) is None
    assert os.listdir("/proc/self/fd") == open_before


def test_more_pages_than_one_call_takes_are_left_out() -> None:
    pages = prefault.Pages()
    pages.become(range(0, 4096 * 4096, 2 * 4096))
    assert pages._count.value == prefault._MOST_VECTORS
