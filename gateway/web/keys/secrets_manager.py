"""The keys in AWS Secrets Manager, for gateways on many hosts: AWSCURRENT is the newest, AWSPREVIOUS the older.

Each version of the secret holds one key. A rotation is one PutSecretValue, which makes the version, moves AWSCURRENT to it and
AWSPREVIOUS to the one before. Its ClientRequestToken, by which AWS names the version, is derived from the versions it replaces: of
several gateways that replace the same ones the first makes the version, and the others, who ask for it with another key, get
ResourceExistsException and read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import msgspec

from ...settings import Settings
from .. import aws
from .source import Key, KeyForm, KeysError, Stored

# "Do not call PutSecretValue at a sustained rate of more than once every 10 minutes": a secret runs out of versions.
_MINIMUM_ROTATION_SECONDS = 600


class _Document(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    version: Literal[1]
    key: KeyForm


class SecretsManagerSource:
    def __init__(self, settings: Settings) -> None:
        if not settings.key_secret:
            raise KeysError("MAYFLY_KEY_SOURCE=aws needs MAYFLY_KEY_SECRET, the name or ARN of the secret")
        if settings.key_rotation_seconds < _MINIMUM_ROTATION_SECONDS:
            raise KeysError(f"MAYFLY_KEY_SOURCE=aws needs MAYFLY_KEY_ROTATION_SECONDS of at least {_MINIMUM_ROTATION_SECONDS}")
        self._settings = settings
        self._secret = settings.key_secret
        # A look that finds the same versions in place fetches no key.
        self._seen: Stored | None = None

    def load(self) -> Stored | None:
        with self._failing_by_name():
            # Both labels of one moment: a rotation between two reads by label would show one version twice.
            stages = self._stages()
            current, previous = stages.get("AWSCURRENT"), stages.get("AWSPREVIOUS")
            if current is None:
                return None
            version = f"{current} {previous}"
            if self._seen is None or self._seen.version != version:
                self._seen = Stored(self._get(current), self._get(previous) if previous else None, version)
            return self._seen

    def rotate(self, old: Stored | None, new: Stored) -> Stored:
        value = msgspec.json.encode(_Document(1, KeyForm.of(new.newest))).decode()
        # Of both versions, so that it is new even after an operator moved AWSCURRENT back by hand.
        token = hashlib.sha256(old.version.encode() if old else b"").hexdigest()
        with self._failing_by_name():
            try:
                self._put(value, token, may_create=old is None)
            except aws.ClientError as error:
                if aws.code(error) != "ResourceExistsException":
                    raise
        held = self.load()
        if held is None:
            raise KeysError(f"secret {self._secret} of AWS Secrets Manager was just made and can't be read yet; try again")
        return held

    def _stages(self) -> dict[str, str]:
        """The version behind each staging label; empty if there is no secret, or one without a value."""
        try:
            described = self._client.describe_secret(SecretId=self._secret)
        except aws.ClientError as error:
            if aws.code(error) == "ResourceNotFoundException":
                return {}
            raise
        if described.get("DeletedDate"):
            raise KeysError(f"secret {self._secret} of AWS Secrets Manager is marked for deletion; restore it or name another")
        return {stage: version for version, stages in described.get("VersionIdsToStages", {}).items() for stage in stages}

    def _get(self, version: str) -> Key:
        answer = self._client.get_secret_value(SecretId=self._secret, VersionId=version)
        try:
            return msgspec.json.decode(answer.get("SecretString", ""), type=_Document).key.read()
        except ValueError:
            raise KeysError(f"secret {self._secret} of AWS Secrets Manager holds no key of Mayfly's; name another") from None

    def _put(self, value: str, token: str, *, may_create: bool) -> None:
        try:
            self._client.put_secret_value(SecretId=self._secret, ClientRequestToken=token, SecretString=value)
        except aws.ClientError as error:
            if aws.code(error) != "ResourceNotFoundException" or not may_create:
                raise
            self._client.create_secret(
                Name=self._secret, ClientRequestToken=token, SecretString=value, Description="Token keys of Mayfly"
            )

    @cached_property
    def _client(self) -> Any:
        try:
            return aws.client("secretsmanager", self._settings)
        except OSError as error:
            raise KeysError(f"MAYFLY_AWS_CREDENTIALS_FILE={self._settings.aws_credentials_file}: {error.strerror}") from None
        except aws.BotoCoreError:  # some are ValueErrors too
            raise
        except ValueError:
            raise KeysError(f"MAYFLY_AWS_ENDPOINT_URL={self._settings.aws_endpoint_url} is no URL") from None

    @contextmanager
    def _failing_by_name(self) -> Iterator[None]:
        try:
            yield
        except KeysError:
            raise
        except Exception as error:  # botocore's own, and what its parser makes of an answer that is none: each may quote a key
            raise KeysError(f"secret {self._secret} of AWS Secrets Manager: {aws.named(error)}") from None
