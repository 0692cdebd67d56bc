"""infra/bench, for a moment: that every figure is there and means what it says. How fast anything is, no test can know."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
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


@pytest.fixture(scope="module")
def run() -> Iterator[tuple[dict[str, Any], str, Path, Path]]:
    """What a short run printed, told, kept, and the folder for its state."""
    with tempfile.TemporaryDirectory(prefix="mayfly-test-bench-") as folder:
        scratch = Path(folder)
        scratch.chmod(0o755)
        environment = {**os.environ, "TMPDIR": folder, "MAYFLY_MIN_FREE_BYTES": "0"}
        done = subprocess.run([REPO / "infra/bench", "smoke"], env=environment, capture_output=True, text=True, timeout=300)
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
