"""Bombs: SQL and native code that want more memory, processor, disk or processes than one request has.

Each ends inside its own limit with its documented answer, its instance works on, and nobody else notices. That a bomb is one, its
control shows: with the limits far away the same statement has its way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.protocol import Verdict

from .conftest import eventually
from .containers import Probes
from .deployment import ENGINES, Answer, Client, Deployment, assert_error, client_of, deployed
from .engines import Contained, contained
from .exploits.tampering import folder_of

QUOTA = 10 << 20
# What ext4 may add to a file's blocks for the list of its extents.
EXTENTS = 64 << 10

ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c)"
MANY = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c LIMIT 100000)"
LONG = "(SELECT replace(hex(zeroblob(149000)), '0', 'a') s)"  # 298,000 characters, as long as a text may be
TOO_BIG = ("sql_error", "invalid sql: string or blob too big")


def fill(rows: int) -> str:
    return (
        f"WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c LIMIT {rows}) INSERT INTO t SELECT randomblob(60000) FROM c"
    )


@dataclass(frozen=True, slots=True)
class Bomb:
    sql: str
    status: int
    code: str
    text: str | None = None
    first: str = ""
    """What is done in the instance before."""


def memory(sql: str, **more: str) -> Bomb:
    return Bomb(sql, 400, "memory_limit", "invalid sql: out of memory", **more)


def forbidden(sql: str, what: str) -> Bomb:
    return Bomb(sql, 400, "forbidden", f"forbidden sql keyword: {what}")


def endless(sql: str, **more: str) -> Bomb:
    return Bomb(sql, 408, "query_timeout", "query timeout", **more)


def full(sql: str, **more: str) -> Bomb:
    return Bomb(sql, 507, "storage_limit", "instance storage limit exceeded", **more)


MEMORY = {
    "a sort": memory(f"{MANY} SELECT n, randomblob(1000) r FROM c ORDER BY r"),
    "a union that remembers": memory(
        "WITH RECURSIVE c(n, b) AS (SELECT 1, randomblob(1000) UNION SELECT n+1, randomblob(1000) FROM c) SELECT count(*) FROM c"
    ),
    "a recursion whose queue grows": memory(
        "WITH RECURSIVE c(n, b) AS (SELECT 1, randomblob(9000) UNION ALL SELECT n+1, randomblob(9000) FROM c, (VALUES (1), (2))) "
        "SELECT count(*) FROM c"
    ),
    "distinct values": memory(f"{MANY} SELECT count(DISTINCT randomblob(1000)) FROM c"),
    "a window": memory(f"{MANY} SELECT n, max(randomblob(900)) OVER (ORDER BY n), randomblob(900) r FROM c ORDER BY r"),
    "group_concat": Bomb(f"{MANY} SELECT group_concat(hex(randomblob(100))) FROM c", 400, *TOO_BIG),
    "a temporary table": memory(f"CREATE TEMP TABLE z AS {MANY} SELECT randomblob(1000) b FROM c"),
    "a temporary index": memory(
        f"CREATE TEMP TABLE z(a); CREATE INDEX temp.i ON z(a); INSERT INTO z {MANY} SELECT randomblob(1000) FROM c"
    ),
    "savepoints": memory(
        "BEGIN; " + "".join(f"SAVEPOINT s{n}; UPDATE t SET b = randomblob(60000); " for n in range(30)) + "ROLLBACK",
        first=f"CREATE TABLE t(b); {fill(70)}",
    ),
    "randomblob": Bomb("SELECT randomblob(1000000000)", 400, *TOO_BIG),
    "zeroblob": Bomb("SELECT length(zeroblob(2147483647))", 400, *TOO_BIG),
    "hex": Bomb("SELECT hex(zeroblob(200000))", 400, *TOO_BIG),
    "printf": Bomb("SELECT printf('%*c', 1000000000, 'x')", 400, *TOO_BIG),
    "replace": Bomb(f"SELECT length(replace(s, 'a', s)) FROM {LONG}", 400, *TOO_BIG),
    "concatenation": Bomb(f"SELECT length(s || s) FROM {LONG}", 400, *TOO_BIG),
    "a long list": Bomb(f"SELECT 5 IN ({','.join('1' * 40_000)})", 400, "too_complex"),
    "brackets": Bomb("SELECT " + "(" * 5000 + "1" + ")" * 5000, 400, "sql_error"),
    "terms": Bomb("SELECT " + "+".join(["1"] * 300), 400, "sql_error"),
    "compound selects": Bomb(" UNION ALL ".join(["SELECT 1"] * 200), 400, "sql_error"),
    "nested json": Bomb("SELECT json('" + "[" * 40_000 + "]" * 40_000 + "')", 400, "sql_error", "invalid sql: malformed JSON"),
}

DISK = {
    "rows": full(f"CREATE TABLE t(b); {fill(100_000)}"),
    "zeroes": full(f"CREATE TABLE t(b); {ENDLESS} INSERT INTO t SELECT zeroblob(250000) FROM c"),
    "many small transactions": full(f"CREATE TABLE t(b); {';'.join([fill(10)] * 40)}"),
    "an index": full("CREATE INDEX i ON t(b)", first=f"CREATE TABLE t(b); {fill(100)}"),
    "a full-text index": full(f"CREATE VIRTUAL TABLE f USING fts5(x); INSERT INTO f {MANY} SELECT hex(randomblob(2000)) FROM c"),
    "VACUUM of a full database": Bomb("VACUUM; VACUUM", 200, "", first=f"CREATE TABLE t(b); {fill(160)}"),
    "a transaction that is rolled back": Bomb(
        f"BEGIN; UPDATE t SET b = randomblob(60000); DELETE FROM t; {fill(140)}; ROLLBACK",
        200,
        "",
        first=f"CREATE TABLE t(b); {fill(150)}",
    ),
    "temporary tables": memory(f"CREATE TEMP TABLE t(b); {fill(100_000)}"),
    "larger pages": forbidden("PRAGMA page_size=65536; VACUUM", "PRAGMA page_size"),
    "more pages": forbidden("PRAGMA max_page_count=1000000000", "PRAGMA max_page_count"),
    "a write-ahead log": forbidden("PRAGMA journal_mode=WAL", "PRAGMA journal_mode"),
    "temporary files": forbidden("PRAGMA temp_store=FILE", "PRAGMA temp_store"),
    "a copy": forbidden("VACUUM INTO '/data/more.sqlite'", "ATTACH"),
    "another database": forbidden("ATTACH '/data/more.sqlite' AS more", "ATTACH"),
}

PROCESSOR = {
    "an endless recursion": endless(f"{ENDLESS} SELECT count(*) FROM c"),
    "a cross join": endless(
        "WITH a(n) AS (VALUES " + ",".join(f"({n})" for n in range(300)) + ") "
        "SELECT count(*) FROM a x, a y, a z, a u WHERE x.n + y.n + z.n + u.n = -1"
    ),
    "instr": endless(f"{ENDLESS} SELECT sum(instr(s, substr(s, 1, 100000) || 'b')), count(*) FROM c, {LONG}"),
    "replace": endless(f"{ENDLESS} SELECT sum(length(replace(s, substr(s, 1, 100000) || 'b', ''))) FROM c, {LONG}"),
    "LIKE": endless(f"{ENDLESS} SELECT sum(s LIKE '{'%a' * 40}%b') FROM c, {LONG}"),
    "GLOB": endless(f"{ENDLESS} SELECT sum(s GLOB '{'*a' * 40}*b') FROM c, {LONG}"),
    "a long pattern": Bomb(f"SELECT 'a' LIKE '{'%a' * 60}'", 400, "sql_error", "invalid sql: LIKE or GLOB pattern too complex"),
    "REGEXP": endless(f"{ENDLESS} SELECT sum(s REGEXP '(a?){{400}}b') FROM c, {LONG}"),
    "a trigger that calls itself": Bomb(
        "PRAGMA recursive_triggers=1; INSERT INTO l VALUES (1)",
        400, "sql_error", "invalid sql: too many levels of trigger recursion",
        first="CREATE TABLE l(n); CREATE TRIGGER r AFTER INSERT ON l BEGIN INSERT INTO l VALUES (new.n+1), (new.n+2); END",
    ),
    "a trigger that does not end": endless(
        "INSERT INTO l VALUES (1)",
        first="CREATE TABLE l(n); CREATE TRIGGER r AFTER INSERT ON l BEGIN "
        f"SELECT count(*) FROM ({ENDLESS} SELECT n FROM c LIMIT 1000000000); END",
    ),
    "a view that does not end": endless("SELECT * FROM v", first=f"CREATE VIEW v AS {ENDLESS} SELECT count(*) FROM c"),
    "a correlated subquery": endless(
        "SELECT count(*) FROM q x WHERE NOT EXISTS (SELECT 1 FROM q y WHERE +y.a = -x.a)",
        first=f"CREATE TABLE q(a); INSERT INTO q {MANY} SELECT n FROM c",
    ),
    "random bytes": endless(f"{ENDLESS} SELECT sum(length(hex(randomblob(100000)))) FROM c"),
}  # fmt: skip


@pytest.fixture(scope="module", params=ENGINES)
def patient(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """The limits of production but for the deadline: on a slow machine too it is the limit that ends a bomb, not the clock."""
    with deployed(engine=request.param, deadline_seconds="30") as deployment:
        yield deployment


@pytest.fixture(scope="module")
def roomy() -> Iterator[Deployment]:
    """Limits so far away that a bomb has its way."""
    room = {"heap_bytes": 1 << 30, "container_memory_bytes": 2 << 30, "instance_bytes": 512 << 20, "limit_length": 1 << 28}
    shape = {"limit_vdbe_op": 10**7, "limit_sql_length": 10**6, "limit_compound_select": 500, "limit_expr_depth": 1000}
    with deployed(deadline_seconds="60", **{name: str(value) for name, value in (room | shape).items()}) as deployment:
        yield deployment


@pytest.fixture
async def caller(patient: Deployment) -> AsyncIterator[Client]:
    async with client_of(patient) as client:
        yield client


async def prepare(caller: Client, bomb: Bomb) -> None:
    if bomb.first:
        assert (await caller.sql(bomb.first)).status == 200


def assert_documented(bomb: Bomb, answer: Answer) -> None:
    if bomb.status == 200:
        assert answer.status == 200, answer.body
    else:
        assert_error(answer, bomb.status, bomb.code, bomb.text)


@pytest.mark.parametrize("name", MEMORY)
async def test_a_memory_bomb_is_refused_and_its_instance_works_on(caller: Client, name: str) -> None:
    bomb = MEMORY[name]
    await prepare(caller, bomb)
    assert_documented(bomb, await caller.sql(bomb.sql))
    assert await caller.rows("SELECT 'still here'") == [["still here"]]


@pytest.mark.parametrize("name", DISK)
async def test_W5_a_disk_bomb_never_holds_more_than_two_files_of_the_quota(caller: Client, patient: Deployment, name: str) -> None:
    bomb = DISK[name]
    await caller.rows("SELECT 1")
    await prepare(caller, bomb)
    volume = folder_of(patient, caller.token) / "volume"
    attack = asyncio.create_task(caller.sql(bomb.sql))
    most = 0
    while not attack.done():
        most = max(most, await asyncio.to_thread(used_bytes, volume))
    assert_documented(bomb, await attack)
    assert max(most, used_bytes(volume)) <= 2 * QUOTA + EXTENTS
    assert {path.name for path in volume.iterdir()} == {"db.sqlite", "db.sqlite-journal"}
    assert await caller.rows("SELECT 'still here'") == [["still here"]]
    assert (volume / "db.sqlite-journal").stat().st_size == 0


def used_bytes(volume: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in volume.iterdir())


@pytest.mark.parametrize("bomb", [DISK["rows"], DISK["a full-text index"]], ids=["rows", "full text"])
async def test_a_full_instance_can_be_emptied_and_used_again(caller: Client, bomb: Bomb) -> None:
    assert_documented(bomb, await caller.sql(bomb.sql))
    names = await caller.rows("SELECT name FROM sqlite_schema WHERE type = 'table' AND (name = 't' OR sql LIKE 'CREATE VIRTUAL%')")
    assert (await caller.sql("; ".join(f"DROP TABLE {name}" for [name] in names) + "; VACUUM")).status == 200
    assert (await caller.sql(f"CREATE TABLE t(b); {fill(100)}")).status == 200


UNBOUND = (
    "a sort", "distinct values", "a window", "group_concat", "a temporary table", "a temporary index", "hex", "concatenation",
    "savepoints", "a long list", "terms", "compound selects",
)  # fmt: skip


@pytest.mark.parametrize("name", UNBOUND)
async def test_the_memory_bomb_goes_off_where_the_limits_are_far_away(roomy: Deployment, name: str) -> None:
    async with client_of(roomy) as caller:
        await prepare(caller, MEMORY[name])
        assert (await caller.sql(MEMORY[name].sql)).status == 200


async def test_the_disk_bomb_goes_off_where_the_quota_is_far_away(roomy: Deployment) -> None:
    async with client_of(roomy) as caller:
        assert (await caller.sql(f"CREATE TABLE t(b); {fill(1000)}; CREATE INDEX i ON t(b)")).status == 200
        assert used_bytes(folder_of(roomy, caller.token) / "volume") > 4 * QUOTA


# --- twenty at once


@pytest.mark.parametrize("engine", ENGINES)
async def test_M3_twenty_bombs_at_once_each_end_and_another_tenant_is_served_correctly_meanwhile(engine: str) -> None:
    bombs = {**PROCESSOR, **{name: MEMORY[name] for name in ("a sort", "a temporary table", "savepoints", "distinct values")}}
    bombs |= {name: DISK[name] for name in ("rows", "a full-text index", "a transaction that is rolled back")}
    assert len(bombs) == 20
    # The wait for a slot is as long as it takes here: whether twenty requests fit in a queue of thirty seconds is not the question.
    with deployed(engine=engine, queue_timeout_seconds="300") as mayfly:
        async with client_of(mayfly) as neighbour:
            callers = {name: neighbour.another() for name in bombs}
            await asyncio.gather(*(prepare(callers[name], bomb) for name, bomb in bombs.items()))
            await neighbour.rows("CREATE TABLE own(x); INSERT INTO own VALUES (0); SELECT 1")
            attacks = {name: asyncio.create_task(callers[name].sql(bomb.sql)) for name, bomb in bombs.items()}
            served = 0
            while served < 3 or not all(attack.done() for attack in attacks.values()):
                served += 1
                assert await neighbour.rows("UPDATE own SET x = x + 1; SELECT x FROM own") == [[served]]
            for name, bomb in bombs.items():
                answer = await attacks[name]
                if name in PROCESSOR or answer.status != 408:  # what its limit does not end in time, the deadline does
                    assert_documented(bomb, answer)
            survivors = await asyncio.gather(*(caller.rows("SELECT 'still here'") for caller in callers.values()))
            assert survivors == [[["still here"]]] * 20
            eventually(lambda: not mayfly.at_work())


# --- native code


@pytest.fixture(scope="module", params=ENGINES)
def here(request: pytest.FixtureRequest) -> Iterator[Contained]:
    """What native code can do in a container of either engine."""
    with contained(request.param) as (container, _):
        yield container


@pytest.fixture(scope="module")
def docker() -> Iterator[tuple[Contained, Probes]]:
    with contained("docker") as both:
        yield both


@pytest.mark.parametrize("confine", [False, True], ids=["before confinement", "after confinement"])
async def test_native_code_fills_two_files_and_no_more(here: Contained, confine: bool) -> None:
    instance, volume = here.new_volume()
    attack = asyncio.create_task(here.run({"do": "attack", "attacks": ["fill_both_files"], "confine": confine}, instance=instance))
    most = 0
    while not attack.done():
        most = max(most, await asyncio.to_thread(used_bytes, volume))
    assert (await attack).report == {"fill_both_files": [QUOTA, QUOTA]}
    assert QUOTA < max(most, used_bytes(volume)) <= 2 * QUOTA + EXTENTS


@pytest.mark.parametrize("confine", [False, True], ids=["before confinement", "after confinement"])
async def test_no_file_can_claim_a_size_beyond_the_quota(here: Contained, confine: bool) -> None:
    instance, volume = here.new_volume()
    attacks = ["write_far_out", "seek_far_out", "truncate_far_out", "truncate_to_the_last_byte"]
    report = (await here.run({"do": "attack", "attacks": attacks, "confine": confine}, instance=instance)).report
    assert report == dict.fromkeys(attacks[:3], "EFBIG") | {"truncate_to_the_last_byte": "done"}
    assert (volume / "db.sqlite").stat().st_size == QUOTA


def test_native_code_fills_the_disk_where_nothing_limits_it(docker: tuple[Contained, Probes]) -> None:
    _, probes = docker
    order = {
        "do": "attack",
        "attacks": ["fill_both_files", "write_far_out"],
        "make": ["/data/db.sqlite", "/data/db.sqlite-journal"],
    }
    data = "rw,uid=64700,size=40m"
    report = probes.run(order, probe="/conformance.py", seccomp=None, data=data, host={"Ulimits": []}).report
    assert report == {"fill_both_files": "ENOSPC", "write_far_out": "ENOSPC"}, "the disk itself was the limit"


def test_a_fork_bomb_ends_at_the_limit_of_processes(docker: tuple[Contained, Probes]) -> None:
    _, probes = docker
    order = {"do": "breed", "most": 100}
    free = probes.run(order, probe="/conformance.py", seccomp=None, host={"PidsLimit": 0}).report
    assert free == {"processes": 101, "refused": None}
    limited = probes.run(order, probe="/conformance.py", seccomp=None).report
    assert limited == {"processes": 16, "refused": "EAGAIN"}


async def test_a_bomb_that_outlives_every_timer_of_the_runner_is_killed_from_outside(here: Contained) -> None:
    run = await here.run({"do": "burn", "seconds": 600}, deadline_seconds=0.3, grace_seconds=0.1)
    assert run.verdict is Verdict.DEADLINE
