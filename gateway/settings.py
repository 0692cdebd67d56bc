"""Every setting, in one table: name, unit, default, help. The only reader of os.environ; a test keeps docs/operations.md equal."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

PREFIX = "MAYFLY_"


class SettingsError(ValueError):
    """A MAYFLY_* variable that does not exist or holds what it cannot hold."""


def _setting(default: Any, text: str, *, minimum: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "minimum": minimum, "choices": choices})


@dataclass(frozen=True, slots=True)
class Settings:
    """Read once at start. A limit of 0 is off where the help says so."""

    listen: str = _setting("127.0.0.1:8080", "Address and port of the HTTP API.")
    metrics_listen: str = _setting("127.0.0.1:9464", "Address and port of the operator's `/metrics`; empty is off.")
    trusted_proxies: str = _setting(
        "", "Networks of proxies whose `X-Forwarded-For` is believed, with commas between: `127.0.0.1/32,::1/128`. Empty: none."
    )
    state_dir: Path = _setting(Path("/var/lib/mayfly"), "Instances, keys, logs and the launcher's socket.")
    web_uid: int = _setting(-1, "User id that may speak to the launcher; -1 is the launcher's own.", minimum=-1)
    engine: str = _setting(
        "auto",
        "`docker`: a container for each request. `zygote`: standing containers that clone one. `auto`: the latter if the host can.",
        choices=("auto", "docker", "zygote"),
    )
    docker_socket: str = _setting("unix:///var/run/docker.sock", "The Docker Engine API.")
    docker_runtime: str = _setting("", "OCI runtime name; empty is the daemon's default.")
    image: str = _setting("mayfly-runner:latest", "The runner image.")
    slots: int = _setting(4, "Runners at work at once; those that wait warm are not counted.", minimum=1)
    slot_requests: int = _setting(10_000, "Requests after which engine `zygote` replaces a slot container.", minimum=1)
    slot_seconds: float = _setting(600.0, "Age at which it replaces one that has served a request.", minimum=1)
    nursery: int = _setting(4, "Fresh instances that wait with their container started; 0 is off.", minimum=0)
    successors: int = _setting(32, "Warm containers that wait for the next request of their instance; 0 is off.", minimum=0)
    warm_idle_seconds: float = _setting(60.0, "Longest wait of a warm container for its instance's next request.", minimum=0.1)
    queue_length: int = _setting(
        512, "Requests that may wait; more answer 503. One address may take no more places than it leaves free.", minimum=0
    )
    queue_delay_seconds: float = _setting(
        3.0,
        "Wait of an address's oldest request from which its newcomers get 503, if it has four waiting for each slot.",
        minimum=0.1,
    )
    queue_timeout_seconds: float = _setting(60.0, "Longest wait for a slot or an instance; beyond it 503.", minimum=0.1)

    ttl_seconds: int = _setting(600, "Life of an instance.", minimum=1)
    max_life_seconds: int = _setting(
        3600,
        "Longest life of an instance, from its beginning, that its callers can extend it to; 0 switches extending off.",
        minimum=0,
    )
    on_damage: str = _setting(
        "strict",
        "What a damaged database gets: `strict`: a report, and it is not touched. "
        "`salvage`: what is readable goes into a new file.",
        choices=("strict", "salvage"),
    )
    reap_interval_seconds: float = _setting(30.0, "Pause between sweeps of the reaper.", minimum=0.1)
    min_free_bytes: int = _setting(1 << 30, "Free space on the state disk below which creates answer 503; 0 is off.", minimum=0)

    rate_requests_per_minute: int = _setting(60, "Requests per address; 0 is off.", minimum=0)
    rate_creates_per_minute: int = _setting(10, "New instances per address; 0 is off.", minimum=0)
    rate_ipv6_56_factor: int = _setting(4, "How often the rates of one IPv6 /64 its whole /56 may have; 0 is off.", minimum=0)
    rate_ipv6_48_factor: int = _setting(16, "The same for its /48.", minimum=0)
    instances: int = _setting(50_000, "Live instances on this host; 0 is off.", minimum=0)
    instances_per_address: int = _setting(
        -1,
        "Live instances of one address; 0 is off. -1: half of what the create rate lets it make in that time, 50; or off.",
        minimum=-1,
    )
    queries_per_instance: int = _setting(100_000, "Requests that one instance answers in its life; 0 is off.", minimum=0)
    breaker_waiting: int = _setting(
        384, "Requests that wait for a slot, from which on the circuit breaker refuses new instances; 0 is off.", minimum=0
    )
    breaker_failure_percent: int = _setting(
        50,
        "Share of the last minute's runs, 20 at least and 4 of an address at most, that may fail before nothing runs; 0 is off.",
        minimum=0,
    )
    breaker_open_seconds: float = _setting(5.0, "From the breaker's opening to its next trial.", minimum=0.1)
    min_free_memory_bytes: int = _setting(
        256 << 20, "Memory that is to be had on the host below which nothing runs; 0 is off.", minimum=0
    )
    connections: int = _setting(
        4096, "Open connections; beyond it the one that has been idle longest is closed. 0 is off.", minimum=0
    )
    connections_per_address: int = _setting(
        512, "Open connections of one address, trusted proxies aside; beyond it a new one is closed. 0 is off.", minimum=0
    )
    header_seconds: float = _setting(10.0, "Longest wait for the rest of a request's header.", minimum=0.1)
    body_seconds: float = _setting(30.0, "Longest wait for the rest of a request's body, for each MiB begun of it.", minimum=0.1)
    keepalive_seconds: float = _setting(30.0, "Longest wait of an idle connection for its next request.", minimum=0.1)
    answer_seconds: float = _setting(60.0, "Longest wait for a caller to read its answer, for each MiB begun of it.", minimum=0.1)
    max_body_bytes: int = _setting(1 << 20, "Largest request body.", minimum=1024)

    deadline_seconds: float = _setting(2.0, "Wall clock of one request's SQL.", minimum=0.05)
    bulk_deadline_seconds: float = _setting(10.0, "Wall clock of an import, of an upload's check and of a salvage.", minimum=0.05)
    grace_seconds: float = _setting(0.5, "From the deadline to the kill from outside.", minimum=0.05)
    start_timeout_seconds: float = _setting(15.0, "Longest wait for a container to start.", minimum=1)
    max_rows: int = _setting(10_000, "Rows of one answer; more are cut.", minimum=1)
    max_result_bytes: int = _setting(1 << 20, "Bytes of rows, as JSON, of one answer; more are cut.", minimum=1024)
    max_stream_bytes: int = _setting(16 << 20, "Bytes of rows, as JSON, of one streamed answer; it stops there.", minimum=1024)

    instance_bytes: int = _setting(10 << 20, "Largest size of each of an instance's two files.", minimum=1 << 20)
    heap_bytes: int = _setting(48 << 20, "SQLite's own memory in one request.", minimum=8 << 20)
    container_memory_bytes: int = _setting(128 << 20, "Memory of one container; there is no swap.", minimum=32 << 20)
    container_pids: int = _setting(16, "Processes and threads of one container.", minimum=8)
    container_cpus: float = _setting(1.0, "Processors of one container.", minimum=0.05)
    container_nofile: int = _setting(64, "Open files of one container.", minimum=16)
    min_landlock_abi: int = _setting(2, "Landlock ABI below which nothing is served; 0 serves without Landlock.", minimum=0)

    limit_length: int = _setting(300_000, "SQLITE_LIMIT_LENGTH, bytes of a string, BLOB or row.", minimum=1000)
    limit_sql_length: int = _setting(100_000, "SQLITE_LIMIT_SQL_LENGTH, bytes.", minimum=100)
    limit_column: int = _setting(100, "SQLITE_LIMIT_COLUMN.", minimum=1)
    limit_expr_depth: int = _setting(100, "SQLITE_LIMIT_EXPR_DEPTH.", minimum=1)
    limit_parser_depth: int = _setting(200, "SQLITE_LIMIT_PARSER_DEPTH.", minimum=10)
    limit_compound_select: int = _setting(50, "SQLITE_LIMIT_COMPOUND_SELECT.", minimum=1)
    limit_vdbe_op: int = _setting(100_000, "SQLITE_LIMIT_VDBE_OP.", minimum=1000)
    limit_function_arg: int = _setting(32, "SQLITE_LIMIT_FUNCTION_ARG.", minimum=1)
    limit_attached: int = _setting(0, "SQLITE_LIMIT_ATTACHED; raised to 1 for a plain VACUUM alone.", minimum=0)
    limit_like_pattern_length: int = _setting(100, "SQLITE_LIMIT_LIKE_PATTERN_LENGTH, bytes.", minimum=1)
    limit_variable_number: int = _setting(250, "SQLITE_LIMIT_VARIABLE_NUMBER.", minimum=1)
    limit_trigger_depth: int = _setting(10, "SQLITE_LIMIT_TRIGGER_DEPTH.", minimum=1)
    limit_worker_threads: int = _setting(0, "SQLITE_LIMIT_WORKER_THREADS.", minimum=0)

    key_rotation_seconds: int = _setting(
        86_400,
        "How long a token key signs; the one before stays valid for as long. At least 600 with `MAYFLY_KEY_SOURCE=aws`.",
        minimum=1,
    )
    key_source: str = _setting(
        "file",
        "Where the token keys are: `file`: below the state folder; `aws`: in AWS Secrets Manager.",
        choices=("file", "aws"),
    )
    key_secret: str = _setting("", "Name or ARN of the secret, with `MAYFLY_KEY_SOURCE=aws`.")
    access_log_days: int = _setting(7, "Days an access log is kept, on this host and in S3.", minimum=1)
    access_log_bytes: int = _setting(
        1 << 30, "Access log of one day; lines beyond it are dropped and counted. 0 is off.", minimum=0
    )
    access_log_bucket: str = _setting("", "S3 bucket that finished days of the access log are copied to; empty: none.")
    access_log_prefix: str = _setting("mayfly/access", "Prefix of their object keys.")
    aws_region: str = _setting("", "Region of the secret and the bucket; empty: what the credentials file or the host says.")
    aws_credentials_file: str = _setting("", "AWS shared credentials file; empty: the role of the host or container.")
    aws_endpoint_url: str = _setting("", "Another endpoint for Secrets Manager and S3; empty is AWS itself.")
    log_level: str = _setting("INFO", "Operator log.", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    log_format: str = _setting("text", "Lines of text, or one JSON object a line.", choices=("text", "json"))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read every MAYFLY_* variable; raises SettingsError naming the first that is unknown or wrong."""
        kinds = get_type_hints(cls)
        known = {PREFIX + item.name.upper(): item for item in fields(cls)}
        values: dict[str, Any] = {}
        for name, text in environment.items():
            if not name.startswith(PREFIX):
                continue
            if name not in known:
                raise SettingsError(f"{name} is not a setting; docs/operations.md lists them all")
            item = known[name]
            try:
                value = kinds[item.name](text)
            except ValueError:
                raise SettingsError(f"{name}={text!r} is not a {kinds[item.name].__name__}") from None
            if isinstance(value, float) and not math.isfinite(value):
                raise SettingsError(f"{name}={text!r} is not finite")
            minimum, choices = item.metadata["minimum"], item.metadata["choices"]
            if minimum is not None and not value >= minimum:
                raise SettingsError(f"{name}={text!r} is below {minimum}")
            if choices and value not in choices:
                raise SettingsError(f"{name}={text!r} is not one of {', '.join(choices)}")
            values[item.name] = value
        settings = cls(**values)
        settings._require_lasting_tokens()
        return settings

    def _require_lasting_tokens(self) -> None:
        for name in ("ttl_seconds", "max_life_seconds"):
            if (seconds := getattr(self, name)) > self.key_rotation_seconds:
                raise SettingsError(
                    f"{PREFIX}KEY_ROTATION_SECONDS={self.key_rotation_seconds} is below {PREFIX}{name.upper()}={seconds}: "
                    "tokens would end before their instances"
                )

    @property
    def sqlite_limits(self) -> dict[str, int]:
        """SQLite's run-time limits by their names without `SQLITE_LIMIT_`."""
        return {
            item.name.removeprefix("limit_").upper(): getattr(self, item.name)
            for item in fields(self)
            if item.name.startswith("limit_")
        }

    @property
    def most_instances_per_address(self) -> int:
        """0: no limit."""
        if self.instances_per_address >= 0:
            return self.instances_per_address
        return math.ceil(self.rate_creates_per_minute * self.ttl_seconds / 60 / 2)

    @property
    def max_request_frame_bytes(self) -> int:
        return 2 * self.max_body_bytes

    @property
    def max_reply_frame_bytes(self) -> int:
        return 2 * self.max_result_bytes + (64 << 10)
