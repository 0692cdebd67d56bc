"""The whole service from the outside: real HTTP, real processes, real containers."""

from __future__ import annotations

import asyncio
import math
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import eventually
from .deployment import ENGINES, Client, assert_error, client_of, deployed

DEADLINE_PLUS_A_SECOND = 3.0
under_each_engine = pytest.mark.engines(*ENGINES)
ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c) SELECT count(*) FROM c"


@under_each_engine
async def test_a_first_call_makes_a_database_and_the_token_finds_it_again(client):
    first = await client.sql("CREATE TABLE notes(body TEXT); INSERT INTO notes VALUES ('hello'), ('world')")
    assert first.status == 200
    assert first.body == {"rows_affected": 2}
    assert first.headers["X-Walkin-Session"].startswith("wkn_")
    assert abs(int(first.headers["X-Walkin-TTL"]) - time.time() - 600) < 60
    second = await client.sql("SELECT rowid, body FROM notes ORDER BY rowid")
    assert second.body == {"columns": ["rowid", "body"], "rows": [[1, "hello"], [2, "world"]], "rows_affected": 0}
    assert "X-Walkin-Session" not in second.headers


@under_each_engine
@pytest.mark.parametrize(
    ("sql", "status", "code", "text"),
    [
        ("ATTACH '/etc/passwd' AS p", 400, "forbidden", "forbidden sql keyword: ATTACH"),
        ("/* x */ aTtAcH '/etc/passwd' AS p", 400, "forbidden", "forbidden sql keyword: ATTACH"),
        ("SELECT load_extension('/lib/evil.so')", 400, "forbidden", "forbidden sql keyword: load_extension"),
        ("PRAGMA max_page_count=99999999", 400, "forbidden", "forbidden sql keyword: PRAGMA max_page_count"),
        ("PRAGMA page_size=65536", 400, "forbidden", "forbidden sql keyword: PRAGMA page_size"),
        ("VACUUM INTO '/data/copy.sqlite'", 400, "forbidden", "forbidden sql keyword: ATTACH"),
        ("SELECT readfile('/etc/shadow')", 400, "forbidden", "forbidden sql keyword: readfile"),
        ("SELEC 1", 400, "sql_error", 'invalid sql: near "SELEC": syntax error'),
        (ENDLESS, 408, "query_timeout", "query timeout"),
    ],
)
async def test_hostile_sql_gets_its_documented_answer_in_time(client, sql, status, code, text):
    await client.rows("SELECT 1")
    started = time.monotonic()
    answer = await client.sql(sql)
    assert_error(answer, status, code, text)
    if status == 408:
        assert time.monotonic() - started < DEADLINE_PLUS_A_SECOND + 5  # a slow machine's container start included
    assert await client.rows("SELECT 2") == [[2]]


@under_each_engine
async def test_W4_one_opcode_that_outlives_every_timer_is_still_answered(client):
    bomb = (
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c) "
        "SELECT sum(instr(s, s || 'b')), count(*) FROM c, (SELECT replace(hex(zeroblob(149000)), '0', 'a') s)"
    )
    assert_error(await client.sql(bomb), 408, "query_timeout", "query timeout")


@under_each_engine
async def test_W5_filling_the_database_ends_at_its_quota_and_it_can_be_emptied_again(client, mayfly):
    await client.sql("CREATE TABLE t(b)")
    for _ in range(8):
        answer = await client.sql(
            "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c WHERE n<50) INSERT INTO t SELECT randomblob(60000) FROM c"
        )
        if answer.status != 200:
            break
    assert_error(answer, 507, "storage_limit", "instance storage limit exceeded")
    for volume in (mayfly.state / "instances").glob("*/volume"):
        assert sum(path.stat().st_blocks * 512 for path in volume.iterdir()) <= 2 * (10 << 20)
    assert (await client.sql("DELETE FROM t")).status == 200
    assert (await client.sql("VACUUM")).status == 200
    assert (await client.sql("INSERT INTO t VALUES (1)")).status == 200


async def test_words_that_look_dangerous_are_legal_where_they_are_only_words(client):
    assert await client.rows("SELECT 'attach', 'pragma max_page_count'") == [["attach", "pragma max_page_count"]]
    assert (await client.sql('CREATE TABLE words(vacuum, "attach"); INSERT INTO words VALUES (1, 2)')).status == 200


@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        -1,
        2**63 - 1,
        -(2**63),
        1.5,
        -0.0,
        5e-324,
        1.7976931348623157e308,
        "",
        "text",
        "nul\0inside",
        "naïve ☃ 𝄞",
        {"$blob": ""},
        {"$blob": "AP8Q"},
        {"$real": "Infinity"},
        {"$real": "-Infinity"},
        {"$text": "/0E="},
    ],
)
async def test_M2_every_value_survives_the_way_through_a_table(client, value):
    await client.sql("CREATE TABLE v(x)")
    await client.sql("INSERT INTO v VALUES (?)", [value])
    [[back]] = await client.rows("SELECT x FROM v WHERE x IS :x", {"x": value})
    assert back == value
    assert type(back) is type(value)
    if value == 0:
        assert math.copysign(1, back) == math.copysign(1, value)


