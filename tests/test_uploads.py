"""Malformed databases uploaded over HTTP: each gets a documented answer, the same twice, and nobody else notices.

A sample of the corpora's files and of damaged copies of a healthy one, in both modes; all of them with MAYFLY_CORPUS_FULL=1.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from . import corpus
from .deployment import ENGINES, FASTEST, Client, Deployment, client_of, deployed

MODES = ("strict", "salvage")
SAMPLES = {"docker": 20, "zygote": 400}
AT_ONCE = 4
SEED = 20250607
NEIGHBOUR = "CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT); INSERT INTO t VALUES (1, 'mine')"

REFUSALS = {
    400: {"database_damaged", "file_refused", "memory_limit"},
    408: {"query_timeout"},
    413: {"body_too_large"},
    507: {"storage_limit"},
}


@dataclass(frozen=True)
class Told:
    """What an upload was answered, without what differs from request to request."""

    status: int
    code: str
    content: str

    @property
    def kind(self) -> str:
        return self.code or str(self.status)


@pytest.fixture(scope="module", params=ENGINES)
def host(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    corpus.require()
    with deployed(engine=request.param, queue_timeout_seconds="300") as deployment:
        yield deployment


@pytest.fixture
async def caller(host: Deployment) -> AsyncIterator[Client]:
    async with client_of(host) as client:
        yield client


def files(engine: str) -> list[tuple[str, bytes]]:
    found = [(case.name, case.database) for case in corpus.cases() if case.database]
    found += [(case.name, case.database) for case in corpus.damaged_copies(70, SEED)]
    return found if corpus.FULL else random.Random(SEED).sample(found, SAMPLES[engine])


async def put(caller: Client, content: bytes, mode: str) -> tuple[Told, str | None]:
    async with caller.http.put(f"{caller.url}/db", params={"on_damage": mode}, data=content) as response:
        body: dict[str, Any] = json.loads(await response.read())
        body.pop("request_id", None)
        told = Told(response.status, body.get("code", ""), json.dumps(body, sort_keys=True))
        return told, response.headers.get("X-Walkin-Session")


async def put_and_use(caller: Client, content: bytes, mode: str) -> Told:
    told, token = await put(caller, content, mode)
    if token is not None:
        own = Client(caller.http, caller.url, token)
        check = await own.rows("PRAGMA integrity_check")
        assert check == [["ok"]], (told, check)
        async with caller.http.delete(f"{caller.url}/session", headers={"X-Walkin-Session": token}) as response:
            assert response.status == 204
    return told


async def told_of(caller: Client, cases: Sequence[tuple[str, bytes]], mode: str) -> dict[str, Told]:
    answers: dict[str, Told] = {}
    waiting = iter(cases)

    async def work() -> None:
        for name, content in waiting:
            answers[name] = await put_and_use(caller, content, mode)

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return answers


@pytest.mark.parametrize("mode", MODES)
async def test_D1_M1_M6_an_uploaded_malformed_database_gets_the_same_documented_answer_twice_and_harms_nobody(
    host: Deployment, caller: Client, mode: str
) -> None:
    before = host.pid("web"), host.pid("launcher")
    neighbour = caller.another()
    assert (await neighbour.sql(NEIGHBOUR)).status == 200
    cases = files(host.engine)
    first = await told_of(caller, cases, mode)
    again = await told_of(caller, cases, mode)
    assert await neighbour.rows("SELECT * FROM t") == [[1, "mine"]]
    assert (host.pid("web"), host.pid("launcher")) == before
    undocumented = {n: t for n, t in first.items() if t.status != 201 and t.code not in REFUSALS.get(t.status, ())}
    assert not undocumented
    assert {n: (first[n], again[n]) for n in first if first[n] != again[n]} == {}
    kinds = Counter(told.kind for told in first.values())
    print(host.engine, mode, dict(kinds))
    # The control: in strict mode damage is refused, in salvage mode much of the same is recovered.
    if mode == "strict":
        assert kinds["database_damaged"] > len(cases) // 2
    else:
        assert kinds["201"] > len(cases) // 10


async def test_D1_a_damaged_upload_leaves_the_instance_that_it_should_have_replaced_as_it_was(caller: Client) -> None:
    own = caller.another()
    assert (await own.sql(NEIGHBOUR)).status == 200
    session = {"X-Walkin-Session": str(own.token)}

    async def content() -> bytes:
        async with own.http.get(f"{own.url}/db", headers=session) as response:
            assert response.status == 200
            return await response.read()

    held = await content()
    for name, damaged in files(FASTEST)[:12]:
        async with own.http.put(f"{own.url}/db", data=damaged, headers=session) as response:
            assert response.status in (200, 400), (name, await response.read())
            if response.status == 400:
                assert hashlib.sha256(await content()).digest() == hashlib.sha256(held).digest(), name
        held = await content()


async def test_a_table_whose_name_is_not_utf_8_does_not_hide_the_others(caller: Client) -> None:
    odd = sqlite3.connect(":memory:")
    odd.executescript(
        "CREATE TABLE t(a); CREATE TABLE odd(a); PRAGMA writable_schema = 1;"
        "UPDATE sqlite_schema SET name = CAST(x'6fff64' AS TEXT), tbl_name = CAST(x'6fff64' AS TEXT),"
        " sql = CAST(x'435245415445205441424c45206fff64286129' AS TEXT) WHERE name = 'odd'"
    )
    async with caller.http.put(f"{caller.url}/db", data=odd.serialize()) as response:
        assert response.status == 201
        session = {"X-Walkin-Session": response.headers["X-Walkin-Session"]}
    async with caller.http.get(f"{caller.url}/schema", headers=session) as response:
        tables = {table["name"]: table["rows"] for table in (await response.json())["tables"]}
    assert tables == {"t": 0, "o\ufffdd": None}
