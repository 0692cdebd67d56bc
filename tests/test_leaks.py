"""Ten thousand requests of every kind on engine zygote; then everything is as it was before."""

from __future__ import annotations

import asyncio
import collections
import os
import random
import re
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import eventually
from .deployment import Client, Deployment, children_of, client_of, deployed, instance_of
from .exploits.tampering import instance_of as instance_of_token

SEED = 20261122
REQUESTS = 10_000
CALLERS = 16
# Enough of each kind that one lost descriptor, process or mount for each is seen. What is left are answers.
RARE = {"time bomb": 10, "memory bomb": 25, "kernel's memory bomb": 15, "killed": 25, "hang-up": 100}
FREQUENT = {"sql error": 0.1, "forbidden": 0.05, "write": 0.25}
# What an allocator or a log's buffer may keep; a leak of a hundred bytes for each request is more.
SLACK_KIB = 1024

ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c) SELECT count(*) FROM c"
SORT = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c LIMIT 100000) SELECT n, randomblob(1000) r FROM c ORDER BY r"
HUGE = (
    "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c LIMIT 300)"
    " SELECT length(group_concat(hex(randomblob(200000)))) FROM c"
)


@pytest.fixture(scope="module")
def service() -> Iterator[Deployment]:
    """Ends a time bomb soon, and sweeps often: the launcher's connection to Docker is there before anything is counted."""
    settings = {"deadline_seconds": 1, "queue_timeout_seconds": 200, "reap_interval_seconds": 1, "heap_bytes": 64 << 20}
    memory = {"container_memory_bytes": 48 << 20, "limit_length": 10**8}
    with deployed(engine="zygote", **{name: str(value) for name, value in (settings | memory).items()}) as deployment:
        yield deployment


@dataclass(frozen=True)
class Facts:
    """Of web, launcher and the zygotes, by name."""

    processes: dict[str, int]
    descriptors: dict[str, int]
    mounts: dict[str, int]
    volumes_mounted_anywhere: int
    containers: list[str]
    folders: list[str]


def processes(mayfly: Deployment) -> dict[str, int]:
    zygotes = {f"zygote {container[:12]}": pid for container, pid in mayfly.slots().items()}
    return {"web": mayfly.pid("web"), "launcher": mayfly.pid("launcher"), **zygotes}


