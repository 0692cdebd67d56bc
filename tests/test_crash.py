"""Web, launcher and Docker are stopped, killed and started in a seeded random order under callers that check every answer.

What must hold, whatever the order: what was acknowledged is read back, what was not is there whole or not at all, no instance is
lost, every request is answered or its connection ends, and nothing is left when it is over.

MAYFLY_CRASH_SEED and MAYFLY_CRASH_SECONDS choose another order and another length; a failure tells its seed and what happened.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import json
import os
import random
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from .conftest import eventually
from .deployment import ENGINES, Client, Deployment, deployed
from .private_docker import PrivateDocker, private_docker

SEED = int(os.environ.pop("MAYFLY_CRASH_SEED", "7"))
SECONDS = float(os.environ.pop("MAYFLY_CRASH_SECONDS", "0"))
LENGTH = {"docker": 40.0, "zygote": 30.0}  # unless SECONDS says otherwise

CALLERS = 6
SETTINGS = {"ttl_seconds": "86400", "reap_interval_seconds": "1", "queue_timeout_seconds": "20", "nursery": "2", "successors": "4"}
WARM = 2 + 4
SLOTS = 4
STEPS_PER_INSTANCE = 40
# Beyond every bound that the service sets itself: a request that takes longer has been forgotten.
ANSWER_SECONDS = 60.0
RECOVERY_SECONDS = 120.0
TEDIOUS = (" 503 ", "healthz:", "ENGINE_DOWN", "orphans not swept")
# What a crash may look like to a caller. Everything else would blame the caller, deny its instance or confess a defect.
EXCUSED = {(503, "launcher_unavailable"), (503, "engine_unavailable"), (503, "shutting_down"), (503, "overloaded")} | {
    (503, "circuit_open"),
    (500, "runner_failed"),
    (408, "query_timeout"),
}


@dataclass
class Witness:
    """One instance and what must be true of it. Step n writes two rows in one transaction; rows are padded to span pages."""

    client: Client
    acknowledged: int = 0
    unsure: bool = False

    @property
    def instance(self) -> str:
        assert self.client.token is not None
        encoded = self.client.token.removeprefix("wkn_")
        return str(uuid.UUID(bytes=base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))[:16]))

    async def step(self, padding: int) -> tuple[int, str]:
        """One request; what became of it. Raises AssertionError when an answer contradicts an earlier one."""
        if self.client.token is None:
            return await self._ask("CREATE TABLE steps(n, half, padding, UNIQUE (n, half))")
        if self.unsure:
            return await self.read()
        self.unsure = True
        outcome = await self._ask(
            "BEGIN; INSERT INTO steps VALUES (:n, 'first', zeroblob(:padding));"
            " INSERT INTO steps VALUES (:n, 'second', zeroblob(:padding)); COMMIT",
            {"n": self.acknowledged + 1, "padding": padding},
        )
        if outcome[0] == 200:
            self.acknowledged, self.unsure = self.acknowledged + 1, False
        return outcome

    async def read(self) -> tuple[int, str]:
        outcome = await self._ask("SELECT count(*), count(DISTINCT n), coalesce(max(n), 0) FROM steps")
        if outcome[0] == 200:
            [[rows, steps, last]] = self.rows
            assert rows == 2 * steps == 2 * last, f"half a transaction, or one lost: {rows} rows of {steps} steps up to {last}"
            possible = {self.acknowledged, self.acknowledged + self.unsure}
            assert last in possible, f"step {last} is the last, instead of one of {sorted(possible)}"
            self.acknowledged, self.unsure = last, False
        return outcome

    async def audit(self) -> None:
        """All is well and says so itself."""
        await self._until_served(self.read)
        await self._until_served(lambda: self._ask("PRAGMA integrity_check"))
        assert self.rows == [["ok"]]

    async def _until_served(self, ask: Callable[[], Any]) -> None:
        async with asyncio.timeout(RECOVERY_SECONDS):
            while (await ask())[0] != 200:
                await asyncio.sleep(0.05)

    async def _ask(self, sql: str, args: Any = None) -> tuple[int, str]:
        try:
            answer = await self.client.sql(sql, args)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            return 0, type(error).__name__
        if answer.status == 200:
            self.rows = answer.body.get("rows", [])
            return 200, "ok"
        outcome = answer.status, answer.body["code"]
        assert outcome in EXCUSED, f"{outcome} {answer.body}"
        return outcome


@dataclass
class Callers:
    """Witnesses at work. `pause` returns when none is in a request."""

    url: str
    http: aiohttp.ClientSession
    chance: random.Random
    outcomes: collections.Counter[tuple[int, str]] = field(default_factory=collections.Counter)
    retired: list[Witness] = field(default_factory=list)
    lost_creates: int = 0
    active: list[Witness] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _working: bool = False

    def start(self) -> None:
        self._working = True
        while len(self.active) < CALLERS:
            self.active.append(self._newcomer())
        self._tasks = [asyncio.ensure_future(self._work(number)) for number in range(CALLERS)]

    async def pause(self) -> None:
        self._working = False
        await asyncio.gather(*self._tasks)

    def failed(self) -> bool:
        return any(task.done() for task in self._tasks)

    @property
    def witnesses(self) -> list[Witness]:
        return [witness for witness in self.retired + self.active if witness.client.token is not None]

    def _newcomer(self) -> Witness:
        return Witness(Client(self.http, self.url))

    async def _work(self, number: int) -> None:
        while self._working:
            witness = self.active[number]
            had_none = witness.client.token is None
            outcome = await witness.step(self.chance.choice((0, 100, 3_000, 20_000)))
            self.outcomes[outcome] += 1
            if outcome[0] != 200:
                self.lost_creates += had_none
                await asyncio.sleep(0.1)
            elif witness.acknowledged >= STEPS_PER_INSTANCE:
                self.retired.append(witness)
                self.active[number] = self._newcomer()


class Service:
    """Web or launcher as infra/up starts it, but alone: the others may be down, and may come up in any order."""

    def __init__(self, mayfly: Deployment, name: str) -> None:
        self._mayfly = mayfly
        self.name = name
        self.up = True

    def start(self) -> None:
        self._mayfly.wait_until_dead(self.name)
        self._mayfly.start_one(self.name)
        self.up = True

    def kill(self) -> None:
        self._mayfly.kill(self.name)
        self.up = False

    def stop(self) -> None:
        """SIGTERM; what follows may find it still stopping."""
        self._mayfly.signal(self.name, signal.SIGTERM)
        self.up = False


class Daemon:
    name = "dockerd"

    def __init__(self, daemon: PrivateDocker) -> None:
        self._daemon = daemon
        self.up = True

    def start(self) -> None:
        assert self._daemon.daemon is not None
        self._daemon.daemon.wait(60)
        self._daemon.start()
        self.up = True

    def kill(self) -> None:
        self._daemon.kill()
        self.up = False

    def stop(self) -> None:
        assert self._daemon.daemon is not None
        self._daemon.daemon.terminate()
        self.up = False


@dataclass
class Descriptors:
    """Of a process that survives: none may be left by what failed around it. Connections that are kept for reuse have a bound."""

    mayfly: Deployment
    kept: dict[str, int]
    baseline: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    def check(self) -> None:
        for name in self.kept:
            eventually(lambda name=name: self._within_bounds(name))

    def _within_bounds(self, name: str) -> bool:
        pid = self.mayfly.pid(name)
        links = []
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(path))
        sockets = sum(link.startswith("socket:") for link in links)
        first_others, first_sockets = self.baseline.setdefault((name, pid), (len(links) - sockets, sockets))
        return len(links) - sockets <= first_others + 2 and sockets <= first_sockets + self.kept[name]


def started_at(pid: int) -> float:
    """Seconds since the machine's start."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


