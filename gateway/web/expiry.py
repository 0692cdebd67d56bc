"""S3's own deletion of the access log: a lifecycle rule for its prefix, in a bucket that may have rules of others.

How old a line gets in S3, for `access_log_days` N. Day D is over at D+1 00:00 UTC and is copied on D+1; if that fails, until 23:00
of D+2, and then never. S3 expires an object of X days at the midnight that follows its upload + X days: what came on D+2 goes at
D+3+X, which is D+N for X = N - 3; so N >= 4. In a bucket that has or had versioning an expired object becomes a noncurrent version,
which lives one day more and on to the next midnight: X = N - 5, N >= 6. What came on time, as nearly all does, expires a day before
the promise ends. S3 deletes what has expired within hours as a rule, but promises no time for it.
"""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

from ..settings import SettingsError
from . import aws
from .access_log import AccessLogError

# Of a day, from its first moment: an hour is left for an upload to end, and a host's clock is a quarter of an hour off at most, or
# S3 refuses its signature.
LAST_UPLOAD = timedelta(days=2, hours=23)
_READ_BACKS = 10

_log = logging.getLogger(__name__)


def expiry_days(keep_days: int, versioned: bool) -> int:
    """Days of the rule by which no line is kept for longer than `keep_days`; raises SettingsError."""
    days = keep_days - (5 if versioned else 3)
    if days < 1:
        least, kind = (6, "a bucket with versions") if versioned else (4, "a bucket")
        raise SettingsError(
            f"MAYFLY_ACCESS_LOG_DAYS={keep_days} cannot be kept in S3, which deletes by whole days from the upload: "
            f"{kind} takes {least} at least"
        )
    return days


def require_expiry(s3: Any, bucket: str, prefix: str, keep_days: int) -> int:
    """See that the rule is in force: put it if it is missing or too long, read it back. Returns its days.

    Raises AccessLogError, SettingsError, BotoCoreError, ClientError; then nothing may be put below the prefix.
    """
    if _retains(s3, bucket):
        raise AccessLogError(f"bucket {bucket} has an object lock that holds what is put into it: nothing would expire")
    days = expiry_days(keep_days, versioned="Status" in s3.get_bucket_versioning(Bucket=bucket))
    rule = {
        "ID": f"mayfly access log {prefix}",
        "Status": "Enabled",
        "Filter": {"Prefix": prefix},
        "Expiration": {"Days": days},
        "NoncurrentVersionExpiration": {"NoncurrentDays": 1},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
    }
    rules, more = _lifecycle(s3, bucket)
    if _holds(rule, rules):
        return days
    for there in rules:
        if there.get("ID") == rule["ID"] and there["Status"] == "Enabled" and there.get("Expiration", {}).get("Days", days) < days:
            raise AccessLogError(
                f"lifecycle rule {rule['ID']!r} of bucket {bucket} keeps less than MAYFLY_ACCESS_LOG_DAYS={keep_days}, "
                "maybe for another gateway: delete it, or lower the setting, or take a prefix of this gateway's own"
            )
    others = [there for there in rules if there.get("ID") != rule["ID"]]
    s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [*others, rule]}, **more)
    for _ in range(_READ_BACKS):
        if _holds(rule, _lifecycle(s3, bucket)[0]):
            _log.info("S3 deletes s3://%s/%s* %d days after the upload", bucket, prefix, days)
            return days
        time.sleep(1)  # S3 may show the old rules for a moment
    raise AccessLogError(f"bucket {bucket} does not show the lifecycle rule that was put: {rule['ID']!r}")


def _holds(rule: dict[str, Any], rules: list[dict[str, Any]]) -> bool:
    return any(all(there.get(name) == value for name, value in rule.items()) for there in rules)


def _lifecycle(s3: Any, bucket: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The bucket's rules, and what else a put of them has to repeat."""
    try:
        there = s3.get_bucket_lifecycle_configuration(Bucket=bucket)
    except aws.ClientError as error:
        if aws.code(error) != "NoSuchLifecycleConfiguration":
            raise
        return [], {}
    size = "TransitionDefaultMinimumObjectSize"
    return there["Rules"], {size: there[size]} if size in there else {}


def _retains(s3: Any, bucket: str) -> bool:
    try:
        lock = s3.get_object_lock_configuration(Bucket=bucket)["ObjectLockConfiguration"]
    except aws.ClientError as error:
        if aws.code(error) != "ObjectLockConfigurationNotFoundError":
            raise
        return False
    return "Rule" in lock
