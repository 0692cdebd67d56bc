"""Hostile scripts and malformed databases: whatever comes, one valid answer in time, the same again, and no neighbour touched."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import random
import signal
import struct
import time
import uuid
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

from gateway.launcher.registry import Registry
from gateway.protocol import Status, Verb, Verdict
from gateway.settings import Settings
from gateway.web.body import Statement
from gateway.web.runner import decode_reply, request_frame

from . import corpus
from .containers import Probes, probes_beside_the_runner, profile_with
from .fake_launcher import exchange
from .launcher_harness import Client, containers_of, launched, uuid7
from .sealed import sealed_disk

SETTINGS = Settings()
SECONDS = SETTINGS.deadline_seconds + SETTINGS.grace_seconds + 1
SAMPLE = 60
DAMAGED = 210
SEED = 20240901
CONTAINERS = 2

FOR_THE_PARENT = ("clone", "wait4", "pipe2", "poll", "kill", "dup")
"""What the probe needs to have children; the runner's own filter takes it from them again."""

_RECORD = struct.Struct("!IiI")


@dataclass(frozen=True, slots=True)
class Answer:
    seconds: float
    status: int
    """As os.waitpid tells it."""
    stream: bytes

    def verdict(self) -> str:
        """Of a stream that is exactly one valid frame, in time, from a runner that ended by itself; else what is wrong with it."""
        if os.WIFSIGNALED(self.status):
            return f"! {signal.Signals(os.WTERMSIG(self.status)).name} after {self.seconds:.1f} s"
        if self.seconds > SECONDS:
            return f"! {self.seconds:.1f} s"
        if self.stream[:4] != (len(self.stream) - 4).to_bytes(4, "big"):
            return f"! {len(self.stream)} bytes that are no frame, exit code {os.waitstatus_to_exitcode(self.status)}"
        if len(self.stream) - 4 > SETTINGS.max_reply_frame_bytes:
            return f"! a frame of {len(self.stream) - 4} bytes"
        try:
            decode_reply(self.stream[4:], "number")
        except Exception as error:
            return f"! {error!r} {error}"
        reply = json.loads(self.stream[4:])
        if reply["verdict"] in ("internal", "unconfined", "request_invalid"):
            return f"! {reply['verdict']}: {reply.get('message')}"
        return str(reply["verdict"])


@pytest.fixture(scope="module")
def cases() -> list[corpus.Case]:
    corpus.require()
    return list(corpus.cases())


@pytest.fixture(scope="module")
def probes() -> Iterator[Probes]:
    with probes_beside_the_runner() as probes:
        yield probes


def frame(sql: str) -> bytes:
    return request_frame(Statement(sql=sql, args=None, int64="number"), SETTINGS.max_request_frame_bytes)


