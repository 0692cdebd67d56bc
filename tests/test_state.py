"""The directory is the registry: what lives, what ends, and what outlives a crash."""

from __future__ import annotations

import asyncio
import time

import pytest

from .conftest import eventually
from .deployment import assert_away, assert_error, client_of, deployed
from .private_docker import private_docker
from .test_faults import at_work, each_engine, nothing_at_work, serves_again

ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c) SELECT count(*) FROM c"


@each_engine
async def test_W13_an_instance_answers_404_from_the_second_of_its_end_and_its_volume_is_reaped(engine):
    with deployed(engine=engine, ttl_seconds="4", reap_interval_seconds="0.5") as mayfly:
        async with client_of(mayfly) as client:
            first = await client.sql("CREATE TABLE t(x)")
            end = int(first.headers["X-Walkin-TTL"])
            answers = []
            while time.time() < end + 1:
                asked = time.time()
                answer = await client.sql("SELECT 1")
                answers.append((asked, time.time(), answer))
            for asked, answered, answer in answers:
                if asked >= end:
                    assert_error(answer, 404, "instance_not_found", "instance not found")
                elif answered < end:
                    assert answer.status == 200
            assert answers[-1][2].status == 404
            eventually(lambda: not mayfly.instances() and not mayfly.at_work())


@each_engine
async def test_W13_a_busy_instance_is_not_reaped_under_its_request(engine):
    with deployed(engine=engine, ttl_seconds="2", reap_interval_seconds="0.1", deadline_seconds="4") as mayfly:
        async with client_of(mayfly) as client:
            answer = await client.sql(ENDLESS)
            assert_error(answer, 408, "query_timeout")
            assert time.time() >= int(answer.headers["X-Walkin-TTL"])
            eventually(lambda: not mayfly.instances())


@pytest.mark.parametrize("victims", [("web",), ("launcher",), ("web", "launcher")])
@each_engine
async def test_acknowledged_writes_outlive_kill_9_of_the_processes(victims, engine):
    with deployed(engine=engine) as mayfly:
        async with client_of(mayfly) as client:
            await client.sql("CREATE TABLE t(x)")
            await client.sql("INSERT INTO t VALUES (1)")
            busy = asyncio.create_task(client.sql(f"INSERT INTO t VALUES (2); {ENDLESS}"))
            await at_work(mayfly)
            for victim in victims:
                mayfly.kill(victim)
            await asyncio.gather(busy, return_exceptions=True)
            await asyncio.to_thread(mayfly.start)
            assert (await client.rows("SELECT min(x) FROM t")) == [[1]]
            assert (await client.sql("INSERT INTO t VALUES (3)")).status == 200
            await nothing_at_work(mayfly)


@each_engine
async def test_instances_outlive_kill_9_of_the_docker_daemon(engine):
    with private_docker() as daemon, deployed(engine=engine, docker_socket=daemon.url) as mayfly:
        async with client_of(mayfly) as client:
            await client.sql("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
            daemon.kill()
            if engine == "docker":
                assert_away(await client.sql("SELECT x FROM t"), "engine_unavailable")
                assert_away(await client.another().sql("SELECT 1"), "engine_unavailable")
            else:  # what stands already needs no daemon
                assert await client.rows("SELECT x FROM t") == [[1]]
            daemon.start()
            await serves_again(client)
            assert await client.rows("SELECT x FROM t") == [[1]]
            await nothing_at_work(mayfly)
