"""infra/bench, for a moment: that every figure is there and means what it says. How fast anything is, no test can know."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from infra.benchmark.client import Address, Answer
from infra.benchmark.errors import BenchmarkError
from infra.benchmark.figures import LATENCY, RATE, Figures, Key, percentile
from infra.benchmark.load import Phase
from infra.benchmark.workloads import check

from .deployment import REPO

WORKLOADS = ("select", "read", "insert", "create")


@contextmanager
def _open_folder() -> Iterator[Path]:
    """Empty, and the services' users can enter it."""
    with tempfile.TemporaryDirectory(prefix="mayfly-test-bench-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def scratch() -> Iterator[Path]:
    with _open_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def run() -> Iterator[tuple[dict[str, Any], str, Path, Path]]:
    """What a short run printed, told, kept, and the folder for its state."""
    with _open_folder() as scratch:
        environment = {**os.environ, "TMPDIR": str(scratch), "MAYFLY_MIN_FREE_BYTES": "0"}
        done = subprocess.run([REPO / "infra/bench", "smoke"], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        kept = REPO / "build" / f"bench-{datetime.fromisoformat(result['date']):%Y-%m-%dT%H%M%SZ}.json"
        yield result, done.stderr, kept, scratch
        for suffix in (".json", ".svg", ".png"):
            kept.with_suffix(suffix).unlink()


def test_every_side_has_a_figure_for_every_workload_it_can_do(run):
    result = run[0]
    figures = {(item["side"], item["workload"], item["concurrency"]): item for item in result["side_by_side"]}
    wanted = {(side, workload, c) for side in ("mayfly", "ceiling") for workload in WORKLOADS for c in (1, 2)}
    wanted |= {(side, "select", c) for side in ("datasette", "blank") for c in (1, 2)}
    assert wanted | {("docker", "container", 1)} <= figures.keys()
    for key, figure in figures.items():
        assert set(figure["statuses"]) == {"200"}, key
        assert 0 < figure["p50_ms"] <= figure["p90_ms"] <= figure["p99_ms"] <= figure["max_ms"], key
        assert figure["n"] == figure["statuses"]["200"] > 0, key
        assert figure["per_second"] > 0, key


def test_ratios_come_first_and_name_both_sides(run):
    result = run[0]
    assert next(iter(result)) == "ratios"
    named = {(item["of"], item["to"], item["measure"]) for item in result["ratios"]}
    assert ("mayfly select c=1", "docker container c=1", "p50") in named
    assert ("mayfly select c=2", "ceiling select c=2", "per_second") in named
    assert ("mayfly select c=1", "datasette select c=1", "p50") in named
    assert ("mayfly follow-up c=8", "docker container c=1", "p99") in named
    assert ("mayfly served under overload", "docker container c=" + str(run[0]["machine"]["cores"]), "per_second") in named
    assert all(item["value"] > 0 and item["rounds"] for item in result["ratios"])


def test_overload_is_reported_with_what_was_answered_and_how_long_it_lasted(run):
    overload = run[0]["saturation"]
    assert sum(overload["statuses"].values()) == overload["requests"] > 0
    assert overload["latency_200"]["n"] == overload["statuses"]["200"]
    assert overload["latency_503"]["n"] == overload["statuses"].get("503", 0) == sum(overload["error_codes"].values())
    assert overload["withheld"] == 0
    assert overload["recovery_seconds"] is None or overload["recovery_seconds"] > 0


def test_every_target_of_an_engine_has_a_figure_and_says_whether_it_is_reached(run):
    targets = run[0]["targets"]
    assert len(targets) == 12
    for target in targets:
        assert target["figure"] > 0, target
        assert ("at_least" in target) != ("at_most" in target), target
        above, below = target["figure"] >= target.get("at_least", 0), target["figure"] <= target.get("at_most", float("inf"))
        assert target["reached"] == (above and below), target
        assert target["what"] in run[1]
    units = [target["unit"] for target in targets]
    assert units == sorted(units, key=lambda unit: unit != "×"), "ratios come first"


def test_an_engine_is_measured_beside_a_second_deployment_that_starts_nothing_ahead(run):
    result = run[0]
    named = {(item["of"], item["to"], item["measure"]) for item in result["ratios"]}
    assert ("mayfly select c=2", "mayfly-docker select c=2", "per_second") in named
    assert ("mayfly-crowd create c=8", "mayfly-few create c=8", "per_second") in named
    figures = {(item["side"], item["workload"]): item for item in result["engine"]["figures"]}
    for workload in ("select at 70 %, paced", "select at 70 %, Poisson"):
        assert figures["mayfly", workload]["n"] > 0
        assert set(figures["mayfly", workload]["statuses"]) == {"200"}
    assert result["engine"]["instances"]["few"] == 10


def test_processor_time_and_memory_are_known_of_each_part(run):
    engine = run[0]["engine"]
    for parts in engine["breakdown"]["cpu_us_per_request"].values():
        assert {"web", "launcher", "containers", "docker", "client", "rest", "machine"} == parts.keys()
        assert all(parts[name]["us"] > 0 for name in ("containers", "client", "machine"))
        assert parts["web"]["us"] >= 0  # of so short a window less may be spent than a tick
    for moment in ("idle", "before", "after"):
        memory = engine["memory"][moment]
        parts = [memory[f"{part}_bytes"] for part in ("web", "launcher", "containers")]
        assert memory["service_bytes"] == sum(parts)
        assert min(parts) > 1_000_000
        assert memory["container_cgroups_bytes"] > 0
        assert set(memory["not_counted"]) == {"dockerd_bytes", "containerd_bytes", "shims_bytes"}


def test_regexp_is_timed_beside_everything_else_that_looks_for_a_text(run):
    searches = run[0]["regexp"]
    assert {name for search in searches for name in search["us"]} == {"REGEXP", "re", "LIKE", "GLOB"}
    for search in searches:
        assert all(took > 0 for took in search["us"].values()), search
        assert search["ratios"].keys() == {f"{name} / REGEXP" for name in search["us"].keys() - {"REGEXP"}}
        assert search["pattern"] in run[1]


def test_a_result_says_what_it_was_measured_on(run):
    result = run[0]
    machine = result["machine"]
    assert machine["cores"] == len(os.sched_getaffinity(0))
    assert all(machine[name] for name in ("cpu", "kernel", "python", "sqlite", "file_system", "docker", "healthz"))
    assert result["settings"]["rate_requests_per_minute"] == 0
    assert {"engine", "slots", "queue_length"} <= result["settings"].keys()


def test_the_result_is_kept_beside_its_picture_and_told_as_a_table(run):
    result, told, kept, _ = run
    assert json.loads(kept.read_text()) == result
    assert kept.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in kept.with_suffix(".svg").read_text()
    for ratio in result["ratios"]:
        assert f"{ratio['of']}  /  {ratio['to']}" in told


def test_nothing_of_the_deployment_is_left(run):
    assert list(run[3].iterdir()) == []
    assert str(run[3]) not in Path("/proc/self/mounts").read_text()


@pytest.mark.parametrize("deployments", [1, 2])
@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True)], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_that_is_stopped_takes_its_deployments_down(scratch, number, to_all, deployments):
    environment = {**os.environ, "TMPDIR": str(scratch), "MAYFLY_MIN_FREE_BYTES": "0", "MAYFLY_ENGINE": "docker"}
    command = [REPO / "infra/bench", "engines"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **streams, process_group=0) as bench:
        try:
            up = (line for line in bench.stderr if line.startswith("mayfly: serving"))
            assert len(list(islice(up, deployments))) == deployments
            assert str(scratch) in Path("/proc/self/mounts").read_text()
            assert len(_processes_about(scratch)) > 2 * deployments
            # A terminal's Ctrl-C reaches every process of the foreground.
            os.killpg(bench.pid, number) if to_all else bench.send_signal(number)
            printed, told = bench.communicate(timeout=120)
        finally:
            bench.terminate()
    assert (bench.returncode, printed) == (128 + number, ""), told
    assert list(scratch.iterdir()) == []
    assert str(scratch) not in Path("/proc/self/mounts").read_text()
    assert _processes_about(scratch) == []


