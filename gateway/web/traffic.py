"""How many requests came, how they ended and how long they took, for the metrics. No label holds a caller's words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..metrics import Durations

OTHER = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"})


class Traffic:
    def __init__(self, paths: Iterable[str]) -> None:
        self.requests: Counter[tuple[str, str, int, str]] = Counter()
        """By route, method, status and code of the error."""
        self.seconds = {route: Durations() for route in (*paths, OTHER)}
        """By route."""

    def count(self, path: str, method: str, status: int, code: str, seconds: float) -> None:
        route = path if path in self.seconds else OTHER
        self.requests[route, method if method in METHODS else OTHER, status, code] += 1
        self.seconds[route].observe(seconds)
