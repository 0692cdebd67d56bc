"""The distributions themselves: for every latency, the share of requests answered within it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

_COLUMNS = 3
_MAX_POINTS = 1000


@dataclass(frozen=True, slots=True)
class Curve:
    label: str
    seconds: Sequence[float]
    """Sorted."""
    colour: str
    style: str = "-"


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    curves: tuple[Curve, ...]


def draw(title: str, panels: Sequence[Panel], stem: Path) -> None:
    """Write `stem`.svg and `stem`.png."""
    mpl.rcParams["svg.hashsalt"] = "mayfly"  # the same results give the same file
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 5.0 * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axis, panel in zip(axes, panels, strict=False):
        for curve in panel.curves:
            if curve.seconds:
                values, shares = _steps(curve.seconds)
                label = f"{curve.label} (n={len(curve.seconds)})"
                axis.step(values, shares, where="post", color=curve.colour, linestyle=curve.style, linewidth=1.4, label=label)
        axis.set(xscale="log", ylim=(0, 1.01), title=panel.title, xlabel="latency, ms")
        axis.grid(visible=True, which="both", alpha=0.25)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supylabel("share of requests answered")
    figure.suptitle(title)
    for suffix in (".svg", ".png"):
        figure.savefig(stem.with_suffix(suffix), dpi=110)


def _steps(seconds: Sequence[float]) -> tuple[list[float], list[float]]:
    """The empirical distribution in ms; beyond a few thousand samples every so-manieth, the last always."""
    step = max(1, len(seconds) // _MAX_POINTS)
    ranks = sorted({*range(0, len(seconds), step), len(seconds) - 1})
    begin = 1000 * seconds[0]
    return [begin, *(1000 * seconds[rank] for rank in ranks)], [0.0, *((rank + 1) / len(seconds) for rank in ranks)]
