"""/metrics: what it says, whom it does not wait for, what it never holds; and the dashboard, the alerts and the table."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from gateway.launcher import metrics as launcher_metrics
from gateway.launcher.footprint import Footprint
from gateway.metrics import BOUNDS, Durations, Family, Process, exposition
from gateway.protocol import MAX_DETAIL_BYTES, Status, Verb
from gateway.settings import Settings, SettingsError
from gateway.web import metrics as web_metrics
from gateway.web import scrape
from gateway.web.__main__ import addresses
from gateway.web.appkeys import ACCESS_LOG, CREATE_RATE, TRAFFIC
from gateway.web.breaker import Reason
from gateway.web.errors import leaves
from gateway.web.metrics import Metrics
from gateway.web.routes import PATHS
from gateway.web.scrape import scraped
from gateway.web.traffic import METHODS, OTHER

from .conftest import eventually
from .deployment import FASTEST, Deployment, client_of, deployed, free_address
from .fake_launcher import Gateway, frame, gateway, replying, until
from .test_web_canary import CANARY, FORGED, assert_silent
from .test_web_process import start

REPO = Path(__file__).resolve().parent.parent
MONITORING = REPO / "infra" / "monitoring"
FAMILIES = (*web_metrics.FAMILIES, *launcher_metrics.FAMILIES)
LAUNCHERS_TEXT = "# HELP mayfly_launcher_x A test's.\n# TYPE mayfly_launcher_x gauge\nmayfly_launcher_x 7.0\n"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> dict[str, Metric]:
    """By name, as Prometheus reads it; fails when a family or a sample is there twice."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    samples = [(sample.name, frozenset(sample.labels.items())) for family in families for sample in family.samples]
    assert len(set(samples)) == len(samples)
    assert text.count("# TYPE") == len(families)
    return {family.name + ("_total" if family.type == "counter" else ""): family for family in families}


def samples(text: str) -> Samples:
    found = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in found}


