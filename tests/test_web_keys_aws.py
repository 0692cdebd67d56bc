"""Keys in AWS Secrets Manager, as moto's server plays it: made once, replaced once, never printed; AWS away, wrong or slow."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings
from gateway.web import aws as gateway_aws
from gateway.web.keys import Key, KeyRing, KeysError, Stored, source_of
from gateway.web.keys.secrets_manager import SecretsManagerSource
from gateway.web.keys.source import KeyForm

from .fake_launcher import FakeLauncher
from .keys_time import AHEAD, DAY, PERIOD, Clock
from .moto_server import Aws
from .test_architecture import imported_modules, modules_under
from .test_web_process import start


@pytest.fixture
def name() -> str:
    return f"mayfly/{secrets.token_hex(8)}"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ring_of(aws: Aws, name: str, clock: Clock) -> Callable[[], KeyRing]:
    """Another gateway on the same secret, opened."""

    def another() -> KeyRing:
        ring = unopened(on(aws, name), clock)
        ring.open()
        return ring

    return another


def on(aws: Aws, name: str, **changes: Any) -> Settings:
    return replace(aws.settings(key_source="aws", key_secret=name), **changes)


def unopened(settings: Settings, clock: Clock) -> KeyRing:
    return KeyRing(source_of(settings), DAY, lambda: clock.wall, lambda: clock.boot)


def all_at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    together = threading.Barrier(len(calls))

    def wait_and(call: Callable[[], Any]) -> Any:
        together.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(wait_and, calls))


def test_the_first_gateway_makes_the_secret_and_the_next_reads_it(aws, name, ring_of):
    first, second = ring_of(), ring_of()
    assert first.current.value.reveal() == second.current.value.reveal()
    described = aws.client("secretsmanager").describe_secret(SecretId=name)
    assert list(described["VersionIdsToStages"].values()) == [["AWSCURRENT"]]


def test_the_newest_key_is_awscurrent_and_the_older_one_awsprevious(aws, name, ring_of, clock):
    ring = ring_of()
    for _ in range(3):
        clock.pass_by(PERIOD)
        assert ring.rotate_if_due()
        clock.pass_by(AHEAD)
        ring.rotate_if_due()
    client = aws.client("secretsmanager")
    for stage, key in (("AWSCURRENT", ring.current), ("AWSPREVIOUS", ring.previous)):
        text = client.get_secret_value(SecretId=name, VersionStage=stage)["SecretString"]
        assert json.loads(text)["key"]["key"] == KeyForm.of(key).key


def test_gateways_that_start_together_make_one_key(aws, name, clock):
    rings = [unopened(on(aws, name), clock) for _ in range(6)]
    all_at_once([ring.open for ring in rings])
    assert len({ring.current.value.reveal() for ring in rings}) == 1


def test_of_gateways_that_find_a_key_due_at_once_one_replaces_it(aws, name, ring_of, clock):
    rings = [ring_of() for _ in range(6)]
    for _ in range(3):
        clock.pass_by(PERIOD)
        assert sorted(all_at_once([ring.rotate_if_due for ring in rings])) == [False] * 5 + [True]
        for ring in rings:
            ring.rotate_if_due()
        assert len({ring.previous.value.reveal() for ring in rings}) == 1
        assert len({ring.current.value.reveal() for ring in rings}) == 1
        clock.pass_by(AHEAD)
        for ring in rings:
            ring.rotate_if_due()
    versions = aws.client("secretsmanager").list_secret_version_ids(SecretId=name)["Versions"]
    assert len(versions) == 4


def state_of(aws: Aws, name: str) -> tuple[SecretsManagerSource, Stored, Stored]:
    source = SecretsManagerSource(on(aws, name))
    old = source.load()
    assert old is not None
    return source, old, Stored(Key.fresh(0), old.newest)


def test_whoever_replaces_a_state_that_is_past_gets_what_holds(aws, name, ring_of):
    ring_of()
    (first, old, new), (second, same, other) = state_of(aws, name), state_of(aws, name)
    won = first.rotate(old, new)
    assert won.newest.value.reveal() == new.newest.value.reveal()
    assert second.rotate(same, other).version == won.version


def test_without_the_derived_version_both_would_have_replaced_it(aws, name, ring_of, monkeypatch):
    """The control of the one above."""
    real = SecretsManagerSource._put
    monkeypatch.setattr(
        SecretsManagerSource, "_put", lambda self, value, _, **named: real(self, value, secrets.token_hex(32), **named)
    )
    ring_of()
    (first, old, new), (second, same, other) = state_of(aws, name), state_of(aws, name)
    assert first.rotate(old, new).newest.value.reveal() == new.newest.value.reveal()
    assert second.rotate(same, other).newest.value.reveal() == other.newest.value.reveal()


def test_a_look_that_finds_nothing_new_fetches_no_key(ring_of, monkeypatch):
    ring = ring_of()
    monkeypatch.setattr(SecretsManagerSource, "_get", lambda *_: pytest.fail("a key was fetched"))
    assert not ring.rotate_if_due()


def test_a_secret_that_an_operator_made_without_a_value_is_filled(aws, name, clock):
    aws.client("secretsmanager").create_secret(Name=name)
    rings = [unopened(on(aws, name), clock) for _ in range(2)]
    all_at_once([ring.open for ring in rings])
    assert len({ring.current.value.reveal() for ring in rings}) == 1


def test_rotation_goes_on_after_an_operator_moved_the_label_back(aws, name, ring_of, clock):
    ring = ring_of()
    clock.pass_by(PERIOD)
    assert ring.rotate_if_due()
    client = aws.client("secretsmanager")
    labels = {
        stage: version
        for version, stages in client.describe_secret(SecretId=name)["VersionIdsToStages"].items()
        for stage in stages
    }
    client.update_secret_version_stage(
        SecretId=name,
        VersionStage="AWSCURRENT",
        RemoveFromVersionId=labels["AWSCURRENT"],
        MoveToVersionId=labels["AWSPREVIOUS"],
    )
    ring.rotate_if_due()
    clock.pass_by(AHEAD)
    ring.rotate_if_due()
    clock.pass_by(PERIOD)
    assert ring.rotate_if_due()


def test_somebody_elses_secret_is_refused_and_not_touched(aws, name, clock):
    client = aws.client("secretsmanager")
    client.create_secret(Name=name, SecretString='{"password": "CANARY"}')
    with pytest.raises(KeysError, match="holds no key") as refused:
        unopened(on(aws, name), clock).open()
    assert "CANARY" not in str(refused.value)
    assert client.get_secret_value(SecretId=name)["SecretString"] == '{"password": "CANARY"}'


def test_a_secret_marked_for_deletion_is_refused(aws, name, ring_of):
    ring_of()
    aws.client("secretsmanager").delete_secret(SecretId=name)
    with pytest.raises(KeysError, match="marked for deletion"):
        ring_of()


def test_a_secret_that_is_gone_while_the_gateway_runs_is_a_failure_that_keeps_the_keys(aws, name, ring_of):
    ring = ring_of()
    key = ring.current.value.reveal()
    aws.client("secretsmanager").delete_secret(SecretId=name, ForceDeleteWithoutRecovery=True)
    with pytest.raises(KeysError, match="gone"):
        ring.rotate_if_due()
    assert ring.current.value.reveal() == key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key_secret": ""}, "MAYFLY_KEY_SECRET"),
        ({"key_rotation_seconds": 599}, "MAYFLY_KEY_ROTATION_SECONDS"),
        ({"aws_credentials_file": "/nowhere"}, "MAYFLY_AWS_CREDENTIALS_FILE=/nowhere: No such file"),
        ({"aws_endpoint_url": "nonsense"}, "MAYFLY_AWS_ENDPOINT_URL=nonsense"),
        ({"aws_region": "no region"}, "InvalidRegionError"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused_by_their_names(aws, name, clock, changes, words):
    with pytest.raises(KeysError, match=words):
        unopened(on(aws, name, **changes), clock).open()


METADATA = {
    "placement/availability-zone/": "us-west-2b",
    "iam/security-credentials/": "gateway",
    "iam/security-credentials/gateway": json.dumps(
        {
            "Code": "Success",
            "AccessKeyId": "of-the-host",
            "SecretAccessKey": "secret",
            "Token": "token",
            "Expiration": "2099-01-01T00:00:00Z",
        }
    ),
}


def test_role_and_region_come_from_the_host_where_no_setting_names_them(monkeypatch):
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    # A token is asked for by PUT, the rest by GET.
    with answering(lambda path, _: (200, METADATA.get(path.removeprefix("/latest/meta-data/"), "token").encode())) as url:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", url)
        client = gateway_aws.client("secretsmanager", Settings())
        assert client.meta.region_name == "us-west-2"
        assert client._request_signer._credentials.get_frozen_credentials().access_key == "of-the-host"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def moto_on(port: int) -> Iterator[None]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    try:
        yield
    finally:
        server.stop()
        server._server.server_close()


def test_keys_are_kept_while_aws_is_away_and_rotation_goes_on_when_it_is_back(aws, name, clock):
    port = free_port()
    ring = unopened(on(aws, name, aws_endpoint_url=f"http://127.0.0.1:{port}"), clock)
    with moto_on(port):
        ring.open()
    key = ring.current.value.reveal()
    clock.pass_by(PERIOD)
    with pytest.raises(KeysError, match=name):
        ring.rotate_if_due()
    assert ring.current.value.reveal() == key
    with moto_on(port):
        assert ring.rotate_if_due()
    assert ring.current.value.reveal() == key


async def test_aws_out_of_reach_at_the_start_is_a_refusal_to_start(aws, tmp_path, name):
    variables = aws.environment() | {"MAYFLY_AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
    process = await start(tmp_path, MAYFLY_KEY_SOURCE="aws", MAYFLY_KEY_SECRET=name, **variables)
    _, said = await process.communicate()
    assert process.returncode == 1
    assert said.decode().splitlines()[-1] == f"mayfly web: secret {name} of AWS Secrets Manager: EndpointConnectionError"
    assert b"Traceback" not in said


@contextmanager
def answering(answer: Callable[[str, bytes], tuple[int, bytes]]) -> Iterator[str]:
    """An endpoint that is not AWS, or AWS on a bad day."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, body = answer(self.path, self.rfile.read(int(self.headers.get("Content-Length", 0))))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def echo(_: str, body: bytes) -> tuple[int, bytes]:
    if b"SecretString" not in body:
        return 400, b'{"__type": "ResourceNotFoundException"}'
    return 400, json.dumps({"__type": "InvalidParameterException", "message": body.decode()}).encode()


