"""The key file: private, atomic under kill -9, replaced by one gateway of many. Weeks of time are in test_web_keys_time.py."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gateway.web.keys import FileSource, Key, KeyRing, KeysError, Stored
from gateway.web.keys.file import FILE_NAME

from .keys_time import Clock

REPO = Path(__file__).parent.parent
# What a rotation period of 100 s adds until the next key is due.
AHEAD = 60


@pytest.fixture
def clock():
    return Clock()


def ring_of(folder: Path, clock: Clock) -> KeyRing:
    return KeyRing(FileSource(folder), 100, lambda: clock.wall, lambda: clock.boot)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state" / "keys"


@pytest.fixture
def ring(folder, clock):
    ring = ring_of(folder, clock)
    ring.open()
    return ring


def test_the_first_start_makes_a_private_folder_and_file(ring, folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / FILE_NAME).stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]


def test_a_second_start_reads_the_same_keys(ring, folder, clock):
    clock.pass_by(100 + AHEAD)
    ring.rotate_if_due()
    again = ring_of(folder, clock)
    again.open()
    assert again.current.value.reveal() == ring.current.value.reveal()
    assert again.previous.value.reveal() == ring.previous.value.reveal()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601])
def test_a_key_file_that_others_can_reach_is_refused(ring, folder, clock, mode):
    (folder / FILE_NAME).chmod(mode)
    with pytest.raises(KeysError, match="mode"):
        ring_of(folder, clock).open()


@pytest.mark.parametrize("mode", [0o710, 0o755, 0o701])
def test_a_key_folder_that_others_can_reach_is_refused(ring, folder, clock, mode):
    folder.chmod(mode)
    with pytest.raises(KeysError, match="mode"):
        ring_of(folder, clock).open()


def test_a_key_file_of_another_user_is_refused(ring, folder, clock):
    if os.geteuid() != 0:
        pytest.fail("this test changes a file's owner and needs root")
    os.chown(folder / FILE_NAME, 12345, 12345)
    with pytest.raises(KeysError, match="belongs to user 12345"):
        ring_of(folder, clock).open()


def test_a_symbolic_link_in_place_of_the_key_file_is_refused(ring, folder, clock, tmp_path):
    (folder / FILE_NAME).rename(tmp_path / "elsewhere")
    (folder / FILE_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeysError):
        ring_of(folder, clock).open()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version":2,"current":{"key":"","created_at":0},"previous":null}',
        '{"version":1,"current":{"key":"AAAA","created_at":0},"previous":null}',
        '{"version":1,"current":{"key":"!","created_at":0},"previous":null}',
    ],
)
def test_a_broken_key_file_is_refused_without_quoting_it(folder, ring, clock, text):
    (folder / FILE_NAME).write_text(text)
    with pytest.raises(KeysError) as refused:
        ring_of(folder, clock).open()
    assert "AAAA" not in str(refused.value)


def test_the_format_of_earlier_versions_is_read(folder, clock):
    folder.mkdir(parents=True, mode=0o700)
    old = {"version": 1, "current": {"key": "A" * 43 + "=", "created_at": int(clock.wall)}, "previous": None}
    (folder / FILE_NAME).write_text(json.dumps(old))
    (folder / FILE_NAME).chmod(0o600)
    ring = ring_of(folder, clock)
    ring.open()
    assert ring.current.value.reveal() == bytes(32)


def test_a_young_key_is_not_rotated(ring, clock):
    clock.pass_by(100 + AHEAD - 1)
    assert not ring.rotate_if_due()


def test_an_old_key_stays_accepted_and_signs_until_the_new_one_is_known_everywhere(ring, clock):
    old = ring.current.value.reveal()
    clock.pass_by(100 + AHEAD)
    assert ring.rotate_if_due()
    new = ring.previous.value.reveal()
    assert ring.current.value.reveal() == old != new
    clock.pass_by(AHEAD / 2)
    assert not ring.rotate_if_due()
    assert (ring.current.value.reveal(), ring.previous.value.reveal()) == (new, old)


def test_a_gateway_that_could_not_look_for_a_day_forgets_no_key_that_it_still_signs_with(ring, clock):
    clock.pass_by(100 + AHEAD)
    assert ring.rotate_if_due()
    signing = ring.current.value.reveal()
    clock.pass_by(1000)
    assert not ring.rotate_if_due()
    assert ring.previous.value.reveal() == signing
    assert ring.rotate_if_due()


def test_the_age_of_the_newest_key_is_known(ring, clock):
    clock.pass_by(50)
    assert ring.age_seconds == 50


def test_a_file_that_is_gone_while_the_gateway_runs_is_a_failure_that_keeps_the_keys(ring, folder):
    key = ring.current.value.reveal()
    (folder / FILE_NAME).unlink()
    with pytest.raises(KeysError, match="gone"):
        ring.rotate_if_due()
    assert ring.current.value.reveal() == key
    assert list(folder.iterdir()) == []


def test_a_rotation_that_cannot_be_written_keeps_the_old_key(ring, folder, clock, monkeypatch):
    key = ring.current.value.reveal()
    before = (folder / FILE_NAME).read_bytes()
    clock.pass_by(100 + AHEAD)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeysError, match="No space"):
        ring.rotate_if_due()
    monkeypatch.undo()
    assert ring.current.value.reveal() == key
    assert (folder / FILE_NAME).read_bytes() == before
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]


def test_the_file_is_synced_before_and_the_folder_after_the_rename(ring, clock, monkeypatch):
    steps: list[str] = []
    real_sync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: steps.append("dir" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file") or real_sync(fd)
    )
    monkeypatch.setattr(os, "rename", lambda a, b: steps.append("rename") or real_rename(a, b))
    clock.pass_by(100 + AHEAD)
    ring.rotate_if_due()
    assert steps == ["file", "rename", "dir"]


def test_the_file_holds_two_keys_at_most(ring, folder, clock):
    for _ in range(3):
        clock.pass_by(100 + AHEAD)
        ring.rotate_if_due()
        ring.rotate_if_due()
    assert set(json.loads((folder / FILE_NAME).read_bytes())) == {"version", "current", "previous"}


def rotation_of(folder: Path) -> tuple[FileSource, Stored, Stored]:
    """A source with its state, and what is to replace it."""
    source = FileSource(folder)
    old = source.load()
    assert old is not None
    return source, old, Stored(Key.fresh(0), old.newest)


def test_of_two_gateways_that_replace_the_same_key_the_second_gets_the_first_ones(ring, folder):
    first, old, new = rotation_of(folder)
    second, same, other = rotation_of(folder)
    assert first.rotate(old, new).newest is new.newest
    held = second.rotate(same, other)
    assert held.newest.value.reveal() == new.newest.value.reveal()
    assert second.load().version == held.version


def test_no_other_gateway_replaces_the_key_between_the_last_look_and_the_write(ring, folder, monkeypatch):
    source, old, new = rotation_of(folder)
    real = FileSource._write

    def write(*args):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
        real(*args)

    monkeypatch.setattr(FileSource, "_write", write)
    source.rotate(old, new)


def test_without_the_lock_two_gateways_would(ring, folder, monkeypatch):
    """The control of the one above: both believe that theirs is the key."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    source, old, new = rotation_of(folder)
    other = Stored(Key.fresh(0), old.newest)
    real, won = FileSource._write, []

    def write(*args):
        monkeypatch.setattr(FileSource, "_write", real)
        won.append(FileSource(folder).rotate(old, other).newest is other.newest)
        real(*args)

    monkeypatch.setattr(FileSource, "_write", write)
    assert source.rotate(old, new).newest is new.newest
    assert won == [True]


