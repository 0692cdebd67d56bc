"""Work that must not be cut off in the middle: what holds a container would leave it behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def to_the_end(work: Coroutine[Any, Any, Result], hurry: Callable[[], None] = lambda: None) -> Result:
    """Cancelling calls `hurry` and is raised once `work` is done."""
    task = asyncio.create_task(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            cancelled = True
            hurry()
    if cancelled:
        task.exception()
        raise asyncio.CancelledError
    return task.result()
