"""What the launcher tells Prometheus, by way of the gateway: it has no network. The parts count; here it is only read and named."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from ..metrics import Family, Process, exposition, process_families
from ..protocol import Status, Verdict
from ..settings import Settings
from .engines import Engine
from .footprint import Footprint
from .memory import available_bytes
from .readiness import Readiness
from .reaper import Reaper
from .registry import Registry
from .service import Service
from .warmth import Warmth

PREFIX = "mayfly_launcher"

ENGINE_UP = Family(f"{PREFIX}_engine_up", "gauge", "1 if the container engine can take runs.")
ENGINE_INFO = Family(
    f"{PREFIX}_engine_info",
    "gauge",
    "Always 1. The engine at work, what MAYFLY_ENGINE wants, the OCI runtime, Docker's version.",
    ("engine", "wanted", "runtime", "version"),
)
SLOTS = Family(f"{PREFIX}_slots", "gauge", "Slots: busy with a run, idle, or starting, which also says missing.", ("state",))
SLOT_REPLACEMENTS = Family(
    f"{PREFIX}_slot_replacements_total",
    "counter",
    "Slot containers replaced: after their requests, by age, or for trouble.",
    ("reason",),
)
WARM = Family(
    f"{PREFIX}_warm_containers",
    "gauge",
    "Containers that wait: nursery, of fresh instances; successors, of instances in use.",
    ("kind",),
)
INSTANCES = Family(f"{PREFIX}_instances", "gauge", "Live instances.")
INSTANCE_BYTES = Family(
    f"{PREFIX}_instance_bytes",
    "gauge",
    "Disk space of all instances' files when they were last gone through: some 3,000 in each MAYFLY_REAP_INTERVAL_SECONDS.",
)
CREATED = Family(f"{PREFIX}_instances_created_total", "counter", "Instances given to somebody.")
FORKED = Family(f"{PREFIX}_instances_forked_total", "counter", "Those of them that are copies of another.")
REPLACED = Family(f"{PREFIX}_instances_replaced_total", "counter", "Instances whose database another's has replaced.")
EXTENDED = Family(f"{PREFIX}_instances_extended_total", "counter", "Times that an instance's life was asked to be longer.")
REAPED = Family(f"{PREFIX}_instances_reaped_total", "counter", "Instances deleted because they had expired.")
REMOVED = Family(
    f"{PREFIX}_instances_removed_total",
    "counter",
    "Instances deleted before, by their caller or because their first request failed.",
)
FREE_BYTES = Family(f"{PREFIX}_free_bytes", "gauge", "Free space on the state disk.")
MIN_FREE_BYTES = Family(f"{PREFIX}_min_free_bytes", "gauge", "MAYFLY_MIN_FREE_BYTES, below which creates are refused.")
FREE_MEMORY = Family(f"{PREFIX}_free_memory_bytes", "gauge", "Memory to be had on the host, or below the launcher's own limits.")
MIN_FREE_MEMORY = Family(f"{PREFIX}_min_free_memory_bytes", "gauge", "MAYFLY_MIN_FREE_MEMORY_BYTES, below which nothing runs.")
RUNS = Family(f"{PREFIX}_runs_total", "counter", "Runs that had a container, by how they ended (docs/wire.md).", ("verdict",))
KILLS = Family(
    f"{PREFIX}_kills_total",
    "counter",
    "Those of them that were killed: at the deadline, for memory, by another signal.",
    ("reason",),
)
REFUSALS = Family(f"{PREFIX}_refusals_total", "counter", "Orders of the gateway that were not done, by status.", ("status",))
CONTAINER_SECONDS = Family(
    f"{PREFIX}_container_seconds", "histogram", "From a run's order until a container holds its request: lease, slot, start."
)
SQL_SECONDS = Family(f"{PREFIX}_sql_seconds", "histogram", "From then until the container's end: the runner, its SQL, the removal.")
ORPHANS = Family(f"{PREFIX}_orphans_total", "counter", "Containers removed that belonged to no run.")

FAMILIES = (
    ENGINE_UP,
    ENGINE_INFO,
    SLOTS,
    SLOT_REPLACEMENTS,
    WARM,
    INSTANCES,
    INSTANCE_BYTES,
    CREATED,
    FORKED,
    REPLACED,
    EXTENDED,
    REAPED,
    REMOVED,
    FREE_BYTES,
    MIN_FREE_BYTES,
    FREE_MEMORY,
    MIN_FREE_MEMORY,
    RUNS,
    KILLS,
    REFUSALS,
    CONTAINER_SECONDS,
    SQL_SECONDS,
    ORPHANS,
    *process_families(PREFIX),
)

_REPLACEMENTS = ("requests", "age", "trouble")
_KILLS = {Verdict.DEADLINE: "deadline", Verdict.OUT_OF_MEMORY: "memory", Verdict.SIGNALLED: "signal"}
_DONE = frozenset({Status.DONE, Status.STARTED, Status.ENDED})


class Metrics(Collector):
    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        engine: Engine,
        readiness: Readiness,
        warmth: Warmth,
        service: Service,
        reaper: Reaper,
        footprint: Footprint,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._engine = engine
        self._readiness = readiness
        self._warmth = warmth
        self._service = service
        self._reaper = reaper
        self._footprint = footprint
        self._process = Process(PREFIX)

    def text(self) -> str:
        """METRICS's detail."""
        return exposition(self, self._process).decode()

    def collect(self) -> Iterator[Metric]:
        service, slots = self._service, self._engine.slots
        yield ENGINE_UP.of(self._readiness.trouble is None)
        yield ENGINE_INFO.by({self._engine_labels(): 1})
        idle = max(0, slots.standing - service.running)
        starting = max(0, self._settings.slots - slots.standing)
        yield SLOTS.by({("idle",): idle, ("busy",): service.running, ("starting",): starting})
        yield SLOT_REPLACEMENTS.by({(reason,): slots.replaced.get(reason, 0) for reason in _REPLACEMENTS})
        yield WARM.by({("nursery",): self._warmth.nursery, ("successors",): self._warmth.successors})
        yield INSTANCES.of(self._registry.live)
        yield INSTANCE_BYTES.of(self._footprint.bytes)
        yield CREATED.of(service.created)
        yield FORKED.of(service.forked)
        yield REPLACED.of(service.replaced)
        yield EXTENDED.of(service.extended)
        yield REAPED.of(self._reaper.reaped)
        yield REMOVED.of(service.removed)
        yield FREE_BYTES.of(self._registry.free_bytes())
        yield MIN_FREE_BYTES.of(self._settings.min_free_bytes)
        yield FREE_MEMORY.of(_free_memory())
        yield MIN_FREE_MEMORY.of(self._settings.min_free_memory_bytes)
        yield RUNS.by({(verdict.name.lower(),): service.verdicts[verdict] for verdict in Verdict})
        yield KILLS.by({(reason,): service.verdicts[verdict] for verdict, reason in _KILLS.items()})
        yield REFUSALS.by({(status.name.lower(),): service.refusals[status] for status in Status if status not in _DONE})
        yield CONTAINER_SECONDS.spread({(): service.container_seconds})
        yield SQL_SECONDS.spread({(): service.sql_seconds})
        yield ORPHANS.of(self._readiness.orphans + self._reaper.orphans)

    def _engine_labels(self) -> tuple[str, ...]:
        facts = self._readiness.facts
        return (self._engine.name, self._settings.engine, facts.runtime if facts else "", facts.version if facts else "")


def _free_memory() -> float:
    try:
        return available_bytes()
    except OSError:
        return math.nan
