"""Finished days of the access log in S3, as moto plays it over HTTP: once, whole, and never without S3's own deletion."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import itertools
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings, SettingsError
from gateway.web import aws as gateway_aws
from gateway.web import expiry, shipping
from gateway.web.access_log import AccessLog, AccessLogError, file_of
from gateway.web.expiry import LAST_UPLOAD, expiry_days
from gateway.web.shipping import SETTLED, Shipping

from .conftest import eventually
from .moto_server import REGION, Aws
from .test_web_process import start

DAY = date(2026, 3, 10)
BEGAN = datetime(2026, 3, 10, tzinfo=UTC)
LINES = b'{"http_status":200}\n' * 5000
PREFIX = "mayfly/access/"
_numbers = itertools.count()


class Clock:
    """Stands at an age of the day that is shipped."""

    def __init__(self) -> None:
        self.age = timedelta(days=1, hours=1)

    def __call__(self) -> float:
        return (BEGAN + self.age).timestamp()


class Bucket:
    """A bucket of its own for each test, seen as an operator sees it."""

    def __init__(self, aws: Aws, **options: Any) -> None:
        self.name = f"logs-{next(_numbers)}"
        self.aws = aws
        self.s3 = aws.client("s3")
        self.s3.create_bucket(Bucket=self.name, CreateBucketConfiguration={"LocationConstraint": REGION}, **options)

    def settings(self, **changes: Any) -> Settings:
        return self.aws.settings(**{"access_log_bucket": self.name, **changes})

    def enable_versions(self, status: str = "Enabled") -> None:
        self.s3.put_bucket_versioning(Bucket=self.name, VersioningConfiguration={"Status": status})

    def objects(self) -> dict[str, bytes]:
        found = self.s3.list_objects_v2(Bucket=self.name).get("Contents", ())
        return {
            item["Key"]: gzip.decompress(self.s3.get_object(Bucket=self.name, Key=item["Key"])["Body"].read()) for item in found
        }

    def puts(self) -> int:
        """Uploads that S3 took, in a bucket with versions."""
        return len(self.s3.list_object_versions(Bucket=self.name).get("Versions", ()))

    def put_rules(self, *rules: dict[str, Any]) -> None:
        self.s3.put_bucket_lifecycle_configuration(Bucket=self.name, LifecycleConfiguration={"Rules": list(rules)})

    def rules(self) -> list[dict[str, Any]]:
        rules = self.s3.get_bucket_lifecycle_configuration(Bucket=self.name)["Rules"]
        assert isinstance(rules, list)
        return rules


@pytest.fixture
def bucket(aws):
    return Bucket(aws)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def folder(tmp_path):
    return a_folder(tmp_path / "log")


@pytest.fixture
def nowhere() -> Iterator[socket.socket]:
    """A listener that takes a connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def a_folder(folder: Path) -> Path:
    folder.mkdir()
    file_of(folder, DAY).write_bytes(LINES)
    return folder


def opened(settings: Settings, folder: Path, clock: Clock) -> Shipping:
    shipping = Shipping(settings, folder, clock)
    shipping.open()
    return shipping


def rule(days: int, **changes: Any) -> dict[str, Any]:
    """Ours, as it is to be."""
    return {
        "ID": f"mayfly access log {PREFIX}",
        "Status": "Enabled",
        "Filter": {"Prefix": PREFIX},
        "Expiration": {"Days": days},
        "NoncurrentVersionExpiration": {"NoncurrentDays": 1},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
        **changes,
    }


# How old a line gets


