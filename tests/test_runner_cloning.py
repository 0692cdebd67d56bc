"""What the zygote does once so that its children need not. Each case is a process of its own, because it changes one for good."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent

PROGRAM = """
import json, os, sys
from pathlib import Path
import apsw
from runner import cloning
from runner.execute import run_prepared
from runner.wire import Request
from tests.runner_database import CONFIGURATION, TenantDatabase
tenant = TenantDatabase(Path(sys.argv[1]))

def from_child(act):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, json.dumps(act()).encode())
        os._exit(0)
    os.wait()
    os.close(writing)
    return json.loads(os.read(reading, 65536))
"""


def told(program: str, folder: Path) -> Any:
    command = [sys.executable, "-c", PROGRAM + program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


RANDOM_NUMBERS = """
def random_numbers():
    connection = apsw.Connection(":memory:", vfs="unix")
    return connection.execute("SELECT random(), hex(randomblob(16))").fetchall()

def journal_nonce():
    # A hot journal's header is on the disk from the first page that leaves a small cache.
    run = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 50)"
    connection = apsw.Connection(str(tenant.path), vfs="unix")
    connection.execute("PRAGMA journal_mode=TRUNCATE; PRAGMA cache_size=5; PRAGMA cache_spill=5; BEGIN").fetchall()
    connection.execute(f"{run} INSERT INTO t SELECT zeroblob(4000) FROM c").fetchall()
    nonce = tenant.journal.read_bytes()[12:16].hex()
    connection.execute("ROLLBACK")
    connection.close()
    return nonce

tenant.run("CREATE TABLE t(a); INSERT INTO t VALUES (1)")
"""


def test_each_child_has_random_numbers_of_its_own(tmp_path):
    program = f"""{RANDOM_NUMBERS}
entropy = cloning.Entropy()
random_numbers()
entropy.forget_the_seed()
print(json.dumps([[from_child(random_numbers) for _ in range(2)], [from_child(journal_nonce) for _ in range(2)]]))
"""
    (first, second), (nonce, other_nonce) = told(program, tmp_path)
    assert first[0][0] != second[0][0]
    assert first[0][1] != second[0][1]
    assert nonce != other_nonce
    assert nonce != "00000000"


def test_control_children_of_a_seeded_process_share_its_random_numbers(tmp_path):
    program = f"""{RANDOM_NUMBERS}
random_numbers()
print(json.dumps([from_child(random_numbers) for _ in range(2)]))
"""
    first, second = told(program, tmp_path)
    assert first == second


def test_sqlite_asks_the_entropy_for_a_seed_and_for_nothing_else(tmp_path):
    program = """
asked = []
class Recorder(cloning.Entropy):
    pass
def record(name):
    def asked_for(self, *arguments):
        asked.append(name)
        return getattr(super(Recorder, self), name)(*arguments)
    return asked_for
for name in dir(apsw.VFS):
    if name.startswith("x"):
        setattr(Recorder, name, record(name))
entropy = Recorder()
entropy.forget_the_seed()
for sql in ("CREATE TABLE t(a); INSERT INTO t VALUES (random())", "SELECT datetime('now'), a FROM t", "VACUUM",
            "CREATE TEMP TABLE s(a); INSERT INTO s VALUES (1)", "BEGIN; INSERT INTO t VALUES (2); ROLLBACK"):
    assert tenant.run(sql)["verdict"] == "ok", sql
print(json.dumps(sorted(set(asked))))
"""
    assert told(program, tmp_path) == ["xRandomness"]


def test_warming_up_answers_requests_and_leaves_nothing_behind(tmp_path):
    program = """
import runner.cloning
seen = set()
def run(request, *rest):
    try:
        reply = run_prepared(request, *rest)
    except Exception as error:
        seen.add(type(error).__name__)
        raise
    seen.add(json.loads(reply)["verdict"])
    return reply
runner.cloning.run_prepared = run
folder = Path(sys.argv[1], "warm")
folder.mkdir()
before = sorted(os.listdir("/proc/self/fd"))
cloning.warm_up(CONFIGURATION, str(folder / "db.sqlite"))
print(json.dumps([sorted(seen), os.listdir(folder), sorted(os.listdir("/proc/self/fd")) == before]))
"""
    assert told(program, tmp_path) == [["VerdictError", "ok"], [], True]


def test_a_filled_heap_has_no_free_block_below_its_top(tmp_path):
    program = """
first = cloning.fill_the_heap()
print(json.dumps([first, cloning.fill_the_heap()]))
"""
    first, second = told(program, tmp_path)
    assert first > 10_000
    assert second < first / 10


HUGE_TEXT = """
import re

def huge_bytes():
    inside, found = False, 0
    for line in open("/proc/self/smaps"):
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = " r-xp " in line
        elif inside and line.startswith("AnonHugePages:"):
            found += 1024 * int(line.split()[1])
    return found

before = huge_bytes()
moved = cloning.enlarge_the_text()
after = huge_bytes()
tenant.run("CREATE TABLE t(a)")
print(json.dumps([before, moved, after, from_child(lambda: [str(n) for n in range(3)])]))
"""


def test_the_interpreters_code_lies_on_huge_pages_where_the_kernel_has_them_and_runs_on(tmp_path: Path) -> None:
    before, moved, after, from_child = told(HUGE_TEXT, tmp_path)
    kernel_has_them = "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    assert (before, from_child) == (0, ["0", "1", "2"])
    assert moved == after
    assert bool(moved) == kernel_has_them
