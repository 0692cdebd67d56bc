"""Whether runs can be taken now. Up means: connected, no container of an earlier life left, self-test passed.

What it says is what was last seen; nobody who asks waits for a dead daemon. A daemon that is down, or was when the launcher
started, is taken up again by itself. A host on which a runner cannot confine itself is refused, whenever that shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from .engines import Engine, EngineFacts
from .errors import EngineDownError, EngineError, ImageMissingError
from .registry import Registry
from .selftest import self_test

log = logging.getLogger(__name__)

_PING_SECONDS = 5.0
_RETRY_SECONDS = 1.0


class Readiness:
    def __init__(self, engine: Engine, registry: Registry) -> None:
        self._engine = engine
        self._registry = registry
        self._look_again = asyncio.Event()
        self._trouble: EngineError | None = EngineDownError("not asked yet")
        self.facts: EngineFacts | None = None
        self.selftest: dict[str, Any] | None = None
        self.orphans = 0
        """Containers of an earlier life that were removed."""

    @property
    def trouble(self) -> EngineError | None:
        """Why no run can be taken; None when one can."""
        return self._trouble

    def doubt(self, error: EngineError) -> None:
        """A run met this. If it would befall the next one too, none is let through until the engine was looked at again."""
        if isinstance(error, EngineDownError | ImageMissingError):
            self._fall(error)
            self._look_again.set()

    async def prepare(self) -> None:
        """Make it up, or raise: EngineError when that may change, RefusedError when it must not serve."""
        try:
            facts = await self._engine.open()
            swept = await self._engine.sweep()
            self.orphans += swept
            self.selftest = await self_test(self._engine, self._registry)
        except EngineError as error:
            self._fall(error)
            raise
        self.facts = facts
        self._trouble = None
        log.info("engine %s up (%s) orphans=%d %s", self._engine.name, self._engine.choice, swept, facts)

    async def watch(self) -> None:
        """For as long as the launcher lives; ends only by RefusedError or by being cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PING_SECONDS if self._trouble is None else _RETRY_SECONDS):
                    await self._look_again.wait()
            self._look_again.clear()
            try:
                await (self._engine.ping() if self._trouble is None else self.prepare())
            except EngineError as error:
                self._fall(error)

    def _fall(self, error: EngineError) -> None:
        if self._trouble is None or type(self._trouble) is not type(error):
            log.warning("engine cannot take runs: %s: %s", type(error).__name__, error)
        self._trouble = error
