"""Draws the pictures of an evaluation, quality against measured speed. Start at :func:`quality_pictures`."""

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any, NamedTuple

from ..intervals import Interval
from ..model.mode import MODES
from ..pictures import plots
from .results import SPEED_NAMES, SPEEDS, Figure, Results, Row


class _Quality(NamedTuple):
    """A measure of quality: its axis label, the whole model's value, and a function of a row, None if it has none."""

    label: str
    full: float
    of: Callable[[Row], Figure | None]


class _Point(NamedTuple):
    row: Row
    speed: Interval
    quality: Figure


def quality_pictures(results: Results) -> dict[str, plots.Figure]:
    """Return pictures by name: ``quality``, ``agreement``, ``rouge-l``, ``score-<task>``; {} if nothing was timed."""
    kinds = {
        "quality": _Quality("added loss, nats per token (lower is better)", 0.0, methodcaller("figure", "added_loss")),
        "agreement": _Quality("agreement with the whole model", 1.0, methodcaller("figure", "agreement")),
        "rouge-l": _Quality("Rouge-L with the whole model's text", 1.0, methodcaller("figure", "rouge_l")),
    }
    for task in results.tasks:
        if (score := results.full.score(task)) is not None:
            kinds[f"score-{task}"] = _Quality(f"score, {task}", score.mean, methodcaller("score", task))
    drawn = {}
    for name, quality in kinds.items():
        panels = {mode: points for mode in MODES if (points := _points(results.of_mode(mode), quality))}
        if panels:
            # A logarithmic axis for losses, which differ by a factor of a hundred.
            drawn[name] = _quality_against_speed(panels, quality, symlog=name == "quality")
    return drawn


def _points(rows: Sequence[Row], quality: _Quality) -> list[_Point]:
    found = ((row, row.speedup, quality.of(row)) for row in rows)
    return [_Point(row, speed, figure) for row, speed, figure in found if speed is not None and figure is not None]


def _quality_against_speed(panels: dict[Any, list[_Point]], quality: _Quality, *, symlog: bool) -> plots.Figure:
    n = len(panels)
    fig, every = plots.panels(1, n, width_in=3.3 * n + 0.4, height_in=3.6, sharey=True)
    handles: dict[str, Any] = {}
    for axes, (mode, points) in zip(every, panels.items(), strict=True):
        if symlog:
            axes.set_yscale("symlog", linthresh=0.1)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        speeds = [1.0, *(point.speed.value for point in points)]
        margin = max(0.06 * (max(speeds) - min(speeds)), 0.01)
        # The points set the limits, not their bars: one disturbed round makes a very long bar.
        axes.set_xlim(min(speeds) - margin, max(speeds) + 1.5 * margin)
        axes.axvline(1.0, color=plots.GRID, linewidth=0.8)
        whole = axes.plot([1.0], [quality.full], **plots.STRATEGY["full"].points, zorder=4)
        handles.setdefault("whole model", whole[0])
        for series in dict.fromkeys(point.row.series for point in points):
            handles.setdefault(series, _draw(axes, [each for each in points if each.row.series == series]))
        plots.title(axes, mode)
        axes.set_xlabel(f"{SPEED_NAMES[SPEEDS[mode]]}, times as fast")
    qualities = [point.quality.mean for points in panels.values() for point in points]
    if symlog:
        every[0].set_ylim(bottom=min([-0.02, *qualities]))
    elif all(0 <= each <= 1 for each in qualities):
        every[0].set_ylim(-0.03, 1.05)
    every[0].set_ylabel(quality.label)
    n_columns = 4 if n > 1 else 2
    plots.legend(fig, handles=list(handles.values()), labels=list(handles), loc="outside lower center", ncols=n_columns)
    return fig


def _draw(axes: plots.Axes, line: Sequence[_Point]) -> Any:
    look = plots.STRATEGY.get(line[0].row.look, plots.OTHERS[-1])
    x, y = [point.speed.value for point in line], [point.quality.mean for point in line]
    spread = list(zip(*((each.value - each.low, each.high - each.value) for _, each, _ in line), strict=True))
    errors = [point.quality.error for point in line]
    axes.errorbar(x, y, errors, spread, fmt="none", ecolor=look.colour, elinewidth=0.7, alpha=0.6)
    (handle,) = axes.plot(x, y, **look.line)
    beside: dict[str, Any] = {"textcoords": "offset points", "xytext": (4, 3), "fontsize": plots.TEXT_PT - 2.5}
    for point, at in zip(line, zip(x, y, strict=True), strict=True):
        axes.annotate(point.row.budget, at, color=look.colour, **beside)
    return handle