@under_each_engine
async def test_random_values_differ_between_requests_of_one_second(client):
    async def draw():
        return (await client.another().rows("SELECT hex(randomblob(16)), random()"))[0]

    drawn = await asyncio.gather(*(draw() for _ in range(6)))
    assert len({blob for blob, _ in drawn}) == len({number for _, number in drawn}) == 6


@under_each_engine
async def test_M8_temporary_objects_live_one_request_and_never_reach_the_file(client, mayfly):
    assert await client.rows("CREATE TEMP TABLE t(x); INSERT INTO t VALUES ('canary'); SELECT x FROM t") == [["canary"]]
    assert_error(await client.sql("SELECT x FROM t"), 400, "sql_error", "invalid sql: no such table: t")
    for volume in (mayfly.state / "instances").glob("*/volume"):
        assert all(b"canary" not in path.read_bytes() for path in volume.iterdir())


async def test_integers_come_as_strings_on_request(client):
    assert await client.rows("SELECT 9007199254740993, 1.5, 'x'", int64="string") == [["9007199254740993", 1.5, "x"]]
    assert await client.rows("SELECT ?", [{"$int": "9007199254740993"}]) == [[9007199254740993]]


@under_each_engine
async def test_M10_answers_are_cut_at_ten_thousand_rows_and_at_a_megabyte(client):
    endless = await client.sql("WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c) SELECT n FROM c")
    assert endless.body["truncated"] is True
    assert len(endless.body["rows"]) == 10_000
    wide = await client.sql("WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c) SELECT hex(zeroblob(50000)) FROM c")
    assert wide.body["truncated"] is True
    assert 900_000 < len(wide.raw) <= (1 << 20) + 1000
    exact = await client.sql("WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c LIMIT 10000) SELECT n FROM c")
    assert "truncated" not in exact.body


