"""What both processes' metrics are made of: declared families, histograms of seconds, the process's own, text for Prometheus.

Whatever happens often is counted in plain attributes of the part in which it happens, and only read when somebody asks: to observe
a duration takes 0.1 µs, where the library's histogram takes a lock and 0.5 µs.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of every histogram's buckets, seconds."""

_LABELS_OF_BOUNDS = (*(str(bound) for bound in BOUNDS), "+Inf")

Labels = tuple[str, ...]


class Durations:
    """A histogram of seconds."""

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * len(_LABELS_OF_BOUNDS)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds

    def buckets(self) -> list[tuple[str, float]]:
        return list(zip(_LABELS_OF_BOUNDS, accumulate(self._counts, initial=None), strict=True))

    @property
    def sum(self) -> float:
        return self._sum


@dataclass(frozen=True, slots=True)
class Family:
    """One line of the documented table. Every label has a closed set of values: none is a caller's."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Labels = ()

    def of(self, value: float) -> Metric:
        """The one value of a family without labels."""
        return self.by({(): value})

    def by(self, values: Mapping[Labels, float]) -> Metric:
        made = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = made(self.name, self.help, labels=self.labels)
        for labels, value in values.items():
            family.add_metric(labels, value)
        return family

    def spread(self, values: Mapping[Labels, Durations]) -> Metric:
        family = HistogramMetricFamily(self.name, self.help, labels=self.labels)
        for labels, durations in values.items():
            family.add_metric(labels, durations.buckets(), durations.sum)
        return family


def exposition(*sources: Collector) -> bytes:
    """What the sources say now, as Prometheus's text format 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    for source in sources:
        registry.register(source)
    return generate_latest(registry)


class Process(ProcessCollector):
    """This process's own, also where /proc shows nothing but processes (systemd's ProcSubset=pid)."""

    def __init__(self, namespace: str) -> None:
        super().__init__(namespace, registry=None)

    def _boot_time(self) -> float:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def process_families(namespace: str) -> tuple[Family, ...]:
    """What Process gives, for the table."""
    return (
        Family(f"{namespace}_process_cpu_seconds_total", "counter", "Processor time of the process, seconds."),
        Family(f"{namespace}_process_resident_memory_bytes", "gauge", "Memory of the process."),
        Family(f"{namespace}_process_virtual_memory_bytes", "gauge", "Address space of the process."),
        Family(f"{namespace}_process_start_time_seconds", "gauge", "Unix second at which the process began."),
        Family(f"{namespace}_process_open_fds", "gauge", "Open files of the process."),
        Family(f"{namespace}_process_max_fds", "gauge", "Open files that the process may have."),
    )
