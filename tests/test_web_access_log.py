"""The access log as a file: form, privacy, bounds, retention under every clock, and disks that fail."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.uuid7 import uuid7
from gateway.web import access_log
from gateway.web.access_log import AccessLog, AccessLogError

from .sealed import sealed_disk

NOON = datetime(2026, 3, 10, 12, 0, 0, 123_456, tzinfo=UTC).timestamp()
DAY = 86_400
TODAY = "access-2026-03-10.jsonl"


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock(NOON)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def log(folder, clock):
    return opened(folder, clock)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system of its own, of 16 pages, that a test may fill or make read-only."""
    with sealed_disk("size=64k") as disk:
        yield disk


def opened(folder: Path, clock: Clock, day_bytes: int = 0) -> AccessLog:
    log = AccessLog(folder, 7, day_bytes, clock)
    log.open()
    return log


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("access-*.jsonl")) for line in path.read_text().splitlines()]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == access_log.__name__]


def record(log: AccessLog, **changed: object) -> None:
    line = {
        "at": log.now(),
        "source_ip": "192.0.2.1",
        "instance": None,
        "method": "POST",
        "status": 200,
        "sql_bytes": 8,
        "user_agent": "curl/8",
    }
    log.record(**{**line, **changed})


async def test_a_line_has_the_documented_fields_in_their_order(log, folder):
    instance = uuid7()
    record(log, instance=instance)
    record(log)
    await log.flush()
    path = folder / TODAY
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert list(first.items()) == [
        ("timestamp", "2026-03-10T12:00:00.123Z"),
        ("source_ip", "192.0.2.1"),
        ("instance_id", str(instance)),
        ("http_method", "POST"),
        ("http_status", 200),
        ("sql_byte_length", 8),
        ("user_agent", "curl/8"),
    ]
    assert "instance_id" not in second


async def test_folder_and_file_are_private(log, folder):
    record(log)
    await log.flush()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize(
    "agent",
    [
        'x"}\n{"forged":1}',
        "\r\nforged",
        "\x1b[2J\x9b2J",
        "\u2028\u2029",
        "\udcff\udc80",
        "\x00\x7f",
        "a" * 10_000,
        "\U0001f600" * 256,
        '"' * 256,
        "\t" * 256,
        '","http_status":1,"x":"',
    ],
)
async def test_no_user_agent_can_forge_a_line_or_reach_a_terminal(log, folder, agent):
    record(log, user_agent=agent)
    await log.flush()
    raw = (folder / TODAY).read_bytes()
    assert raw.count(b"\n") == 1
    assert raw.endswith(b"\n")
    assert all(0x20 <= byte < 0x7F for byte in raw[:-1])
    assert len(raw) < 750
    line = json.loads(raw)
    assert line["http_status"] == 200
    assert len(line["user_agent"]) <= 256
    line["user_agent"].encode()


@pytest.mark.parametrize("method", ["wkn_AZrq0123456789", "BREW", "get", 'GET","x":"', "G" * 10_000])
async def test_a_word_that_is_no_method_of_http_is_not_written(log, folder, method):
    record(log, method=method)
    await log.flush()
    assert [line["http_method"] for line in lines(folder)] == ["OTHER"]


@pytest.mark.parametrize("agent", ["wkn_AZrq-0_9", "x wkn_AZrq-0_9 y", "a" * 250 + "wkn_AZrq-0_9"])
async def test_a_token_in_the_user_agent_is_not_written(log, folder, agent):
    record(log, user_agent=agent)
    await log.flush()
    (line,) = lines(folder)
    assert "wkn_***" in line["user_agent"]
    assert "AZ" not in line["user_agent"]


async def test_a_request_is_written_to_the_file_of_its_own_day(log, folder, clock):
    record(log)
    clock.now += DAY
    record(log)
    record(log, at=clock.now - DAY)
    await log.flush()
    assert [(path.name, path.read_text().count("\n")) for path in sorted(folder.iterdir())] == [
        (TODAY, 2),
        ("access-2026-03-11.jsonl", 1),
    ]


# Bounds


async def test_a_flood_fills_a_days_bytes_and_no_more_whatever_is_restarted(folder, clock):
    log, sent = opened(folder, clock, day_bytes=10_000), 0
    for _ in range(5):
        for _ in range(40):
            record(log, user_agent="x" * random.Random(sent).randrange(256))
            sent += 1
        await log.flush()
        assert (folder / TODAY).stat().st_size <= 10_000
    dropped = log.lost["day_bytes"]
    assert dropped == sent - len(lines(folder)) > 0
    log = opened(folder, clock, day_bytes=10_000)
    record(log, user_agent="x" * 250)
    await log.flush()
    assert log.lost == {"day_bytes": 1}
    clock.now += DAY
    record(log)
    await log.flush()
    assert log.lost["day_bytes"] == 1
    assert (folder / "access-2026-03-11.jsonl").stat().st_size > 0