def volumes_mounted_anywhere(mayfly: Deployment) -> int:
    """In all mount namespaces of the machine, each looked at through one of its processes."""
    namespaces: dict[str, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            namespaces[os.readlink(process / "ns/mnt")] = (process / "mountinfo").read_text()
        except OSError:
            continue
    return sum(len(re.findall(f"{mayfly.state}/instances/", mounts)) for mounts in namespaces.values())


def own_mounts(mayfly: Deployment, name: str, pid: int) -> list[str]:
    """A zygote's are all its own; web and launcher also see those that come and go on the machine."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return [line for line in lines if name.startswith("zygote") or str(mayfly.state) in line]


def facts(mayfly: Deployment) -> Facts:
    found = processes(mayfly)
    return Facts(
        {name: len(children_of(pid)) for name, pid in found.items()},
        {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in found.items()},
        {name: len(own_mounts(mayfly, name, pid)) for name, pid in found.items()},
        volumes_mounted_anywhere(mayfly),
        sorted(item["Id"] for item in mayfly.containers()),
        sorted(str(path) for name in ("launcher/slots", "run") for path in (mayfly.state / name).iterdir()),
    )


def memory_kib(mayfly: Deployment) -> dict[str, int]:
    """Each process's share: what it has alone, and its part of what it has with others."""
    found = {}
    for name, pid in processes(mayfly).items():
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found[name] = sum(int(kib) for kib in re.findall(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE))
    return found


class Crowd:
    """Callers with an instance each, and what they do."""

    def __init__(self, mayfly: Deployment, client: Client, chance: random.Random) -> None:
        self.mayfly = mayfly
        self.chance = chance
        self.callers = [client.another() for _ in range(CALLERS)]
        self.zygotes = list(mayfly.slots().values())
        self.outcomes: collections.Counter[tuple[str, int, str]] = collections.Counter()

    async def move_in(self) -> None:
        for caller in self.callers:
            assert (await caller.sql("CREATE TABLE t(x); INSERT INTO t VALUES (1)")).status == 200

    async def do(self, kinds: list[str]) -> None:
        queue = iter(kinds)
        await asyncio.gather(*(self._work(caller, queue) for caller in self.callers))

    async def _work(self, caller: Client, queue: Iterator[str]) -> None:
        ways: dict[str, Callable[[Client], Awaitable[None]]] = {"killed": self._killed, "hang-up": self._hang_up}
        scripts = {
            "answer": "SELECT x FROM t LIMIT 1",
            "write": "UPDATE t SET x = x + 1",
            "sql error": "SELEC 1",
            "forbidden": "ATTACH 'x' AS y",
            "time bomb": ENDLESS,
            "memory bomb": SORT,
            "kernel's memory bomb": HUGE,
        }
        for kind in queue:
            if kind in ways:
                await ways[kind](caller)
            else:
                answer = await caller.sql(scripts[kind])
                self.outcomes[kind, answer.status, answer.body.get("code", "")] += 1

    def child_of(self, caller: Client) -> int | None:
        instance = _instance(caller)
        for zygote in self.zygotes:
            for child in children_of(zygote):
                if instance_of(child) == instance:
                    return child
        return None

    async def _at_work(self, caller: Client, asked: asyncio.Task[object]) -> int | None:
        while not asked.done():
            if (child := self.child_of(caller)) is not None:
                return child
            await asyncio.sleep(0)
        return None

    async def _killed(self, caller: Client) -> None:
        asked = asyncio.create_task(caller.sql(ENDLESS))
        if (child := await self._at_work(caller, asked)) is not None:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        answer = await asked
        self.outcomes["killed", answer.status, answer.body["code"]] += 1

    async def _hang_up(self, caller: Client) -> None:
        """Anywhere on the way: before it is asked, in its queue, or with the child at work."""
        asked = asyncio.create_task(caller.sql(ENDLESS))
        if self.chance.random() < 0.5:
            await self._at_work(caller, asked)
        else:
            await asyncio.sleep(self.chance.choice((0.0, 0.0, 0.001, 0.01)))
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        self.outcomes["hang-up", 0, ""] += 1


def _instance(caller: Client) -> str:
    assert caller.token is not None
    return str(instance_of_token(caller.token))


def schedule(chance: random.Random, requests: int, rare: dict[str, int]) -> list[str]:
    kinds = [kind for kind, count in rare.items() for _ in range(count)]
    kinds += [kind for kind, share in FREQUENT.items() for _ in range(int(share * requests))]
    kinds += ["answer"] * (requests - len(kinds))
    chance.shuffle(kinds)
    return kinds


async def test_ten_thousand_requests_of_every_kind_leave_everything_as_it_was(service):
    chance = random.Random(SEED)
    async with client_of(service) as client:
        crowd = Crowd(service, client, chance)
        await crowd.move_in()
        # Every way is gone once before, so that what is opened or allocated once is there.
        await crowd.do(schedule(chance, 500, dict.fromkeys(RARE, 2)))
    await asyncio.to_thread(eventually, lambda: not service.at_work())
    before, memory_before = await asyncio.to_thread(at_rest, service)

    async with client_of(service) as client:
        for caller in crowd.callers:
            caller.http = client.http
        crowd.outcomes.clear()
        await crowd.do(schedule(chance, REQUESTS, RARE))
    assert crowd.outcomes.total() == REQUESTS
    outcomes = {
        "answer": {(200, "")},
        "write": {(200, "")},
        "sql error": {(400, "sql_error")},
        "forbidden": {(400, "forbidden")},
        "time bomb": {(408, "query_timeout")},
        "memory bomb": {(400, "memory_limit")},
        "kernel's memory bomb": {(400, "memory_limit")},
        "killed": {(500, "runner_failed"), (408, "query_timeout")},
        "hang-up": {(0, "")},
    }
    for kind, status, code in crowd.outcomes:
        assert (status, code) in outcomes[kind], crowd.outcomes

    await asyncio.to_thread(eventually, lambda: not service.at_work())
    after, memory_after = await asyncio.to_thread(at_rest, service)
    assert after == before
    grown = {name: memory_after[name] - kib for name, kib in memory_before.items()}
    assert max(grown.values()) < SLACK_KIB, grown


def at_rest(mayfly: Deployment) -> tuple[Facts, dict[str, int]]:
    """Once the callers' connections are closed and each zygote's next child waits."""
    seen = [facts(mayfly)]
    while len(seen) < 3 or seen[-1] != seen[-2]:
        seen.append(facts(mayfly))
        assert len(seen) < 100, seen[-2:]
    return seen[-1], memory_kib(mayfly)