GATEWAY = """
import hashlib, sys
from pathlib import Path
from gateway.web.keys import FileSource, KeyRing
now = 0.0
ring = KeyRing(FileSource(Path(sys.argv[1])), 100, lambda: 1e9 + now, lambda: now)
digest = lambda key: hashlib.sha256(key.value.reveal()).hexdigest()
for line in sys.stdin:
    if line == "open\\n":
        ring.open()
        print(digest(ring.current), flush=True)
    else:
        now += float(line)
        rotated = ring.rotate_if_due()
        ring.rotate_if_due()
        print(rotated, digest(ring.previous), flush=True)
"""


def test_processes_on_one_folder_make_one_key_and_one_of_them_replaces_it(folder):
    gateways = [
        subprocess.Popen(
            [sys.executable, "-c", GATEWAY, folder], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]

    def all_at_once(order: str) -> list[list[str]]:
        for gateway in gateways:
            gateway.stdin.write(order + "\n")
            gateway.stdin.flush()
        return [gateway.stdout.readline().split() for gateway in gateways]

    try:
        assert len({tuple(said) for said in all_at_once("open")}) == 1
        keys = set()
        for _ in range(5):
            said = all_at_once(str(100 + AHEAD))
            assert sorted(rotated for rotated, _ in said) == ["False", "False", "False", "True"]
            (key,) = {key for _, key in said}
            keys.add(key)
            all_at_once(str(AHEAD / 2))
        assert len(keys) == 5
    finally:
        for gateway in gateways:
            gateway.communicate()


# A gateway that is killed at one step of replacing the key: before it, or halfway through writing.
KILLED = """
import os, signal, sys
from pathlib import Path
from gateway.web.keys import FileSource, Key, Stored
import gateway.web.keys.file as module
source, step = FileSource(Path(sys.argv[1])), sys.argv[2]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
def dying(name):
    real, (wanted, _, count) = getattr(os, name), step.partition(":")
    seen = []
    def call(*args, **kwargs):
        seen.append(1)
        if wanted == name and len(seen) == int(count or 1):
            die()
        return real(*args, **kwargs)
    return call
old = source.load()
for name in ("open", "fsync", "rename", "mkdir", "close"):
    setattr(os, name, dying(name))
if step == "write":
    real = os.fdopen
    class Half:
        def __init__(self, file): self.file = file
        def __enter__(self): return self
        def __exit__(self, *_): self.file.close()
        def write(self, raw):
            self.file.write(raw[: len(raw) // 2]); self.file.flush(); die()
    os.fdopen = lambda fd, mode: Half(real(fd, mode)) if mode == "wb" else real(fd, mode)
source.rotate(old, Stored(Key.fresh(1), old.newest if old else None))
"""
STEPS = ["mkdir", "open:1", "open:2", "open:3", "write", "fsync:1", "rename", "fsync:2", "close"]


@pytest.mark.parametrize("there", [True, False], ids=["replace", "create"])
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_of_a_write_leaves_the_old_keys_or_the_new(folder, clock, step, there):
    if there:
        ring_of(folder, clock).open()
    before = FileSource(folder).load()
    done = subprocess.run([sys.executable, "-c", KILLED, folder, step], cwd=REPO, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    after = FileSource(folder).load()
    replaced = (after.version if after else None) != (before.version if before else None)
    assert replaced == (step in ("fsync:2", "close"))
    # The next gateway starts on what is there, replaces it, and leaves nothing lying about.
    ring = ring_of(folder, clock)
    ring.open()
    clock.pass_by(100 + AHEAD)
    ring.rotate_if_due()
    ring.rotate_if_due()
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]


BUSY = """
import sys
import threading
from pathlib import Path
from gateway.web.keys import FileSource, Key, Stored
source = FileSource(Path(sys.argv[1]))
print("at work", flush=True)
while True:
    old = source.load()
    source.rotate(old, Stored(Key.fresh(1), old.newest))
"""


def test_kills_at_random_instants_of_ceaseless_rotation_leave_a_file_that_serves(ring, folder):
    chance, states = random.Random(1), set()
    for _ in range(20):
        busy = subprocess.Popen([sys.executable, "-c", BUSY, folder], cwd=REPO, stdout=subprocess.PIPE)
        busy.stdout.readline()
        for _ in range(chance.randrange(200)):
            FileSource(folder).load()
        busy.kill()
        busy.communicate()
        held = FileSource(folder).load()
        assert held is not None
        states.add(held.version)
    assert len(states) > 1


class Failing:
    """A source that does what it is told to do next."""

    def __init__(self, source: FileSource) -> None:
        self.source = source
        self.errors: list[Exception] = []
        self.looks = 0

    def load(self):
        self.looks += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.source.load()

    def rotate(self, old, new):
        return self.source.rotate(old, new)


async def test_looking_goes_on_after_failures_which_are_counted_and_logged_without_what_they_hold(folder, caplog):
    source = Failing(FileSource(folder))
    ring = KeyRing(source, 0.01)
    ring.open()
    first = ring.current.value.reveal()
    source.errors = [KeysError("not to be reached"), RuntimeError("CANARY")]
    task = asyncio.create_task(ring.keep_rotating())
    try:
        async with asyncio.timeout(20):
            while first in (ring.current.value.reveal(), ring.previous.value.reveal()):
                await asyncio.sleep(0)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert ring.rotation_failures == 2
    assert "not to be reached" in caplog.text
    assert "RuntimeError" in caplog.text
    assert "CANARY" not in caplog.text


async def test_a_source_that_hangs_holds_up_no_request(folder):
    """The event loop goes on while a look waits."""
    source, hanging, go_on = Failing(FileSource(folder)), threading.Event(), threading.Event()
    ring = KeyRing(source, 0.01)
    ring.open()
    real = source.load

    def load():
        hanging.set()
        go_on.wait()
        return real()

    source.load = load
    task = asyncio.create_task(ring.keep_rotating())
    async with asyncio.timeout(20):
        while not hanging.is_set():
            await asyncio.sleep(0)
    assert ring.current.value.reveal()
    go_on.set()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
