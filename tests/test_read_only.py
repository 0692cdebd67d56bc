"""A read-only run cannot write, and each of four layers alone would see to that: in a zygote's child and in Docker's container.

Every proof has its control: the same attempt in the same place, by a run that may write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any
from unittest.mock import patch

import pytest

from gateway.launcher import mounts
from gateway.launcher.engines import slot as launchers_slot
from gateway.launcher.engines import zygote
from gateway.launcher.specification import Command
from gateway.settings import Settings

from .containers import Probes, probes_beside_the_runner
from .engines import Contained, Opened, contained
from .launcher_harness import frame, unframe
from .runner_database import frames_of

READS: tuple[Command, ...] = ("serve-read", "serve-bulk-read")
WRITES: tuple[Command, ...] = ("serve", "serve-bulk")


@pytest.fixture(scope="module")
def here() -> Iterator[Contained]:
    with contained("zygote") as (found, _):
        yield found


@pytest.fixture(scope="module")
def probes() -> Iterator[Probes]:
    with probes_beside_the_runner() as found:
        yield found


@pytest.fixture(scope="module", params=["zygote", "docker"])
def production(request: pytest.FixtureRequest) -> Iterator[Contained]:
    """With the runner's own image."""
    with contained(request.param, image=Settings.from_environment().image) as (found, _):
        yield found


def sql(text: str) -> bytes:
    return frame(v=1, sql=text, args=None, int64="number")


# --- as a whole


async def test_every_kind_of_run_reads_and_only_those_that_may_write_do(production: Contained) -> None:
    instance, folder = production.new_volume()
    file = Path(folder, "db.sqlite")
    refusal = {"v": 1, "verdict": "sql_error", "message": "attempt to write a readonly database"}
    async with production.open() as opened:

        async def run(command: Command, order: bytes) -> dict[str, Any]:
            found: dict[str, Any] = unframe((await opened.run(order, instance=instance, command=command)).output)
            return found

        await run("serve", sql("CREATE TABLE t(a); INSERT INTO t VALUES (1)"))
        for number, command in enumerate(WRITES):
            assert (await run(command, sql("INSERT INTO t VALUES (2)")))["verdict"] == "ok"
            assert (await run(command, sql("SELECT count(*) FROM t")))["rows"] == [[2 + number]]
        before = file.read_bytes()
        for command in READS:
            assert await run(command, sql("INSERT INTO t VALUES (2)")) == refusal
            assert await run(command, sql("VACUUM")) == refusal
            assert (await run(command, sql("CREATE TEMP TABLE x AS SELECT a FROM t; SELECT count(*) FROM x")))["rows"] == [[3]]
            assert (await run(command, frame(v=1, op="schema")))["tables"][0]["rows"] == 3
            assert (await run(command, frame(v=1, op="verify")))["report"]["ok"]
        assert file.read_bytes() == before


async def test_every_operation_is_at_home_in_a_sealed_runner(production: Contained) -> None:
    """Its files, its descriptors, its memory, its system calls."""
    instance, folder = production.new_volume()
    file = Path(folder, "db.sqlite")
    count = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 40000)"
    async with production.open() as opened:

        async def run(command: Command, content: bytes = b"", **keys: Any) -> bytes:
            ended = await opened.run(frame(v=1, **keys) + content, instance=instance, command=command)
            return ended.output

        step = {"sql": "CREATE TABLE t(a); INSERT INTO t VALUES (1)", "args": None, "if": None}
        assert unframe(await run("serve", op="batch", steps=[step], int64="number"))["verdict"] == "batch"
        stream = frames_of(await run("serve", op="rows", sql=f"{count} SELECT x FROM c", args=None, int64="number"))
        assert stream[-1] == {"rows": 40_000, "rows_affected": 0, "stopped": None, "message": None}
        order = {"table": "p", "format": "csv", "columns": None, "header": True, "delimiter": ",", "null": None}
        rows = b"n,s\n" + b"".join(b"%d,text\n" % number for number in range(10_000))
        assert unframe(await run("serve-bulk", rows, op="import", upload=len(rows), **order))["rows"] == 10_000
        exported = await run("serve", op="export")
        content = exported[4 + int.from_bytes(exported[:4], "big") :]
        assert content == file.read_bytes()
        assert unframe(exported[: len(exported) - len(content)])["sha256"] == hashlib.sha256(content).hexdigest()
        accepted = unframe(await run("serve-bulk", content, op="accept", upload=len(content)))
        assert (accepted["verdict"], accepted["size"]) == ("accepted", len(content))
        damaged = content[:4096] + bytes(4096) + content[8192:]
        assert not unframe(await run("serve-bulk", damaged, op="accept", upload=len(damaged)))["report"]["ok"]
        assert unframe(await run("serve-bulk-read", op="verify"))["report"]["findings"]
        assert unframe(await run("serve-bulk", op="salvage"))["report"]["ok"]
        assert unframe(await run("serve-bulk-read", op="verify"))["report"]["ok"]
        assert unframe(await run("serve", sql="SELECT count(*) FROM p", args=None, int64="number"))["rows"] == [[10_000]]


