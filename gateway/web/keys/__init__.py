"""The keys that sign session tokens: `ring` says when, a source (`file`, `secrets_manager`) says where."""

from __future__ import annotations

from ...settings import Settings
from .file import FileSource
from .ring import KeyRing
from .source import Key, KeysError, KeySource, Stored

__all__ = ["FileSource", "Key", "KeyRing", "KeySource", "KeysError", "Stored", "source_of"]


def source_of(settings: Settings) -> KeySource:
    """Where MAYFLY_KEY_SOURCE says. Opens nothing. Raises KeysError for settings that don't go together."""
    if settings.key_source == "file":
        return FileSource(settings.state_dir / "keys")
    from .secrets_manager import SecretsManagerSource  # imports boto3: 30 MB that a deployment without AWS does not need

    return SecretsManagerSource(settings)