def run_all(probes: Probes, state: Path, cases: Sequence[corpus.Case], runs: int) -> list[list[list[Answer]]]:
    """Every case `runs` times, dealt out to one container for each processor: by case, by run, by request."""
    (state / "instances").mkdir()
    registry = Registry(state / "instances", ttl_seconds=600, min_free_bytes=0)
    try:
        instances = [uuid7() for _ in range(CONTAINERS + 1)]
        for instance in instances:
            registry.create(instance)
        control, *volumes = [Path(registry.volume(instance)) for instance in instances]
    finally:
        registry.close()
    before = leave_content(control)
    with ThreadPoolExecutor(CONTAINERS) as pool:
        jobs = [
            pool.submit(run_share, probes, cases[number::CONTAINERS], runs, state / f"cases-{number}", volume)
            for number, volume in enumerate(volumes)
        ]
        results = [job.result() for job in jobs]
    assert fingerprint(control) == before
    return [results[number % CONTAINERS][number // CONTAINERS] for number in range(len(cases))]


def run_share(probes: Probes, cases: Sequence[corpus.Case], runs: int, folder: Path, volume: Path) -> list[list[list[Answer]]]:
    """In one container, with the volume where a runner has it."""
    folder.mkdir()
    with (folder / "cases.jsonl").open("w") as lines:
        for case in cases:
            files = {"database": base64.b64encode(case.database).decode(), "journal": base64.b64encode(case.journal).decode()}
            lines.write(json.dumps({**files, "frames": [base64.b64encode(frame(sql)).decode() for sql in case.requests]}) + "\n")
    ended = probes.run(
        {"runs": runs, "seconds": SECONDS},
        probe="/corpus_probe.py",
        seccomp=profile_with(added=FOR_THE_PARENT),
        host={
            "Mounts": [
                {"Type": "bind", "Source": str(volume), "Target": "/data"},
                {"Type": "bind", "Source": str(folder), "Target": "/cases", "ReadOnly": True},
            ],
            "Tmpfs": {},
        },
    )
    assert ended.exit_code == 0, ended.errors.decode(errors="replace")
    answers = _answers(ended.output)
    found = [[[next(answers) for _ in case.requests] for _ in range(runs)] for case in cases]
    assert next(answers, None) is None
    assert {item.name for item in volume.iterdir()} == {"db.sqlite", "db.sqlite-journal"}
    return found


def _answers(output: bytes) -> Iterator[Answer]:
    offset = 0
    while offset < len(output):
        milliseconds, status, length = _RECORD.unpack_from(output, offset)
        offset += _RECORD.size
        yield Answer(milliseconds / 1000, status, output[offset : offset + length])
        offset += length


def leave_content(volume: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Something in a neighbour's volume that would show any change."""
    for name in ("db.sqlite", "db.sqlite-journal"):
        (volume / name).write_bytes(hashlib.sha512(name.encode()).digest() * 1000)
    return fingerprint(volume)


def fingerprint(volume: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for path in [volume, *volume.iterdir()]:
        stat = path.stat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[path.name] = content, (stat.st_mode, stat.st_uid, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_nlink)
    return found


def differ(first: str, second: str) -> bool:
    """A timeout is as stable as the machine's load; every other verdict follows from the case."""
    return first != second and "timeout" not in (first, second)


def faults(cases: Sequence[corpus.Case], results: Sequence[list[list[Answer]]]) -> list[str]:
    found = []
    for case, runs in zip(cases, results, strict=True):
        for number, answers in enumerate(zip(*runs, strict=True)):
            verdicts = [answer.verdict() for answer in answers]
            if any(verdict.startswith("!") for verdict in verdicts) or differ(verdicts[0], verdicts[-1]):
                found.append(f"{case.name} {verdicts} {case.requests[number][:300]!r}")
    return found


def seen(results: Sequence[list[list[Answer]]]) -> Counter[str]:
    return Counter(answer.verdict() for runs in results for run in runs for answer in run)


@pytest.fixture(scope="module")
def results(cases: list[corpus.Case], probes: Probes) -> list[list[list[Answer]]]:
    """Of every case, by the runner that engine docker starts. Twice only if asked: engine zygote has its own turn at it, twice."""
    with sealed_disk("size=256m") as state:
        return run_all(probes, state, cases, runs=2 if corpus.FULL else 1)


def test_M1_every_case_gets_one_valid_answer_in_time(cases, results):
    wrong = faults(cases, results)
    assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong[:20]])
    assert {"ok", "sql_error", "forbidden", "args_invalid", "damaged"} <= set(seen(results))


def test_damage_to_a_database_of_the_right_shape_is_no_worse(probes):
    cases = list(corpus.damaged_copies(DAMAGED, SEED))
    with sealed_disk("size=256m") as state:
        results = run_all(probes, state, cases, runs=2)
    wrong = faults(cases, results)
    assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong[:20]])
    verdicts = seen(results)
    assert min(verdicts["ok"], verdicts["damaged"]) > sum(verdicts.values()) / 10, verdicts


OVERSIZED = [
    "SELECT 1;" * 12_000,
    "SELECT 1;" + " " * 900_000,
    "-" * 500_000,
    "SELECT " + "(" * 40_000,
    "SELECT " + "[" * 90_000,
    "SELECT '" + "ä" * 400_000 + "'",
    "SELECT " + "1+" * 49_000 + "1",
    "VALUES " + ",".join(["(1)"] * 24_000),
    "CREATE TABLE t(" + ",".join(f"c{n}" for n in range(9_000)) + ")",
    "WITH " + ",".join(f"a{n} AS (SELECT * FROM a{n - 1})" for n in range(3_000)) + " SELECT * FROM a2999",
    "SELECT * FROM " * 6_000,
    "\0" * 100,
    "\ufffe\U0010ffff" * 20_000,
]


