"""AWS, for deployments that want it: the one module that imports boto3, itself imported only then (80 ms and 30 MB).

botocore writes whole requests and answers, secrets among them, to its loggers at DEBUG; they are silent below WARNING whatever
`MAYFLY_LOG_LEVEL` says. Its exceptions quote values and bodies, so only `named()` of one is fit for a message.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]
from botocore.utils import IMDSRegionProvider  # type: ignore[import-untyped]

from ..settings import Settings

__all__ = ["BotoCoreError", "ClientError", "client", "code", "named"]

# A call that gets no answer ends after about 17 seconds: two attempts of at most eight and a short pause.
_BOUNDS = Config(connect_timeout=3, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 2})

for _name in ("boto3", "botocore", "s3transfer", "urllib3"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def client(service: str, settings: Settings) -> Any:
    """A client of "secretsmanager" or "s3", for any thread. Blocks.

    Raises OSError (credentials file), ValueError (endpoint) or BotoCoreError (no region).
    """
    session = botocore.session.Session()
    if settings.aws_credentials_file:
        # botocore passes over a file that it can't read and asks the host for a role.
        Path(settings.aws_credentials_file).read_bytes()
        session.set_config_variable("credentials_file", settings.aws_credentials_file)
    region = settings.aws_region or session.get_config_variable("region") or IMDSRegionProvider(session).provide()
    return boto3.Session(botocore_session=session).client(
        service, region_name=region, endpoint_url=settings.aws_endpoint_url or None, config=_BOUNDS
    )


def code(error: ClientError) -> str:
    """AWS's name of a refusal: `ResourceNotFoundException`."""
    return str(error.response["Error"]["Code"])


def named(error: Exception) -> str:
    """What went wrong, without a word of what was sent or received."""
    return f"{error.operation_name}: {code(error)}" if isinstance(error, ClientError) else type(error).__name__
