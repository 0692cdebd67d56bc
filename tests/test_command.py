"""`mayfly verify FILE` and `mayfly salvage FILE`, as an operator types them: no service runs, the container is real."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tarfile
import uuid
from contextlib import closing
from pathlib import Path

import docker
import pytest

from gateway.command.__main__ import CODES
from gateway.launcher.specification import LABEL_ROLE, command_specification, container_specification
from gateway.settings import Settings

from .conftest import eventually

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "golden" / "command_specification.json"
COMMAND = [sys.executable, "-m", "gateway.command"]
PROFILE = '{"defaultAction":"SCMP_ACT_ERRNO"}'
NO_DOCKER = {"MAYFLY_DOCKER_SOCKET": "unix:///nonexistent/docker.sock"}
PAGE = 4096

# Plays a runner that was taken over. What it does, the first line of FILE says.
TAKEN_OVER = r"""
import json, os, sys, time

digests = json.loads(sys.argv[1])  # the image has no hashlib

def read(count):
    data = b""
    while len(data) < count:
        data += os.read(0, count - len(data))
    return data

request = json.loads(read(int.from_bytes(read(4), "big")))
content = read(request["upload"])
report = {
    "kind": request["op"].removesuffix("_file"), "ok": True, "size": len(content), "sha256": digests[content.decode()],
    "page_size": None, "pages": None, "findings": [], "more_findings": False, "tables": [], "unassigned": 0, "objects_lost": [],
}
reply = {"v": 1, "verdict": "report", "report": report}
forged = b"forged"
head = {"v": 1, "verdict": "file", "size": len(forged), "sha256": digests["forged"]}

def frame(document):
    payload = json.dumps(document).encode()
    return len(payload).to_bytes(4, "big") + payload

def say(*pieces):
    for piece in pieces:
        while piece:
            piece = piece[os.write(1, piece):]
    os._exit(0)

match content.split(b"\n")[0].decode():
    case "hang":
        while True:
            time.sleep(60)
    case "say nothing":
        say()
    case "flood":
        say(b"\xff" * (64 << 20))
    case "another file's report":
        report["sha256"] = "0" * 64
        say(frame(reply), frame(head), forged)
    case "an unknown key":
        report["path"] = "/etc/passwd"
        say(frame(reply), frame(head), forged)
    case "orders to a terminal":
        report["ok"] = False
        report["findings"] = [{"code": "other", "page": None, "object": None, "message": "\x1b]0;owned\x07\u202e"}]
        say(frame(reply))
    case "a refusal that is orders to a terminal":
        say(frame({"v": 1, "verdict": "unconfined", "message": "\x1b]0;owned\x07\u202e"}))
    case "another file":
        say(frame(reply), frame(head), b"FORGED")
    case "a file that is too large":
        head["size"] = 1 << 40
        say(frame(reply), frame(head), forged)
    case "more than a file":
        say(frame(reply), frame(head), forged, b"!")