def of(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


async def scraped_text(address: str) -> str:
    async with aiohttp.ClientSession() as http, http.get(f"http://{address}/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return await response.text()


# ── what they are made of


def test_a_duration_counts_in_the_first_bucket_whose_bound_it_does_not_exceed():
    durations = Durations()
    for seconds in (0.0, BOUNDS[0], BOUNDS[0] + 1e-9, 60.0, 61.0):
        durations.observe(seconds)
    family = Family("x_seconds", "histogram", "Of a test.").spread({(): durations})
    counted = {sample.labels.get("le"): sample.value for sample in family.samples if sample.name == "x_seconds_bucket"}
    assert (counted["0.0005"], counted["0.001"], counted["30.0"], counted["60.0"], counted["+Inf"]) == (2, 3, 3, 4, 5)
    assert [*counted] == [*map(str, BOUNDS), "+Inf"]
    values = {sample.name: sample.value for sample in family.samples}
    assert values["x_seconds_count"] == 5
    assert values["x_seconds_sum"] == pytest.approx(121.001 + 1e-9)


def test_the_process_is_described_even_where_proc_shows_nothing_but_processes(monkeypatch, tmp_path):
    (tmp_path / "self").symlink_to("/proc/self")
    process = Process("x")
    process._proc = str(tmp_path)
    found = samples(exposition(process).decode())
    started = of(found, "x_process_start_time_seconds")
    began = float(Path("/proc/self/stat").read_text().rsplit(")")[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    booted = next(int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    assert started == pytest.approx(booted + began, abs=2)
    assert of(found, "x_process_resident_memory_bytes") > 1 << 20
    process._proc = str(tmp_path / "hidden")
    assert exposition(process) == b""


def test_the_footprint_is_that_of_the_files_and_one_look_does_not_take_long(tmp_path, monkeypatch):
    for number in range(100):
        volume = tmp_path / f"i{number}" / "volume"
        volume.mkdir(parents=True)
        (volume / "db.sqlite").write_bytes(b"x" * 8192)
    (tmp_path / ".new-x").mkdir()
    (tmp_path / "i0" / "volume" / "db.sqlite").unlink()
    footprint = Footprint(tmp_path, 30.0)
    monkeypatch.setattr("gateway.launcher.footprint._LOOK_SECONDS", 0.0)
    for _ in range(99):
        footprint.look()
        assert footprint.bytes == 0, "published before all were gone through"
    footprint.look()
    assert footprint.bytes == 99 * 8192
    monkeypatch.setattr("gateway.launcher.footprint._LOOK_SECONDS", 60.0)
    (tmp_path / "i1" / "volume" / "db.sqlite").unlink()
    footprint.look()
    assert footprint.bytes == 98 * 8192


# ── the gateway's part


@asynccontextmanager
async def watched(state: Path, **settings: object) -> AsyncIterator[tuple[Gateway, str]]:
    """A gateway with a fake launcher, and the address of its metrics."""
    async with gateway(state, **settings) as web, scraped("127.0.0.1", 0, Metrics(web.server).text) as port:
        yield web, f"127.0.0.1:{port}"


async def test_requests_are_counted_by_route_method_status_and_code(tmp_path):
    async with watched(tmp_path, rate_creates_per_minute=3) as (web, address):
        assert (await web.sql()).status == 200
        web.launcher.script = replying(frame({"v": 1, "verdict": "sql_error", "message": "near"}))
        assert (await web.sql()).status == 400
        web.launcher.script = replying(b"")
        assert (await web.sql()).status == 500
        assert (await web.sql()).status == 429
        assert (await web.get("/livez")).status == 200
        assert (await web.get("/metrics")).status == 404
        assert (await web.get("/sql")).status == 405
        async with web.client.request("DELETE", web.url + f"/{CANARY}") as response:
            assert response.status == 404
        assert (await web.raw(b"nonsense\r\n\r\n")).startswith(b"HTTP/1.")
        found = samples(await scraped_text(address))
    for expected in (
        {"route": "/sql", "method": "POST", "status": "200", "code": ""},
        {"route": "/sql", "method": "POST", "status": "400", "code": "sql_error"},
        {"route": "/sql", "method": "POST", "status": "500", "code": "runner_failed"},
        {"route": "/sql", "method": "POST", "status": "429", "code": "rate_limited"},
        {"route": "/livez", "method": "GET", "status": "200", "code": ""},
        {"route": "other", "method": "GET", "status": "404", "code": "not_found"},
        {"route": "/sql", "method": "GET", "status": "405", "code": "method_not_allowed"},
        {"route": "other", "method": "DELETE", "status": "404", "code": "not_found"},
        {"route": "other", "method": "other", "status": "400", "code": "bad_request"},
    ):
        assert of(found, "mayfly_requests_total", **expected) == 1, expected
    assert sum(value for (name, _), value in found.items() if name == "mayfly_requests_total") == 9
    assert of(found, "mayfly_rate_limited_total", limit="creates") == 1
    assert of(found, "mayfly_rate_limited_total", limit="requests") == 0
    assert of(found, "mayfly_request_seconds_count", route="/sql") == 5
    assert of(found, "mayfly_run_seconds_count") == 3
    assert of(found, "mayfly_queue_seconds_count") == 3


async def test_the_values_of_labels_are_closed_sets_whatever_callers_send(tmp_path):
    async with watched(tmp_path) as (web, address):
        for number in range(20):
            await web.raw(f"X{number} /{number}?{number} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            async with web.client.get(f"{web.url}/{CANARY}/{number}", headers={"X-Walkin-Session": FORGED}) as response:
                assert response.status == 404
        text = await scraped_text(address)
    known = {
        "route": {*PATHS, OTHER},
        "method": {*METHODS, OTHER},
        "code": {"", *(error.code for error in leaves())},
        "status": {str(error.status) for error in leaves()} | {"200", "204", "499"},
    }
    for sample in parsed(text)["mayfly_requests_total"].samples:
        for label, value in sample.labels.items():
            assert value in known[label]
    assert_silent("metrics", text.encode(), [FORGED])


async def test_what_the_parts_count_is_what_is_told(tmp_path):
    async with watched(tmp_path, connections_per_address=3) as (web, address):
        web.app[ACCESS_LOG].lost["disk"] = 4
        web.app[CREATE_RATE].refused = 5
        held = [await asyncio.open_connection("127.0.0.1", web.port) for _ in range(3)]
        await until(lambda: web.server.door.connections >= 3)
        found = samples(await scraped_text(address))
        for _, writer in held:
            writer.close()
    assert of(found, "mayfly_access_log_lost_lines_total", reason="disk") == 4
    assert of(found, "mayfly_rate_limited_total", limit="creates") == 5
    assert of(found, "mayfly_connections") == 3
    assert of(found, "mayfly_breaker_state", state="closed") == 1
    assert {dict(labels)["reason"] for name, labels in found if name == "mayfly_breaker_openings_total"} == {*Reason}
    assert 0 <= of(found, "mayfly_key_age_seconds") < 3600
    assert of(found, "mayfly_key_rotation_seconds") == web.settings.key_rotation_seconds


async def test_a_connection_that_is_turned_away_is_counted(tmp_path):
    async with watched(tmp_path, connections_per_address=1) as (web, address):
        _, writer = await asyncio.open_connection("127.0.0.1", web.port)
        await until(lambda: web.server.door.connections == 1)
        with pytest.raises(ConnectionResetError):  # met by whichever call looks first
            await web.raw(b"")
        found = samples(await scraped_text(address))
        writer.close()
    assert of(found, "mayfly_connections_refused_total", reason="address") == 1
    assert of(found, "mayfly_connections_refused_total", reason="full") == 0


# ── the launcher's part, behind it


async def test_the_launchers_text_follows_the_gateways_own(tmp_path):
    async with watched(tmp_path) as (web, address):
        web.launcher.metrics = LAUNCHERS_TEXT
        found = parsed(await scraped_text(address))
    assert found["mayfly_launcher_x"].samples[0].value == 7
    assert found["mayfly_launcher_up"].samples[0].value == 1
    assert {*found} == {family.name for family in web_metrics.FAMILIES} | {"mayfly_launcher_x"}


@pytest.mark.parametrize(
    "text",
    [
        LAUNCHERS_TEXT + "mayfly_requests_total 1\n",
        LAUNCHERS_TEXT + "# TYPE mayfly_connections gauge\n",
        LAUNCHERS_TEXT + "mayfly_launcher_up 1\n",
        LAUNCHERS_TEXT + "\n",
        LAUNCHERS_TEXT + "mayfly_launcher_y 1",
        "",
    ],
)
async def test_a_text_that_could_spoil_the_whole_is_not_passed_on(tmp_path, text):
    async with watched(tmp_path) as (web, address):
        web.launcher.metrics = text
        found = parsed(await scraped_text(address))
    assert found["mayfly_launcher_up"].samples[0].value == 0
    assert {*found} == {family.name for family in web_metrics.FAMILIES}


async def test_a_launcher_that_hangs_or_refuses_or_is_gone_leaves_the_gateways_own(tmp_path, monkeypatch):
    monkeypatch.setattr(web_metrics, "LAUNCHER_SECONDS", 0.05)
    async with watched(tmp_path) as (web, address):
        web.launcher.silent.add(Verb.METRICS)
        hung = samples(await scraped_text(address))
        web.launcher.silent.clear()
        web.launcher.refusals[Verb.METRICS] = Status.FAILED
        refused = samples(await scraped_text(address))
        await web.launcher.stop()
        gone = samples(await scraped_text(address))
    for found in (hung, refused, gone):
        assert of(found, "mayfly_launcher_up") == 0
        assert of(found, "mayfly_connections") == 0


# ── the listener


async def test_the_listener_knows_one_path_and_one_method_and_is_no_part_of_the_api(tmp_path):
    async with watched(tmp_path) as (web, address):
        for path, method, status in (
            ("/", "GET", 404),
            ("/sql", "POST", 404),
            ("/metrics", "POST", 405),
            ("/metrics/", "GET", 404),
        ):
            async with web.client.request(method, f"http://{address}{path}", headers={"Origin": "http://x"}) as response:
                assert response.status == status
                assert not [name for name in response.headers if name.startswith("Access-Control")]
        await scraped_text(address)
        assert not web.app[TRAFFIC].requests
        assert web.server.door.connections == 0
        await web.app[ACCESS_LOG].flush()
    assert "".join(path.read_text() for path in (tmp_path / "log").iterdir()) == ""


async def test_connections_that_are_left_open_keep_no_scrape_out(tmp_path):
    async with watched(tmp_path) as (_, address):
        host, port = address.split(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(3 * scrape.MAX_CONNECTIONS)]
        assert "mayfly_build_info" in await scraped_text(address)
        oldest, _ = idle[0]
        assert await oldest.read() == b""
        for _, writer in idle:
            writer.close()


def test_the_metrics_have_an_address_of_their_own_or_none():
    assert addresses(Settings(metrics_listen=""))[1] is None
    assert addresses(Settings(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0"))[1] == ("127.0.0.1", 0)
    for wrong in ("127.0.0.1:8080", "nowhere", "127.0.0.1:99999"):
        with pytest.raises(SettingsError, match="MAYFLY_METRICS_LISTEN"):
            addresses(Settings(listen="127.0.0.1:8080", metrics_listen=wrong))


async def test_a_port_that_is_taken_is_a_refusal_to_start(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await start(tmp_path, MAYFLY_METRICS_LISTEN=f"127.0.0.1:{port}")
        _, said = await process.communicate()
    assert process.returncode == 1
    assert said.decode().splitlines()[-1].startswith(f"mayfly web: MAYFLY_METRICS_LISTEN: 127.0.0.1 port {port}: ")
    assert b"listening on" not in said


async def test_the_process_says_where_its_metrics_are(tmp_path):
    process = await start(tmp_path, MAYFLY_METRICS_LISTEN="127.0.0.1:0")
    try:
        said = ""
        while "listening on" not in said:
            assert process.stderr is not None
            said += (await process.stderr.readline()).decode()
        port = re.search(r"metrics on 127\.0\.0\.1 port (\d+)", said)
        assert port is not None
        assert "mayfly_launcher_up 0.0" in await scraped_text(f"127.0.0.1:{port[1]}")
    finally:
        process.send_signal(signal.SIGTERM)
        await process.communicate()
    assert process.returncode == 0


# ── a whole deployment


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    more = {"slots": "2", "reap_interval_seconds": "0.2", "deadline_seconds": "60"}
    with deployed(engine=FASTEST, metrics_listen=free_address(), **more) as deployment:
        yield deployment


def metrics_of(deployment: Deployment) -> str:
    return deployment.settings["MAYFLY_METRICS_LISTEN"]


async def test_every_family_of_the_table_is_told_and_no_other(deployment):
    told = await scraped_text(metrics_of(deployment))
    found = parsed(told)
    assert {*found} == {family.name for family in FAMILIES}
    own = "".join(line for line in told.splitlines(keepends=True) if "mayfly_launcher_" in line)
    assert len(own) < MAX_DETAIL_BYTES / 2, "the launcher's text is to fit its packet with room to spare"
    for family in FAMILIES:
        metric = found[family.name]
        assert metric.type == family.kind
        for sample in metric.samples:
            assert {*sample.labels} - {"le"} == {*family.labels}, family.name


async def test_what_callers_do_shows_and_what_they_send_does_not(deployment):
    before = samples(await scraped_text(metrics_of(deployment)))

    def more(found: Samples, name: str, **labels: str) -> float:
        return of(found, name, **labels) - of(before, name, **labels)

    async with client_of(deployment) as client:
        answer = await client.sql(f"CREATE TABLE {CANARY}(x); INSERT INTO {CANARY} VALUES {', '.join(['(zeroblob(250000))'] * 8)}")
        assert answer.status == 200, answer.body
        assert (await client.rows(f"SELECT '{CANARY}', ?", [CANARY]))[0] == [CANARY, CANARY]
        running = asyncio.ensure_future(
            client.sql("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c")
        )
        while not (pids := [work.pid for work in deployment.at_work() if work.pid]):
            await asyncio.sleep(0.02)
        os.kill(pids[0], signal.SIGKILL)
        assert (await running).body["code"] == "runner_failed"
        token = client.token or ""
    while True:
        text = await scraped_text(metrics_of(deployment))
        found = samples(text)
        if (
            more(found, "mayfly_launcher_runs_total", verdict="exited") == 2
            and of(found, "mayfly_launcher_instance_bytes") >= 2_000_000
        ):
            break
        await asyncio.sleep(0.05)
    assert more(found, "mayfly_launcher_runs_total", verdict="signalled") == 1
    assert more(found, "mayfly_launcher_kills_total", reason="signal") == 1
    assert more(found, "mayfly_launcher_kills_total", reason="deadline") == 0
    assert more(found, "mayfly_launcher_container_seconds_count") == 3
    assert more(found, "mayfly_launcher_sql_seconds_count") == 3
    assert more(found, "mayfly_run_seconds_count") == 3
    assert more(found, "mayfly_launcher_instances_created_total") == 1
    assert more(found, "mayfly_launcher_instances") == 1
    assert of(found, "mayfly_launcher_up") == of(found, "mayfly_launcher_engine_up") == 1
    slots = [of(found, "mayfly_launcher_slots", state=state) for state in ("idle", "busy", "starting")]
    assert slots == [2, 0, 0]
    assert of(found, "mayfly_launcher_free_bytes") > 0
    assert of(found, "mayfly_launcher_free_memory_bytes") > 0
    assert_silent("metrics", text.encode(), [token])
    assert str(uuid_of(deployment)) not in text
    assert "127.0.0.1" not in text


def uuid_of(deployment: Deployment) -> str:
    return sorted(deployment.instances())[-1]


async def test_slots_that_are_lost_or_worn_are_counted(tmp_path_factory):
    if FASTEST != "zygote":
        pytest.skip("without root there are no slots")
    with deployed(engine="zygote", metrics_listen=free_address(), slots="1", slot_requests="2") as deployment:

        async def replaced(reason: str) -> float:
            return of(samples(await scraped_text(metrics_of(deployment))), "mayfly_launcher_slot_replacements_total", reason=reason)

        async with client_of(deployment) as client:
            for _ in range(2):
                await client.rows("SELECT 1")
        while not await replaced("requests"):
            await asyncio.sleep(0.05)
        eventually(lambda: len(deployment.slots()) == 1)
        (zygote,) = deployment.slots().values()
        os.kill(zygote, signal.SIGKILL)
        while not await replaced("trouble"):
            await asyncio.sleep(0.05)
        assert await replaced("age") == 0


async def test_a_launcher_that_is_killed_shows_and_comes_back(deployment):
    deployment.kill("launcher")
    assert of(samples(await scraped_text(metrics_of(deployment))), "mayfly_launcher_up") == 0
    deployment.start_one("launcher")
    async with asyncio.timeout(60):
        while not of(found := samples(await scraped_text(metrics_of(deployment))), "mayfly_launcher_up"):
            await asyncio.sleep(0.05)
    assert of(found, "mayfly_launcher_instances_created_total") == 0


# ── what speaks of them


def test_the_table_is_the_codes():
    rows = [
        f"| `{family.name}` | {family.kind} | {', '.join(f'`{label}`' for label in family.labels)} | {family.help} |"
        for family in FAMILIES
    ]
    text = (REPO / "docs" / "metrics.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows


def names_in(expressions: str) -> set[str]:
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bmayfly_[a-z0-9_]+", expressions)}


def test_dashboard_and_alerts_speak_of_families_that_exist():
    known = {family.name for family in FAMILIES}
    board = json.loads((MONITORING / "mayfly.json").read_text())
    shown = "\n".join(target["expr"] for panel in board["panels"] for target in panel.get("targets", ()))
    rules = "\n".join(line for line in (MONITORING / "alerts.yml").read_text().splitlines() if "summary:" not in line)
    for text in (shown, rules, (MONITORING / "alerts.test.yml").read_text()):
        assert names_in(text)
        assert names_in(text) <= known
    silent = known - names_in(shown) - {name for name in known if name.endswith(("_virtual_memory_bytes", "_max_fds"))}
    assert not silent, "families that the dashboard does not show"


def test_labels_in_dashboard_and_alerts_exist():
    labels = {family.name: {*family.labels, "instance", "job", "le"} for family in FAMILIES}
    for path in (MONITORING / "mayfly.json", MONITORING / "alerts.yml"):
        for name, selector in re.findall(r"\b(mayfly_[a-z0-9_]+)\{([^}]*)\}", path.read_text().replace('\\"', '"')):
            (family,) = names_in(name)
            assert {*re.findall(r"(\w+)\s*(?:=|!=|=~|!~)\"", selector)} <= labels[family], name


def test_every_alert_names_a_heading_of_the_runbook_and_is_tried_by_promtools_tests():
    rules = (MONITORING / "alerts.yml").read_text()
    headings = re.findall(r"^#+ (.+)$", (REPO / "docs" / "runbook.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert len({*alerts}) == len(alerts) == rules.count("summary: ") == rules.count("runbook_url: ") == rules.count("severity: ")
    assert {*re.findall(r"runbook_url: docs/runbook\.md#(\S+)", rules)} <= anchors
    tried = (MONITORING / "alerts.test.yml").read_text()
    assert not [alert for alert in alerts if f'alertname="{alert}"' not in tried]
