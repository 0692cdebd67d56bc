"""Instances on disk: made whole or not at all, gone on the second, removed without following anything."""

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.launcher import state
from gateway.launcher.errors import InstanceExistsError, RefusedError, StorageLowError, UnknownInstanceError
from gateway.launcher.registry import Registry

from .launcher_harness import uuid7
from .sealed import sealed_directory, sealed_disk


@dataclass
class Clock:
    now: float = 1_000_000.25

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def registry(tmp_path, clock):
    registry = Registry(tmp_path, ttl_seconds=600, min_free_bytes=0, clock=clock)
    yield registry
    registry.close()


def test_an_instance_is_two_empty_files_in_a_folder_nobody_can_add_to(registry, tmp_path):
    instance = uuid7()
    registry.create(instance)
    volume = Path(registry.volume(instance))
    assert sorted(path.name for path in volume.iterdir()) == ["db.sqlite", "db.sqlite-journal"]
    for path in volume.iterdir():
        found = path.lstat()
        assert (stat.S_IMODE(found.st_mode), found.st_size, found.st_nlink) == (0o666, 0, 1)
    assert stat.S_IMODE(volume.lstat().st_mode) == 0o711
    assert sorted(path.name for path in (tmp_path / str(instance)).iterdir()) == ["instance.json", "volume"]


def test_an_instance_lives_to_the_second_it_was_promised(registry, clock):
    instance = uuid7()
    record = registry.create(instance)
    assert record.expires_at == 1_000_601
    clock.now = 1_000_600.999
    assert registry.find(instance) == record
    assert registry.expired() == []
    clock.now = 1_000_601.0
    with pytest.raises(UnknownInstanceError):
        registry.find(instance)
    assert registry.expired() == [instance]


def test_an_id_is_used_once(registry, tmp_path):
    instance = uuid7()
    registry.create(instance)
    (Path(registry.volume(instance)) / "db.sqlite").write_text("kept")
    with pytest.raises(InstanceExistsError):
        registry.create(instance)
    assert (Path(registry.volume(instance)) / "db.sqlite").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == [str(instance)]


def test_removal_is_idempotent_and_counted_once(registry, tmp_path):
    instance = uuid7()
    registry.create(instance)
    assert registry.count == 1
    assert registry.remove(instance)
    assert not registry.remove(instance)
    assert registry.count == 0
    assert list(tmp_path.iterdir()) == []


def test_removal_unlinks_a_symbolic_link_and_leaves_its_target(registry, tmp_path_factory):
    treasure = tmp_path_factory.mktemp("host") / "treasure"
    treasure.write_text("host")
    instance = uuid7()
    registry.create(instance)
    (Path(registry.volume(instance)) / "folder").symlink_to(treasure.parent)
    (Path(registry.volume(instance)) / "db.sqlite").unlink()
    (Path(registry.volume(instance)) / "db.sqlite").symlink_to(treasure)
    registry.remove(instance)
    assert treasure.read_text() == "host"


def test_a_prepared_instance_is_nobodys_until_it_is_claimed_and_its_life_begins_then(registry, tmp_path, clock):
    instance = uuid7()
    registry.prepare(instance)
    assert sorted(path.name for path in Path(registry.volume(instance)).iterdir()) == ["db.sqlite", "db.sqlite-journal"]
    with pytest.raises(UnknownInstanceError):
        registry.find(instance)
    assert (registry.count, registry.expired()) == (0, [instance])
    clock.now += 5000
    assert registry.claim(instance).expires_at == 1_005_601
    assert (registry.find(instance).expires_at, registry.count, registry.expired()) == (1_005_601, 1, [])
    assert sorted(path.name for path in (tmp_path / str(instance)).iterdir()) == ["instance.json", "volume"]


@pytest.mark.parametrize("salvage", [False, True])
def test_how_an_instance_was_asked_for_is_kept_over_a_restart_and_over_every_change_of_its_record(tmp_path, clock, salvage):
    registry = Registry(tmp_path, ttl_seconds=600, min_free_bytes=0, max_life_seconds=3600, clock=clock)
    made, claimed = uuid7(), uuid7()
    registry.create(made, salvage=salvage)
    registry.prepare(claimed)
    registry.claim(claimed, salvage=salvage)
    for instance in (made, claimed):
        registry.extend(instance, 1_000_900)
        registry.ran(instance)
    registry.close()
    again = Registry(tmp_path, ttl_seconds=600, min_free_bytes=0, clock=clock)
    found = [again.find(instance) for instance in (made, claimed)]
    assert [(record.salvage, record.expires_at, record.queries) for record in found] == [(salvage, 1_000_900, 1)] * 2
    again.close()


def test_a_prepared_instance_that_nobody_claimed_is_gone_after_a_restart_and_removed_like_any_other(registry, tmp_path, clock):
    kept, claimed, unclaimed = uuid7(), uuid7(), uuid7()
    registry.create(kept)
    registry.prepare(claimed)
    registry.claim(claimed)
    registry.prepare(unclaimed)
    again = Registry(tmp_path, ttl_seconds=600, min_free_bytes=0, clock=clock)
    assert again.expired() == [unclaimed]
    assert again.remove(unclaimed)
    assert again.count == 2
    again.close()
    assert registry.count == 2


def test_below_the_low_water_mark_nothing_is_claimed_and_it_can_be_later(tmp_path):
    low = Registry(tmp_path, ttl_seconds=600, min_free_bytes=0)
    instance = uuid7()
    low.prepare(instance)
    low._min_free_bytes = 1 << 60
    with pytest.raises(StorageLowError):
        low.prepare(uuid7())
    with pytest.raises(StorageLowError):
        low.claim(instance)
    with pytest.raises(UnknownInstanceError):
        low.find(instance)
    low._min_free_bytes = 0
    assert low.claim(instance) == low.find(instance)
    low.close()


