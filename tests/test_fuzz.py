"""A short run of every fuzzing target, each in its own process; FUZZ_SECONDS makes it a long one."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from .deployment import REPO

# Not imported: atheris instruments whatever is loaded after it.
TARGETS = re.findall(r'^    "(\w+)": \w+,$', (REPO / "tests" / "fuzz.py").read_text(), re.MULTILINE)


def test_every_parser_has_a_target():
    assert set(TARGETS) == {"sql", "batch", "parameters", "ranges", "replies", "packets", "forwarded", "tokens"}


@pytest.mark.skipif(find_spec("atheris") is None, reason="the extra `fuzz` is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_no_bytes_make_a_parser_fail_otherwise_than_documented(target, tmp_path):
    program = [sys.executable, "-m", "tests.fuzz", target, os.environ.get("FUZZ_SECONDS", "1")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # it ends without tidying up
    done = subprocess.run(program, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done" in done.stderr
