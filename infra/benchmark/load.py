"""Making load: so many callers that each wait for their answer (closed loop), or arrivals that wait for nobody (open loop), on as
many connections as it takes or on so many and no more (at a rate)."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time

from .client import Address, Answer, Connection
from .errors import BenchmarkError

OK = 200
HUNG_UP = 0  # stands for a status when the server closed the connection instead of answering

_MAX_REQUESTS = 500_000
_MAX_CONNECTIONS = 2048
_PATIENCE_SECONDS = 90.0  # beyond a window: the slowest engine's whole queue

Check = Callable[[Answer], None]


@dataclass(slots=True)
class Phase:
    """One window's worth. Latencies, in seconds, are of answers with status 200."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    per_second: float = 0.0
    machine_cpu_seconds: float = 0.0
    """Of all processes of the machine, per request."""
    client_cpu_seconds: float = 0.0
    """Of the load generator, per request."""
    answers: int = 0
    """All of them, those that opened the window and those of its end included."""


class Window:
    """Opens when every worker has done its first, unrecorded piece of work; then runs for so many seconds."""

    def __init__(self, workers: int, seconds: float) -> None:
        self._workers = self._missing = workers
        self._seconds = seconds
        self._opened_cpu: tuple[float, float] | None = None
        self._used_cpu: tuple[float, float] | None = None
        self._counted_for_cpu = 0
        self._records: list[tuple[float, float, int]] = []
        self._begins = self._ends = float("inf")

    def warmed_up(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self._opened_cpu = machine_cpu_seconds(), process_time()
            self._begins = perf_counter()
            self._ends = self._begins + self._seconds

    def is_open(self) -> bool:
        if perf_counter() < self._ends and len(self._records) < _MAX_REQUESTS:
            return True
        if self._opened_cpu is not None and self._used_cpu is None:
            machine, client = self._opened_cpu
            self._used_cpu = machine_cpu_seconds() - machine, process_time() - client
            self._counted_for_cpu = sum(ended > self._begins for _, ended, _ in self._records)
        return False

    def record(self, started: float, ended: float, status: int) -> None:
        self._records.append((started, ended, status))

    def phase(self) -> Phase:
        """Latencies of what began in the window, throughput of what ended in it: the load is the same all through it."""
        phase = Phase(answers=self._workers + len(self._records))
        for started, ended, status in self._records:
            if started >= self._begins:
                phase.statuses[status] += 1
                if status == OK:
                    phase.latencies.append(ended - started)
        ends = [ended for _, ended, status in self._records if status == OK and ended > self._begins]
        inside = [ended for ended in ends if ended <= self._ends]
        if ends:
            # From one completion, the one that opened the window, to another.
            counted = inside or ends
            phase.per_second = len(counted) / (max(counted) - self._begins)
        if self._used_cpu is not None and self._counted_for_cpu:
            phase.machine_cpu_seconds, phase.client_cpu_seconds = (used / self._counted_for_cpu for used in self._used_cpu)
        return phase


def machine_cpu_seconds() -> float:
    """Busy processor time of the machine since it started."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, _stat().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _stat() -> str:
    with Path("/proc/stat").open() as file:
        return file.readline()


async def closed_loop(address: Address, orders: Sequence[Iterator[bytes]], check: Check, seconds: float) -> Phase:
    """One caller, on a connection of its own, for each of `orders`. The first answer of each is checked and not counted."""
    window = Window(len(orders), seconds)
    connections = [await Connection.open(address) for _ in orders]

    async def call(connection: Connection, order: Iterator[bytes]) -> None:
        check(await connection.ask(next(order)))
        window.warmed_up()
        if not window.is_open():
            return
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def answered(answer: Answer | None) -> None:
            if over.done():  # another caller failed, and all were cancelled
                return
            try:
                if answer is None:
                    raise ConnectionError("closed by the server")
                window.record(answer.started, answer.ended, answer.status)
                if window.is_open():
                    connection.send(next(order), answered)
                else:
                    over.set_result(None)
            except Exception as error:
                over.set_exception(error)

        connection.send(next(order), answered)
        await over

    await all_of([call(*pair) for pair in zip(connections, orders, strict=True)], seconds + _PATIENCE_SECONDS)
    for connection in connections:
        connection.close()
    return window.phase()


def paced(per_second: float) -> Iterator[float]:
    """Pauses between arrivals, all alike."""
    return itertools.repeat(1 / per_second)


def poisson(per_second: float, chance: random.Random) -> Iterator[float]:
    """Pauses between arrivals that know nothing of each other."""
    return iter(lambda: chance.expovariate(per_second), None)


async def at_rate(
    address: Address, orders: Sequence[Iterator[bytes]], pauses: Iterator[float], check: Check, seconds: float
) -> Phase:
    """Arrivals that wait for nobody, on one connection for each of `orders`; what finds none idle waits its turn.

    A latency counts from the instant at which the request was due, so a connection that was not free flatters nobody. The first
    answer on each connection is checked and not counted.
    """
    connections = [await Connection.open(address) for _ in orders]

    async def warm_up(connection: Connection, order: Iterator[bytes]) -> None:
        check(await connection.ask(next(order)))

    await all_of([warm_up(*pair) for pair in zip(connections, orders, strict=True)], _PATIENCE_SECONDS)
    loop = asyncio.get_running_loop()
    window = Window(1, seconds)
    waiting: deque[float | None] = deque()
    idle: deque[asyncio.Future[float | None]] = deque()

    def arrived(due: float | None) -> None:
        if idle:
            idle.popleft().set_result(due)
        else:
            waiting.append(due)

    async def call(connection: Connection, order: Iterator[bytes]) -> None:
        while True:
            if waiting:
                due = waiting.popleft()
            else:
                idle.append(turn := loop.create_future())
                due = await turn
            if due is None:
                return
            answer = await connection.ask(next(order))
            # A timer may ring early, by less than its resolution.
            window.record(min(due, answer.started), answer.ended, answer.status)

    async def arrive() -> None:
        window.warmed_up()
        due = perf_counter()
        while window.is_open():
            due += next(pauses)
            await asyncio.sleep(max(0.0, due - perf_counter()))
            arrived(due)
        for _ in orders:
            arrived(None)

    work = [call(*pair) for pair in zip(connections, orders, strict=True)]
    await all_of([*work, arrive()], seconds + _PATIENCE_SECONDS)
    for connection in connections:
        connection.close()
    return window.phase()


async def all_of(work: Sequence[Coroutine[None, None, None]], within_seconds: float) -> None:
    """Run side by side; the first failure ends all. Raises BenchmarkError."""
    try:
        async with asyncio.timeout(within_seconds), asyncio.TaskGroup() as group:
            for item in work:
                group.create_task(item)
    except TimeoutError:
        raise BenchmarkError(f"not done within {within_seconds:.0f} s") from None
    except ExceptionGroup as failures:
        raise BenchmarkError(f"{type(failures.exceptions[0]).__name__}: {failures.exceptions[0]}") from failures


@dataclass(frozen=True, slots=True)
class Arrival:
    """Instants of perf_counter. `due` is when the request was to be sent: a late sender does not flatter the server."""

    due: float
    ended: float
    status: int
    body: bytes


@dataclass(slots=True)
class Offered:
    arrivals: list[Arrival] = field(default_factory=list)
    withheld: int = 0
    """Due while every connection that we allow ourselves was waiting."""
    began: float = 0.0
    ended: float = 0.0
    """When the last request was sent."""


async def open_loop(
    address: Address, orders: Iterator[bytes], per_second: float, seconds: float, chance: random.Random, after: Callable[[], None]
) -> Offered:
    """Poisson arrivals. `after` is called when the last one is sent; then all answers are waited for."""
    offered = Offered(began=perf_counter())
    idle: deque[Connection] = deque()
    opened = 0

    async def send(due: float, request: bytes) -> None:
        nonlocal opened
        connection = idle.pop() if idle else None
        if connection is None:
            if opened >= _MAX_CONNECTIONS:
                offered.withheld += 1
                return
            opened += 1
        try:
            connection = connection or await Connection.open(address)
            answer = await connection.ask(request)
        except OSError:
            opened -= 1
            offered.arrivals.append(Arrival(due, perf_counter(), HUNG_UP, b""))
            return
        idle.append(connection)
        offered.arrivals.append(Arrival(due, answer.ended, answer.status, answer.body if answer.status != OK else b""))

    async def arrive() -> None:
        due, last = offered.began, offered.began + seconds
        for _ in range(_MAX_REQUESTS):
            due += chance.expovariate(per_second)
            if due > last:
                break
            await asyncio.sleep(max(0.0, due - perf_counter()))
            group.create_task(send(due, next(orders)))
        offered.ended = perf_counter()
        after()

    try:
        async with asyncio.timeout(seconds + _PATIENCE_SECONDS), asyncio.TaskGroup() as group:
            group.create_task(arrive())
    except TimeoutError:
        raise BenchmarkError("answers of the open loop are missing") from None
    except ExceptionGroup as failures:
        raise BenchmarkError(f"{type(failures.exceptions[0]).__name__}: {failures.exceptions[0]}") from failures
    for connection in idle:
        connection.close()
    return offered
