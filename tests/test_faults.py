"""What breaks under a request is answered with its documented code, frees everything, and the next request works."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from .conftest import eventually
from .deployment import ENGINES, Client, Deployment, Work, assert_away, assert_error, client_of, deployed

ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c) SELECT count(*) FROM c"


under_each_engine = pytest.mark.engines(*ENGINES)
each_engine = pytest.mark.parametrize("engine", ENGINES)


async def at_work(mayfly: Deployment) -> Work:
    """The first run that is seen."""
    while True:
        for work in await asyncio.to_thread(mayfly.at_work):
            if work.pid:
                return work


async def nothing_at_work(mayfly: Deployment) -> None:
    await asyncio.to_thread(eventually, lambda: not mayfly.at_work())


async def serves_again(client: Client) -> None:
    async def asking() -> None:
        while (answer := await client.sql("SELECT 2")).status == 503:
            pass
        assert answer.body["rows"] == [[2]]

    await asyncio.wait_for(asking(), 30)


@pytest.fixture(scope="module", params=ENGINES)
def unhurried(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """What ends in here before its deadline was ended."""
    with deployed(engine=request.param, deadline_seconds="600") as deployment:
        yield deployment


async def test_a_runner_killed_under_its_request_is_a_500_and_the_next_request_works(unhurried):
    async with client_of(unhurried) as client:
        await client.rows("SELECT 1")
        await nothing_at_work(unhurried)
        busy = asyncio.create_task(client.sql(ENDLESS))
        os.kill((await at_work(unhurried)).pid, signal.SIGKILL)
        assert_error(await busy, 500, "runner_failed")
        assert await client.rows("SELECT 2") == [[2]]
        await nothing_at_work(unhurried)


async def test_a_caller_who_hangs_up_leaves_no_runner_and_no_lease_behind(unhurried):
    async with client_of(unhurried) as client:
        await client.rows("SELECT 1")
        await nothing_at_work(unhurried)
        busy = asyncio.create_task(client.sql(ENDLESS))
        await at_work(unhurried)
        busy.cancel()
        await nothing_at_work(unhurried)
        assert await client.rows("SELECT 2") == [[2]]


async def test_a_missing_image_is_a_503_and_heals_when_it_is_back():
    """Under engine docker, whose every request needs it; test_zygote_service has what standing slots make of it."""
    with contextlib.closing(docker.from_env()) as daemon:
        daemon.images.get("mayfly-runner:latest").tag("mayfly-fault:latest")
        with deployed(engine="docker", image="mayfly-fault:latest") as mayfly:
            async with client_of(mayfly) as client:
                await client.rows("SELECT 1")
                await nothing_at_work(mayfly)
                daemon.images.remove("mayfly-fault:latest")
                assert_error(await client.sql("SELECT 1"), 503, "image_missing")
                daemon.images.get("mayfly-runner:latest").tag("mayfly-fault:latest")
                await serves_again(client)
        daemon.images.remove("mayfly-fault:latest")


@each_engine
async def test_a_runner_that_the_kernel_kills_for_memory_is_the_callers_error(engine):
    room = {"heap_bytes": 1 << 30, "container_memory_bytes": 48 << 20, "limit_length": 10**9}
    with deployed(engine=engine, **{name: str(value) for name, value in room.items()}) as mayfly:
        async with client_of(mayfly) as client:
            hungry = (
                "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c LIMIT 1000)"
                " SELECT length(group_concat(hex(randomblob(200000)))) FROM c"
            )
            assert_error(await client.sql(hungry), 400, "memory_limit", "invalid sql: out of memory")
            assert await client.rows("SELECT 2") == [[2]]
            await nothing_at_work(mayfly)


@under_each_engine
async def test_M17_sqlites_own_memory_is_bounded_before_the_kernel_has_to_kill(client):
    hungry = (
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c LIMIT 100000) SELECT n, randomblob(1000) r FROM c ORDER BY r"
    )
    assert_error(await client.sql(hungry), 400, "memory_limit", "invalid sql: out of memory")


@pytest.fixture
def small_disk():
    folder = Path(tempfile.mkdtemp(prefix="mayfly-disk-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=755", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


@each_engine
async def test_a_full_disk_refuses_writes_and_creates_and_loses_nothing(small_disk, engine):
    with deployed(small_disk, engine=engine) as mayfly:
        async with client_of(mayfly) as client:
            assert (await client.sql("CREATE TABLE t(x); INSERT INTO t VALUES (1)")).status == 200
            ballast = small_disk / "operator" / "ballast"
            with open(ballast, "wb") as file:
                try:
                    while True:
                        file.write(bytes(1 << 16))
                        file.flush()
                except OSError:
                    pass
            filler = "INSERT INTO t SELECT randomblob(200000) FROM t"
            assert_error(await client.sql(filler), 503, "host_storage_low")
            assert_error(await client.another().sql("SELECT 1"), 503, "host_storage_low")
            assert await client.rows("SELECT x FROM t") == [[1]]
            ballast.unlink()
            assert (await client.sql(filler)).status == 200


async def test_creates_are_refused_below_the_low_water_mark_while_old_instances_are_served(mayfly, client):
    await client.sql("CREATE TABLE t(x)")
    with deployed(min_free_bytes=str(1 << 60)) as full:
        async with client_of(full) as other:
            answer = await other.sql("SELECT 1")
            assert_away(answer, "host_storage_low")
            assert int(answer.headers["Retry-After"]) > 0
            assert not full.instances()


@each_engine
async def test_a_dead_launcher_is_a_503_and_heals(engine):
    with deployed(engine=engine) as mayfly:
        async with client_of(mayfly) as own:
            await own.rows("SELECT 1")
            mayfly.kill("launcher")

            async def refused(caller: Client) -> None:
                while (answer := await caller.sql("SELECT 1")).status == 200:
                    pass
                assert_away(answer, "launcher_unavailable")

            await asyncio.wait_for(refused(own), 20)
            await asyncio.to_thread(mayfly.start)
            await serves_again(own)
