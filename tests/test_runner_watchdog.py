"""The deadline when SQLite does not look at the clock. Each case is a process, because the watchdog ends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from time import monotonic

PROGRAM = """
import os, sys, threading
from time import monotonic
import apsw
from runner.watchdog import Watchdog
def give_up():
    os.write(1, b"watchdog")
    os._exit(7)
watchdog = Watchdog(give_up)
watchdog.start()
connection = apsw.Connection(":memory:")
def finish(text):
    watchdog.claim_answer()
    os.write(1, text)
    os._exit(0)
"""

REPO = Path(__file__).resolve().parent.parent


def outcome(program: str) -> tuple[int, str, float]:
    begun = monotonic()
    done = subprocess.run([sys.executable, "-c", PROGRAM + program], capture_output=True, text=True, cwd=REPO, timeout=30)
    assert not done.stderr
    return done.returncode, done.stdout, monotonic() - begun


def test_a_query_of_many_instructions_is_interrupted():
    program = """
watchdog.arm(monotonic() + 0.3)
watchdog.guard(connection)
try:
    connection.execute("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) SELECT count(*) FROM c").fetchall()
except apsw.InterruptError:
    finish(b"main")
"""
    code, answer, _ = outcome(program)
    assert (code, answer) == (0, "main")


def test_an_instruction_that_outlives_the_interrupt_is_answered_for():
    program = """
watchdog.arm(monotonic() + 0.2)
watchdog.guard(connection)
hay, needle = "a" * 1000000, "a" * 500000 + "b"
connection.execute("SELECT instr(?, ?)", (hay, needle)).fetchall()
finish(b"main")
"""
    code, answer, seconds = outcome(program)
    assert (code, answer) == (7, "watchdog")
    assert seconds < 5


def test_whoever_claims_the_answer_first_is_the_only_one_to_give_it():
    program = """
watchdog.arm(monotonic() + 0.1)
watchdog.claim_answer()
threading.Event().wait(0.6)
os.write(1, b"main")
os._exit(0)
"""
    assert outcome(program)[:2] == (0, "main")
    program = """
watchdog.arm(monotonic() - 1)
threading.Event().wait()
"""
    assert outcome(program)[:2] == (7, "watchdog")


def test_a_closed_connection_is_not_interrupted():
    program = """
watchdog.arm(monotonic())
watchdog.guard(connection)
watchdog.guard(None)
connection.close()
threading.Event().wait(0.1)
finish(b"main")
"""
    assert outcome(program)[:2] == (0, "main")


def test_an_unarmed_watchdog_waits():
    assert outcome("threading.Event().wait(0.4); finish(b'main')")[:2] == (0, "main")


def test_one_that_is_never_armed_ends_its_process_and_gives_no_answer():
    program = """
forgotten = Watchdog(give_up, lambda: os._exit(9), longest_wait_seconds=0.2)
forgotten.start()
threading.Event().wait()
"""
    assert outcome(program)[:2] == (9, "")