async def test_without_a_bound_every_line_is_written(log, folder):
    for _ in range(200):
        record(log, user_agent="x" * 250)
    await log.flush()
    assert len(lines(folder)) == 200
    assert not +log.lost


async def test_what_waits_in_memory_is_bounded_and_what_is_beyond_it_counted(log, folder, clock, monkeypatch, caplog):
    monkeypatch.setattr(access_log, "_MAX_PENDING_BYTES", 10_000)
    for _ in range(100):
        record(log, user_agent="x" * 250)
    await log.flush()
    kept = len(lines(folder))
    assert 0 < (folder / TODAY).stat().st_size < 10_500
    assert log.lost == {"memory": 100 - kept}
    assert told(caplog) == [f"access log: lines lost: {100 - kept} memory"]
    record(log)
    await log.flush()
    assert len(lines(folder)) == kept + 1


async def test_the_operator_is_told_of_lost_lines_once_a_minute(folder, clock, caplog):
    log = opened(folder, clock, day_bytes=1)
    for _ in range(180):
        record(log)
        await log.flush()
        clock.now += 1
    assert told(caplog) == [
        "access log: lines lost: 1 day_bytes",
        "access log: lines lost: 60 day_bytes",
        "access log: lines lost: 60 day_bytes",
    ]
    assert log.lost["day_bytes"] == 180


# Retention


async def test_three_weeks_with_restarts_keep_every_line_six_days_and_none_for_seven(folder, clock):
    chance, log, written = random.Random(7), opened(folder, clock), []
    end = clock.now + 21 * DAY
    while clock.now < end:
        # From a second to most of a day, and now and then the second before midnight.
        clock.now += chance.choice((1, 59, 3_600, 20_000, 70_000))
        if chance.random() < 0.2:
            clock.now += DAY - clock.now % DAY - 1
        if chance.random() < 0.3:
            log = opened(folder, clock)
        record(log)
        written.append(clock.now)
        await log.flush()
        ages = [clock.now - datetime.fromisoformat(line["timestamp"]).timestamp() for line in lines(folder)]
        assert max(ages) < 7 * DAY
        assert len(ages) >= sum(clock.now - at < 6 * DAY for at in written)
        assert len(names(folder)) <= 8
    assert not +log.lost


@pytest.mark.parametrize("restarts", [False, True])
async def test_a_file_goes_a_minute_before_its_first_line_would_be_too_old(folder, clock, restarts):
    clock.now -= clock.now % DAY
    log = opened(folder, clock)
    record(log)
    await log.flush()
    clock.now += 7 * DAY - 61
    log = opened(folder, clock) if restarts else log
    await log.flush()
    assert TODAY in names(folder)
    clock.now += 1
    log = opened(folder, clock) if restarts else log
    await log.flush()
    assert TODAY not in names(folder)


async def test_after_a_stop_of_a_month_nothing_old_is_there_when_the_service_begins(log, folder, clock):
    for _ in range(7):
        record(log)
        await log.flush()
        clock.now += DAY
    assert len(names(folder)) > 5
    clock.now += 30 * DAY
    opened(folder, clock)
    assert lines(folder) == []


async def test_a_clock_that_jumps_forward_takes_the_old_files_along(log, folder, clock):
    record(log)
    await log.flush()
    record(log)
    clock.now += 30 * DAY
    await log.flush()
    assert lines(folder) == []
    assert log.lost == {"day": 1}  # it was a month old when it was to be written


async def test_a_clock_that_jumps_back_takes_the_days_along_that_have_not_begun(log, folder, clock, caplog):
    record(log)
    await log.flush()
    clock.now += 3 * DAY
    record(log)
    await log.flush()
    clock.now -= 2 * DAY
    record(log, at=clock.now + DAY)
    record(log)
    await log.flush()
    assert names(folder) == [TODAY, "access-2026-03-11.jsonl"]
    assert log.lost == {"day": 1}
    assert "access-2026-03-13.jsonl deleted, its day has not begun" in " ".join(told(caplog))


async def test_a_start_under_a_clock_that_was_put_back_begins_with_no_day_to_come(log, folder, clock):
    clock.now += 30 * DAY
    record(log)
    await log.flush()
    clock.now -= 30 * DAY
    log = opened(folder, clock)
    assert names(folder) == [TODAY]


async def test_a_clock_that_goes_back_by_seconds_loses_no_day(log, folder, clock):
    record(log)
    await log.flush()
    clock.now += DAY / 2 + 5
    record(log)
    await log.flush()
    clock.now -= 10
    record(log)
    await log.flush()
    assert len(lines(folder)) == 3
    assert not +log.lost


async def test_files_and_folders_of_other_names_are_left_alone(log, folder, clock):
    others = [
        "notes.txt",
        "host-id",
        "access-2001-01-01.jsonl.gz",
        "xaccess-2001-01-01.jsonl",
        "access-2001-13-01.jsonl",
        "access-0000-00-00.jsonl",
        "access-2001-01-1.jsonl",
        "access-\u0662001-01-01.jsonl",
    ]
    for name in (*others, "access-2001-01-01.jsonl"):
        (folder / name).touch()
    (folder / "access-2001-01-02").mkdir()
    clock.now += DAY
    await log.flush()
    assert names(folder) == sorted([*others, "access-2001-01-02", TODAY])