async def healthy(callers: Callers) -> None:
    async with asyncio.timeout(RECOVERY_SECONDS):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with callers.http.get(f"{callers.url}/healthz") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.05)


def assert_instances_are_on_disk(mayfly: Deployment, callers: Callers) -> None:
    known = {witness.instance for witness in callers.witnesses}
    # One that nobody has claimed has the time 0, and may go while we look.
    lives = {name: end for name in mayfly.instances() if (end := expires_at(mayfly, name)) is not None}
    assert known <= lives.keys(), f"lost: {known - lives.keys()}"
    # A create whose answer was lost on its way leaves an instance without an owner, which expires like any other.
    unowned = {name for name, end in lives.items() if end and name not in known}
    assert len(unowned) <= callers.lost_creates
    assert max(lives.values()) <= time.time() + int(SETTINGS["ttl_seconds"]) + 1


def only_what_waits(mayfly: Deployment) -> bool:
    """No container but those that wait for a next request: one for an instance, or a slot for anybody."""
    containers = mayfly.containers()
    if mayfly.engine == "zygote":
        return len(mayfly.slots()) == len(containers) == SLOTS and not mayfly.at_work()
    instances = [container["Config"]["Labels"]["org.mayfly.instance"] for container in containers]
    unclaimed = [name for name in mayfly.instances() if expires_at(mayfly, name) == 0]
    return len(instances) == len(set(instances)) <= WARM and len(unclaimed) <= int(SETTINGS["nursery"])


