"""infra/presets: every line is a setting, and under a deployment with the preset each number is where requests begin to fail."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway.launcher.specification import runner_configuration
from gateway.settings import Settings
from runner.configuration import Configuration

from .deployment import FASTEST, REPO, Client, Deployment, assert_error, client_of, deployed

PRESETS = REPO / "infra" / "presets"
READ_BEFORE_THE_PRESET = {"MAYFLY_STATE_DIR", "MAYFLY_LISTEN", "MAYFLY_IMAGE", "MAYFLY_ENGINE", "MAYFLY_DOCKER_SOCKET"}
PAGES = 2560


def settings_of(preset: Path) -> dict[str, str]:
    """As systemd's EnvironmentFile and compose's env_file read it: comments, and NAME=VALUE without quotes."""
    lines = [line for line in preset.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"MAYFLY_[A-Z0-9_]+=[^\s\"'$\\]+", line) for line in lines)
    named = [line.partition("=")[::2] for line in lines]
    assert len(dict(named)) == len(named)
    return dict(named)


WALKINDB = settings_of(PRESETS / "walkindb.env")


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.env")), ids=lambda path: path.stem)
def test_every_line_of_a_preset_is_a_setting_that_infra_up_has_not_read_before(preset: Path) -> None:
    named = settings_of(preset)
    Settings.from_environment(named)
    assert not READ_BEFORE_THE_PRESET & set(named)


def test_the_numbers_of_walkindb_are_its_own() -> None:
    settings = Settings.from_environment(WALKINDB)
    given = {name: value for name, value in settings.sqlite_limits.items() if f"MAYFLY_LIMIT_{name}" in WALKINDB}
    assert given == {
        "VDBE_OP": 500_000, "SQL_LENGTH": 8 << 10, "LENGTH": 1 << 20, "EXPR_DEPTH": 50, "COMPOUND_SELECT": 10,
        "LIKE_PATTERN_LENGTH": 100, "VARIABLE_NUMBER": 100, "TRIGGER_DEPTH": 5, "FUNCTION_ARG": 16, "ATTACHED": 0,
    }  # fmt: skip
    assert Configuration.parse(runner_configuration(settings)).max_pages == PAGES
    assert (settings.deadline_seconds, settings.max_rows, settings.max_result_bytes) == (2.0, 10_000, 1 << 20)
    assert (settings.rate_requests_per_minute, settings.rate_creates_per_minute) == (60, 10)
    assert (settings.ttl_seconds, settings.reap_interval_seconds) == (600, 30.0)
    assert (settings.key_rotation_seconds, settings.access_log_days) == (24 * 60 * 60, 7)


def test_an_unknown_preset_is_refused_with_the_list(tmp_path: Path) -> None:
    environment = {**os.environ, "MAYFLY_STATE_DIR": str(tmp_path / "state")}
    for name in ("walkindb.env", "../presets/walkindb", "nope", ""):
        done = subprocess.run([REPO / "infra/up", "-d", "--preset", name], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1, f"mayfly: no preset '{name}'; there are: walkindb\n")
    assert not (tmp_path / "state").exists()


@pytest.fixture(scope="module")
def walkindb() -> Iterator[Deployment]:
    # Memory for programs that are too long, which are refused as out of memory otherwise.
    roomy = {"heap_bytes": str(200 << 20), "container_memory_bytes": str(400 << 20)}
    with deployed(preset="walkindb", ttl_seconds="1234", engine=FASTEST, **roomy) as deployment:
        yield deployment


@pytest.fixture
async def caller(walkindb: Deployment) -> AsyncIterator[Client]:
    async with client_of(walkindb) as client:
        yield client


def test_both_processes_have_the_preset_and_a_variable_that_was_set_wins(walkindb: Deployment) -> None:
    for process in ("web", "launcher"):
        environment = Path(f"/proc/{walkindb.pid(process)}/environ").read_bytes().decode().split("\0")
        found = dict(line.partition("=")[::2] for line in environment if line.startswith("MAYFLY_"))
        explicit = {"MAYFLY_TTL_SECONDS": "1234", "MAYFLY_RATE_REQUESTS_PER_MINUTE": "0", "MAYFLY_RATE_CREATES_PER_MINUTE": "0"}
        assert {name: found[name] for name in WALKINDB} == {**WALKINDB, **explicit}


def triggers(count: int) -> str:
    """A chain of so many triggers, each of which sets off the next."""
    tables = "".join(f"CREATE TABLE t{n}(x);" for n in range(count + 1))
    chain = (f"CREATE TRIGGER r{n} AFTER INSERT ON t{n} BEGIN INSERT INTO t{n + 1} VALUES (1); END;" for n in range(count))
    return tables + "".join(chain) + "INSERT INTO t0 VALUES (1)"


def of_bytes(count: int) -> str:
    start = "SELECT 1 --"
    return start + "x" * (count - len(start))


def program(columns: int) -> str:
    """A statement of 8,192 operations for each of its columns, from views that double each other's expression."""
    views = (f"CREATE VIEW v{n + 1} AS SELECT c + c AS c FROM v{n};" for n in range(12))
    chain = "CREATE TABLE t(x); CREATE VIEW v0 AS SELECT x AS c FROM t;" + "".join(views)
    return chain + f"SELECT {', '.join(['c'] * columns)} FROM v12"