async def test_the_time_of_a_bulk_run_is_its_own(production: Contained) -> None:
    endless = sql("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT count(*) FROM c")
    async with production.open(deadline_seconds=0.1, bulk_deadline_seconds=1.0) as opened:
        for command in (*READS, *WRITES):
            begun = monotonic()
            assert unframe((await opened.run(endless, command=command)).output) == {"v": 1, "verdict": "timeout"}
            assert monotonic() - begun > (1.0 if "bulk" in command else 0.1)


# --- each layer alone, in a child


def mount_that_can_be_written_to(folder: str | Path, *, read_only: bool = False) -> int:
    return mounts.detached(folder)


async def outcome(slot: Opened, command: Command, steps: list[str], attempt: str) -> str:
    run = await slot.run({"do": "attempt", "steps": steps, "attempts": [attempt]}, command=command)
    found: str = run.report[attempt]
    return found


ALONE = {
    "Landlock": (["descriptors", "landlock"], "EACCES"),
    "the child's seal": (["volume", "descriptors"], "EROFS"),
}


@pytest.mark.parametrize("layer", ALONE)
@pytest.mark.parametrize("attempt", ["write_the_database", "write_the_journal"])
async def test_D7_neither_file_can_be_opened_to_be_written(here: Contained, layer: str, attempt: str) -> None:
    steps, refusal = ALONE[layer]
    async with here.open() as slot:
        with patch.object(zygote, "detached", mount_that_can_be_written_to):
            assert await outcome(slot, "serve", steps, attempt) == "done"
            for command in READS:
                assert await outcome(slot, command, steps, attempt) == refusal
                assert await outcome(slot, command, steps, "read_both_files") == "done"


async def test_D7_the_launchers_seal_alone_holds(here: Contained) -> None:
    async with here.open() as slot:
        for command in READS:
            assert await outcome(slot, command, ["descriptors"], "write_the_database") == "EROFS"
        with patch.object(zygote, "detached", mount_that_can_be_written_to):
            assert await outcome(slot, "serve-read", ["descriptors"], "write_the_database") == "done"


async def test_D7_the_databases_descriptor_alone_cannot_write(here: Contained) -> None:
    steps = ["descriptors", "database"]
    async with here.open() as slot:
        with patch.object(zygote, "detached", mount_that_can_be_written_to):
            assert await outcome(slot, "serve", steps, "write_by_the_databases_descriptor") == "done"
            for command in READS:
                assert await outcome(slot, command, steps, "write_by_the_databases_descriptor") == "EBADF"


async def test_D7_sqlite_alone_does_not_write_by_a_descriptor_that_could(here: Contained) -> None:
    order = {"do": "write_by_sql", "steps": ["descriptors"]}
    instance, _ = here.new_volume()
    async with here.open() as slot:
        await slot.run({"do": "ask", "sql": "CREATE TABLE t(a)"}, instance=instance)
        with patch.object(zygote, "detached", mount_that_can_be_written_to):
            assert (await slot.run(order, instance=instance)).report == {"outcome": "done"}
            for command in READS:
                report = (await slot.run(order, instance=instance, command=command)).report
                assert report == {"outcome": "sql_error: attempt to write a readonly database"}


async def test_a_child_with_a_command_that_nobody_knows_does_nothing() -> None:
    with contained("zygote", image=Settings.from_environment().image) as (production, _):
        async with production.open() as slot:
            with patch.dict(launchers_slot._COMMANDS, {"serve": 3}):
                reply = unframe((await slot.run(sql("SELECT 1"))).output)
    assert (reply["verdict"], reply["message"]) == ("unconfined", "no command 3 is known")


# --- in Docker's container


def test_landlock_alone_holds_in_dockers_container(probes: Probes) -> None:
    attempts = ["write_the_database", "write_the_journal", "read_both_files"]

    def outcomes(**kind: bool) -> Any:
        order = {"fork": True, "steps": ["privileges", "landlock"], "attempts": attempts, "kind": kind}
        return probes.run(order, seccomp=None, host={"NetworkMode": "none"}).report

    assert outcomes() == dict.fromkeys(attempts, "done")
    assert outcomes(read_only=True) == {**dict.fromkeys(attempts[:2], "EACCES"), "read_both_files": "done"}


def test_a_read_only_runner_refuses_a_volume_that_could_be_written_to(probes: Probes) -> None:
    assert "refused" not in probes.run({}).report
    ended = probes.run({"kind": {"read_only": True}})
    assert json.loads(ended.output) == {"refused": "/data is not mounted ro"}


def test_the_processor_time_of_a_bulk_run_follows_its_own_deadline(probes: Probes) -> None:
    assert probes.run({}).report["rlimits"]["CPU"] == 4
    assert probes.run({"kind": {"bulk": True}}).report["rlimits"]["CPU"] == 11