def _processes_about(folder: Path) -> list[str]:
    """Command lines of all whose environment names it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(folder).encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


def test_an_unknown_mode_is_refused_before_anything_starts():
    done = subprocess.run([REPO / "infra/bench", "slow"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage" in done.stderr


def test_a_percentile_is_a_value_that_was_measured():
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 0.99) == 7.0


def test_a_ratio_is_the_median_of_the_ratios_of_neighbours_in_time():
    figures, a, b = Figures(), Key("a", "x", 1), Key("b", "x", 1)
    for moment, (ours, theirs) in enumerate(((2.0, 1.0), (30.0, 10.0), (400.0, 100.0))):
        figures.add(a, moment, Phase([ours], Counter({200: 1}), per_second=theirs))
        figures.add(b, moment, Phase([theirs], Counter({200: 1}), per_second=ours))
    figures.add(a, "alone", Phase([1.0], Counter({200: 1}), per_second=1.0))
    (latency,) = figures.ratio(LATENCY, a, b)
    (rate,) = figures.ratio(RATE, b, a)
    assert (latency.value, latency.rounds) == (3.0, (2.0, 3.0, 4.0))
    assert rate.rounds == latency.rounds
    assert list(figures.ratio(LATENCY, a, Key("never measured", "x", 1))) == []


@pytest.mark.parametrize(
    ("workload", "status", "body"),
    [
        ("select", 503, b'{"error":"overloaded"}'),
        ("select", 200, b'{"columns":["1"],"rows":[[2]],"rows_affected":0}'),
        ("create", 200, b'{"columns":["1"],"rows":[[1]],"rows_affected":0}'),
        ("read", 200, b'{"columns":["id","body"],"rows":[],"rows_affected":0}'),
        ("insert", 200, b'{"rows_affected":0}'),
    ],
)
def test_a_wrong_answer_abandons_the_run(workload, status, body):
    with pytest.raises(BenchmarkError, match=workload):
        check(workload, Answer(status, b"", body, 0.0, 1.0))


def test_load_is_made_on_loopback_alone():
    with pytest.raises(BenchmarkError, match="loopback"):
        Address("192.0.2.1", 80)
