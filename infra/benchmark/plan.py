"""How long each mode measures what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """Seconds unless named otherwise; 0 leaves a part out."""

    rounds: int = 0
    """Of the side-by-side comparison."""
    side_by_side_budget: float = 0.0
    """After this, and one whole round, nothing more of it begins."""
    concurrencies: tuple[int, ...] = (1, 8, 32)
    window: float = 1.2
    """Of Mayfly."""
    floor_window: float = 1.0
    """Of bare Docker, which has one beside nearly every one of Mayfly's."""
    short_window: float = 0.6
    """Of the sides that answer in about a millisecond."""
    agents: float = 0.0
    """All segments together."""
    agent_segments: int = 2
    think: float = 1.0
    """Mean pause of an agent between an answer and its next request."""
    saturation: float = 0.0
    saturation_limit: float = 60.0
    """The load lasts longer than `saturation`, up to this, where the queue would not fill before."""
    recovery: float = 90.0
    """Longest wait for the service to be itself again."""
    engine_rounds: int = 0
    """Of the engine's targets."""
    engine_window: float = 2.0
    rival_window: float = 3.0
    """Of engine docker without anything started ahead: a request is a whole container."""
    tail_window: float = 5.0
    """At 70 % of capacity."""
    many_requests: int = 10_000
    """After which the service is to hold no more memory than before."""
    crowd: int = 10_000
    """Live instances."""
    crowd_seconds: float = 180.0
    """Longest time to make them in."""
    breakdown: float = 0.0
    """Of each window in which processor time is accounted for."""
    flood: float = 0.0
    """Before it a well-behaved client is measured for half of it, after it for a fifth."""
    regexp_rounds: int = 0
    """Of REGEXP beside the other ways to look for a text."""


PLANS = {
    "quick": Plan(rounds=3, side_by_side_budget=165, agents=20, saturation=10, saturation_limit=16, recovery=40),
    "full": Plan(
        rounds=5, side_by_side_budget=780, window=4, floor_window=3, short_window=1.5, agents=120, agent_segments=4, saturation=30
    ),
    "agents": Plan(agents=120, agent_segments=4),
    "saturation": Plan(saturation=30),
    "engines": Plan(engine_rounds=3, breakdown=3),
    "engines full": Plan(engine_rounds=7, engine_window=4, rival_window=4, tail_window=15, many_requests=100_000, breakdown=5),
    "breakdown": Plan(breakdown=3),
    "flood": Plan(flood=25),
    "regexp": Plan(regexp_rounds=7),
    "smoke": Plan(
        rounds=1,
        side_by_side_budget=60,
        concurrencies=(1, 2),
        window=0.3,
        floor_window=0.2,
        short_window=0.1,
        agents=2,
        agent_segments=1,
        think=0.1,
        saturation=1.5,
        saturation_limit=1.5,
        recovery=20,
        engine_rounds=1,
        engine_window=0.3,
        rival_window=0.3,
        tail_window=0.5,
        many_requests=20,
        crowd=50,
        crowd_seconds=5,
        breakdown=0.3,
        regexp_rounds=1,
    ),
}
