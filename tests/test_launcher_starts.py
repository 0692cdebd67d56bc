"""The order in which containers may start: those that somebody waits for first, the others once nobody would miss the turn."""

import asyncio
from contextlib import AsyncExitStack, ExitStack

import pytest

from gateway.launcher.engines.starts import Starts


class Queue:
    """Starts that note when they begin, and end when told."""

    def __init__(self, starts: Starts) -> None:
        self.starts = starts
        self.begun: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def ask(self, name: str, *, spare: bool = False) -> None:
        self._ends[name] = asyncio.Event()
        self._tasks.append(asyncio.create_task(self._start(name, spare)))

    async def _start(self, name: str, spare: bool) -> None:
        async with self.starts.spare() if spare else self.starts.urgent():
            self.begun.append(name)
            await self._ends[name].wait()

    async def end(self, name: str, then: str) -> None:
        """End one, and wait until another has begun."""
        self._ends[name].set()
        await self.until(then)

    async def until(self, name: str) -> None:
        async with asyncio.timeout(10):
            while name not in self.begun:
                await asyncio.sleep(0)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def queue():
    queue = Queue(Starts(turns=1, slots=2))
    yield queue
    await queue.close()


async def test_a_spare_start_comes_after_every_one_that_somebody_waits_for_however_late_that_asked(queue):
    queue.ask("first")
    await queue.until("first")
    queue.ask("spare", spare=True)
    queue.ask("second")
    await queue.end("first", then="second")
    queue.ask("third")
    await queue.end("second", then="third")
    await queue.end("third", then="spare")
    assert queue.begun == ["first", "second", "third", "spare"]


async def test_a_spare_start_waits_for_a_free_slot_even_while_every_turn_is_free(queue):
    with ExitStack() as slots:
        for _ in range(2):
            slots.enter_context(queue.starts.serving())
        queue.ask("spare", spare=True)
        queue.ask("urgent")
        await queue.until("urgent")
        queue._ends["urgent"].set()
        await asyncio.sleep(0.1)  # longer than a spare start waits for calm
        assert queue.begun == ["urgent"]
    await queue.until("spare")


async def test_starts_at_a_time_are_as_many_as_there_are_turns():
    starts = Starts(turns=3, slots=10)
    async with AsyncExitStack() as held:
        for _ in range(3):
            await held.enter_async_context(starts.urgent())
        fourth = asyncio.create_task(held.enter_async_context(starts.urgent()))
        await asyncio.sleep(0)
        assert not fourth.done()
        fourth.cancel()
        await asyncio.gather(fourth, return_exceptions=True)
    async with asyncio.timeout(10):
        for _ in range(3):
            async with starts.urgent(), starts.spare():
                pass


async def test_a_spare_start_that_is_called_off_takes_no_turn_with_it(queue):
    queue.ask("first")
    await queue.until("first")
    queue.ask("spare", spare=True)
    await asyncio.sleep(0)
    queue._tasks[-1].cancel()
    queue.ask("second")
    await queue.end("first", then="second")
    assert queue.begun == ["first", "second"]
