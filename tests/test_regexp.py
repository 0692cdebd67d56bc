"""REGEXP in the image's SQLite: what a pattern means, what it may cost, and that it obeys what every other function obeys.

The apsw of the tests' own interpreter lacks it, so each test is a script in a container of the image, on a connection that the
runner's own code has opened. Python's `re` says what is meant, and is the control for what a backtracking engine would cost.
"""

from __future__ import annotations

import json
import os
import random
import re
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import apsw
import docker
import pytest

from gateway.launcher.specification import runner_configuration
from gateway.settings import Settings

from .containers import printed
from .deployment import ENGINES, assert_error, client_of, deployed

TAG = os.environ.get("MAYFLY_IMAGE", "mayfly-runner:latest")
PRELUDE = f"""
import json, os, re, sys, time
sys.path.insert(0, "/opt/mayfly")
import apsw
from runner import policy
from runner.configuration import Configuration
from runner.database import open_database
for name in ("/work/db.sqlite", "/work/db.sqlite-journal"):
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o600))
late = False
looks = 0
def expired():
    global looks
    looks += 1
    return late
database = open_database(Configuration.parse({runner_configuration(Settings())!r}), expired, "/work/db.sqlite")
def rows(sql, args=()):
    return database.connection.execute(sql, args).fetchall()
def answer(sql, args=()):
    try:
        return rows(sql, args)
    except apsw.Error as error:
        return [type(error).__name__, str(error)]
def matches(pattern, text):
    found = answer("SELECT ? REGEXP ?", (text, pattern))
    return found[0][0] if len(found) == 1 else found[1]
def cost(action):
    '''Processor seconds, the least of five.'''
    took = []
    for _ in range(5):
        began = time.process_time()
        action()
        took.append(time.process_time() - began)
    return min(took)
"""

Script = Callable[..., Any]


@pytest.fixture(scope="module")
def ask() -> Iterator[Script]:
    """Run a script in the image as a runner is run; it finds `given`, and what it leaves in `told` is returned."""
    client = docker.from_env()

    def run(script: str, given: object = None) -> Any:
        code = f"{PRELUDE}given = json.loads({json.dumps(given)!r})\n{script}\nprint(json.dumps(told))"
        return printed(client, TAG, code, tmpfs={"/work": "size=4m,mode=1777"})

    yield run
    client.close()


# ── What a pattern means ──────────────────────────────────────────────────────────────────────────────────────────────────────

_CLASSES = ("[ab]", "[^a]", "[a-cé]", "[^é]", "[\\w.-]", "[^\\d\\s]", "[-x]")
_ESCAPES = ("\\w", "\\W", "\\d", "\\D", "\\s", "\\S", "\\b", "\\.", "\\x61", "\\u00e9")
_ATOMS = (*"abcéx.^$🐢", *_CLASSES, *_ESCAPES)
_QUANTIFIERS = ("*", "+", "?", "{2}", "{1,2}", "{0,2}", "{1,}", "{2,3}")


def _pattern(source: random.Random, depth: int) -> str:
    kind = source.random()
    if not depth or kind < 0.4:
        return source.choice(_ATOMS)
    if kind < 0.6:
        return _pattern(source, depth - 1) + _pattern(source, depth - 1)
    if kind < 0.75:
        return f"({_pattern(source, depth - 1)}|{_pattern(source, depth - 1)})"
    return f"({_pattern(source, depth - 1)}){source.choice(_QUANTIFIERS)}"


def test_what_both_dialects_have_means_what_it_means_to_python(ask: Script) -> None:
    source = random.Random(11)
    given = [(_pattern(source, 4), "".join(source.choices("abcé x1.🐢", k=source.randrange(12)))) for _ in range(1000)]
    expected = [int(re.search(pattern, text, re.ASCII | re.DOTALL) is not None) for pattern, text in given]
    assert 200 < sum(expected) < 800
    found = ask("told = [matches(*pair) for pair in given]", given)
    assert [(*pair, found, wanted) for pair, found, wanted in zip(given, found, expected, strict=True) if found != wanted] == []


