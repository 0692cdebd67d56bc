"""The access log as a file: form, privacy, retention."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime

import pytest

from gateway.uuid7 import uuid7
from gateway.web.access_log import AccessLog

NOON = datetime(2026, 3, 10, 12, 0, 0, 123_456, tzinfo=UTC).timestamp()
DAY = 86_400


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock(NOON)


@pytest.fixture
def log(tmp_path, clock):
    log = AccessLog(tmp_path / "log", 7, clock)
    log.open()
    return log


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


async def test_a_line_has_the_documented_fields_in_their_order(log, tmp_path):
    instance = uuid7()
    record(log, instance=instance)
    record(log)
    await log.flush()
    path = tmp_path / "log" / "access-2026-03-10.jsonl"
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


async def test_folder_and_file_are_private(log, tmp_path):
    record(log)
    await log.flush()
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "log").iterdir()} == {0o600}


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
        '","http_status":1,"x":"',
    ],
)
async def test_no_user_agent_can_forge_a_line_or_reach_a_terminal(log, tmp_path, agent):
    record(log, user_agent=agent)
    await log.flush()
    raw = (tmp_path / "log" / "access-2026-03-10.jsonl").read_bytes()
    assert raw.count(b"\n") == 1
    assert raw.endswith(b"\n")
    assert all(0x20 <= byte < 0x7F for byte in raw[:-1].replace(b"\x7f", b""))
    line = json.loads(raw)
    assert line["http_status"] == 200
    assert len(line["user_agent"]) <= 256
    line["user_agent"].encode()


async def test_a_request_is_written_to_the_file_of_its_own_day(log, tmp_path, clock):
    record(log)
    record(log, at=clock.now + DAY)
    await log.flush()
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["access-2026-03-10.jsonl", "access-2026-03-11.jsonl"]


async def test_no_line_is_kept_longer_than_the_days_promised(log, tmp_path, clock):
    for _ in range(20):
        record(log)
        await log.flush()
        clock.now += DAY
    await log.flush()
    days = sorted(path.name for path in (tmp_path / "log").iterdir())
    oldest = datetime.fromisoformat(days[0][7:17]).replace(tzinfo=UTC)
    assert len(days) == 6
    assert clock.now - oldest.timestamp() <= 7 * DAY


async def test_old_files_go_at_midnight_without_any_request(log, tmp_path, clock):
    record(log)
    await log.flush()
    clock.now += 7 * DAY
    await log.flush()
    assert list((tmp_path / "log").iterdir()) == []


async def test_only_the_programs_own_files_are_deleted(log, tmp_path, clock):
    for name in ("notes.txt", "access-2001-01-01.jsonl.gz", "xaccess-2001-01-01.jsonl"):
        (tmp_path / "log" / name).touch()
    (tmp_path / "log" / "access-2001-01-01.jsonl").touch()
    clock.now += DAY
    await log.flush()
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == [
        "access-2001-01-01.jsonl.gz",
        "notes.txt",
        "xaccess-2001-01-01.jsonl",
    ]


async def test_a_symbolic_link_in_place_of_a_log_is_not_followed(log, tmp_path, caplog):
    target = tmp_path / "target"
    (tmp_path / "log" / "access-2026-03-10.jsonl").symlink_to(target)
    record(log)
    await log.flush()
    assert not target.exists()
    assert "access log" in caplog.text


async def test_a_log_that_cannot_be_written_loses_lines_and_not_requests(log, tmp_path, caplog):
    (tmp_path / "log").rmdir()
    record(log)
    await log.flush()
    assert "lines lost" in caplog.text
