"""The runner image: what is in it, what is not, what its SQLite was built to refuse, and how infra/image makes it."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import apsw
import docker
import pytest

from .containers import printed

REPO = Path(__file__).resolve().parent.parent
TAG = os.environ.get("MAYFLY_IMAGE", "mayfly-runner:latest")
PYTHON = "usr/bin/python3.13"
LOADER = "lib64/ld-linux-x86-64.so.2"
APSW = "opt/mayfly/apsw/__init__.cpython-313-x86_64-linux-gnu.so"
LIMIT_BYTES = 18_000_000
UNCHECKED_HASH = 0b01


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture(scope="module")
def image(engine: docker.DockerClient):
    return engine.images.get(TAG)


@pytest.fixture(scope="module")
def file_system(image) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    """Every file of the image's layers, links and devices too, without what Docker adds to a container."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(b"".join(image.save()))) as saved:
        (manifest,) = json.load(saved.extractfile("manifest.json"))
        for layer in manifest["Layers"]:
            with tarfile.open(fileobj=saved.extractfile(layer)) as archive:
                for entry in archive:
                    if not entry.isdir():
                        files[entry.name] = (entry, archive.extractfile(entry).read() if entry.isreg() else b"")
    return files


@pytest.fixture(scope="module")
def build(file_system) -> dict:
    return json.loads(file_system["opt/mayfly/build.json"][1])