"""

ACTS = {act: 6 if act in ("hang", "say nothing") else 5 for act in re.findall(r'case "(.*)":', TAKEN_OVER)}
"""What it can do, and the exit code that the command gives to it."""


@pytest.fixture(autouse=True)
def no_container_is_left():
    yield
    assert containers() == []


@pytest.fixture(scope="module")
def taken_over():
    """An image whose runner says what it likes."""
    digests = {text: hashlib.sha256(text.encode()).hexdigest() for text in ("forged", *(f"{act}\n" for act in ACTS))}
    entry = ["/usr/bin/python3.13", "-I", "-S", "-B", "/opt/taken_over.py", json.dumps(digests)]
    files = {
        "taken_over.py": TAKEN_OVER,
        "Dockerfile": f"FROM {Settings.from_environment().image}\nADD taken_over.py /opt/\nENTRYPOINT {json.dumps(entry)}\n",
    }
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        for name, text in files.items():
            item = tarfile.TarInfo(name)
            item.size, item.mode = len(text.encode()), 0o644
            tar.addfile(item, io.BytesIO(text.encode()))
    context.seek(0)
    name = f"mayfly-taken-over:{uuid.uuid4().hex[:12]}"
    with closing(docker.from_env()) as client:
        client.images.build(fileobj=context, custom_context=True, tag=name, rm=True, network_mode="none")
        yield name
        client.images.remove(name, force=True)


@pytest.fixture
def healthy(tmp_path):
    path = tmp_path / "healthy.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE notes(id INTEGER PRIMARY KEY, body)")
        connection.execute("CREATE INDEX by_body ON notes(body)")
        connection.executemany("INSERT INTO notes(body) VALUES (?)", [(f"{n} {'x' * 300}",) for n in range(300)])
        connection.commit()
    return path


@pytest.fixture
def damaged(healthy):
    """One leaf of the table is zeros, so its rows are gone; the rest is whole."""
    content = bytearray(healthy.read_bytes())
    leaf = next(place for place in range(PAGE, len(content), PAGE) if content[place] == 0x0D)
    content[leaf : leaf + PAGE] = bytes(PAGE)
    path = healthy.with_name("damaged.db")
    path.write_bytes(content)
    return path


def containers():
    with closing(docker.from_env()) as client:
        return client.containers.list(all=True, filters={"label": f"{LABEL_ROLE}=command"}, ignore_removed=True)


def mayfly(*arguments, **environment):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=REPO, env={**os.environ, **environment}, capture_output=True, text=True
    )


def report_of(done):
    report = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1  # a program reads it line by line
    return report


def rows(path):
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return set(connection.execute("SELECT id, body FROM notes"))


def command(settings=None):
    return command_specification(settings or Settings(), PROFILE)


# --- what it starts


def test_the_commands_container_is_the_golden_one():
    assert command() == json.loads(GOLDEN.read_text())


def test_the_commands_container_differs_from_a_runs_in_its_command_its_labels_its_removal_and_a_volume_of_its_own_memory():
    settings = Settings(docker_runtime="crun", instance_bytes=3 << 20, container_memory_bytes=100 << 20)
    ours = command(settings)
    run = container_specification(settings, uuid.UUID(int=7), Path("/v"), "d", PROFILE)
    memory = {"Memory": 106 << 20, "MemorySwap": 106 << 20}
    volume = {"/data": f"rw,nosuid,nodev,noexec,uid=64700,gid=64700,size={6 << 20}"}
    assert ours == run | {
        "Cmd": ["file"],
        "Labels": {LABEL_ROLE: "command"},
        "HostConfig": run["HostConfig"] | memory | {"AutoRemove": True, "Mounts": [], "Tmpfs": volume},
    }


# --- what it says


def test_a_healthy_file_is_found_to_be_healthy_and_salvaged_as_it_is(healthy):
    content = healthy.read_bytes()
    done = mayfly("verify", healthy)
    assert (done.returncode, done.stderr) == (0, "")
    report = report_of(done)
    assert (report["kind"], report["ok"], report["findings"]) == ("verify", True, [])
    assert (report["size"], report["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert (report["page_size"], report["pages"]) == (PAGE, len(content) // PAGE)
    assert mayfly("salvage", healthy).returncode == 0
    assert rows(healthy.with_name("healthy.db.salvaged")) == rows(healthy)
    assert healthy.read_bytes() == content


def test_a_damaged_file_is_reported_the_same_twice_and_what_is_left_of_it_is_salvaged(healthy, damaged):
    content = damaged.read_bytes()
    first, second = mayfly("verify", damaged), mayfly("verify", damaged)
    assert (first.returncode, first.stdout) == (second.returncode, second.stdout)
    assert first.returncode == 1
    assert report_of(first)["findings"]
    out = damaged.with_name("out.db")
    done = mayfly("salvage", damaged, "-o", out)
    assert (done.returncode, done.stderr) == (1, f"mayfly: recovered into {out}\n")
    report = report_of(done)
    kept = rows(out)
    assert (report["kind"], report["ok"]) == ("salvage", True)
    assert kept < rows(healthy)
    assert [(table["name"], table["kept"]) for table in report["tables"]] == [("notes", len(kept))]
    assert report["tables"][0]["lost"] == 300 - len(kept)
    assert damaged.read_bytes() == content
    assert out.stat().st_mode & 0o777 == 0o600


def test_what_never_was_a_database_is_damaged_and_nothing_of_it_is_recovered(tmp_path):
    noise = tmp_path / "noise"
    noise.write_bytes(b"no database\n" * 1000)
    assert mayfly("verify", noise).returncode == 1
    done = mayfly("salvage", noise)
    assert done.returncode == 3
    assert report_of(done)["ok"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["noise"]


def test_a_log_beside_the_file_is_not_looked_at_and_that_is_said(healthy):
    wal = healthy.with_name("healthy.db-wal")
    wal.write_bytes(b"content")
    assert f"{wal} is not looked at" in mayfly("verify", healthy, **NO_DOCKER).stderr


def test_a_report_that_nobody_takes_is_not_passed_off_as_a_verdict(healthy):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "verify", healthy], cwd=REPO, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (4, "mayfly: cannot write the report: No space left on device\n")


# --- what it refuses, all of it before there is a container: there is no Docker


@pytest.mark.parametrize("make", ["missing", "folder", "pipe", "too large"])
def test_what_is_no_readable_file_of_an_instances_size_is_refused(tmp_path, make):
    path = tmp_path / "file"
    match make:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "too large":
            path.touch()
            os.truncate(path, (1 << 20) + 1)
    done = mayfly("verify", path, MAYFLY_INSTANCE_BYTES=str(1 << 20), **NO_DOCKER)
    assert (done.returncode, done.stdout) == (4, "")
    assert str(path) in done.stderr


def test_a_file_that_is_there_already_is_not_written_over_unless_forced(healthy):
    out = healthy.with_name("healthy.db.salvaged")
    out.write_bytes(b"precious")
    done = mayfly("salvage", healthy, **NO_DOCKER)
    assert done.returncode == 4
    assert "--force" in done.stderr
    assert out.read_bytes() == b"precious"
    assert mayfly("salvage", healthy, "--force").returncode == 0
    assert rows(out) == rows(healthy)


def test_the_file_itself_is_never_written_over(healthy):
    content = healthy.read_bytes()
    link = healthy.with_name("link")
    link.symlink_to(healthy)
    for out in (healthy, link):
        done = mayfly("salvage", healthy, "-o", out, "--force", **NO_DOCKER)
        assert done.returncode == 4
        assert "never touched" in done.stderr
    assert healthy.read_bytes() == content


@pytest.mark.parametrize("arguments", [(), ("verify",), ("verify", "a", "b"), ("repair", "a"), ("verify", "a", "--force")])
def test_wrong_arguments_are_told_with_the_usage(arguments):
    done = mayfly(*arguments)
    assert done.returncode == 2
    assert "usage: mayfly" in done.stderr


def test_a_wrong_setting_is_told(healthy):
    done = mayfly("verify", healthy, MAYFLY_INSTANCE_BYTES="much")
    assert done.returncode == 2
    assert "MAYFLY_INSTANCE_BYTES='much'" in done.stderr


def test_without_docker_or_the_image_there_is_no_verdict(healthy):
    done = mayfly("verify", healthy, **NO_DOCKER)
    assert (done.returncode, done.stdout) == (5, "")
    done = mayfly("verify", healthy, MAYFLY_IMAGE="mayfly-runner:nonexistent")
    assert (done.returncode, done.stdout) == (5, "")
    assert "./infra/image" in done.stderr


# --- a runner that was taken over


@pytest.mark.parametrize("act", [act for act in ACTS if act not in ("hang", "orders to a terminal")])
def test_M5_an_answer_that_is_not_of_the_documented_form_is_neither_shown_nor_written(tmp_path, taken_over, act):
    path = tmp_path / "file"
    path.write_text(f"{act}\n")
    done = mayfly("salvage", path, MAYFLY_IMAGE=taken_over)
    assert (done.returncode, done.stdout) == (ACTS[act], ""), done.stderr
    assert done.stderr.isascii()
    assert "\x1b" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_M5_names_out_of_a_file_are_no_orders_to_a_terminal(tmp_path, taken_over):
    path = tmp_path / "file"
    path.write_text("orders to a terminal\n")
    done = mayfly("verify", path, MAYFLY_IMAGE=taken_over)
    assert done.returncode == 1
    assert done.stdout.isascii()
    assert done.stdout.strip().isprintable()
    assert report_of(done)["findings"][0]["message"] == "\x1b]0;owned\x07\u202e"


def test_a_runner_that_does_not_answer_is_killed(tmp_path, taken_over):
    path = tmp_path / "file"
    path.write_text("hang\n")
    limits = {"MAYFLY_BULK_DEADLINE_SECONDS": "0.1", "MAYFLY_GRACE_SECONDS": "0.1", "MAYFLY_START_TIMEOUT_SECONDS": "5"}
    done = mayfly("verify", path, MAYFLY_IMAGE=taken_over, **limits)
    assert (done.returncode, done.stdout) == (6, "")
    assert "killed" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_takes_its_container_along(tmp_path, taken_over, number):
    path = tmp_path / "file"
    path.write_text("hang\n")
    with subprocess.Popen(
        [*COMMAND, "verify", path], cwd=REPO, env={**os.environ, "MAYFLY_IMAGE": taken_over}, stderr=subprocess.PIPE
    ) as running:
        eventually(lambda: any(container.status == "running" for container in containers()))
        running.send_signal(number)
        assert running.wait(60) == 130
        assert running.stderr.read() == b"mayfly: interrupted\n"


# --- what is written about it


def test_M15_the_exit_codes_of_the_page_are_those_of_the_command():
    text = (REPO / "docs" / "operations.md").read_text()
    table = text.partition("| exit code | |\n")[2].partition("\n\n")[0]
    assert {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.*) \|$", table, re.MULTILINE)} == CODES
    told = mayfly("--help").stdout
    assert all(f"{code:>5}  {meaning}\n" in told for code, meaning in CODES.items())


def test_the_console_script_is_the_command():
    assert 'mayfly = "gateway.command.__main__:run"' in (REPO / "pyproject.toml").read_text()