def goes(uploaded: datetime, days: int, versioned: bool) -> datetime:
    """When S3 deletes: each term is added and rounded up to the next midnight, of the next day if it is one already."""

    def after(moment: datetime, days: int) -> datetime:
        return (moment + timedelta(days=days + 1)).replace(hour=0, minute=0, second=0, microsecond=0)

    expired = after(uploaded, days)
    return after(expired, 1) if versioned else expired


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("keep_days", [6, 7, 8, 30, 365])
def test_no_line_is_older_in_s3_than_the_days_promised_whenever_it_is_uploaded(keep_days, versioned):
    days = expiry_days(keep_days, versioned)
    until = BEGAN + timedelta(days=keep_days)
    last = BEGAN + LAST_UPLOAD + timedelta(minutes=59)
    assert goes(BEGAN + SETTLED, days, versioned) == until - timedelta(days=1)
    assert goes(last, days, versioned) == until
    assert goes(last + timedelta(minutes=1), days, versioned) > until  # neither the days nor the last hour have room to spare


@pytest.mark.parametrize(("versioned", "least"), [(False, 4), (True, 6)])
def test_days_that_s3_cannot_keep_are_refused_by_name(versioned, least):
    assert expiry_days(least, versioned) == 1
    with pytest.raises(SettingsError, match=f"MAYFLY_ACCESS_LOG_DAYS={least - 1} .* takes {least} at least"):
        expiry_days(least - 1, versioned)


def test_too_few_days_and_an_empty_prefix_are_refused_before_aws_is_asked(folder):
    with pytest.raises(SettingsError, match="MAYFLY_ACCESS_LOG_DAYS"):
        Shipping(Settings(access_log_bucket="b", access_log_days=3), folder)
    for prefix in ("", "/", "//"):
        with pytest.raises(SettingsError, match="MAYFLY_ACCESS_LOG_PREFIX"):
            Shipping(Settings(access_log_bucket="b", access_log_prefix=prefix), folder)


# The lifecycle rule


def test_the_rule_is_put_once_beside_the_rules_of_others(bucket, folder, clock):
    others = [
        {
            "ID": "by tag",
            "Status": "Enabled",
            "Filter": {"And": {"Prefix": "reports/", "Tags": [{"Key": "kind", "Value": "old"}]}},
            "Expiration": {"Days": 400},
            "Transitions": [{"Days": 30, "StorageClass": "GLACIER"}],
        },
        {"ID": "off", "Status": "Disabled", "Filter": {"Prefix": "x/"}, "NoncurrentVersionExpiration": {"NoncurrentDays": 3}},
    ]
    bucket.put_rules(*others)
    before = bucket.rules()
    for _ in range(2):
        opened(bucket.settings(), folder, clock)
        assert bucket.rules() == [*before, rule(4)]


def test_in_a_bucket_with_versions_they_expire_in_time_too(bucket, folder, clock):
    bucket.enable_versions()
    opened(bucket.settings(), folder, clock)
    assert bucket.rules() == [rule(2)]
    bucket.enable_versions("Suspended")
    opened(bucket.settings(), folder, clock)
    assert bucket.rules() == [rule(2)]
    with pytest.raises(SettingsError, match="a bucket with versions takes 6 at least"):
        opened(bucket.settings(access_log_days=5), folder, clock)


@pytest.mark.parametrize(
    "changed",
    [
        {"Status": "Disabled"},
        {"Expiration": {"Days": 5}},
        {"Filter": {"Prefix": "elsewhere/"}},
        {"NoncurrentVersionExpiration": {"NoncurrentDays": 400}},
    ],
    ids=str,
)
def test_a_rule_that_would_keep_more_is_put_right(bucket, folder, clock, changed):
    bucket.put_rules(rule(4, **changed))
    opened(bucket.settings(), folder, clock)
    assert bucket.rules() == [rule(4)]


def test_a_rule_that_keeps_less_may_be_the_promise_of_another_gateway_and_is_a_refusal(bucket, folder, clock):
    opened(bucket.settings(access_log_days=7), folder, clock)
    with pytest.raises(AccessLogError, match="keeps less than MAYFLY_ACCESS_LOG_DAYS=14"):
        opened(bucket.settings(access_log_days=14), folder, clock)
    assert bucket.rules() == [rule(4)]


