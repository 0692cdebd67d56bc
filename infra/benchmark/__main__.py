"""`python -m infra.benchmark MODE`: infra/bench calls it with a deployment running and its settings in the environment."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import resource
import signal
import sys
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import uvloop

from gateway.settings import Settings

from . import agents, breakdown, deployments, engines, flood, machine, picture, processes, regexp, report, saturation, side_by_side
from .accounting import Accounting
from .errors import BenchmarkError
from .figures import Figures, Key, Ratio
from .picture import Curve, Panel
from .plan import PLANS, Plan
from .saturation import UNAVAILABLE
from .sides import BLANK, CEILING, CONTAINER, CORES, DATASETTE, DOCKER, MAYFLY, neighbours, sides
from .workloads import CREATE, INSERT, READ, ROWS, SELECT

_BUILD = Path(__file__).resolve().parents[2] / "build"
_COLOURS = {SELECT: "tab:blue", READ: "tab:green", INSERT: "tab:orange", CREATE: "tab:red"}


async def measure(mode: str, plan: Plan, settings: Settings) -> tuple[dict[str, Any], list[Panel]]:
    began, date = perf_counter(), datetime.now(UTC)
    ratios: list[Ratio] = []
    parts: dict[str, Any] = {}
    panels: list[Panel] = []
    instances = max(*plan.concurrencies, 2 * settings.slots + 1)
    async with sides(settings, instances, ROWS if plan.rounds else 1) as all_sides:
        described = await machine.describe(settings, all_sides)
        idle = await engines.idle_memory(settings, all_sides) if plan.engine_rounds else {}
        if plan.rounds:
            _say("side by side")
            async with neighbours(settings, max(plan.concurrencies)) as next_door:
                compared = await side_by_side.measure(plan, all_sides, next_door)
            ratios.extend(side_by_side.ratios(plan, compared))
            parts["side_by_side"] = compared.as_json()
            panels.extend(_side_by_side_panels(plan, compared))
        if plan.agents:
            _say("agents")
            seen = await agents.measure(plan, all_sides)
            ratios.extend(agents.ratios(seen))
            parts["agents"] = seen.as_json()
            panels.append(_agents_panel(seen))
        if plan.saturation:
            _say("saturation")
            overload = await saturation.measure(plan, all_sides, settings.slots, settings.queue_length)
            ratios.extend(overload.ratios(saturation.enough(settings.slots, instances)))
            parts["saturation"] = overload.as_json()
            panels.append(_saturation_panel(overload))
        if plan.engine_rounds:
            _say("engine")
            async with processes.datasette() as datasette, processes.blank() as blank:
                engine = await engines.measure(plan, settings, all_sides, datasette, blank, idle)
            ratios.extend(engine.ratios())
            parts["targets"] = [target.as_json() for target in engine.targets()]
            parts["engine"] = engine.as_json()
            panels.extend(_engine_panels(engine.figures))
        elif plan.breakdown:
            accounting = Accounting(deployments.measured(settings), all_sides.docker)
            parts["breakdown"] = await breakdown.measure(plan, all_sides.mayfly, all_sides.tokens, accounting)
        if plan.flood:
            _say("flood")
            parts["flood"] = await flood.measure(plan, deployments.measured(settings), all_sides.tokens[0])
        if plan.regexp_rounds:
            _say("regexp")
            parts["regexp"] = await regexp.measure(settings, plan.regexp_rounds)
    result = {
        "ratios": [ratio.as_json() for ratio in ratios],
        "mode": mode,
        "date": date.isoformat(timespec="seconds"),
        "seconds": round(perf_counter() - began, 1),
        **parts,
        "machine": described,
        "settings": machine.settings_in_effect(settings),
    }
    return result, panels


def _side_by_side_panels(plan: Plan, figures: Figures) -> Iterator[Panel]:
    for concurrency in plan.concurrencies:
        parallelism = 1 if concurrency == 1 else CORES
        curves = [Curve(f"bare Docker, {parallelism} at once", figures.samples(Key(DOCKER, CONTAINER, parallelism)), "black")]
        for workload, colour in _COLOURS.items():
            curves.append(Curve(f"Mayfly, {workload}", figures.samples(Key(MAYFLY, workload, concurrency)), colour))
            curves.append(Curve(f"in-process, {workload}", figures.samples(Key(CEILING, workload, concurrency)), colour, "--"))
        curves.append(Curve("Datasette, select", figures.samples(Key(DATASETTE, SELECT, concurrency)), "tab:gray", ":"))
        yield Panel(f"concurrency {concurrency}", tuple(curves))


def _agents_panel(figures: Figures) -> Panel:
    names = {agents.FIRST: "tab:red", agents.FOLLOW_UP: "tab:blue"}
    curves = [Curve(f"Mayfly, {name}", figures.samples(Key(MAYFLY, name, agents.AGENTS)), colour) for name, colour in names.items()]
    floor = Curve("bare Docker", figures.samples(Key(DOCKER, CONTAINER, 1)), "black")
    return Panel(f"{agents.AGENTS} agents", (*curves, floor))


def _saturation_panel(result: saturation.Result) -> Panel:
    return Panel(
        f"{saturation.OVERLOAD:g} × capacity offered",
        (
            Curve("200", sorted(result.latencies(200)), "tab:blue"),
            Curve("503", sorted(result.latencies(UNAVAILABLE)), "tab:red"),
        ),
    )


def _engine_panels(figures: Figures) -> Iterator[Panel]:
    keys = [key for key in figures.phases if key.side != BLANK]
    for concurrency in sorted({key.concurrency for key in keys}):
        colours = itertools.cycle(_COLOURS.values())
        curves = [Curve(str(key), figures.samples(key), next(colours)) for key in keys if key.concurrency == concurrency]
        yield Panel(f"concurrency {concurrency}", tuple(curves))


def _say(text: str) -> None:
    print(f"mayfly bench: {text}", file=sys.stderr, flush=True)


async def until_told_to_stop(work: Coroutine[Any, Any, Any]) -> Any:
    """Cancelled by SIGTERM, so that what was started is stopped; infra/bench passes every signal on as this one."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def main() -> int:
    mode = sys.argv[1]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    settings = Settings.from_environment()
    settings = replace(settings, state_dir=settings.state_dir.resolve())
    gc.freeze()  # what is loaded by now stays; a collection in the middle of a window has only the samples to look at
    try:
        result, panels = uvloop.run(until_told_to_stop(measure(mode, PLANS[mode], settings)))
    except BenchmarkError as error:
        _say(f"abandoned: {error}")
        return 1
    except asyncio.CancelledError:
        _say("told to stop")
        return 128 + signal.SIGTERM
    text = json.dumps(result, indent=1)
    stem = _BUILD / f"bench-{datetime.fromisoformat(result['date']):%Y-%m-%dT%H%M%SZ}"
    _BUILD.mkdir(exist_ok=True)
    stem.with_suffix(".json").write_text(text + "\n")
    if panels:
        picture.draw(f"Mayfly ({settings.engine} engine), {mode}, {result['date']}", panels, stem)
    print(text)
    print(report.table(result), file=sys.stderr)
    _say(f"kept as {stem}.json" + (" .svg .png" if panels else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
