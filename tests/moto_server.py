"""AWS as moto's HTTP server plays it, in a thread of the tests' process: Secrets Manager and S3, over a real socket."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings

REGION = "eu-central-1"


@dataclass(frozen=True)
class Aws:
    """One server for the whole session: tests take names of their own for secrets and buckets."""

    url: str
    credentials_file: Path

    def settings(self, **changes: Any) -> Settings:
        """Settings by which the gateway's own `aws.client` reaches this server."""
        return Settings(aws_region=REGION, aws_credentials_file=str(self.credentials_file), aws_endpoint_url=self.url, **changes)

    def environment(self) -> dict[str, str]:
        """The same, as variables of a gateway that is a process."""
        return {
            "MAYFLY_AWS_REGION": REGION,
            "MAYFLY_AWS_CREDENTIALS_FILE": str(self.credentials_file),
            "MAYFLY_AWS_ENDPOINT_URL": self.url,
        }

    def client(self, service: str) -> Any:
        """boto3 as an operator's own script would use it, to look at what the gateway did."""
        import boto3

        return boto3.client(
            service, region_name=REGION, endpoint_url=self.url, aws_access_key_id="testing", aws_secret_access_key="testing"
        )


def _serial(operation: Callable[..., Any], lock: threading.Lock) -> Callable[..., Any]:
    @wraps(operation)
    def one_at_a_time(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return operation(*args, **kwargs)

    return one_at_a_time


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    # Here, for it takes a fifth of a second that other tests need not pay.
    from moto.secretsmanager.models import SecretsManagerBackend
    from moto.server import ThreadedMotoServer

    credentials = tmp_path_factory.mktemp("aws") / "credentials"
    credentials.write_text("[default]\naws_access_key_id = testing\naws_secret_access_key = testing\n")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    # Each operation of AWS is atomic; moto's look first and write then, in a thread for each request.
    lock = threading.Lock()
    for operation in ("create_secret", "put_secret_value"):
        setattr(SecretsManagerBackend, operation, _serial(getattr(SecretsManagerBackend, operation), lock))
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield Aws(f"http://{host}:{port}", credentials)
    finally:
        server.stop()