def test_a_rule_of_another_prefix_is_another_rule(bucket, folder, clock):
    opened(bucket.settings(), folder, clock)
    opened(bucket.settings(access_log_prefix="/second/", access_log_days=30), folder, clock)
    assert [(there["Filter"]["Prefix"], there["Expiration"]["Days"]) for there in bucket.rules()] == [(PREFIX, 4), ("second/", 27)]


def test_a_rule_that_s3_does_not_show_is_a_refusal(bucket, monkeypatch):
    class Forgetful:
        def __getattr__(self, name: str) -> Any:
            return getattr(bucket.s3, name)

        def put_bucket_lifecycle_configuration(self, **_: Any) -> None:
            pass

    monkeypatch.setattr(expiry.time, "sleep", lambda _: None)
    with pytest.raises(AccessLogError, match="does not show the lifecycle rule"):
        expiry.require_expiry(Forgetful(), bucket.name, PREFIX, 7)


def test_a_bucket_that_is_not_there_is_a_refusal(aws, folder, clock):
    with pytest.raises(AccessLogError, match=r"s3://no-such-bucket/mayfly/access/: .*NoSuchBucket"):
        opened(aws.settings(access_log_bucket="no-such-bucket"), folder, clock)


def test_a_bucket_that_holds_its_objects_is_a_refusal(aws, folder, clock):
    bucket = Bucket(aws, ObjectLockEnabledForBucket=True)
    opened(bucket.settings(), folder, clock)  # nothing is held unless the bucket says so
    bucket.s3.put_object_lock_configuration(
        Bucket=bucket.name,
        ObjectLockConfiguration={
            "ObjectLockEnabled": "Enabled",
            "Rule": {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 30}},
        },
    )
    with pytest.raises(AccessLogError, match="object lock"):
        opened(bucket.settings(), folder, clock)


def test_a_rule_that_was_deleted_is_there_again_before_the_next_upload(bucket, folder, clock):
    ship = opened(bucket.settings(), folder, clock)
    bucket.s3.delete_bucket_lifecycle(Bucket=bucket.name)
    ship.ship()
    assert bucket.rules() == [rule(4)]
    assert len(bucket.objects()) == 1


def test_without_a_rule_nothing_is_uploaded(bucket, folder, clock, monkeypatch):
    ship = opened(bucket.settings(), folder, clock)
    bucket.put_rules(rule(3))
    with pytest.raises(AccessLogError, match="keeps less"):
        ship.ship()
    assert bucket.objects() == {}


# The copy


def test_a_finished_day_is_one_object_whole_and_checked_by_s3(bucket, folder, clock):
    file_of(folder, DAY + timedelta(days=1)).write_bytes(b"today\n")
    (folder / "notes.txt").touch()
    ship = opened(bucket.settings(), folder, clock)
    ship.ship()
    ((key, content),) = bucket.objects().items()
    assert re.fullmatch(r"mayfly/access/2026-03-10/[0-9a-f]{32}\.jsonl\.gz", key)
    assert content == LINES
    there = bucket.s3.get_object(Bucket=bucket.name, Key=key, ChecksumMode="ENABLED")
    assert there["ChecksumSHA256"] == base64.b64encode(hashlib.sha256(there["Body"].read()).digest()).decode()
    assert (ship.shipped, ship.missed) == (1, 0)
    assert sorted(path.name for path in folder.iterdir()) == [
        "access-2026-03-10.jsonl",
        "access-2026-03-11.jsonl",
        "host-id",
        "notes.txt",
    ]


def test_a_day_is_copied_only_when_its_last_request_has_long_been_written(bucket, folder, clock):
    ship = opened(bucket.settings(), folder, clock)
    clock.age = timedelta(days=1, minutes=14)
    ship.ship()
    assert bucket.objects() == {}
    clock.age = timedelta(days=1, minutes=15)
    ship.ship()
    assert len(bucket.objects()) == 1