def test_scripts_beyond_every_size_are_answered_and_not_dropped(probes):
    cases = [corpus.Case(f"oversized/{number}", b"", (sql,)) for number, sql in enumerate(OVERSIZED)]
    with sealed_disk("size=256m") as state:
        results = run_all(probes, state, cases, runs=2)
    assert not faults(cases, results)
    assert set(seen(results)) <= {"too_complex", "sql_error", "ok"}, seen(results)


@pytest.mark.parametrize(("engine", "runs"), [("docker", 1), ("zygote", 2)])
async def test_M1_M6_in_containers_of_their_own_cases_end_the_same_and_leave_neighbours_and_launcher_as_they_were(
    cases, results, engine, runs
):
    """Engine zygote has the time for all of them, and twice."""
    expected = list(zip(cases, results, strict=True))
    chosen = expected if corpus.FULL or engine == "zygote" else random.Random(SEED).sample(expected, SAMPLE)
    with sealed_disk("size=256m") as state:
        real = {"image": Settings.from_environment().image, "engine": engine}
        async with launched(state, **real, slots=4, ttl_seconds=86_400) as (launcher, client):
            control = await client.create()
            before = leave_content(volume_of(state, control))
            await one_by_one(client, state, chosen[0][0])  # connections to the daemon are there from now on
            standing = {item["Id"] for item in containers_of(launcher.deployment)}
            at_start = launcher.descriptors(), mounts_under(state)
            queue = iter([item for item in chosen for _ in range(runs)])
            lists = await asyncio.gather(*(work_off(client, state, queue) for _ in range(4)))
            wrong = [*chain.from_iterable(lists)]
            assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong[:20]])
            assert fingerprint(volume_of(state, control)) == before
            assert (await client.health())["instances"] == 1
            assert {item["Id"] for item in containers_of(launcher.deployment)} == standing
            assert len(standing) == {"docker": 0, "zygote": 4}[engine]
            assert launcher.descriptors() <= at_start[0] + 4, "the pool's connections to the daemon, one for each run at a time"
            assert mounts_under(state) == at_start[1]


async def work_off(client: Client, state: Path, queue: Iterator[tuple[corpus.Case, list[list[Answer]]]]) -> list[str]:
    wrong = []
    for case, (expected, *_) in queue:
        for answer, sql, before in zip(await one_by_one(client, state, case), case.requests, expected, strict=True):
            if answer.startswith("!") or differ(answer, before.verdict()):
                wrong.append(f"{case.name} {answer}, before {before.verdict()} {sql[:300]!r}")
    return wrong


async def one_by_one(client: Client, state: Path, case: corpus.Case) -> list[str]:
    """Each request in a container of its own, on one instance, through the launcher."""
    instance = await client.create()
    volume = volume_of(state, instance)
    (volume / "db.sqlite").write_bytes(case.database)
    (volume / "db.sqlite-journal").write_bytes(case.journal)
    try:
        return [await told(through_the_launcher(client, instance, sql)) for sql in case.requests]
    finally:
        await client.ask(Verb.REMOVE, instance)


async def told(run: Coroutine[None, None, str]) -> str:
    """A run that the harness gives up on is one more fault in the list, not the loss of the list."""
    try:
        return await run
    except TimeoutError:
        return "! no end"


async def through_the_launcher(client: Client, instance: uuid.UUID, sql: str) -> str:
    async with client.run(instance) as (ours, replies):
        first = await replies.get()
        if first.status is not Status.STARTED:
            return f"! {first}"
        started = time.monotonic()
        try:
            payload = await exchange(ours, frame(sql), SETTINGS.max_reply_frame_bytes)
        except Exception as error:
            return f"! {error!r}"
        took = time.monotonic() - started
        last = await replies.get()
        if (last.status, last.verdict) == (Status.ENDED, Verdict.DEADLINE) and not payload:
            return "timeout"  # by the kill from outside
        if (last.status, last.verdict) != (Status.ENDED, Verdict.EXITED) or payload is None:
            return f"! {last}"
        return Answer(took, 0, len(payload).to_bytes(4, "big") + payload).verdict()


def volume_of(state: Path, instance: uuid.UUID) -> Path:
    return state / "instances" / str(instance) / "volume"


def mounts_under(state: Path) -> set[str]:
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(state) in line}