@pytest.mark.parametrize(
    "answer",
    [
        echo,
        lambda *_: (200, b"<html>"),
        lambda *_: (200, b"[]"),
        lambda *_: (500, b""),
        lambda *_: (404, b"\xff"),
        lambda *_: (200, b"{}"),
    ],
    ids=["echo", "html", "list", "500", "bytes", "empty"],
)
def test_an_endpoint_that_answers_nonsense_is_a_failure_that_quotes_nothing(aws, name, clock, answer, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    canary = Key.fresh(0)
    monkeypatch.setattr(Key, "fresh", lambda _: canary)
    with answering(answer) as url:
        settings = on(aws, name, aws_endpoint_url=url)
        with pytest.raises(KeysError) as refused:
            unopened(settings, clock).open()
    text = KeyForm.of(canary).key
    assert text not in str(refused.value) + caplog.text
    assert "<html>" not in str(refused.value)


def test_the_error_of_the_echo_would_quote_the_key(aws, name):
    """The control of the one above."""
    with answering(echo) as url:
        client = gateway_aws.client("secretsmanager", on(aws, name, aws_endpoint_url=url))
        with pytest.raises(gateway_aws.ClientError) as refused:
            client.create_secret(Name=name, SecretString="CANARY")
    assert "CANARY" in str(refused.value)
    assert "CANARY" not in gateway_aws.named(refused.value)


@pytest.mark.parametrize("control", [False, True])
def test_no_key_is_logged_even_at_debug(aws, name, ring_of, clock, caplog, control):
    caplog.set_level(logging.DEBUG)
    if control:
        caplog.set_level(logging.DEBUG, logger="botocore")
    ring = ring_of()
    clock.pass_by(PERIOD)
    ring.rotate_if_due()
    ring_of()
    shown = [KeyForm.of(key).key in caplog.text for key in (ring.current, ring.previous)]
    assert shown == ([True, True] if control else [False, False])


async def listening(process: asyncio.subprocess.Process) -> str:
    """What the process says until it serves."""
    said = ""
    while " port " not in said:
        line = (await process.stderr.readline()).decode()
        assert line, said
        said += line
    return said


async def test_a_gateway_on_aws_serves_at_debug_and_prints_no_key(aws, tmp_path, name):
    launcher = FakeLauncher(tmp_path / "run" / "launcher.sock")
    await launcher.start()
    try:
        process = await start(
            tmp_path, MAYFLY_KEY_SOURCE="aws", MAYFLY_KEY_SECRET=name, MAYFLY_LOG_LEVEL="DEBUG", **aws.environment()
        )
        said = await listening(process)
        process.send_signal(signal.SIGTERM)
        said += (await process.communicate())[1].decode()
    finally:
        await launcher.stop()
    assert process.returncode == 0
    text = aws.client("secretsmanager").get_secret_value(SecretId=name)["SecretString"]
    assert json.loads(text)["key"]["key"] not in said
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("source", ["file", "aws"])
async def test_boto3_is_imported_where_keys_are_in_aws_and_by_no_default_gateway(aws, tmp_path, name, source):
    """80 ms and 30 MB. The interpreter itself tells what it imports."""
    process = await start(
        tmp_path, PYTHONPROFILEIMPORTTIME="1", MAYFLY_KEY_SOURCE=source, MAYFLY_KEY_SECRET=name, **aws.environment()
    )
    said = await listening(process)
    process.send_signal(signal.SIGTERM)
    said += (await process.communicate())[1].decode()
    imported = {line.rsplit("|", 1)[1].strip() for line in said.splitlines() if line.startswith("import time:")}
    assert "gateway.web.keys.ring" in imported
    for module in ("boto3", "botocore", "gateway.web.aws"):
        assert (module in imported) == (source == "aws")


def test_one_module_alone_imports_boto3():
    users = {
        Path(path).name
        for path in modules_under("gateway")
        if any(module.split(".")[0] in ("boto3", "botocore", "s3transfer") for module in imported_modules(path))
    }
    assert users == {"aws.py"}


def test_every_call_is_bounded(aws):
    config = gateway_aws.client("secretsmanager", aws.settings()).meta.config
    assert (config.connect_timeout, config.read_timeout) == (3, 5)
    assert config.retries["total_max_attempts"] == 2