@pytest.fixture(scope="module")
def ask(engine: docker.DockerClient, image):
    """Run a script in the image as a runner is run, and return what it prints as JSON."""

    def run(script: str) -> object:
        prelude = "import sys, json\nsys.path.insert(0, '/opt/mayfly')\nimport apsw\nconnection = apsw.Connection(':memory:')\n"
        prelude += "def rows(sql, args=()):\n    return connection.execute(sql, args).fetchall()\n"
        return printed(engine, image.id, prelude + script)

    return run


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    """infra/image as a module, for the decisions that it makes without any input/output."""
    loader = SourceFileLoader("mayfly_image_builder", str(REPO / "infra" / "image"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = writes
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What infra/image reads, in a folder of its own that a test may change."""
    folder = tmp_path / "checkout"
    for name in ("infra", "runner"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "Dockerfile.runner", folder)
    return folder


@pytest.fixture
def scratch_tag(engine: docker.DockerClient) -> Iterator[str]:
    tag = f"mayfly-image-test:{uuid.uuid4().hex}"
    yield tag
    if engine.images.list(name=tag):
        engine.images.remove(tag, force=True)


def build_image(checkout: Path, tag: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MAYFLY_IMAGE": tag, **settings}
    return subprocess.run([checkout / "infra" / "image"], env=environment, capture_output=True, text=True, timeout=900)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


# ── What is in it ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_but_the_interpreter_and_its_loader_can_be_executed(file_system):
    executable = {name for name, (entry, _) in file_system.items() if entry.isreg() and entry.mode & 0o111}
    assert executable == {PYTHON, LOADER}


def test_every_file_is_plain_owned_by_root_and_without_setuid(file_system):
    for name, (entry, _) in file_system.items():
        assert not entry.mode & 0o7000, name
        assert entry.isreg(), name
        assert (entry.uid, entry.gid) == (0, 0), name


def test_every_native_file_is_the_interpreter_a_library_it_needs_or_a_listed_extension(file_system, builder):
    native = {name for name, (_, content) in file_system.items() if content.startswith(b"\x7fELF")}
    libraries = {f"usr/lib/{builder.MULTIARCH}/{name}" for name in builder.LIBRARIES}
    extensions = {f"{builder.STDLIB}/lib-dynload/{name}{builder.EXTENSION_SUFFIX}" for name in builder.EXTENSIONS}
    assert native == {PYTHON, LOADER, APSW} | libraries | extensions


def test_no_script_starts_with_an_interpreter_line(file_system):
    assert not [name for name, (_, content) in file_system.items() if content.startswith(b"#!")]


def test_every_module_is_bytecode_that_is_never_compared_with_a_source(file_system):
    modules = {name: content for name, (_, content) in file_system.items() if name.endswith((".py", ".pyc"))}
    assert {f"opt/mayfly/runner/{path.stem}.pyc" for path in (REPO / "runner").glob("*.py")} <= modules.keys()
    for name, content in modules.items():
        assert name.endswith(".pyc"), name
        assert struct.unpack_from("<I", content, 4)[0] == UNCHECKED_HASH, name


def imports_of(node: ast.AST) -> Iterator[ast.AST]:
    """Every import, but what stands in for one that failed."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ExceptHandler):
            yield child
            yield from imports_of(child)


def test_every_module_that_the_runner_imports_is_there(ask):
    wanted = {f"runner.{path.stem}" for path in (REPO / "runner").glob("*.py") if path.stem not in ("__init__", "__main__")}
    for path in (REPO / "runner").glob("*.py"):
        for node in imports_of(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                wanted.add(node.module)
    script = (
        f"import importlib\nfor name in {sorted(wanted)!r}: importlib.import_module(name)\nprint(json.dumps(sorted(sys.modules)))"
    )
    assert wanted <= set(ask(script))


@pytest.mark.parametrize(
    "name", ["subprocess", "multiprocessing", "asyncio", "sqlite3", "ssl", "http", "pickle", "ctypes.util", "pty"]
)
def test_modules_of_no_use_to_a_runner_are_not_there(ask, name):
    script = f"import importlib\ntry: importlib.import_module({name!r})\nexcept ImportError as error: print(json.dumps(error.name))"
    assert ask(script) == name


def test_image_stays_small(image):
    assert image.attrs["Size"] < LIMIT_BYTES


def test_image_runs_the_runner_as_an_unprivileged_user_and_nothing_else(image):
    config = image.attrs["Config"]
    assert config["Entrypoint"] == ["/usr/bin/python3.13", "-s", "-P", "-S", "-B", "/opt/mayfly/__main__.pyc"]
    assert config["User"] == "64700:64700"
    assert not config["Cmd"]
    assert not config.get("ExposedPorts")


# ── Its SQLite ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_build_record_and_label_tell_what_answers(image, build, ask):
    label = image.labels["mayfly.sqlite_build"]
    assert label == build["sqlite_build"] == "hardened", "the suite is for the hardened image: unset MAYFLY_IMAGE_SQLITE"
    answered = ask(
        "print(json.dumps([apsw.apsw_version(), apsw.sqlite_lib_version(), sys.version.split()[0], apsw.compile_options]))"
    )
    assert answered[:3] == [build["apsw"], build["sqlite"], build["python"]]
    assert sorted(answered[3]) == build["compile_options"]
    assert image.labels["mayfly.rootfs"]


def test_build_record_names_every_package_of_the_lock_with_version_and_hash(build, builder):
    lock = json.loads((REPO / "infra" / "image.lock").read_text())
    assert build["debian"].keys() == set(builder.IMAGE_PACKAGES) == lock["debian_image"].keys()
    for text in [*build["debian"].values(), *build["builder"].values()]:
        assert len(builder.Deb.parse(text).sha256) == 64
    for name, source in build["sources"].items():
        assert source == {"version": lock["pypi"][name]["version"], "sha256": lock["pypi"][name]["sdist"]}
    assert build["patches"].keys() == {path.name for path in (REPO / "infra" / "patches").iterdir()}


def test_W1_sqlite_is_compiled_without_what_hostile_sql_could_use(build):
    options = set(build["compile_options"])
    wanted = {"OMIT_LOAD_EXTENSION", "OMIT_DEPRECATED", "OMIT_SHARED_CACHE", "DQS=0", "MAX_ATTACHED=1", "TEMP_STORE=3"}
    wanted |= {"MAX_MMAP_SIZE=0", "MAX_WORKER_THREADS=0", "ENABLE_FTS5", "ENABLE_RTREE", "ENABLE_MATH_FUNCTIONS"}
    wanted |= {"EXTRA_AUTOEXT=sqlite3_regexp_autoext"}
    assert wanted <= options
    assert not [option for option in options if "CODEC" in option or option.startswith("ENABLE_FTS3")]
    assert tuple(int(part) for part in build["sqlite"].split(".")) >= (3, 53, 2)


def test_opening_a_database_sets_no_memory_aside_for_pages(build):
    assert "DEFAULT_PCACHE_INITSZ=0" in build["compile_options"]


def test_load_extension_and_the_cipher_code_of_the_source_do_not_exist(ask, file_system):
    script = """
try:
    rows("select load_extension('x')")
except apsw.SQLError as error:
    print(json.dumps([str(error), hasattr(connection, "enable_load_extension"), hasattr(connection, "load_extension")]))
"""
    assert ask(script) == ["no such function: load_extension", False, False]
    assert b"sqlcipher" not in file_system[APSW][1].lower()
    assert b"cipher_" not in file_system[APSW][1].lower()
    assert b"sqlite3mc" not in file_system[APSW][1].lower()


def test_sql_people_use_works(ask):
    script = """
rows("create virtual table f using fts5(body)")
rows("insert into f values ('the quick brown fox'), ('lazy dogs')")
rows("create virtual table r using rtree(id, x0, x1)")
rows("insert into r values (1, 0, 10), (2, 20, 30)")
print(json.dumps([
    rows("select rowid from f where f match 'quick AND fox' order by rank"),
    rows("select id from r where x1 >= 25"),
    rows("select round(sqrt(2), 3), round(pi(), 3), ln(1)"),
    rows("select json_extract('{\\"a\\": [1, 2]}', '$.a[1]'), json_array(1, 'b'), json(jsonb('[1]'))"),
    rows("select value, sum(value) over (order by value) from json_each('[1,2,3]')"),
    rows("with recursive c(n) as (values(1) union all select n+1 from c where n<4) select group_concat(n) from c"),
    rows("vacuum"),
]))
"""
    assert ask(script) == [
        [[1]],
        [[2]],
        [[1.414, 3.142, 0.0]],
        [[2, '[1,"b"]', "[1]"]],
        [[1, 1], [2, 3], [3, 6]],
        [["1,2,3,4"]],
        [],
    ]


def test_trusted_schema_is_off_unless_asked_for(ask):
    assert ask("print(json.dumps(rows('pragma trusted_schema')))") == [[0]]


def elf_facts(content: bytes) -> dict[str, object]:
    """What `readelf -ldW --dyn-syms` would tell of a 64-bit little-endian object."""
    program, header_bytes, headers = struct.unpack_from("<Q", content, 32)[0], *struct.unpack_from("<HH", content, 54)
    segments = [struct.unpack_from("<IIQQQQQQ", content, program + index * header_bytes) for index in range(headers)]
    kinds = {segment[0]: segment for segment in segments}
    loads = [segment for segment in segments if segment[0] == 1]
    dynamic = kinds[2]
    tags = [struct.unpack_from("<QQ", content, at) for at in range(dynamic[2], dynamic[2] + dynamic[5], 16)]
    strings = dict(tags)[5]
    (offset,) = [strings - load[3] + load[2] for load in loads if load[3] <= strings < load[3] + load[5]]
    names = content[offset : offset + dict(tags)[10]].split(b"\0")
    return {
        "stack_executable": bool(kinds[0x6474E551][1] & 1),
        "relro": 0x6474E552 in kinds,
        "bind_now": any((tag == 30 and value & 8) or (tag == 0x6FFFFFFB and value & 1) for tag, value in tags),
        "writable_code": any(load[1] & 3 == 3 for load in loads),
        "stack_protector": b"__stack_chk_fail" in names,
        "fortified": any(name.endswith(b"_chk") for name in names),
    }


def test_compiled_module_is_hardened_against_memory_errors(file_system):
    assert elf_facts(file_system[APSW][1]) == {
        "stack_executable": False,
        "relro": True,
        "bind_now": True,
        "writable_code": False,
        "stack_protector": True,
        "fortified": True,
    }


def test_control_module_built_without_those_flags_is_seen_to_lack_them(file_system, builder):
    debian = file_system[f"{builder.STDLIB}/lib-dynload/_ctypes{builder.EXTENSION_SUFFIX}"][1]
    assert elf_facts(debian)["bind_now"] is False


def test_control_stock_apsw_has_load_extension_and_stumbles_over_text_that_is_not_utf_8():
    connection = apsw.Connection(":memory:")
    assert hasattr(connection, "enable_load_extension")
    with pytest.raises(UnicodeDecodeError):
        connection.execute("select cast(x'ff' as text)").fetchall()


def test_text_that_is_not_utf_8_is_read_as_escaped_bytes(ask):
    script = """
print(json.dumps([
    rows("select cast(x'ff41' as text), char(55296), 'a' || char(0) || 'b', 'żółw', char(128034)"),
    rows("select hex(cast(x'ff' as text) || 'z')"),
]))
"""
    assert ask(script) == [[["\udcffA", "\udced\udca0\udc80", "a\0b", "żółw", "🐢"]], [["FF7A"]]]


def test_escaped_bytes_are_bound_as_those_bytes(ask):
    script = """
odd = "a\\udcff", "a\\0b", "ż", "\\udced\\udca0\\udc80"
print(json.dumps([
    rows("select hex(?), hex(?), hex(?), hex(?)", odd),
    rows("select :odd, typeof(:odd), length(cast(:odd as blob))", {"odd": "a\\udcff"}),
]))
"""
    assert ask(script) == [[["61FF", "610062", "C5BC", "EDA080"]], [["a\udcff", "text", 2]]]


def test_surrogate_that_stands_for_no_byte_is_refused(ask):
    script = """
try:
    rows("select ?", ["\\ud800"])
except UnicodeEncodeError as error:
    print(json.dumps(error.reason))
"""
    assert ask(script) == "surrogates not allowed"


def test_functions_error_messages_and_traces_bear_text_that_is_not_utf_8(ask):
    script = """
seen = []
connection.create_scalar_function("echo", lambda text: seen.append(text) or text)
connection.exec_trace = lambda cursor, sql, bindings: seen.append(sql) or True
echoed = rows("select hex(echo(cast(x'ff41' as text)))")
try:
    rows("select json_extract('{}', cast(x'24ff' as text))")
except apsw.SQLError as error:
    message = str(error)
print(json.dumps([seen[:2], echoed, message]))
"""
    seen, echoed, message = ask(script)
    assert seen == ["select hex(echo(cast(x'ff41' as text)))", "\udcffA"]
    assert echoed == [["FF41"]]
    assert message.startswith("bad JSON path")


def test_column_names_that_are_not_utf_8_are_read_as_escaped_bytes(ask):
    """Such a name can only come from a damaged schema: one is made by changing a byte of a database file's image."""
    script = """
rows("create table t(abcdefgh text)")
damaged = connection.serialize("main").replace(b"abcdefgh", b"abcd\\xfffgh")
other = apsw.Connection(":memory:")
other.deserialize("main", damaged)
cursor = other.cursor().execute("select * from t union all select 1")
print(json.dumps([cursor.get_description(), [row[1] for row in other.execute("pragma table_info(t)")]]))
"""
    description, names = ask(script)
    assert [name for name, _ in description] == ["abcd\udcfffgh"]
    assert names == ["abcd\udcfffgh"]


# ── How it is made ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_unchanged_tree_is_not_built_again(engine, image):
    mode = image.labels["mayfly.sqlite_build"]
    first = build_image(REPO, TAG, MAYFLY_IMAGE_SQLITE=mode)
    assert first.returncode == 0, first.stderr
    built = engine.images.get(TAG).id
    second = build_image(REPO, TAG, MAYFLY_IMAGE_SQLITE=mode)
    assert second.returncode == 0, second.stderr
    assert "up to date" in second.stderr
    assert engine.images.get(TAG).id == built


def test_change_in_the_runner_makes_only_the_last_layer_anew(engine, checkout, scratch_tag):
    first = build_image(checkout, scratch_tag)
    assert first.returncode == 0, first.stderr
    before = engine.images.get(scratch_tag)
    (checkout / "runner" / "added.py").write_text("ANSWER = 42\n")
    second = build_image(checkout, scratch_tag)
    assert second.returncode == 0, second.stderr
    after = engine.images.get(scratch_tag)
    assert "compiling" not in second.stderr
    assert "root file system (" not in second.stderr
    assert before.attrs["RootFS"]["Layers"][0] == after.attrs["RootFS"]["Layers"][0]
    assert before.attrs["RootFS"]["Layers"][1] != after.attrs["RootFS"]["Layers"][1]


def test_M16_same_inputs_give_the_same_root_file_system(engine, checkout, scratch_tag, tmp_path):
    assert build_image(checkout, scratch_tag).returncode == 0
    cache = tmp_path / "cache" / "mayfly" / "image"
    cache.mkdir(parents=True)
    # the compilation is deterministic too, and takes minutes: here it is shared, all else is made twice
    for folder in (cache_folder() / "mayfly" / "image").glob("apsw-*"):
        shutil.copytree(folder, cache / folder.name)
    digests = []
    for _ in range(2):
        for folder in cache.glob("rootfs-*"):
            shutil.rmtree(folder)
        if engine.images.list(name=scratch_tag):
            engine.images.remove(scratch_tag, force=True)
        done = build_image(checkout, scratch_tag, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        assert "building the root file system" in done.stderr
        digests.append(engine.images.get(scratch_tag).labels["mayfly.rootfs"])
    assert digests[0] == digests[1]


def test_input_with_another_hash_stops_the_build(engine, checkout, scratch_tag, tmp_path):
    lock = json.loads((checkout / "infra" / "image.lock").read_text())
    lock["pypi"]["apsw"]["wheel"] = "0" * 64
    (checkout / "infra" / "image.lock").write_text(json.dumps(lock))
    done = build_image(checkout, scratch_tag, MAYFLY_IMAGE_SQLITE="stock", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "is not the wheel that infra/image.lock names by its hash" in done.stderr
    assert not engine.images.list(name=scratch_tag)


def test_unreachable_sources_stop_the_build_and_name_the_way_out(engine, checkout, scratch_tag, tmp_path):
    nowhere = {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_FIND_LINKS": "",
    }
    done = build_image(checkout, scratch_tag, XDG_CACHE_HOME=str(tmp_path), **nowhere)
    assert done.returncode == 1
    assert "MAYFLY_IMAGE_SQLITE=stock ./infra/image" in done.stderr
    assert not engine.images.list(name=scratch_tag)


def test_unknown_sqlite_mode_is_refused(checkout, scratch_tag):
    done = build_image(checkout, scratch_tag, MAYFLY_IMAGE_SQLITE="fast")
    assert done.returncode == 1
    assert "hardened, stock" in done.stderr


LOCKED = {"libc6": "2.36-9 sha256:aa"}


def test_locked_package_with_the_locked_bytes_is_taken_silently(builder):
    assert list(builder.reconcile({"libc6": builder.Deb("2.36-9", "aa")}, LOCKED)) == []


def test_other_bytes_under_the_locked_version_are_refused(builder):
    with pytest.raises(builder.BuildError, match="the lock says aa"):
        list(builder.reconcile({"libc6": builder.Deb("2.36-9", "bb")}, LOCKED))


def test_newer_signed_package_is_taken_and_named(builder):
    (note,) = builder.reconcile({"libc6": builder.Deb("2.36-10", "bb")}, LOCKED)
    assert note == "libc6 2.36-10 has replaced 2.36-9"


def test_package_older_than_the_lock_is_refused(builder):
    with pytest.raises(builder.BuildError, match="older than the lock"):
        list(builder.reconcile({"libc6": builder.Deb("2.36-8", "bb")}, LOCKED))
