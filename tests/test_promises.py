"""SECURITY.md's promises each have a test of their name, and its table of layers points at files that exist."""

import ast
import re
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SECURITY = (REPO / "SECURITY.md").read_text()


def test_every_promise_has_a_test_of_its_name():
    promised = re.findall(r"^\| ([WMD]\d+[a-c]?) \|", SECURITY, re.MULTILINE)
    assert len(promised) == len(set(promised)) > 25
    names = [
        node.name
        for path in (REPO / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    tested = {part for name in names if name.startswith("test_") for part in re.findall(r"(?<=_)[WMD]\d+[a-c]?(?=_)", name)}
    assert set(promised) == tested


def test_every_file_named_in_the_security_page_exists():
    for path in re.findall(r"`((?:tests|gateway|runner|infra|docs)/[\w./]+)`", SECURITY):
        assert (REPO / path).exists(), path