async def test_a_file_that_somebody_has_open_is_deleted_like_any_other(log, folder, clock):
    record(log)
    await log.flush()
    with (folder / TODAY).open() as reader:
        clock.now += 7 * DAY
        record(log)
        await log.flush()
        assert names(folder) == ["access-2026-03-17.jsonl"]
        assert len(reader.read().splitlines()) == 1
    assert len(lines(folder)) == 1


async def test_one_old_file_that_cannot_be_deleted_holds_up_no_other_and_is_told(log, folder, clock, caplog):
    for day in (1, 2, 3):
        (folder / f"access-2026-03-0{day}.jsonl").touch()
    (folder / "access-2026-03-02.jsonl").unlink()
    (folder / "access-2026-03-02.jsonl").mkdir()
    clock.now += DAY
    record(log)
    await log.flush()
    assert names(folder) == ["access-2026-03-02.jsonl", TODAY, "access-2026-03-11.jsonl"]
    assert "access-2026-03-02.jsonl should be gone and cannot be deleted" in " ".join(told(caplog))
    (folder / "access-2026-03-02.jsonl").rmdir()
    (folder / "access-2026-03-02.jsonl").touch()
    await log.flush()
    assert "access-2026-03-02.jsonl" not in names(folder)


def test_an_old_file_that_cannot_be_deleted_is_a_refusal_to_start(folder, clock):
    (folder / "access-2026-03-02.jsonl").mkdir(parents=True)
    with pytest.raises(AccessLogError, match="should be gone"):
        opened(folder, clock)


# Disks that fail


async def test_a_symbolic_link_in_place_of_a_log_is_not_followed(log, folder, clock, tmp_path, caplog):
    target = tmp_path / "target"
    (folder / "access-2026-03-11.jsonl").symlink_to(target)
    clock.now += DAY
    record(log)
    await log.flush()
    assert not target.exists()
    assert log.lost == {"disk": 1}
    assert "not written" in " ".join(told(caplog))
    with pytest.raises(AccessLogError):
        opened(folder, clock)


async def test_a_log_whose_folder_is_gone_loses_lines_and_not_requests(log, folder, caplog):
    (folder / TODAY).unlink()
    folder.rmdir()
    record(log)
    await log.flush()
    assert log.lost == {"disk": 1}
    assert "not written: No such file or directory" in " ".join(told(caplog))


async def test_a_full_disk_loses_whole_lines_and_the_log_goes_on_when_there_is_room(disk, clock, caplog):
    log = opened(disk / "log", clock)
    record(log, user_agent="before")
    await log.flush()
    fill(disk / "filler")
    for _ in range(100):
        record(log, user_agent="x" * 250)
    await log.flush()
    assert log.lost == {"disk": 100}
    assert "No space left on device" in " ".join(told(caplog))
    (disk / "filler").unlink()
    record(log, user_agent="after")
    await log.flush()
    assert [line["user_agent"] for line in lines(disk / "log")] == ["before", "after"]


async def test_on_a_full_disk_old_files_go_first_and_make_room(disk, clock):
    log = opened(disk / "log", clock)
    fill(disk / "log" / TODAY)
    clock.now += 7 * DAY
    for _ in range(100):
        record(log, user_agent="x" * 250)
    await log.flush()
    assert names(disk / "log") == ["access-2026-03-17.jsonl"]
    assert len(lines(disk / "log")) == 100
    assert not +log.lost


async def test_the_service_starts_on_a_full_disk(disk, clock):
    opened(disk / "log", clock)
    fill(disk / "filler")
    log = opened(disk / "log", clock)
    record(log)
    await log.flush()


async def test_a_folder_that_becomes_read_only_is_told_and_purged_once_it_can_be(disk, clock, caplog):
    log = opened(disk / "log", clock)
    record(log)
    await log.flush()
    remount(disk, "ro")
    clock.now += 7 * DAY
    record(log)
    await log.flush()
    assert log.lost == {"disk": 1}
    said = " ".join(told(caplog))
    assert f"{TODAY} should be gone and cannot be deleted: Read-only file system" in said
    assert "not written: Read-only file system" in said
    remount(disk, "rw")
    await log.flush()
    assert TODAY not in names(disk / "log")
    record(log)
    await log.flush()
    assert len(lines(disk / "log")) == 1


def test_a_read_only_folder_is_a_refusal_to_start(disk, clock):
    (disk / "log").mkdir()
    remount(disk, "ro")
    with pytest.raises(AccessLogError, match="Read-only file system"):
        opened(disk / "log", clock)


def fill(path: Path) -> None:
    with path.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    assert os.statvfs(path).f_bavail == 0


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)