def test_a_day_is_uploaded_once_whatever_is_restarted(bucket, folder, clock):
    bucket.enable_versions()
    for _ in range(3):
        ship = opened(bucket.settings(), folder, clock)
        ship.ship()
        ship.ship()
    assert bucket.puts() == 1


def test_an_upload_whose_answer_was_lost_is_not_repeated(bucket, folder, clock):
    bucket.enable_versions()
    ship = opened(bucket.settings(), folder, clock)
    ship.ship()
    (key,) = bucket.objects()
    file_of(folder, DAY).write_bytes(b"other\n")
    ship._upload(file_of(folder, DAY), key)
    assert bucket.puts() == 1
    assert bucket.objects() == {key: LINES}


def test_gateways_that_share_a_bucket_write_objects_of_their_own(bucket, folder, clock, tmp_path):
    for each in (folder, a_folder(tmp_path / "second")):
        opened(bucket.settings(), each, clock).ship()
    assert list(bucket.objects().values()) == [LINES, LINES]


def test_a_hosts_id_stays_and_one_that_is_damaged_is_a_refusal(bucket, folder, clock):
    opened(bucket.settings(), folder, clock)
    host = (folder / "host-id").read_text()
    opened(bucket.settings(), folder, clock)
    assert (folder / "host-id").read_text() == host
    (folder / "host-id").write_text("../../elsewhere")
    with pytest.raises(AccessLogError, match="holds no host id; remove it"):
        opened(bucket.settings(), folder, clock)


def test_a_symbolic_link_in_place_of_a_day_is_not_followed(bucket, folder, clock, tmp_path):
    (tmp_path / "secret").write_text("secret")
    file_of(folder, DAY).unlink()
    file_of(folder, DAY).symlink_to(tmp_path / "secret")
    ship = opened(bucket.settings(), folder, clock)
    with pytest.raises(OSError, match="symbolic links"):
        ship.ship()
    assert bucket.objects() == {}


# Trouble


def test_a_day_that_was_missed_is_told_once_and_never_uploaded(bucket, folder, clock, caplog):
    clock.age = LAST_UPLOAD
    ship = opened(bucket.settings(), folder, clock)
    ship.ship()
    ship.ship()
    assert bucket.objects() == {}
    assert caplog.text.count("access log of 2026-03-10 is NOT COPIED") == 1
    assert ship.missed == 1


def test_after_a_restart_a_day_is_missed_only_if_s3_would_still_have_it(bucket, folder, clock, caplog):
    opened(bucket.settings(), folder, clock).ship()
    clock.age = LAST_UPLOAD
    opened(bucket.settings(), folder, clock).ship()
    (key,) = bucket.objects()
    bucket.s3.delete_object(Bucket=bucket.name, Key=key)  # as S3 itself does, on day D+6
    clock.age = timedelta(days=6)
    opened(bucket.settings(), folder, clock).ship()
    assert "NOT COPIED" not in caplog.text


def test_an_outage_of_days_is_told_for_each_day_before_its_file_is_gone(bucket, folder, clock, caplog):
    ship = opened(bucket.settings(), folder, clock)
    bucket.s3.delete_bucket(Bucket=bucket.name)
    for age in range(1, 6):
        clock.age = timedelta(days=age, hours=1)
        with pytest.raises(gateway_aws.ClientError):
            ship.ship()
    clock.age = timedelta(days=6, hours=1)
    ship.ship()
    assert caplog.text.count("access log of 2026-03-10 is NOT COPIED") == 1


def test_the_files_on_disk_go_in_time_whether_or_not_they_were_copied(bucket, folder, clock):
    ship = opened(bucket.settings(), folder, clock)
    bucket.s3.delete_bucket(Bucket=bucket.name)
    with pytest.raises(gateway_aws.ClientError):
        ship.ship()
    clock.age = timedelta(days=7) - timedelta(minutes=1)
    AccessLog(folder, 7, 0, clock).open()
    assert not file_of(folder, DAY).exists()
    ship.ship()


