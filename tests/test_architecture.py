"""The rooms of the project and the direction of the imports between them."""

import ast
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "gateway/web": {"docker", "apsw", "sqlite3", "runner", "gateway.launcher", "gateway.command"},
    "gateway/launcher": {"aiohttp", "apsw", "sqlite3", "runner", "gateway.web", "gateway.command"},
    "gateway/command": {"aiohttp", "apsw", "sqlite3", "runner"},
    "runner": {"gateway", "docker", "aiohttp", "sqlite3"},
}


def imported_modules(path: Path) -> set[str]:
    package = path.relative_to(REPO).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def modules_under(room: str) -> list[Path]:
    return sorted((REPO / room).rglob("*.py"))


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_nothing_that_is_not_its_business(room):
    files = modules_under(room)
    assert files
    for path in files:
        for module in imported_modules(path):
            bad = [name for name in FORBIDDEN[room] if module == name or module.startswith(name + ".")]
            assert not bad, f"{path.relative_to(REPO)} imports {module}"


def test_the_command_takes_of_the_gateway_how_it_reads_a_runners_reply_alone():
    for path in modules_under("gateway/command"):
        for module in imported_modules(path):
            taken = module.removeprefix("gateway.web.").split(".")[0] if module.startswith("gateway.web.") else "runner"
            assert taken in ("runner", "errors"), f"{path.relative_to(REPO)} imports {module}"


def test_the_runner_needs_the_standard_library_and_apsw_alone():
    allowed = sys.stdlib_module_names | {"apsw", "runner", "_sha2"}  # the last one of the image's interpreter
    for path in modules_under("runner"):
        for module in imported_modules(path):
            assert module.split(".")[0] in allowed, f"{path.relative_to(REPO)} imports {module}"


def test_one_module_alone_reads_the_environment_of_the_gateway():
    for path in modules_under("gateway"):
        if path.name != "settings.py":
            text = path.read_text()
            assert "os.environ" not in text, path
            assert "getenv" not in text, path


def test_every_package_of_the_tree_is_installed():
    import tomllib

    patterns = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert patterns == ["gateway*", "runner"]
    for room in ("gateway", "gateway/web", "gateway/launcher", "gateway/launcher/engines", "gateway/command", "runner"):
        assert (REPO / room / "__init__.py").exists(), room


def test_M4_foreign_functions_are_called_for_the_sandbox_alone():
    users = {
        path.relative_to(REPO).as_posix()
        for room in ("gateway", "runner")
        for path in modules_under(room)
        if any(module.split(".")[0] in ("ctypes", "cffi") for module in imported_modules(path))
    }
    in_the_runner = {
        f"runner/{name}.py" for name in ("child", "cloning", "huge_pages", "landlock", "seccomp", "syscalls", "zygote")
    }
    assert users == {"gateway/launcher/mounts.py", "gateway/launcher/replacement.py", *in_the_runner}
