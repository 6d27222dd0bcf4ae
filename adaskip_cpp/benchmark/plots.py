"""Draws the pictures of a benchmark: times by context, and ratios with their intervals. Start at :func:`plot`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..model.plan import TIMED
from ..pictures import plots
from .table import NO_PLAN, STOCK, Row

TITLES = {"prefill": "Time to first token", "decode": "Time per token"}


def plot(rows: Sequence[Row], target: str) -> list[Path]:
    """Draw times and ratios as PNG and SVG. ``target`` is a folder, or a path whose last part begins the file names."""
    folder, stem = os.path.split(target)
    if not stem or os.path.isdir(target):
        folder, stem = target, "bench"
    stem = stem.removesuffix(".png").removesuffix(".svg")
    written = plots.save(_draw_times(rows), folder or ".", f"{stem}-times")
    if any(row.against for row in rows):
        written += plots.save(_draw_ratios(rows), folder or ".", f"{stem}-ratios")
    return written


def _draw_times(rows: Sequence[Row]) -> plots.Figure:
    fig, axes = plots.panels(1, 2, height_in=3.2)
    contexts = sorted({row.context for row in rows})
    for axis, phase, unit, scale in zip(axes, TIMED, ("seconds", "milliseconds"), (1, 1e3), strict=True):
        for index, name in enumerate(_contenders(rows)):
            own = [row for row in rows if row.phase == phase and row.contender == name]
            low, middle, high = scale * np.array([(row.low_s, row.median_s, row.high_s) for row in own]).T
            spread = [middle - low, high - middle]
            look = plots.other(index).line
            axis.errorbar([row.context for row in own], middle, yerr=spread, label=name, capsize=2, **look)
        axis.set_xscale("log", base=2)
        axis.set(xlim=(contexts[0] / 1.3, contexts[-1] * 1.3), ylim=(0, None), ylabel=unit)
        axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axis.minorticks_off()
    return _finished(fig, axes)


def _draw_ratios(rows: Sequence[Row]) -> plots.Figure:
    contenders = _contenders(rows)
    reference = STOCK if STOCK in contenders else NO_PLAN
    fig, axes = plots.panels(1, 2, height_in=3.2, sharey=True)
    contexts = sorted({row.context for row in rows})
    names = [name for name in contenders if name != reference]
    for axis, phase in zip(axes, TIMED, strict=True):
        axis.axhline(1.0, color=plots.INK, linewidth=0.8)
        ideal: list[tuple[float, float]] = []
        for index, name in enumerate(names):
            own = [row for row in rows if row.phase == phase and row.contender == name]
            x = [contexts.index(row.context) + 0.7 * ((index + 0.5) / len(names) - 0.5) for row in own]
            against = [row.against[reference] for row in own]
            ends = [[max(i.value - i.low, 0) for i in against], [max(i.high - i.value, 0) for i in against]]
            look = plots.other(contenders.index(name))
            axis.errorbar(x, [i.value for i in against], yerr=ends, label=name, capsize=2.5, **look.points)
            ideal += [(place, row.ideal.value) for place, row in zip(x, own, strict=True) if row.ideal is not None]
        if ideal:
            bar: dict[str, Any] = {"marker": "_", "color": plots.INK, "markersize": 11, "linestyle": "none"}
            axis.plot(*zip(*ideal, strict=True), label="ideal, against no plan", **bar)
        axis.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
        axis.set_xlim(-0.6, len(contexts) - 0.4)
    axes[0].set_ylabel(f"times as fast as {reference}")
    return _finished(fig, axes)


def _contenders(rows: Sequence[Row]) -> list[str]:
    return [*dict.fromkeys(row.contender for row in rows)]


def _finished(fig: plots.Figure, axes: Sequence[plots.Axes]) -> plots.Figure:
    for axis, phase in zip(axes, TIMED, strict=True):
        axis.set_xlabel("tokens of the prompt")
        plots.title(axis, TITLES[phase])
    # Below the panels, where it hides no points.
    handles, labels = axes[0].get_legend_handles_labels()
    plots.legend(fig, handles=handles, labels=labels, loc="outside lower center", ncols=min(len(labels), 4))
    return fig
