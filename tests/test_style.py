"""Lint, format and types, as CONTRIBUTING.md promises them."""

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", ".", "infra/image"),
        ("ruff", "format", "--check", ".", "infra/image"),
        ("mypy", "--no-error-summary"),
    ],
    ids=" ".join,
)
def test_the_tree_is_clean(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
