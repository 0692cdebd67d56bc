"""How much of the disk instances take, for the metrics: looked at in passing, never all at once."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from .registry import VOLUME_FILES

_FILES = tuple(f"{folder}/{name}" for folder in ("volume", "damaged") for name in VOLUME_FILES)
# An instance takes 6 µs: some 3,000 in one look.
_LOOK_SECONDS = 0.02
_BLOCK_BYTES = 512


class Footprint:
    def __init__(self, folder: Path, interval_seconds: float) -> None:
        self._folder = str(folder)
        self._interval_seconds = interval_seconds
        self._left: list[str] = []
        self._counted = 0
        self.bytes = 0
        """Bytes that the instances' files took on the disk when they were last gone through."""

    async def run(self) -> None:
        """Until cancelled: look at every interval, beside the thread that creates wait for."""
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(self._interval_seconds)

    def look(self) -> None:
        """Go on where the last look ended, for a fixed time at most."""
        end = time.monotonic() + _LOOK_SECONDS
        if not self._left:
            with os.scandir(self._folder) as entries:
                self._left = [entry.name for entry in entries if not entry.name.startswith(".")]
        while self._left:
            self._counted += self._size(self._left.pop())
            if self._left and time.monotonic() > end:
                return
        self.bytes, self._counted = self._counted, 0

    def _size(self, instance: str) -> int:
        size = 0
        for name in _FILES:
            try:
                size += os.lstat(f"{self._folder}/{instance}/{name}").st_blocks * _BLOCK_BYTES
            except OSError:
                continue  # there is none, or it has ended meanwhile; a disk in trouble is the reaper's to tell of
        return size
