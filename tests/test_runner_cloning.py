"""What the zygote does once so that its children need not. Each case is a process of its own, because it changes one for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import docker
import pytest

from gateway.settings import Settings

from .containers import printed

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


def told(program: str, folder: Path, **environment: str) -> Any:
    command = [sys.executable, "-c", PROGRAM + program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env={**os.environ, **environment})
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
import runner.child
seen = set()
def run(request, *rest):
    try:
        reply = run_prepared(request, *rest)
    except Exception as error:
        seen.add(type(error).__name__)
        raise
    seen.add(json.loads(reply)["verdict"])
    return reply
runner.child.run_prepared = run
folder = Path(sys.argv[1], "warm")
folder.mkdir()
before = sorted(os.listdir("/proc/self/fd"))
cloning.warm_up(CONFIGURATION, str(folder / "db.sqlite"))
print(json.dumps([sorted(seen), os.listdir(folder), sorted(os.listdir("/proc/self/fd")) == before]))
"""
    assert told(program, tmp_path) == [["VerdictError", "ok"], [], True]


IMMORTAL = """
import gc, json, os, resource, sys
sys.path.insert(0, "/opt/mayfly")
from runner import cloning

class Thing:
    pass

def function():
    return 1234.5, ("a constant", b"a constant")

thing = Thing()
thing.list = [[f"text {number}"] for number in range(3)]
nested = tuple(tuple([f"untracked {number}", 10.5 + number]) for number in range(3))
texts = [f"{number:0200}" for number in range(10_000)]  # two megabytes

def objects():
    yield from (thing, thing.__dict__, thing.list, *thing.list, *(text for text, in thing.list), Thing, function, sys.modules)
    yield from (*nested, *(item for pair in nested for item in pair), *function(), function.__code__, function.__name__, texts[7])

def is_immortal(one):
    return sys.getrefcount(one) == sys.getrefcount(None)

def counted():
    return sum(not is_immortal(one) for one in objects())

def copies_of_a_child_that_looks():
    reading, writing = os.pipe()
    if os.fork() == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for text in texts:
            same = text
        os.write(writing, str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(reading, 100))

def look():
    return {"counted": counted(), "copies": copies_of_a_child_that_looks()}

before = look()
made = cloning.make_immortal()
later = [f"later {number}" for number in range(3)]
print(json.dumps([before, made, look(), sum(map(is_immortal, (later, *later)))]))
"""


def test_objects_that_are_immortal_are_copied_for_no_child_that_looks_at_them():
    before, made, after, later = printed(docker.from_env(), Settings.from_environment().image, IMMORTAL)
    assert before["counted"] > 20
    assert before["copies"] > 500  # the control
    assert made > 20_000
    assert after["counted"] == 0
    assert after["copies"] < 20
    assert later == 0


def test_an_interpreter_without_immortal_objects_keeps_its_counts(tmp_path):
    program = """
before = sys.getrefcount(tenant)
sys.getrefcount, real = lambda one: 1000, sys.getrefcount
print(json.dumps([cloning.make_immortal(), real(tenant) - before]))
"""
    assert told(program, tmp_path) == [0, 0]


HEAP = """
import re
from runner import huge_pages

def in_huge_pages(name):
    inside, found = False, 0
    for line in open("/proc/self/smaps"):
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = name in line
        elif inside and line.startswith("AnonHugePages:"):
            found += 1024 * int(line.split()[1])
    return found
"""
KERNEL_HAS_THEM = "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()


def test_what_is_there_lies_on_huge_pages_where_the_kernel_has_them_and_what_follows_beside_it(tmp_path: Path) -> None:
    program = """
heap = huge_pages.Heap()
there = [bytes(1000) for _ in range(5000)]
holes = [bytes(1000) for _ in range(2000)]
del holes[::2]
heap.finish()
filled, again = heap.fill(), heap.fill()
behind = [bytes(1000) for _ in range(100)]
enlarged = heap.enlarge()
pages = {id(one) >> 21 for one in there}
print(json.dumps([
    filled, again, enlarged, in_huge_pages("[heap]"), len(pages), len({id(one) >> 21 for one in behind} & pages),
    from_child(lambda: [len(one) for one in there[::1000]]), there == [bytes(1000)] * 5000,
]))
"""
    filled, again, enlarged, on_huge_pages, pages, shared, from_child, kept = told(HEAP + program, tmp_path, PYTHONMALLOC="malloc")
    assert filled > 900_000
    assert again < filled / 10
    assert on_huge_pages >= enlarged
    assert enlarged >= (pages << 21 if KERNEL_HAS_THEM else 0)
    assert pages >= 2
    assert shared == 0
    assert from_child == [1000] * 5
    assert kept


@pytest.mark.parametrize("said", ["always madvise [never]\n", None])
def test_a_host_that_wants_no_huge_pages_or_has_none_gets_none(tmp_path: Path, said: str | None) -> None:
    if said is not None:
        (tmp_path / "enabled").write_text(said)
    program = """
huge_pages._WANTED = str(Path(sys.argv[1], "enabled"))
heap = huge_pages.Heap()
there = [bytes(1000) for _ in range(5000)]
heap.finish()
print(json.dumps([heap.enlarge(), huge_pages.enlarge_the_text(), in_huge_pages("[heap]"), in_huge_pages(" r-xp ")]))
"""
    assert told(HEAP + program, tmp_path, PYTHONMALLOC="malloc") == [0, 0, 0, 0]


def test_the_interpreters_code_lies_on_huge_pages_where_the_kernel_has_them_and_runs_on(tmp_path: Path) -> None:
    program = """
before = in_huge_pages(" r-xp ")
moved = huge_pages.enlarge_the_text()
after = in_huge_pages(" r-xp ")
tenant.run("CREATE TABLE t(a)")
print(json.dumps([before, moved, after, from_child(lambda: [str(n) for n in range(3)])]))
"""
    before, moved, after, from_child = told(HEAP + program, tmp_path)
    assert (before, from_child) == (0, ["0", "1", "2"])
    assert moved == after
    assert bool(moved) == KERNEL_HAS_THEM
