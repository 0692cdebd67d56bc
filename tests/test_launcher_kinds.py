"""Runs of every kind, forks and replacements with the real runner, under each engine."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from gateway.protocol import BULK, KEEP, READ_ONLY, Status, Verb, Verdict

from .deployment import ENGINES
from .launcher_harness import Client, launched
from .sealed import sealed_directory

each_engine = pytest.mark.parametrize("engine", ENGINES)


class Runner:
    """Speaks docs/wire.md to the runner of one instance."""

    def __init__(self, client: Client, instance: uuid.UUID) -> None:
        self.client = client
        self.instance = instance

    async def ask(self, flags: int, **request: Any) -> tuple[dict[str, Any], bytes]:
        """The reply, and what came behind it."""
        replies, output = await self.client.do(self.instance, flags=flags, v=1, **request)
        assert (replies[-1].status, replies[-1].verdict) == (Status.ENDED, Verdict.EXITED), replies
        length = int.from_bytes(output[:4], "big")
        return json.loads(output[4 : 4 + length]), output[4 + length :]

    async def sql(self, text: str, flags: int = 0) -> dict[str, Any]:
        return (await self.ask(flags, sql=text, args=None, int64="number"))[0]


@asynccontextmanager
async def serving(engine: str) -> AsyncIterator[tuple[Path, Client]]:
    with sealed_directory() as state:
        async with launched(state, image="mayfly-runner:latest", engine=engine) as (_, client):
            yield state, client


@each_engine
async def test_D7_each_kind_does_what_is_its_and_a_run_that_only_reads_writes_nothing(engine):
    async with serving(engine) as (state, client):
        runner = Runner(client, await client.create())
        assert (await runner.sql("CREATE TABLE t(x); INSERT INTO t VALUES (1)"))["rows_affected"] == 1
        volume = state / "instances" / str(runner.instance) / "volume"
        before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in volume.iterdir()}
        assert (await runner.sql("SELECT x FROM t", READ_ONLY))["rows"] == [[1]]
        refused = await runner.sql("INSERT INTO t VALUES (2)", READ_ONLY)
        assert (refused["verdict"], refused["message"]) == ("sql_error", "attempt to write a readonly database")
        head, content = await runner.ask(READ_ONLY, op="export")
        assert (head["verdict"], content) == ("file", before["db.sqlite"][0])
        report = (await runner.ask(READ_ONLY | BULK, op="verify"))[0]["report"]
        assert (report["kind"], report["ok"]) == ("verify", True)
        assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in volume.iterdir()} == before
        assert (await runner.ask(BULK, op="salvage"))[0]["report"]["ok"] is True
        assert (await runner.sql("INSERT INTO t VALUES (2); SELECT x FROM t"))["rows"] == [[1], [2]]


@each_engine
async def test_a_fork_recovers_from_a_hot_journal_as_its_source_does(engine, tmp_path):
    with closing(sqlite3.connect(tmp_path / "db.sqlite", isolation_level=None)) as database:
        database.execute("CREATE TABLE t(x)")
        database.executemany("INSERT INTO t VALUES (?)", [("committed" * 100,)] * 1000)
        database.execute("PRAGMA cache_size = 1")
        database.execute("BEGIN")
        database.execute("UPDATE t SET x = replace(x, 'committed', 'forgotten')")
        hot = {name: (tmp_path / name).read_bytes() for name in ("db.sqlite", "db.sqlite-journal")}
        database.execute("ROLLBACK")
    assert b"forgotten" in hot["db.sqlite"], "the control: without its journal it is not what was committed"
    count = "SELECT count(*) FROM t WHERE x LIKE 'committed%'"
    async with serving(engine) as (state, client):
        source = Runner(client, await client.create())
        for name, content in hot.items():
            (state / "instances" / str(source.instance) / "volume" / name).write_bytes(content)
        fork = Runner(client, (await client.ask(Verb.FORK, source.instance)).instance)
        for runner in (fork, source):
            assert (await runner.sql(count, READ_ONLY))["verdict"] == "unsettled"
            assert (await runner.sql(count))["rows"] == [[1000]]
            assert (await runner.sql(count, READ_ONLY))["rows"] == [[1000]]


@each_engine
async def test_a_fork_and_its_source_go_their_own_ways_until_one_takes_the_others_place(engine):
    async with serving(engine) as (state, client):
        source = Runner(client, await client.create())
        await source.sql("CREATE TABLE t(x); INSERT INTO t VALUES ('both')")
        fork = Runner(client, (await client.ask(Verb.FORK, source.instance)).instance)
        for runner, text in ((source, "source"), (fork, "fork")):
            assert (await runner.sql(f"INSERT INTO t VALUES ('{text}'); SELECT x FROM t"))["rows"] == [["both"], [text]]
        assert (await client.ask(Verb.REPLACE, source.instance, flags=KEEP, other=fork.instance.bytes)).status is Status.DONE
        assert (await source.sql("SELECT x FROM t"))["rows"] == [["both"], ["fork"]]
        with closing(sqlite3.connect(state / "instances" / str(source.instance) / "damaged" / "db.sqlite")) as kept:
            assert kept.execute("SELECT x FROM t").fetchall() == [("both",), ("source",)]