USEFUL = [
    (r"^[\w.+-]+@[\w-]+(\.[\w-]+)+$", ["me@example.com"], ["me@", "a b@c.d"]),
    (r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", ["0190b6c1-7e7a-7000-8000-0123456789ab"], ["0190b6c1-7e7a-7000-8000"]),
    (r"^(25[0-5]|2[0-4]\d|1?\d?\d)(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}$", ["127.0.0.1"], ["256.0.0.1"]),
    (r"^\d{4}-(0[1-9]|1[0-2])-\d{2}([T ]\d{2}:\d{2}(:\d{2})?Z?)?$", ["2026-01-31", "2026-01-31T12:00:00Z"], ["2026-13-01"]),
    (r"^\s+|\s+$", [" a", "a "], ["a", "a b"]),
    (r"\b(mayfly|Ephemera)\b", ["a mayfly.", "Ephemera"], ["mayflys"]),
    (r"^.{3}$", ["żół", "🐢🐢🐢"], ["ab", "żółw"]),
    ("", ["", "a"], []),
    ("a.c", ["a\nc"], ["ac"]),
    ("^$", [""], ["a"]),
]  # fmt: skip


def test_patterns_people_write_find_what_they_are_written_for(ask: Script) -> None:
    pairs = [(pattern, text, wanted) for pattern, good, bad in USEFUL for wanted, texts in ((1, good), (0, bad)) for text in texts]
    found = ask("told = [matches(pattern, text) for pattern, text, _ in given]", pairs)
    assert found == [wanted for _, _, wanted in pairs]


def test_operator_function_and_its_caseless_twin_agree_about_null_numbers_and_bytes(ask: Script) -> None:
    given = {
        "SELECT 'abc' REGEXP 'B', regexp('b', 'abc'), regexpi('B', 'abc'), 'abc' NOT REGEXP 'b'": [0, 1, 1, 0],
        "SELECT NULL REGEXP 'a', 'a' REGEXP NULL, NULL REGEXP '('": [None, None, "unmatched '('"],
        "SELECT 1234 REGEXP '^[0-9]+$', 'a1' REGEXP 1, x'616263' REGEXP 'b'": [1, 1, 1],
        "SELECT ('a' || char(0) || 'b') REGEXP 'b', CAST(x'ff62' AS TEXT) REGEXP '^.b$', regexpi('É', 'é')": [0, 1, 0],
    }
    found = ask("told = [answer(sql) for sql in given]", list(given))
    assert [cells[0] if len(cells) == 1 else [None, None, cells[1]] for cells in found] == list(given.values())


BAD = {
    "(a": "unmatched '('",
    "a)": "unrecognized character",
    "[a": "unclosed '['",
    "[[:alpha:]]": "POSIX character classes not supported",
    "a{2": "unmatched '{'",
    "a{3,2}": "n less than m in '{m,n}'",
    "a{0,0}": "both m and n are zero in '{m,n}'",
    "*a": "'*' without operand",
    "(?:a)": "'?' without operand",
    "a|+": "'+' without operand",
    "{2}": "'{m,n}' without operand",
    "[\\W]": "unknown \\ escape",
    "\\q": "unknown \\ escape",
    "(a)\\1": "unknown \\ escape",
    "a\\": "nothing after \\",
    "a" * 1001: "REGEXP pattern too big",
    "é" * 501: "REGEXP pattern too big",
    "a{600}": "REGEXP pattern too big",
    "a{99999999999999999999}": "REGEXP pattern too big",
    "(a{100}){11}": "REGEXP pattern too big",
    "((a{1,100}){1,100}){1,100}": "REGEXP pattern too big",
    "(" * 100 + "a{1,9}" + "){9}" * 100: "REGEXP pattern too big",
}


def test_a_pattern_that_is_none_is_an_error_that_says_why(ask: Script) -> None:
    found = ask("told = [answer('SELECT ? REGEXP ?', ('a', pattern)) for pattern in given]", list(BAD))
    assert found == [["SQLError", words] for words in BAD.values()]


# ── What it may cost ──────────────────────────────────────────────────────────────────────────────────────────────────────────

CATASTROPHIC = [
    "(a+)+$b",
    "(a|a)*b",
    "(.*)*x",
    "(a*)*b",
    "(a|aa)+$b",
    "((a{1,9}){1,9}){1,2}b",
    "(a?){30}a{30}b",
    "(.*a){20}b",
    "(" * 100 + "a" + ")*" * 100 + "b",
    "(\\b|a)*x",
]


def test_M11_a_pattern_costs_time_in_proportion_to_the_text(ask: Script) -> None:
    """Four times the text. Quadratic time would be 16 times as much; Python's takes about that for each four letters more."""
    costs = ask("told = [[cost(lambda: matches(pattern, 'a' * n)) for n in (20000, 80000)] for pattern in given]", CATASTROPHIC)
    assert [pattern for pattern, (short, long) in zip(CATASTROPHIC, costs, strict=True) if long > 8 * short] == []


def test_M11_control_a_backtracking_engine_takes_exponential_time(ask: Script) -> None:
    short, long = ask("told = [cost(lambda: re.search('(a|a)*b', 'a' * n)) for n in (10, 16)]")
    assert long > 16 * short


def test_M11_a_pattern_costs_time_in_proportion_to_itself(ask: Script) -> None:
    """Four times the pattern, each of whose states is active at each letter: upstream's sets of states make that 11 times."""
    given = [["(" + "|" * n + "a)*b" for n in (100, 400)], [f"(a?){{{n}}}b" for n in (110, 440)]]
    costs = ask("told = [[cost(lambda: matches(p, 'a' * 10000)) for p in pair] for pair in given]", given)
    for small, large in costs:
        assert large < 6 * small


def test_M11_the_longest_pattern_and_the_largest_automaton_are_served(ask: Script) -> None:
    given = [
        ["a" * 1000, "a" * 1000],
        ["(" * 499 + "ab" + ")" * 499, "ab"],
        ["a{512}", "a" * 512],
        ["((a{10}){10}){10}$", "a" * 1000],
    ]
    assert ask("told = [matches(*pair) for pair in given]", given) == [1, 1, 1, 1]


def test_M11_one_call_looks_at_the_clock_and_ends_when_the_time_is_over(ask: Script) -> None:
    """A function is one opcode, and the progress handler comes every thousand opcodes."""
    told = ask(
        """
text = "a" * 299000
looks = 0
found = rows("SELECT length(?), instr(?, 'b'), ? LIKE '%a%a%b'", (text, text, text[:3000]))
without, looks = looks, 0
matches("(a?){400}b", text)
within, looks, late = looks, 0, True
told = [without, within, answer("SELECT ? REGEXP '(a?){400}b'", (text,)), looks]
"""
    )
    without, within, ended, looks = told
    assert without == 0
    assert within > 500
    assert ended == ["InterruptError", "interrupted"]
    assert looks == 1


def test_M11_patterns_leave_nothing_behind(ask: Script) -> None:
    """One compiled pattern for each REGEXP of a statement, and none when it comes from a column."""
    told = ask(
        """
def most(count):
    apsw.memory_high_water(True)
    numbers = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c LIMIT ?)"
    rows(numbers + " SELECT sum('x' REGEXP ('a{9}' || n)) FROM c", (count,))
    return apsw.memory_high_water()
most(100)
before = apsw.memory_used()
few, many = most(100), most(20000)
told = [few, many, apsw.memory_used() - before]
"""
    )
    few, many, left = told
    assert many - few < 16_384
    assert left < 16_384


def test_too_little_memory_is_an_error_and_never_a_match(ask: Script) -> None:
    """A state set of more than 50 states is allocated for each text; every limit on memory that can stop just that is tried."""
    told = ask(
        """
pattern = "c" + "(a?){300}b"
rows("CREATE TEMP TABLE t AS WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c LIMIT 3) SELECT 'ca' a, n FROM c")
told = []
for room in range(2048, 65536, 256):
    apsw.hard_heap_limit(apsw.memory_used() + room)
    told.append(answer("SELECT DISTINCT a REGEXP ? FROM t", (pattern,)))
    apsw.hard_heap_limit(1 << 30)
"""
    )
    no_memory = [["NoMemError", "out of memory"], ["SQLError", "out of memory"]]
    assert [found for found in told if found not in [[[0]], *no_memory]] == []
    assert [[0]] in told
    assert no_memory[0] in told


# ── What it obeys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_schema_may_rely_on_it(ask: Script) -> None:
    """Deterministic and innocuous: with trusted_schema off, in a check, an index, a generated column, a view and a trigger."""
    told = ask(
        """
rows('''
CREATE TABLE t(a TEXT CHECK (a REGEXP '^[a-z]+$'), b AS (a REGEXP 'x') STORED, c AS (regexpi('Y', a)));
CREATE INDEX i ON t(a REGEXP 'z');
CREATE INDEX p ON t(a) WHERE a REGEXP 'q';
CREATE VIEW v AS SELECT a FROM t WHERE a REGEXP 'x';
CREATE TABLE l(a);
CREATE TRIGGER r AFTER INSERT ON t WHEN new.a REGEXP '^x' BEGIN INSERT INTO l VALUES (new.a); END;
INSERT INTO t(a) VALUES ('xyz'), ('abc');
''')
told = [
    database.connection.config(apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, -1),
    answer("INSERT INTO t(a) VALUES ('A1')"),
    rows("SELECT * FROM t"),
    rows("SELECT * FROM v"),
    rows("SELECT * FROM l"),
    rows("EXPLAIN QUERY PLAN SELECT a FROM t WHERE (a REGEXP 'z') = 1")[0][3],
    rows("PRAGMA integrity_check"),
]
"""
    )
    assert told == [
        0,
        ["ConstraintError", "CHECK constraint failed: a REGEXP '^[a-z]+$'"],
        [["xyz", 1, 1], ["abc", 0, 0]],
        [["xyz"]],
        [["xyz"]],
        "SEARCH t USING INDEX i (<expr>=?)",
        [["ok"]],
    ]


def test_the_authorizer_is_asked_for_it_by_name(ask: Script) -> None:
    told = ask(
        """
told = [answer("SELECT 'a' REGEXP 'a'")]
policy.DENIED_FUNCTIONS = frozenset({"regexp"})
told += [answer("SELECT 'a' REGEXP 'a'"), database.guard.refused]
"""
    )
    assert told == [[[1]], ["SQLError", "not authorized to use function: REGEXP"], "regexp"]


def test_every_connection_has_it_and_no_other_function_came_along(ask: Script) -> None:
    told = ask(
        """
plain = apsw.Connection(":memory:")
named = "SELECT name, narg, flags & 0x800 != 0, flags & 0x200000 != 0 FROM pragma_function_list"
named += " WHERE name LIKE 'regexp%' ORDER BY name"
told = [plain.execute(named).fetchall(), plain.execute("SELECT 'a' REGEXP 'a'").fetchall()]
"""
    )
    assert told == [[["regexp", 2, 1, 1], ["regexpi", 2, 1, 1]], [[1]]]


def test_control_neither_the_released_apsw_nor_pythons_sqlite_has_it() -> None:
    for connection, error in (
        (apsw.Connection(":memory:"), apsw.SQLError),
        (sqlite3.connect(":memory:"), sqlite3.OperationalError),
    ):
        with pytest.raises(error, match="no such function: REGEXP"):
            connection.execute("SELECT 'a' REGEXP 'a'")
        connection.close()


@pytest.mark.parametrize("engine", ENGINES)
async def test_M11_a_caller_gets_sqlites_words_and_the_deadline_holds(engine: str) -> None:
    endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c) SELECT sum(s REGEXP '(a?){400}b') FROM c, "
    endless += "(SELECT replace(hex(zeroblob(149000)), '0', 'a') s)"
    with deployed(engine=engine) as deployment:
        async with client_of(deployment) as client:
            assert await client.rows("SELECT 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!' REGEXP '(a+)+$'") == [[0]]
            assert_error(await client.sql("SELECT 'a' REGEXP '('"), 400, "sql_error", "invalid sql: unmatched '('")
            assert_error(await client.sql(endless), 408, "query_timeout", "query timeout")
            assert await client.rows("SELECT 'still here' REGEXP 'here$'") == [[1]]