# Each limit with SQL that needs as much as it is given: the most that is allowed passes, one more does not.
SHARP = {
    "SQL_LENGTH": (of_bytes, "too_complex"),
    "LENGTH": (lambda n: f"SELECT length(zeroblob({n}))", "sql_error"),
    "EXPR_DEPTH": (lambda n: "SELECT " + "+".join(["1"] * n), "sql_error"),
    "COMPOUND_SELECT": (lambda n: " UNION ALL ".join(["SELECT 1"] * n), "sql_error"),
    "FUNCTION_ARG": (lambda n: f"SELECT max({','.join(['1'] * n)})", "sql_error"),
    "LIKE_PATTERN_LENGTH": (lambda n: f"SELECT 'a' LIKE '{'b' * n}'", "sql_error"),
    "VARIABLE_NUMBER": (lambda n: f"SELECT ?{n}", "sql_error"),
    "TRIGGER_DEPTH": (triggers, "sql_error"),
}


@pytest.mark.parametrize("limit", SHARP)
async def test_a_limit_of_walkindb_is_exactly_its_number(caller: Client, limit: str) -> None:
    sql, code = SHARP[limit]
    most = int(WALKINDB[f"MAYFLY_LIMIT_{limit}"])
    args = [None] * most if limit == "VARIABLE_NUMBER" else None
    answer = await caller.sql(sql(most), args)
    assert answer.status == 200, answer.body
    assert_error(await caller.another().sql(sql(most + 1), args), 400, code)


async def test_programs_are_as_long_as_walkindbs(caller: Client, mayfly: Deployment) -> None:
    """Not sharp: SQLite doubles a program's memory as it grows and refuses the doubling, so from half the number on it may."""
    half, too_long = program(30), program(62)
    assert 100_000 < 30 * 8192 < 500_000 / 2 < 500_000 < 62 * 8192
    assert (await caller.sql(half)).status == 200
    assert_error(await caller.another().sql(too_long), 400, "too_complex")
    async with client_of(mayfly) as of_the_defaults:
        assert_error(await of_the_defaults.sql(half), 400, "too_complex")


async def test_no_database_is_attached(caller: Client) -> None:
    assert_error(await caller.sql("ATTACH ':memory:' AS a"), 400, "forbidden")


async def test_an_instance_has_2560_pages_and_then_it_is_full(caller: Client) -> None:
    await caller.sql("CREATE TABLE t(x)")
    one_page = "INSERT INTO t SELECT zeroblob(4000) FROM c"
    filled = f"WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT {PAGES - 20}) {one_page}"
    assert (await caller.sql(filled)).status == 200
    pages = [[0]]
    while (answer := await caller.sql("INSERT INTO t VALUES (zeroblob(4000)); PRAGMA page_count")).status == 200:
        assert pages[0][0] < answer.body["rows"][0][0]
        pages = answer.body["rows"]
    assert pages == [[PAGES]]
    assert_error(answer, 507, "storage_limit", "instance storage limit exceeded")
