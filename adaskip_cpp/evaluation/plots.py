"""Draws the picture of an evaluation, loss against speed: :func:`quality_picture`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..intervals import Interval
from ..pictures import plots
from ..planning.modes import MODES
from .results import SPEED_NAMES, SPEEDS, Figure, Results, Row


class _Point(NamedTuple):
    row: Row
    speed: Interval
    loss: Figure


def quality_picture(results: Results) -> plots.Figure | None:
    """Return the picture, with a panel for each mode; None if nothing was timed, or no loss was measured."""
    panels: dict[str, list[_Point]] = {}
    for row in (each for mode in MODES for each in results.of_mode(mode)):
        if row.mode and row.speedup is not None and (loss := row.figure("added_loss")) is not None:
            panels.setdefault(row.mode, []).append(_Point(row, row.speedup, loss))
    if not panels:
        return None
    n = len(panels)
    fig, every = plots.panels(n, width_in=3.3 * n + 0.4, height_in=3.6, sharey=True)
    drawn: dict[str, Any] = {}
    for axes, (mode, points) in zip(every, panels.items(), strict=True):
        axes.set_yscale("symlog", linthresh=0.1)  # logarithmic, because losses differ by a factor of a hundred
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        speeds = [1.0, *(point.speed.value for point in points)]
        margin = max(0.06 * (max(speeds) - min(speeds)), 0.01)
        # The points set the limits, not their bars: one disturbed round makes a very long bar.
        axes.set_xlim(min(speeds) - margin, max(speeds) + 1.5 * margin)
        axes.axvline(1.0, color=plots.GRID, linewidth=0.8)
        drawn.setdefault("whole model", axes.plot([1.0], [0.0], **plots.STRATEGY["full"].line, zorder=4)[0])
        for series in dict.fromkeys(point.row.series for point in points):
            drawn.setdefault(series, _draw(axes, [each for each in points if each.row.series == series]))
        plots.title(axes, mode)
        axes.set_xlabel(f"{SPEED_NAMES[SPEEDS[mode]]}, times as fast")
    every[0].set_ylim(bottom=min([-0.02, *(point.loss.mean for points in panels.values() for point in points)]))
    every[0].set_ylabel("added loss, nats per token (lower is better)")
    plots.legend(fig, handles=[*drawn.values()], labels=[*drawn], loc="outside lower center", ncols=4 if n > 1 else 2)
    return fig


def _draw(axes: plots.Axes, line: Sequence[_Point]) -> Any:
    look = plots.STRATEGY.get(line[0].row.look, plots.OTHERS[-1])
    x, y = [point.speed.value for point in line], [point.loss.mean for point in line]
    spread = list(zip(*((each.value - each.low, each.high - each.value) for _, each, _ in line), strict=True))
    errors = [point.loss.error for point in line]
    axes.errorbar(x, y, errors, spread, fmt="none", ecolor=look.colour, elinewidth=0.7, alpha=0.6)
    (handle,) = axes.plot(x, y, **look.line)
    beside: dict[str, Any] = {"textcoords": "offset points", "xytext": (4, 3), "fontsize": plots.TEXT_PT - 2.5}
    for point, at in zip(line, zip(x, y, strict=True), strict=True):
        axes.annotate(point.row.budget, at, color=look.colour, **beside)
    return handle
