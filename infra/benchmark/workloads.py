"""What callers ask for, as endless seeded streams of ready requests, and how an answer is known to be right."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from time import perf_counter

from .client import Address, Answer, Connection
from .errors import BenchmarkError
from .load import OK, all_of

ROWS = 10_000
SELECT, READ, INSERT, CREATE = "select", "read", "insert", "create"
WORKLOADS = {
    SELECT: "SELECT 1",
    READ: f"one row of {ROWS} by primary key",
    INSERT: "one row inserted",
    CREATE: "a new instance, and SELECT 1 in it",
}

_SELECT = b'{"sql":"SELECT 1"}'
_READ = b'{"sql":"SELECT id, body FROM item WHERE id = ?","args":[%d]}'
_INSERT = b'{"sql":"INSERT INTO entry(body) VALUES (?)","args":["a line of some forty letters, number %d"]}'
_SCHEMA = """
    CREATE TABLE item(id INTEGER PRIMARY KEY, body TEXT NOT NULL);
    CREATE TABLE entry(id INTEGER PRIMARY KEY, body TEXT NOT NULL);
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
        INSERT INTO item SELECT i, printf('the body of item %d', i) FROM n
"""
_PREPARED_AT_ONCE = 4
_PREPARE_SECONDS = 120.0
_PATIENCE_SECONDS = 60.0


def orders(workload: str, address: Address, token: bytes, chance: random.Random) -> Iterator[bytes]:
    """Requests of one caller, who owns one prepared instance."""
    fixed = {SELECT: address.post_sql(_SELECT, token), CREATE: address.post_sql(_SELECT)}.get(workload)
    number = 0
    while True:
        number += 1
        if fixed is not None:
            yield fixed
        elif workload == READ:
            yield address.post_sql(_READ % chance.randint(1, ROWS), token)
        else:
            yield address.post_sql(_INSERT % number, token)


def check(workload: str, answer: Answer) -> None:
    """Raises BenchmarkError unless the answer is the right one."""
    right = answer.status == OK
    if right:
        result = answer.json()
        match workload:
            case "select":
                right = result["rows"] == [[1]]
            case "create":
                right = result["rows"] == [[1]] and answer.token.startswith(b"wkn_")
            case "read":
                right = len(result["rows"]) == 1 and result["rows"][0][1] == f"the body of item {result['rows'][0][0]}"
            case _:
                right = result == {"rows_affected": 1}
    if not right:
        raise BenchmarkError(f"{workload} answered {answer.status} {answer.body[:300]!r}")


async def prepare(address: Address, count: int, rows: int = ROWS) -> list[bytes]:
    """The tokens of so many new instances with the tables in them."""
    body = json.dumps({"sql": _SCHEMA, "args": [rows]}).encode()
    tokens = await make(address, count, body, _PREPARED_AT_ONCE, _PREPARE_SECONDS)
    if len(tokens) < count:
        raise BenchmarkError(f"{count} instances were not prepared within {_PREPARE_SECONDS:.0f} s")
    return tokens


async def make(address: Address, count: int, body: bytes, at_once: int, seconds: float) -> list[bytes]:
    """The tokens of so many new instances in which `body` was run, or of fewer, if this takes longer than so many seconds."""
    request = address.post_sql(body)
    tokens: list[bytes] = []
    until = perf_counter() + seconds

    async def some(share: int) -> None:
        connection = await Connection.open(address)
        for _ in range(share):
            if perf_counter() > until:
                break
            answer = await connection.ask(request)
            if answer.status != OK:
                raise BenchmarkError(f"an instance could not be prepared: {answer.status} {answer.body[:300]!r}")
            tokens.append(answer.token)
        connection.close()

    shares = [len(range(worker, count, at_once)) for worker in range(at_once)]
    await all_of([some(share) for share in shares if share], seconds + _PATIENCE_SECONDS)
    return tokens


def callers(workload: str, address: Address, tokens: Sequence[bytes], seed: str) -> list[Iterator[bytes]]:
    """One stream for each token."""
    return [
        orders(workload, address, token, random.Random(f"{seed} {workload} {number}"))  # noqa: S311 -- to be repeatable
        for number, token in enumerate(tokens)
    ]
