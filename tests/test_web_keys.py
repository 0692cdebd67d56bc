"""The key file: private, atomic, rotated by age, indifferent to a clock that jumps back."""

from __future__ import annotations

import json
import os
import stat

import pytest

from gateway.web.keys import FILE_NAME, KeyRing, KeysError


class Clock:
    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state" / "keys"


@pytest.fixture
def ring(folder, clock):
    ring = KeyRing(folder, 100, clock)
    ring.open()
    return ring


def test_the_first_start_makes_a_private_folder_and_file(ring, folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / FILE_NAME).stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]


def test_a_second_start_reads_the_same_keys(ring, folder, clock):
    clock.now += 100
    ring.rotate_if_due()
    again = KeyRing(folder, 100, clock)
    again.open()
    assert again.current.value.reveal() == ring.current.value.reveal()
    assert again.previous.value.reveal() == ring.previous.value.reveal()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601])
def test_a_key_file_that_others_can_reach_is_refused(ring, folder, clock, mode):
    (folder / FILE_NAME).chmod(mode)
    with pytest.raises(KeysError, match="mode"):
        KeyRing(folder, 100, clock).open()


@pytest.mark.parametrize("mode", [0o710, 0o755, 0o701])
def test_a_key_folder_that_others_can_reach_is_refused(ring, folder, clock, mode):
    folder.chmod(mode)
    with pytest.raises(KeysError, match="mode"):
        KeyRing(folder, 100, clock).open()


def test_a_key_file_of_another_user_is_refused(ring, folder, clock):
    if os.geteuid() != 0:
        pytest.fail("this test changes a file's owner and needs root")
    os.chown(folder / FILE_NAME, 12345, 12345)
    with pytest.raises(KeysError, match="belongs to user 12345"):
        KeyRing(folder, 100, clock).open()


def test_a_symbolic_link_in_place_of_the_key_file_is_refused(ring, folder, clock, tmp_path):
    (folder / FILE_NAME).rename(tmp_path / "elsewhere")
    (folder / FILE_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeysError):
        KeyRing(folder, 100, clock).open()


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
        KeyRing(folder, 100, clock).open()
    assert "AAAA" not in str(refused.value)


def test_a_young_key_is_not_rotated(ring, clock):
    clock.now += 99
    assert not ring.rotate_if_due()


def test_an_old_key_becomes_the_previous_one(ring, clock):
    old = ring.current.value.reveal()
    clock.now += 100
    assert ring.rotate_if_due()
    assert ring.previous.value.reveal() == old
    assert ring.current.value.reveal() != old


def test_a_key_that_outlived_both_periods_while_stopped_is_forgotten(ring, folder, clock):
    old = ring.current.value.reveal()
    clock.now += 1000
    again = KeyRing(folder, 100, clock)
    again.open()
    assert old not in (again.current.value.reveal(), again.previous.value.reveal())


def test_a_clock_that_jumps_back_neither_rotates_nor_rejects(ring, folder, clock):
    key = ring.current.value.reveal()
    clock.now -= 500_000
    assert not ring.rotate_if_due()
    again = KeyRing(folder, 100, clock)
    again.open()
    assert again.current.value.reveal() == key


def test_a_rotation_that_cannot_be_written_keeps_the_old_key(ring, folder, clock, monkeypatch):
    key = ring.current.value.reveal()
    before = (folder / FILE_NAME).read_bytes()
    clock.now += 100

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
    clock.now += 100
    ring.rotate_if_due()
    assert steps == ["file", "rename", "dir"]


def test_the_file_holds_two_keys_at_most(ring, folder, clock):
    for _ in range(3):
        clock.now += 100
        ring.rotate_if_due()
    assert set(json.loads((folder / FILE_NAME).read_bytes())) == {"version", "current", "previous"}