def expires_at(mayfly: Deployment, instance: str) -> int | None:
    try:
        return json.loads((mayfly.state / "instances" / instance / "instance.json").read_text())["expires_at"]
    except FileNotFoundError:
        return None


async def crash_and_recover(mayfly: Deployment, daemon: PrivateDocker, callers: Callers, log: list[str]) -> None:
    """Rounds of a few blows, then everything up again and all witnesses heard."""
    chance, began = random.Random(SEED), time.monotonic()
    parts = [Service(mayfly, "web"), Service(mayfly, "launcher"), Daemon(daemon)]
    descriptors = Descriptors(mayfly, {"web": CALLERS + 2, "launcher": 2 * SLOTS + 4 + 4 * WARM})
    deck: list[tuple[Any, str]] = []

    async def do(verb: str, part: Any) -> None:
        log.append(f"{time.monotonic() - began:7.2f} {verb} {part.name}")
        await asyncio.to_thread(getattr(part, verb))

    seconds = SECONDS or LENGTH[mayfly.engine]
    while time.monotonic() - began < seconds:
        callers.start()
        for _ in range(chance.randint(1, 5)):
            # The moment of a blow is the schedule itself, drawn from the seed; nothing waits for it to have passed.
            await asyncio.sleep(chance.uniform(0.0, 2.0))
            if not deck:
                # Every kind of blow has fallen before any falls again.
                deck = [(part, verb) for part in parts for verb in ("kill", "kill", "stop")]
                chance.shuffle(deck)
            part, verb = deck.pop()
            await do(verb if part.up else "start", part)
            if callers.failed():
                break
        for part in chance.sample(parts, len(parts)):
            if not part.up:
                await do("start", part)
        await healthy(callers)
        await callers.pause()
        log.append(f"{time.monotonic() - began:7.2f} all up; {dict(callers.outcomes)}")
        await asyncio.gather(*(witness.audit() for witness in callers.active if witness.client.token is not None))
        assert_instances_are_on_disk(mayfly, callers)
        await asyncio.to_thread(eventually, lambda: only_what_waits(mayfly), 60)
        await asyncio.to_thread(descriptors.check)
    for witness in callers.witnesses:
        await witness.audit()


def assert_a_stopped_service_leaves_nothing(mayfly: Deployment, daemon: PrivateDocker, callers: Callers) -> None:
    for name in ("web", "launcher"):
        mayfly.signal(name, signal.SIGTERM)
        mayfly.wait_until_dead(name)
    assert_instances_are_on_disk(mayfly, callers)
    assert 0 not in {expires_at(mayfly, name) for name in mayfly.instances()}
    with mayfly.docker() as client:
        eventually(lambda: client.containers(all=True) == [], 60)
    assert not [name for name in os.listdir(mayfly.state / "instances") if name.startswith(".")]
    assert f"{mayfly.state}/instances" not in Path("/proc/self/mounts").read_text()
    # What the daemon was starting when it was killed it forgets for good; nothing that it started since may be left.
    assert daemon.daemon is not None
    latest = started_at(daemon.daemon.pid)

    def left() -> list[int]:
        found = []
        for pid in daemon.forgotten():
            with contextlib.suppress(OSError):
                if started_at(pid) > latest:
                    found.append(pid)
        return found

    eventually(lambda: not left(), 60)


@pytest.mark.parametrize("engine", ENGINES)
async def test_no_order_of_crashes_loses_an_acknowledged_write_or_an_instance_or_leaves_anything_behind(engine):
    log: list[str] = []
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    with (
        private_docker() as daemon,
        deployed(engine=engine, docker_socket=daemon.url, **SETTINGS) as mayfly,
    ):
        try:
            async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
                callers = Callers(mayfly.url, http, random.Random(SEED))
                await crash_and_recover(mayfly, daemon, callers, log)
                assert sum(witness.acknowledged for witness in callers.witnesses) > CALLERS
            assert_a_stopped_service_leaves_nothing(mayfly, daemon, callers)
        except BaseException as error:
            error.add_note(f"MAYFLY_CRASH_SEED={SEED} MAYFLY_CRASH_SECONDS={SECONDS or LENGTH[engine]}\n" + "\n".join(log))
            for path in (mayfly.state / "operator").glob("*.log"):
                lines = [line for line in path.read_text().splitlines() if not any(word in line for word in TEDIOUS)]
                error.add_note("\n".join([f"--- {path.name}", *lines[-60:]]))
            error.add_note((daemon.folder / "log").read_text()[-5000:])
            raise
