"""The table for people. Ratios come first, as in the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .figures import Key

_COLUMNS = ("n", "p50_ms", "p99_ms", "per_second", "machine_cpu_ms_per_request")


def table(result: dict[str, Any]) -> str:
    return "\n".join(_lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield "ratios (median over windows measured next to each other; of p50 and p99 less is better, of per_second more)"
    rows = [(f"{item['of']}  /  {item['to']}", item["measure"], f"{item['value']:g}") for item in result["ratios"]]
    yield from _aligned(rows)
    for part in ("side_by_side", "agents"):
        if figures := result.get(part):
            yield ""
            yield part.replace("_", " ")
            yield from _figures(figures)
    if saturation := result.get("saturation"):
        yield ""
        yield "saturation"
        yield from _figures(saturation["figures"])
        for name in ("offered_per_second", "seconds", "statuses", "error_codes", "latency_200", "latency_503", "recovery_seconds"):
            yield f"  {name}: {saturation[name]}"
    machine, docker = result["machine"], result["machine"]["docker"]
    yield ""
    yield f"{machine['cores']} × {machine['cpu']}, Linux {machine['kernel']}, {machine['file_system']}"
    yield f"load average {machine['load_average']:.2f} before anything was measured"
    yield f"Docker {docker['version']} ({docker['runtime']}, {docker['storage']})"
    yield f"Python {machine['python']}, SQLite " + ", ".join(f"{version} ({side})" for side, version in machine["sqlite"].items())


def _figures(figures: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("", *_COLUMNS, "statuses")]
    for item in figures:
        name = str(Key(item["side"], item["workload"], item["concurrency"]))
        statuses = " ".join(f"{status}:{count}" for status, count in item["statuses"].items())
        rows.append((name, *("" if item[column] is None else f"{item[column]:g}" for column in _COLUMNS), statuses))
    yield from _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        yield "  " + "  ".join(cells).rstrip()
