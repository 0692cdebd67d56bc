"""From windows to numbers: exact percentiles, and ratios of windows that were neighbours in time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .load import Phase

LATENCY, TAIL, RATE = "p50", "p99", "per_second"


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """What one figure is about.

    For the floor, concurrency is how many lines of containers run side by side; 0 stands for arrivals that wait for nobody.
    """

    side: str
    workload: str
    concurrency: int

    def __str__(self) -> str:
        return f"{self.side} {self.workload}" + (f" c={self.concurrency}" if self.concurrency else "")


@dataclass(frozen=True, slots=True)
class Ratio:
    """`of` divided by `to`. Of latencies less is better, of rates more."""

    measure: str
    of: str
    to: str
    value: float
    rounds: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "of": self.of,
            "to": self.to,
            "value": rounded(self.value),
            "rounds": [rounded(value) for value in self.rounds],
        }


@dataclass(slots=True)
class Figures:
    """Every window measured, by what it is about and by its moment. Windows of one moment were measured next to each other."""

    phases: dict[Key, dict[Hashable, Phase]] = field(default_factory=dict)

    def add(self, key: Key, moment: Hashable, phase: Phase) -> None:
        self.phases.setdefault(key, {})[moment] = phase

    def samples(self, key: Key) -> list[float]:
        """All latencies of a key, sorted."""
        return sorted(latency for phase in self.phases.get(key, {}).values() for latency in phase.latencies)

    def ratio(self, measure: str, of: Key, to: Key) -> Iterator[Ratio]:
        """The median over moments; nothing where the two have none in common."""
        upper, lower = self.phases.get(of, {}), self.phases.get(to, {})
        pairs = [(_measure(measure, phase), _measure(measure, lower[moment])) for moment, phase in upper.items() if moment in lower]
        values = [a / b for a, b in pairs if a and b]
        if values:
            yield Ratio(measure, str(of), str(to), median(values), tuple(values))

    def as_json(self) -> list[dict[str, Any]]:
        return [self._summary(key, [*phases.values()]) for key, phases in self.phases.items()]

    def _summary(self, key: Key, phases: Sequence[Phase]) -> dict[str, Any]:
        statuses: Counter[int] = sum((phase.statuses for phase in phases), Counter())
        return {
            "side": key.side,
            "workload": key.workload,
            "concurrency": key.concurrency,
            **latency_summary(self.samples(key)),
            "per_second": rounded(median(phase.per_second for phase in phases)),
            "machine_cpu_ms_per_request": _scaled(1e3, [phase.machine_cpu_seconds for phase in phases]),
            "client_cpu_us_per_request": _scaled(1e6, [phase.client_cpu_seconds for phase in phases]),
            "statuses": {str(status): count for status, count in sorted(statuses.items())},
            "rounds": [
                {
                    "n": len(phase.latencies),
                    "p50_ms": milliseconds(_measure(LATENCY, phase)),
                    "per_second": rounded(phase.per_second),
                }
                for phase in phases
            ],
        }


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank: a value that was measured, never one between two."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def latency_summary(seconds: Sequence[float]) -> dict[str, Any]:
    """n, p50, p90, p99 and max in ms; null without samples."""
    ordered = sorted(seconds)
    shares = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "max_ms": 1.0}
    values = {name: milliseconds(percentile(ordered, share)) if ordered else None for name, share in shares.items()}
    return {"n": len(ordered), **values}


def milliseconds(seconds: float) -> float:
    return rounded(1000 * seconds)


def _scaled(factor: float, values: Sequence[float]) -> float | None:
    """Zero is what a part leaves that does not look at processor time."""
    return rounded(factor * median(values)) if any(values) else None


def rounded(value: float) -> float:
    """Four figures: more would be noise."""
    return float(f"{value:.4g}")


def _measure(measure: str, phase: Phase) -> float:
    if measure == RATE:
        return phase.per_second
    ordered = sorted(phase.latencies)
    return percentile(ordered, {LATENCY: 0.5, TAIL: 0.99}[measure]) if ordered else 0.0
