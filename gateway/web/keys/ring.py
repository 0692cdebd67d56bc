"""Which key signs and which are accepted, for as long as a gateway runs.

Of the two stored keys both are accepted. A rotation publishes a key ahead of its use: it takes the place of the newest, the newest
becomes the older, and the one before that is forgotten. Every gateway looks for it at least once a minute and accepts it from then
on; each goes on signing with the older until it has known the newest for three looks, when every other gateway knows it too. Six
looks after it was published a key signs everywhere; once it has done so for the rotation period it is due to be replaced. So the
key before it is accepted for that period or longer after the last token that it signed.

While a gateway runs, the time since boot decides, so a wall clock that jumps changes nothing. The wall clock is asked once, at the
start, for the age of the newest key. If that is due it is replaced then, like any other, however old it is. A key that was made in
the future is taken to be half a period old, so that it is replaced even if its gateways restart every day.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable

from .source import Key, KeysError, KeySource, Stored

_LOOK_SECONDS = 60.0
_LOOKS_AHEAD = 3

_log = logging.getLogger(__name__)


def _since_boot() -> float:
    """Unlike CLOCK_MONOTONIC this goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class KeyRing:
    """`open()` once before use; `rotate_if_due()` as often as wanted. What tokens read changes in no call but these two."""

    def __init__(
        self,
        source: KeySource,
        rotation_seconds: float,
        clock: Callable[[], float] = time.time,
        since_boot: Callable[[], float] = _since_boot,
    ) -> None:
        self._source = source
        self._rotation_seconds = rotation_seconds
        self._look_seconds = min(_LOOK_SECONDS, rotation_seconds / 10)
        self._ahead_seconds = _LOOKS_AHEAD * self._look_seconds
        self._clock = clock
        self._since_boot = since_boot
        # Stands in while there is no other key, so that two digests are computed for every token.
        self._decoy = Key.fresh(0)
        self._stored: Stored | None = None
        self._published_at = 0.0
        self._newest_signs = False
        self.rotation_failures = 0
        """Looks of `keep_rotating()` that failed."""

    @property
    def current(self) -> Key:
        """The key that signs."""
        stored = self._held
        return stored.newest if self._newest_signs or stored.older is None else stored.older

    @property
    def previous(self) -> Key:
        """The other key that is accepted; ahead of a change it is the next one."""
        stored = self._held
        return (stored.older if self._newest_signs else stored.newest) if stored.older else self._decoy

    @property
    def age_seconds(self) -> float:
        """Time since the newest key was published: more than a period and a few minutes means that rotation fails."""
        return self._since_boot() - self._published_at

    def open(self) -> None:
        """Read the keys or make the first; raises KeysError."""
        stored = self._source.load() or self._source.rotate(None, Stored(Key.fresh(self._clock()), None))
        self._take(stored, self._age_at_start(stored))
        self.rotate_if_due()

    def rotate_if_due(self) -> bool:
        """Take up what other gateways stored, and replace the newest key if it is due: then True. Raises KeysError."""
        stored, rotated = self._look()
        self._follow(stored)
        return rotated

    async def keep_rotating(self) -> None:
        """Until cancelled: look, off the event loop. A failure keeps the keys and is tried again with the next look."""
        while True:
            await asyncio.sleep(self._look_seconds)
            try:
                stored, rotated = await asyncio.to_thread(self._look)
            except KeysError as error:
                self.rotation_failures += 1
                _log.error("token keys not looked after: %s", error)
            except Exception as error:  # the task must outlive what nobody thought of, whose text may hold a key
                self.rotation_failures += 1
                _log.error("token keys not looked after: %s", type(error).__name__)
            else:
                # On the event loop, between two requests: none sees one key of the old state and one of the new.
                self._follow(stored)
                if rotated:
                    _log.info("token key rotated")

    def _look(self) -> tuple[Stored, bool]:
        """What is stored now, and whether this gateway put it there. Blocks, and changes nothing here."""
        stored = self._source.load()
        if stored is None:
            raise KeysError("the stored keys are gone; restart every gateway to make new ones (all tokens lapse)")
        if stored.version != self._held.version or not self._is_due():
            return stored, False
        new = Stored(Key.fresh(self._clock()), stored.newest)
        held = self._source.rotate(stored, new)
        return held, hmac.compare_digest(held.newest.value.reveal(), new.newest.value.reveal())

    def _is_due(self) -> bool:
        # Never while this gateway signs with the key that a rotation forgets.
        return self._newest_signs and self.age_seconds >= self._rotation_seconds + 2 * self._ahead_seconds

    def _follow(self, stored: Stored) -> None:
        if stored.version != self._held.version:
            self._take(stored, 0.0)
        else:
            self._newest_signs |= self.age_seconds >= self._ahead_seconds

    def _take(self, stored: Stored, age: float) -> None:
        self._stored = stored
        self._published_at = self._since_boot() - age
        self._newest_signs = stored.older is None or age >= self._ahead_seconds

    def _age_at_start(self, stored: Stored) -> float:
        age = self._clock() - stored.newest.created_at
        if age < -self._ahead_seconds:
            return self._rotation_seconds / 2
        return max(0.0, age)

    @property
    def _held(self) -> Stored:
        if self._stored is None:
            raise KeysError("the keys are not open")
        return self._stored
