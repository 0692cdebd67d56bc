"""The table for people. Ratios come first, as in the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .figures import Key

_COLUMNS = ("n", "p50_ms", "p99_ms", "per_second", "machine_cpu_ms_per_request", "client_cpu_us_per_request")


def table(result: dict[str, Any]) -> str:
    return "\n".join(_lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    if result["ratios"]:
        yield "ratios (median over windows measured next to each other; of p50 and p99 less is better, of per_second more)"
        rows = [(f"{item['of']}  /  {item['to']}", item["measure"], f"{item['value']:g}") for item in result["ratios"]]
        yield from _aligned(rows)
    if targets := result.get("targets"):
        yield ""
        yield "targets"
        yield from _aligned([("", "figure", "target", "", "reached"), *map(_target, targets)])
    for part in ("side_by_side", "agents"):
        if figures := result.get(part):
            yield ""
            yield part.replace("_", " ")
            yield from _figures(figures)
    if engine := result.get("engine"):
        yield ""
        yield "engine"
        yield from _figures(engine["figures"])
        yield from _breakdown(engine["breakdown"])
        yield ""
        yield "memory, MB"
        yield from _memory(engine["memory"])
    if breakdown := result.get("breakdown"):
        yield from _figures(breakdown["figures"])
        yield from _breakdown(breakdown)
    if saturation := result.get("saturation"):
        yield ""
        yield "saturation"
        yield from _figures(saturation["figures"])
        for name in ("offered_per_second", "seconds", "statuses", "error_codes", "latency_200", "latency_503", "recovery_seconds"):
            yield f"  {name}: {saturation[name]}"
    if flood := result.get("flood"):
        yield ""
        yield f"flood: p99 of a well-behaved client {flood['p99_ratio']:g} times its quiet p99, target below {flood['target']:g}"
        for name in ("quiet", "flooded", "after", "resident_bytes", "flood"):
            yield f"  {name}: {flood[name]}"
    if searches := result.get("regexp"):
        yield ""
        yield "regexp: processor time of a search in vain, µs, and how many times REGEXP's each other one is"
        yield from _aligned(list(_searches(searches)))
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


def _target(target: dict[str, Any]) -> tuple[str, ...]:
    bound = f"≥ {target['at_least']:g}" if "at_least" in target else f"≤ {target['at_most']:g}"
    figure = "none" if target["figure"] is None else f"{target['figure']:g}"
    return target["what"], figure, bound, target["unit"], "yes" if target["reached"] else "NO"


def _breakdown(breakdown: dict[str, Any]) -> Iterator[str]:
    """One table, a column of each concurrency for all time, and for that of it in the kernel."""
    parts = breakdown["cpu_us_per_request"]
    names = list(dict.fromkeys(name for part in parts.values() for name in part))
    yield ""
    yield "processor time, µs per request"
    rows: list[tuple[str, ...]] = [("", *(cell for about in parts for cell in (about, "user", "system")))]
    for name in names:
        cells = [part.get(name, {}).get(column) for part in parts.values() for column in ("us", "user_us", "system_us")]
        rows.append((name, *("" if cell is None else f"{cell:.0f}" for cell in cells)))
    yield from _aligned(rows)


def _memory(memory: dict[str, Any]) -> Iterator[str]:
    moments = ("idle", "before", "after")
    rows: list[tuple[str, ...]] = [("", *moments)]
    for name in ("service_bytes", "web_bytes", "launcher_bytes", "containers_bytes", "container_cgroups_bytes"):
        rows.append((name.removesuffix("_bytes"), *(f"{memory[moment][name] / 1e6:.1f}" for moment in moments)))
    for name in memory["idle"]["not_counted"]:
        cells = (f"{memory[moment]['not_counted'][name] / 1e6:.1f}" for moment in moments)
        rows.append((f"{name.removesuffix('_bytes')}, not counted", *cells))
    yield from _aligned(rows)
    yield f"  {memory['requests_between']} requests between before and after"


def _searches(searches: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    others = ("re", "LIKE", "GLOB")
    yield "pattern", "characters", "REGEXP", *(cell for name in others for cell in (name, "times"))
    for search in searches:
        times = (cell for name in others for cell in (search["us"].get(name), search["ratios"].get(f"{name} / REGEXP")))
        cells = ("" if cell is None else f"{cell:g}" for cell in times)
        yield search["pattern"], f"{search['characters']}", f"{search['us']['REGEXP']:g}", *cells


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        yield "  " + "  ".join(cells).rstrip()