@pytest.mark.engines("docker")
async def test_W6c_a_busy_request_is_exactly_one_container_with_one_mount_and_none_is_left(client, mayfly):
    await client.rows("SELECT 1")
    eventually(lambda: not mayfly.containers())
    busy = asyncio.create_task(client.sql(ENDLESS))
    seen = []
    while not busy.done():
        seen.append([item for item in await asyncio.to_thread(mayfly.containers) if item["State"]["Running"]])
    assert_error(await busy, 408, "query_timeout")
    assert max(len(found) for found in seen) == 1
    [container] = next(found for found in seen if found)
    host = container["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["Privileged"] is False
    assert "no-new-privileges" in host["SecurityOpt"]
    assert any(option.startswith("seccomp={") for option in host["SecurityOpt"])
    assert (host["NetworkMode"], host["IpcMode"], host["CgroupnsMode"]) == ("none", "none", "private")
    assert host["Memory"] == host["MemorySwap"] == 128 << 20
    assert host["PidsLimit"] == 16
    assert host["NanoCpus"] == 10**9
    assert host["LogConfig"]["Type"] == "none"
    assert {item["Name"]: (item["Soft"], item["Hard"]) for item in host["Ulimits"]} == {
        "nofile": (64, 64),
        "fsize": (10 << 20, 10 << 20),
        "core": (0, 0),
    }
    assert not container["Config"]["User"].startswith(("0", "root"))
    [mount] = container["Mounts"]
    assert (mount["Type"], mount["Destination"], mount["RW"]) == ("bind", "/data", True)
    assert mount["Source"].startswith(str(mayfly.state / "instances"))
    eventually(lambda: not mayfly.containers())


@under_each_engine
async def test_health_says_which_engine_it_is_and_which_layers_the_runner_found(client, mayfly):
    async with client.http.get(f"{client.url}/healthz") as response:
        health = await response.json()
    assert (response.status, health["status"], health["engine"], health["separation"]) == (
        200,
        "ok",
        mayfly.engine,
        os.getuid() == 0,
    )
    assert health["runner"]["landlock_abi"] >= 3
    assert health["runner"]["sqlite_build"] == "hardened"
    assert "OMIT_LOAD_EXTENSION" in health["runner"]["compile_options"]


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@under_each_engine
async def test_W10_two_hundred_parallel_requests_of_twenty_instances_do_not_mix(mayfly):
    async with client_of(
        mayfly
    ) as client:  # from here on the launcher has all its connections to Docker, for as many as run at once
        await asyncio.gather(*(client.another().sql("SELECT 1") for _ in range(16)))
    eventually(lambda: not mayfly.at_work())
    before = {name: open_descriptors(mayfly.pid(name)) for name in ("launcher", "web")}
    async with client_of(mayfly) as client:
        await twenty_callers_ask_at_once([client.another() for _ in range(20)])
    eventually(lambda: not mayfly.at_work())
    for name, count in before.items():
        eventually(lambda name=name, count=count: open_descriptors(mayfly.pid(name)) <= count + 2)
    assert f"{mayfly.state}/instances" not in Path("/proc/self/mounts").read_text()


async def twenty_callers_ask_at_once(callers: list[Client]) -> None:
    for number, caller in enumerate(callers):
        answer = await caller.sql("CREATE TABLE own(caller, step UNIQUE); INSERT INTO own VALUES (?, -1)", [number])
        assert answer.status == 200

    async def one(number: int, step: int) -> None:
        sql = "INSERT INTO own VALUES (?, ?); SELECT DISTINCT caller FROM own"
        assert await callers[number].rows(sql, [number, step]) == [[number]]

    await asyncio.gather(*(one(number, step) for step in range(10) for number in range(20)))
    for number, caller in enumerate(callers):
        assert await caller.rows("SELECT count(*), min(caller), max(caller) FROM own") == [[11, number, number]]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become the gateway's user")
def test_W12_the_gateways_user_reaches_neither_docker_nor_volumes_nor_the_launchers_folder(mayfly):
    probe = f"""
import os, socket
for path in ["{mayfly.state}/instances", "{mayfly.state}/launcher", "{mayfly.state}/operator"]:
    try:
        os.listdir(path)
        print("readable", path)
    except PermissionError:
        pass
try:
    socket.socket(socket.AF_UNIX).connect("/var/run/docker.sock")
    print("docker answers")
except PermissionError:
    pass
"""
    command = ["setpriv", "--reuid", "mayfly-web", "--regid", "mayfly-web", "--init-groups", "/usr/bin/python3", "-c", probe]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""
    control = subprocess.run(["/usr/bin/python3", "-c", probe], capture_output=True, text=True, check=True).stdout
    assert len(control.splitlines()) == 4
    web, launcher = (os.stat(f"/proc/{mayfly.pid(name)}").st_uid for name in ("web", "launcher"))
    assert len({0, web, launcher}) == 3
    for name in ("web", "launcher"):
        process = Path(f"/proc/{mayfly.pid(name)}")
        assert "NoNewPrivs:\t1" in process.joinpath("status").read_text(), name
        [clone] = [line.split() for line in process.joinpath("mountinfo").read_text().splitlines() if line.split()[4] == "/srv"]
        assert {"ro", "nosuid", "nodev"} <= set(clone[5].split(",")), name


CAP_SYS_ADMIN = 1 << 21


def capabilities(pid: int) -> set[int]:
    """What stands in the five sets of capabilities; one member if they are all the same."""
    return {int(held, 16) for held in re.findall(r"^Cap\w+:\t([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a capability")
@pytest.mark.engines("zygote")
def test_W12_the_launcher_has_one_capability_for_engine_zygote_and_the_gateway_has_none(mayfly):
    assert capabilities(mayfly.pid("launcher")) == {CAP_SYS_ADMIN}
    assert capabilities(mayfly.pid("web")) == {0}
    shared = {name: os.readlink(f"/proc/{mayfly.pid(name)}/ns/mnt") for name in ("launcher", "web")}
    assert len({*shared.values(), os.readlink("/proc/self/ns/mnt")}) == 3


@pytest.mark.skipif(os.getuid() != 0, reason="only root could give a capability")
def test_W12_engine_docker_leaves_the_launcher_without_any_capability():
    with deployed(engine="docker") as mayfly:
        assert {number for name in ("launcher", "web") for number in capabilities(mayfly.pid(name))} == {0}


def test_gateway_and_launcher_have_their_settings_for_an_environment_and_every_descriptor_they_may(mayfly):
    for name in ("web", "launcher"):
        variables = {
            pair.split(b"=")[0].decode() for pair in Path(f"/proc/{mayfly.pid(name)}/environ").read_bytes().split(b"\0") if pair
        }
        assert {variable for variable in variables if not variable.startswith("MAYFLY_")} <= {"PATH", "LANG", "PWD", "OLDPWD"}, name
        [limits] = re.findall(r"^Max open files +(\d+) +(\d+)", Path(f"/proc/{mayfly.pid(name)}/limits").read_text(), re.MULTILINE)
        assert limits[0] == limits[1], name


async def test_W11_the_access_log_has_seven_fields_and_no_secret(client, mayfly):
    secret = "canary7531"
    await client.sql(f"CREATE TABLE {secret}(x); INSERT INTO {secret} VALUES ('{secret}')")
    await client.sql(f"SELECT ? AS {secret}", [secret])
    await client.http.get(f"{client.url}/healthz")
    eventually(lambda: any(line.get("instance_id") in mayfly.instances() for line in mayfly.access_log()))
    fields = {"timestamp", "source_ip", "instance_id", "http_method", "http_status", "sql_byte_length", "user_agent"}
    lines = mayfly.access_log()
    assert all(set(line) <= fields for line in lines)
    assert all(set(line) >= fields - {"instance_id", "sql_byte_length"} for line in lines)
    everything = "".join(path.read_text() for path in (mayfly.state / "log").iterdir()) + mayfly.logs()
    assert secret not in everything
    assert client.token is not None
    assert client.token not in everything