def test_another_registry_on_the_same_folder_sees_the_same_instances(registry, tmp_path, clock):
    instances = {uuid7() for _ in range(5)}
    for instance in instances:
        registry.create(instance)
    (tmp_path / ".new-half").mkdir()
    (tmp_path / ".gone-half").mkdir()
    again = Registry(tmp_path, ttl_seconds=1, min_free_bytes=0, clock=clock)
    assert again.count == 5
    assert again.sweep_leftovers() == 2
    assert all(again.find(instance).expires_at == 1_000_601 for instance in instances)
    again.close()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"v": 2, "created_at": 0, "expires_at": 9999999999}', '{"v": 1}'])
def test_a_record_that_is_unreadable_at_a_start_is_no_instance_and_is_reaped(registry, tmp_path, clock, damage):
    instance = uuid7()
    registry.create(instance)
    (tmp_path / str(instance) / "instance.json").write_text(damage)
    assert registry.expired() == [], "the control: what is in memory is not asked of the disk again"
    again = Registry(tmp_path, ttl_seconds=600, min_free_bytes=0, clock=clock)
    with pytest.raises(UnknownInstanceError):
        again.find(instance)
    assert again.expired() == [instance]
    assert again.remove(instance)
    assert list(tmp_path.iterdir()) == []
    again.close()


def test_a_folder_that_is_deleted_by_hand_is_missed_by_a_second_look_and_forgotten_by_the_next_sweep(registry, tmp_path):
    kept, deleted = uuid7(), uuid7()
    for instance in (kept, deleted):
        registry.create(instance)
        registry.look_again(instance)
    shutil.rmtree(tmp_path / str(deleted))
    registry.look_again(kept)
    with pytest.raises(UnknownInstanceError):
        registry.look_again(deleted)
    assert registry.expired() == []
    with pytest.raises(UnknownInstanceError):
        registry.find(deleted)
    assert registry.count == 1
    assert registry.find(kept)


def test_a_folder_that_was_deleted_by_hand_is_counted_out_by_its_removal_too(registry, tmp_path):
    instance = uuid7()
    registry.create(instance)
    shutil.rmtree(tmp_path / str(instance))
    assert not registry.remove(instance)
    assert registry.count == 0
    with pytest.raises(UnknownInstanceError):
        registry.find(instance)


def test_a_folder_that_is_put_back_by_hand_is_found_after_the_next_sweep(registry, tmp_path, tmp_path_factory):
    instance = uuid7()
    record = registry.create(instance)
    aside = tmp_path_factory.mktemp("aside") / str(instance)
    shutil.move(tmp_path / str(instance), aside)
    assert (registry.expired(), registry.count) == ([], 0)
    shutil.move(aside, tmp_path / str(instance))
    assert (registry.expired(), registry.count) == ([], 1)
    assert registry.find(instance) == record


def test_an_instance_whose_record_the_disk_does_not_give_is_neither_served_nor_deleted(registry, tmp_path, clock):
    instance, other = uuid7(), uuid7()
    record = registry.create(instance)
    registry.create(other)
    path = tmp_path / str(instance) / "instance.json"
    text = path.read_text()
    path.unlink()
    path.mkdir()
    again = Registry(tmp_path, ttl_seconds=600, min_free_bytes=0, clock=clock)
    with pytest.raises(UnknownInstanceError):
        again.find(instance)
    assert (again.expired(), again.count) == ([], 1)
    path.rmdir()
    path.write_text(text)
    assert again.expired() == []
    assert again.find(instance) == record
    again.close()


def test_below_the_low_water_mark_nothing_is_made(tmp_path):
    registry = Registry(tmp_path, ttl_seconds=600, min_free_bytes=1 << 60)
    with pytest.raises(StorageLowError):
        registry.create(uuid7())
    assert list(tmp_path.iterdir()) == []
    registry.close()


def test_a_disk_that_fills_up_in_the_middle_of_making_an_instance_keeps_nothing_of_it():
    made_before = 0
    for inodes in range(2, 9):  # the root is one: the disk is full at every step in turn
        with sealed_disk(f"nr_inodes={inodes}") as disk:
            registry = Registry(disk, ttl_seconds=600, min_free_bytes=0)
            try:
                registry.create(uuid7())
            except StorageLowError:
                assert list(disk.iterdir()) == []
                made_before += 1
            registry.close()
    assert made_before >= 4


def test_a_state_folder_without_the_mount_flags_is_refused_with_the_command_that_cures_it(tmp_path):
    with pytest.raises(RefusedError, match=r"mount --bind .* && mount -o remount,bind,nosuid,nodev,noexec"):
        state.prepare_folders(tmp_path)


def test_a_state_folder_that_others_may_enter_is_refused():
    with sealed_directory() as folder:
        state.prepare_folders(folder)
        (folder / "instances").chmod(0o755)
        with pytest.raises(RefusedError, match="mode 700"):
            state.prepare_folders(folder)


def test_the_deployment_id_is_made_once_and_kept():
    with sealed_directory() as folder:
        state.prepare_folders(folder)
        first = state.deployment_id(folder)
        assert state.deployment_id(folder) == first
        (folder / "launcher" / "deployment-id").write_text("../../etc")
        with pytest.raises(RefusedError):
            state.deployment_id(folder)


def test_one_state_folder_has_one_launcher():
    with sealed_directory() as folder:
        state.prepare_folders(folder)
        held = state.lock(folder)
        with pytest.raises(RefusedError):
            state.lock(folder)
        os.close(held)
        os.close(state.lock(folder))
