"""What an engine is to reach, as data: a figure, its bound, and whether it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .figures import rounded


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that could not be measured reaches nothing. One of the bounds is set."""

    what: str
    figure: float | None
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool:
        if self.figure is None:
            return False
        return (self.at_least is None or self.figure >= self.at_least) and (self.at_most is None or self.figure <= self.at_most)

    def as_json(self) -> dict[str, Any]:
        bound = {"at_most": self.at_most} if self.at_least is None else {"at_least": self.at_least}
        figure = None if self.figure is None else rounded(self.figure)
        return {"what": self.what, "figure": figure, "unit": self.unit, **bound, "reached": self.reached}