async def test_what_fails_is_tried_again_until_it_works(bucket, folder, clock, monkeypatch, caplog):
    monkeypatch.setattr(shipping, "_LOOK_SECONDS", 0)
    ship = opened(bucket.settings(), folder, clock)
    bucket.s3.delete_bucket(Bucket=bucket.name)
    task = asyncio.create_task(ship.run())
    await asyncio.to_thread(eventually, lambda: ship.failures >= 2)
    assert "next try in 0 s: ListObjectsV2: NoSuchBucket" in caplog.text
    bucket.s3.create_bucket(Bucket=bucket.name, CreateBucketConfiguration={"LocationConstraint": REGION})
    await asyncio.to_thread(eventually, lambda: ship.shipped == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(bucket.objects().values()) == [LINES]


def test_pauses_between_failures_grow_to_half_an_hour(bucket, folder, clock):
    ship, pauses = opened(bucket.settings(), folder, clock), []

    class Stopping:
        def wait(self, pause: float) -> bool:
            pauses.append(pause)
            return len(pauses) == 10

    bucket.s3.delete_bucket(Bucket=bucket.name)
    ship._stopping = Stopping()  # type: ignore[assignment]
    ship._keep_shipping()
    assert pauses == [0, 120, 240, 480, 960, 1800, 1800, 1800, 1800, 1800]


async def test_an_s3_that_hangs_holds_up_neither_the_log_nor_the_end_of_the_service(bucket, folder, clock, nowhere):
    ship = opened(bucket.settings(), folder, clock)
    url = f"http://127.0.0.1:{nowhere.getsockname()[1]}"
    ship._s3 = gateway_aws.client("s3", replace(bucket.settings(), aws_endpoint_url=url))
    log = AccessLog(folder, 7, 0, clock)
    log.open()
    task = asyncio.create_task(ship.run())
    connection, _ = await asyncio.to_thread(nowhere.accept)
    with connection:
        log.record(at=log.now(), source_ip="::1", instance=None, method="GET", status=200, sql_bytes=0, user_agent="")
        await log.flush()
        assert b"GET" in file_of(folder, DAY + timedelta(days=1)).read_bytes()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ship.failures == 0  # its thread still waits, and nobody for it


def test_what_was_packed_for_an_upload_that_failed_is_nowhere_on_the_disk(bucket, folder, clock):
    ship = opened(bucket.settings(), folder, clock)
    bucket.s3.delete_bucket(Bucket=bucket.name)
    with pytest.raises(gateway_aws.ClientError):
        ship._upload(file_of(folder, DAY), "key")
    assert sorted(path.name for path in folder.iterdir()) == ["access-2026-03-10.jsonl", "host-id"]


# The process


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MAYFLY_ACCESS_LOG_BUCKET": "no-such-bucket"}, b"s3://no-such-bucket/mayfly/access/: "),
        ({"MAYFLY_ACCESS_LOG_BUCKET": "b", "MAYFLY_ACCESS_LOG_DAYS": "3"}, b"MAYFLY_ACCESS_LOG_DAYS=3 cannot be kept in S3"),
        ({"MAYFLY_ACCESS_LOG_BUCKET": "b", "MAYFLY_ACCESS_LOG_PREFIX": "/"}, b"MAYFLY_ACCESS_LOG_PREFIX is empty"),
        ({"MAYFLY_ACCESS_LOG_BUCKET": "b", "MAYFLY_AWS_CREDENTIALS_FILE": "/no/such/file"}, b"/no/such/file: No such file"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else " ".join(value),
)
async def test_a_copy_that_cannot_be_kept_as_promised_is_a_refusal_to_start(tmp_path, aws, variables, words):
    process = await start(tmp_path, **{**aws.environment(), **variables})
    _, said = await process.communicate()
    assert process.returncode in (1, 2)
    assert words in said
    assert b"Traceback" not in said
