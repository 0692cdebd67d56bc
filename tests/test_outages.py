"""A part of the service is away, hangs or dies under a request: the answer comes in bounded time; what is back is used again."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import pytest

from .deployment import ENGINES, Client, Deployment, assert_away, assert_error, client_of, deployed
from .exploits.tampering import folder_of
from .launcher_harness import containers_of, launched, runner_image, wire
from .launcher_harness import eventually as until
from .private_docker import PrivateDocker, private_docker
from .sealed import sealed_directory
from .test_faults import ENDLESS, at_work, each_engine, nothing_at_work, serves_again

# Every bound that the service sets itself is shorter; a loaded machine's share is included.
BOUNDED_SECONDS = 60.0


async def within_bounds(answer):
    return await asyncio.wait_for(answer, BOUNDED_SECONDS)


async def health(client: Client) -> tuple[int, dict[str, object]]:
    async with client.http.get(f"{client.url}/healthz") as response:
        return response.status, await response.json()


async def reachable(client: Client) -> None:
    """Until web listens; what it answers is another matter."""

    async def asking() -> None:
        while True:
            try:
                await health(client)
                return
            except OSError:
                await asyncio.sleep(0.02)

    await within_bounds(asking())


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDocker]:
    with private_docker() as daemon:
        yield daemon


@pytest.fixture(scope="module", params=ENGINES)
def own(daemon: PrivateDocker, request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """With a Docker daemon of its own."""
    with deployed(engine=request.param, docker_socket=daemon.url) as mayfly:
        yield mayfly


async def test_a_daemon_killed_under_a_request_is_answered_for_in_bounded_time_and_the_service_heals(own, daemon):
    async with client_of(own) as client:
        assert (await client.sql("CREATE TABLE t(x); INSERT INTO t VALUES (1)")).status == 200
        await nothing_at_work(own)
        busy = asyncio.create_task(client.sql(f"INSERT INTO t VALUES (2); {ENDLESS}"))
        await at_work(own)
        daemon.kill()
        if own.engine == "docker":
            assert_error(await within_bounds(busy), 503, "engine_unavailable")
            assert_away(await within_bounds(client.sql("SELECT 1")), "engine_unavailable")
        else:  # what stands already needs no daemon
            assert_error(await within_bounds(busy), 408, "query_timeout")
            assert await within_bounds(client.rows("SELECT 1")) == [[1]]
        daemon.start()
        await serves_again(client)
        assert await client.rows("SELECT min(x) FROM t") == [[1]]
        await nothing_at_work(own)


async def test_a_service_started_while_docker_is_down_says_so_and_serves_when_it_is_up(own, daemon):
    async with client_of(own) as client:
        await client.rows("SELECT 1")
        for name in ("web", "launcher"):
            own.kill(name)
        daemon.stop()
        for name in ("launcher", "web"):
            own.start_one(name)
        await reachable(client)
        await within_bounds(engine_missed(client))
        assert_away(await within_bounds(client.sql("SELECT 1")), "engine_unavailable")
        assert_away(await within_bounds(client.another().sql("SELECT 1")), "engine_unavailable")
        daemon.start()
        await serves_again(client)


async def engine_missed(client: Client) -> None:
    """Until the launcher is there and says so."""
    while (report := await health(client))[1].get("reason") != "engine_unavailable":
        await asyncio.sleep(0.05)
    assert (report[0], report[1]["status"]) == (503, "unavailable")


async def test_a_launcher_without_its_image_refuses_to_start_and_says_what_builds_it(own):
    async with client_of(own) as client:
        await client.rows("SELECT 1")
        own.kill("launcher")
        image = own.environment.get("MAYFLY_IMAGE", "mayfly-runner:latest")
        own.environment["MAYFLY_IMAGE"] = "mayfly-absent:latest"
        own.start_one("launcher")
        own.wait_until_dead("launcher")
        log = (own.state / "operator" / "launcher.log").read_text()
        assert "mayfly-absent:latest" in log.splitlines()[-1]
        assert "infra/up" in log.splitlines()[-1]
        assert_away(await within_bounds(client.sql("SELECT 1")), "launcher_unavailable")
        own.environment["MAYFLY_IMAGE"] = image
        own.start_one("launcher")
        await serves_again(client)


async def test_a_daemon_lost_in_the_launchers_self_test_says_nothing_about_the_host():
    slowly = {"container_cpus": 0.1}
    with runner_image(), sealed_directory() as state:
        async with wire(state) as line, launched(state, docker_socket=line.url, **slowly) as (launcher, launchers_client):
            await line.mend()
            await until(lambda: [item["State"] for item in containers_of(launcher.deployment)] == ["running"], 60)
            await line.cut()
            await until(lambda: "not removed" in launcher.log.read_text())
            assert (await launchers_client.health())["daemon"] == "down"
            await line.mend()
            while (await launchers_client.health())["daemon"] == "down":
                await asyncio.sleep(0.05)
            assert launcher.process is not None
            assert launcher.process.poll() is None


@each_engine
async def test_a_launcher_that_hangs_is_answered_for_in_bounded_time_and_used_again_when_it_goes_on(engine):
    with deployed(engine=engine) as mayfly:
        async with client_of(mayfly) as client:
            await client.rows("SELECT 1")
            await nothing_at_work(mayfly)
            busy = asyncio.create_task(client.sql(f"CREATE TABLE t(x); {ENDLESS}"))
            written = folder_of(mayfly, client.token) / "volume" / "db.sqlite"
            await until(lambda: written.stat().st_size > 0)
            mayfly.signal("launcher", signal.SIGSTOP)
            try:
                if engine == "docker":  # whose runner's words pass through the launcher
                    assert_away(await within_bounds(busy), "launcher_unavailable")
                else:
                    assert_error(await within_bounds(busy), 408, "query_timeout")
                asked = [client.sql("SELECT 1"), client.another().sql("SELECT 1")]
                *answers, (status, _) = await within_bounds(asyncio.gather(*asked, health(client)))
                for answer in answers:
                    assert_away(answer, "launcher_unavailable")
                assert status == 503
            finally:
                mayfly.signal("launcher", signal.SIGCONT)
            await serves_again(client)
            await nothing_at_work(mayfly)


@each_engine
async def test_a_web_process_killed_with_requests_in_flight_leaves_no_runner_and_the_next_one_serves(engine):
    with deployed(engine=engine) as mayfly:
        async with client_of(mayfly) as client:
            await client.rows("SELECT 1")
            await nothing_at_work(mayfly)
            busy = [asyncio.create_task(caller.sql(ENDLESS)) for caller in (client, client.another(), client.another())]
            await at_work(mayfly)
            launcher = mayfly.pid("launcher")
            mayfly.kill("web")
            await asyncio.gather(*busy, return_exceptions=True)
            await nothing_at_work(mayfly)
            mayfly.start_one("web")
            await reachable(client)
            await serves_again(client)
            assert mayfly.pid("launcher") == launcher
