"""The pictures of a benchmark: times by context, and ratios with their intervals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..model.plan import PHASES
from ..pictures import plots
from .table import NO_PLAN, STOCK, BenchTimes, Row

__all__ = ["TITLES", "plot"]

TITLES = {"prefill": "Time to first token", "decode": "Time per token"}


def plot(rows: Sequence[Row], times: BenchTimes, target: str) -> list[Path]:
    """Draw times and ratios, and return the files written: PNG and SVG of each.

    Args:
        rows: of :func:`adaskip_cpp.bench.table.table`.
        times: what they come from.
        target: a folder, or a path whose last part begins the files' names.

    Raises:
        PackageMissingError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    folder, stem = _target(target)
    written = plots.save(_draw_times(rows, times), folder, f"{stem}-times")
    if any(row.against for row in rows):
        written += plots.save(_draw_ratios(rows, times), folder, f"{stem}-ratios")
    return written


def _target(target: str) -> tuple[str, str]:
    if target.endswith(("/", os.sep)) or os.path.isdir(target):
        return target, "bench"
    folder, name = os.path.split(target)
    return folder or ".", name.removesuffix(".png").removesuffix(".svg")


def _draw_times(rows: Sequence[Row], times: BenchTimes) -> Any:
    fig, axes = plots.panels(1, 2, width_in=6.5, height_in=3.2)
    for axis, phase in zip(axes, PHASES, strict=True):
        for index, name in enumerate(times.contenders):
            own = [row for row in rows if row.phase == phase and row.contender == name]
            unit = 1.0 if phase == "prefill" else 1e3
            middle = [row.median_s * unit for row in own]
            spread = [
                [(row.median_s - row.low_s) * unit for row in own],
                [(row.high_s - row.median_s) * unit for row in own],
            ]
            axis.errorbar(
                [row.context for row in own], middle, yerr=spread, label=name, capsize=2, **plots.other(index).line
            )
        _context_axis(axis, [row.context for row in rows])
        axis.set_ylim(bottom=0)
        axis.set_ylabel("seconds" if phase == "prefill" else "milliseconds")
        plots.title(axis, TITLES[phase])
    _legend(fig, axes[0])
    return fig


def _draw_ratios(rows: Sequence[Row], times: BenchTimes) -> Any:
    reference = STOCK if STOCK in times.contenders else NO_PLAN
    fig, axes = plots.panels(1, 2, width_in=6.5, height_in=3.2, sharey=True)
    contexts = sorted({row.context for row in rows})
    names = [
        name for name in times.contenders if any(name == row.contender and reference in row.against for row in rows)
    ]
    for axis, phase in zip(axes, PHASES, strict=True):
        axis.axhline(1.0, color=plots.INK, linewidth=0.8)
        ideal: list[tuple[float, float]] = []
        for index, name in enumerate(names):
            offset = 0.7 * ((index + 0.5) / len(names) - 0.5)
            own = [row for row in rows if row.phase == phase and row.contender == name and reference in row.against]
            x = [contexts.index(row.context) + offset for row in own]
            against = [row.against[reference] for row in own]
            ends = [[max(i.value - i.low, 0) for i in against], [max(i.high - i.value, 0) for i in against]]
            look = plots.other(times.contenders.index(name))
            axis.errorbar(x, [i.value for i in against], yerr=ends, label=name, capsize=2.5, **look.points)
            ideal += [(place, row.ideal.value) for place, row in zip(x, own, strict=True) if row.ideal is not None]
        if ideal:
            bar: dict[str, Any] = {"marker": "_", "color": plots.INK, "markersize": 11, "linestyle": "none"}
            axis.plot(*zip(*ideal, strict=True), label="ideal, against no plan", **bar)
        axis.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
        axis.set_xlim(-0.6, len(contexts) - 0.4)
        axis.set_xlabel("tokens of the prompt")
        plots.title(axis, TITLES[phase])
    axes[0].set_ylabel(f"times as fast as {reference}")
    _legend(fig, axes[0])
    return fig


def _legend(fig: Any, axis: Any) -> None:
    """Below the panels: contenders of any number hide no point there."""
    handles, labels = axis.get_legend_handles_labels()
    plots.legend(fig, handles=handles, labels=labels, loc="outside lower center", ncols=min(len(labels), 4))


def _context_axis(axis: Any, contexts: Sequence[int]) -> None:
    ticks = sorted(set(contexts))
    axis.set_xscale("log", base=2)
    axis.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
    axis.set_xticks(ticks, [f"{context:,}" for context in ticks])
    axis.minorticks_off()
    axis.set_xlabel("tokens of the prompt")
