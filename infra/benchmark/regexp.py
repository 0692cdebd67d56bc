"""REGEXP beside Python's `re`, LIKE and GLOB, turn by turn in one process of the runner's image, so that the ratios mean something.

Without a gateway: a request's own two milliseconds would hide what a pattern costs. Texts for `re` are as short as it needs them on
patterns that send it back and forth; what REGEXP makes of the longest text that SQLite is given follows at the end.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from gateway.settings import Settings

from .errors import BenchmarkError

ENTRY = ("--entrypoint=/usr/bin/python3.13", "--network=none", "--read-only", "--cap-drop=ALL")

SCRIPT = r"""
import json, re, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the first process of a container has no default
sys.path.insert(0, "/opt/mayfly")
import apsw
longest, rounds = int(sys.argv[1]), int(sys.argv[2])
connection = apsw.Connection(":memory:")

def median(values):
    return sorted(values)[len(values) // 2]

def sql(operator, pattern):
    return lambda text: connection.execute(f"SELECT ? {operator} ?", (text, pattern)).fetchone()[0]

def of(regexp, like=None, glob=None, backtracks=True):
    contestants = {"REGEXP": sql("REGEXP", regexp)}
    if backtracks:
        contestants["re"] = re.compile(regexp, re.ASCII | re.DOTALL).search
    if like:
        contestants["LIKE"] = sql("LIKE", like)
    if glob:
        contestants["GLOB"] = sql("GLOB", glob)
    return contestants

words = ("the quick brown fox 12-3 " * longest)[:longest]
letters = "a" * longest
cases = {
    "mayfly": (words, of("mayfly", "%mayfly%", "*mayfly*")),
    "[0-9]{4}-[0-9]{2}": (words, of("[0-9]{4}-[0-9]{2}", None, "*[0-9][0-9][0-9][0-9]-[0-9][0-9]*")),
    "(lion|whale|mayfly)s?$": (words, of("(lion|whale|mayfly)s?$")),
    "a.*a.*a.*b": (letters[:200], of("a.*a.*a.*b", "%a%a%a%b", "*a*a*a*b")),
    "(a+)+$": (letters[:18] + "!", of("(a+)+$")),
    "(a|a)*b": (letters[:18], of("(a|a)*b")),
    "(.*)*x": (letters[:18], of("(.*)*x")),
    "((a{1,9}){1,9}){1,2}b": (letters[:18], of("((a{1,9}){1,9}){1,2}b")),
    "(a+)+$ on the longest text": (letters[:-1] + "!", of("(a+)+$", backtracks=False)),
    "(a|a)*b on the longest text": (letters, of("(a|a)*b", backtracks=False)),
    "((a{1,9}){1,9}){1,2}b on the longest text": (letters, of("((a{1,9}){1,9}){1,2}b", backtracks=False)),
    "(a?){500}b on the longest text": (letters, of("(a?){500}b", backtracks=False)),
}
told = []
for name, (text, contestants) in cases.items():
    took = {one: [] for one in contestants}
    for _ in range(rounds):
        for one, search in contestants.items():
            began = time.process_time()
            found = search(text)
            took[one].append((time.process_time() - began) * 1e6)
            if found:
                sys.exit(f"{one} finds {name}")
    told.append({
        "pattern": name,
        "characters": len(text),
        "us": {one: round(median(times), 1) for one, times in took.items()},
        "ratios": {
            f"{one} / REGEXP": float(f"{median([a / b for a, b in zip(times, took['REGEXP'])]):.3g}")
            for one, times in took.items() if one != "REGEXP"
        },
    })
print(json.dumps(told))
"""


async def measure(settings: Settings, rounds: int) -> list[dict[str, Any]]:
    """One entry for each pattern: microseconds of processor time of a search in vain, and each other one's share of REGEXP's."""
    arguments = ("-I", "-S", "-B", "-c", SCRIPT, str(settings.limit_length - 1000), str(rounds))
    command = ("docker", "run", "--rm", *ENTRY, settings.image, *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    try:
        printed, complaint = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    if process.returncode:
        raise BenchmarkError(f"regexp: {complaint.decode(errors='replace').strip()}")
    result: list[dict[str, Any]] = json.loads(printed)
    return result
