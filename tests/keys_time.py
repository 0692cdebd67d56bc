"""Two clocks that move by hand, and a fleet of gateways that lives by them, for tests of keys over weeks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.uuid7 import uuid7
from gateway.web.keys import KeyRing, KeySource
from gateway.web.secret import Secret
from gateway.web.tokens import Tokens

DAY = 86_400.0
YEAR = 365 * DAY
LOOK = 60.0
AHEAD = 3 * LOOK
PERIOD = DAY + 2 * AHEAD
"""From one rotation to the next."""
TTL = 600.0


class Clock:
    def __init__(self, now: float = 1_000_000_000.0) -> None:
        self.wall = now
        self.boot = 0.0

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds

    def jump(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self.wall += seconds


@dataclass
class Gateway:
    ring: KeyRing
    tokens: Tokens
    looks_at: float


@dataclass
class Issued:
    token: Secret[str]
    at: float
    wall: float
    alive: bool = True


@dataclass
class Fleet:
    """Gateways on one source, which look once a minute each at a time of its own."""

    clock: Clock
    source: Callable[[], KeySource]
    size: int
    gateways: list[Gateway] = field(default_factory=list)
    rotations: list[float] = field(default_factory=list)
    issued: list[Issued] = field(default_factory=list)
    by_key: dict[bytes, Issued] = field(default_factory=dict)
    """Of each key the last token that it signed."""

    def start(self, *, look_offset: float = 0.0) -> Gateway:
        ring = KeyRing(self.source(), DAY, lambda: self.clock.wall, lambda: self.clock.boot)
        ring.open()
        gateway = Gateway(ring, Tokens(ring), self.clock.boot + LOOK + look_offset)
        self._issue(gateway)
        return gateway

    def start_all(self) -> None:
        self.gateways = [self.start(look_offset=LOOK * index / self.size) for index in range(self.size)]

    def restart(self, index: int) -> None:
        self.gateways[index] = self.start()

    def run(self, seconds: float, at_each_step: Callable[[], None] = lambda: None) -> None:
        end = self.clock.boot + seconds
        while self.clock.boot < end:
            self.clock.pass_by(min(self._step(), end - self.clock.boot))
            for gateway in self.gateways:
                if self.clock.boot >= gateway.looks_at:
                    gateway.looks_at = self.clock.boot + LOOK
                    if gateway.ring.rotate_if_due():
                        self.rotations.append(self.clock.boot)
                self._issue(gateway)
                self.live_tokens_are_accepted()
            at_each_step()

    def _step(self) -> float:
        """Small around rotations, large where a look finds nothing new."""
        ages = [gateway.ring.age_seconds for gateway in self.gateways]
        if min(ages) < AHEAD + 2 * LOOK or max(ages) >= PERIOD - LOOK:
            return LOOK / self.size
        return max(1.0, min(3600.0, PERIOD - LOOK - max(ages)))

    def _issue(self, gateway: Gateway) -> None:
        one = Issued(gateway.tokens.issue(uuid7()), self.clock.boot, self.clock.wall)
        self.issued.append(one)
        self.by_key[gateway.ring.current.value.reveal()] = one

    def accepts(self, one: Issued) -> set[bool]:
        return {gateway.tokens.resolve(one.token)[1] for gateway in self.gateways}

    def live_tokens_are_accepted(self) -> None:
        """By every gateway, whoever issued them. An instance ends by the wall clock; if that takes days, its token ends first."""
        for one in self.issued:
            one.alive &= self.clock.wall < one.wall + TTL and self.clock.boot <= one.at + DAY
        self.issued = [one for one in self.issued if one.alive]
        for one in self.issued:
            assert self.accepts(one) == {True}, f"issued at {one.at}, refused at {self.clock.boot}"

    def tokens_last_between_one_cycle_and_two(self) -> None:
        """Counted from the last token that their key signed."""
        for one in self.by_key.values():
            since = self.clock.boot - one.at
            if since <= DAY:
                assert self.accepts(one) == {True}, f"refused after {since} s"
            if since > 2 * DAY:
                assert self.accepts(one) == {False}, f"accepted after {since} s"
