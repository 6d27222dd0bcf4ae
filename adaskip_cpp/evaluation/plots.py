"""Pictures of an evaluation: quality against measured speed, and scores by length and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..model.plan import MODES
from ..pictures import plots
from .results import SPEEDS
from .rows import MODE_NAMES, STRATEGY_NAMES, added_loss, contender_label, look_key, speedup, text_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["QualityPoint", "quality_against_speed", "quality_pictures", "score_maps"]

_SPEED_LABELS = {
    "first_token": "first token, times as fast",
    "per_token": "later tokens, times as fast",
    "request": "whole request, times as fast",
}


@dataclass(frozen=True)
class QualityPoint:
    """One contender in the picture.

    Attributes:
        panel: title of the axes it is in; those of one panel are side by side.
        series: points of one series are joined by a line, in the order of their speed.
        look: key in :data:`adaskip_cpp.pictures.plots.STRATEGY`; another gets a look for all others.
        budget: written beside the point.
        speed: measured speed-up.
        speed_low, speed_high: its 95% interval; NaN where unknown.
        quality: on the vertical axis.
        error: its standard error; NaN where unknown.
    """

    panel: str
    series: str
    look: str
    budget: str
    speed: float
    speed_low: float
    speed_high: float
    quality: float
    error: float


def quality_against_speed(
    points: Sequence[QualityPoint],
    *,
    label: str,
    full: float,
    speed_labels: Mapping[str, str],
    symlog: bool = False,
) -> Figure:
    """Draw quality over measured speed: one pair of axes per panel, one line per series.

    Args:
        points: at least one.
        label: of the vertical axis.
        full: quality of the full model, at speed 1.
        speed_labels: of the horizontal axes, by panel.
        symlog: logarithmic away from 0, as losses differ by a factor of a hundred.

    Raises:
        PackageMissingError: matplotlib is not installed.
    """
    names = list(dict.fromkeys(point.panel for point in points))
    fig, every = plots.panels(1, len(names), width_in=3.3 * max(len(names), 1) + 0.4, height_in=3.6, sharey=True)
    handles: dict[str, Any] = {}
    for axes, name in zip(every, names, strict=True):
        mine = [point for point in points if point.panel == name]
        if symlog:
            axes.set_yscale("symlog", linthresh=0.1)
            axes.yaxis.set_major_formatter(_plain)
        speeds = [1.0, *(point.speed for point in mine)]
        margin = max(0.06 * (max(speeds) - min(speeds)), 0.01)
        # By the points, not by their bars: one round that was interrupted makes a bar that dwarfs them all.
        axes.set_xlim(min(speeds) - margin, max(speeds) + 1.5 * margin)
        axes.axvline(1.0, color=plots.GRID, linewidth=0.8)
        whole = axes.plot([1.0], [full], **plots.STRATEGY["full"].points, zorder=4)
        handles.setdefault("full model", whole[0])
        for series in dict.fromkeys(point.series for point in mine):
            line = sorted((point for point in mine if point.series == series), key=lambda point: point.speed)
            handles.setdefault(series, _draw(axes, line))
        plots.title(axes, name)
        axes.set_xlabel(speed_labels[name])
    if symlog:
        every[0].set_ylim(bottom=min([-0.02, *(point.quality for point in points)]))
    elif all(0 <= point.quality <= 1 for point in points):
        every[0].set_ylim(-0.03, 1.05)
    every[0].set_ylabel(label)
    n_columns = 4 if len(names) > 1 else 2
    plots.legend(fig, handles=list(handles.values()), labels=list(handles), loc="outside lower center", ncols=n_columns)
    return fig


def _plain(value: float, _: float) -> str:
    return f"{value:g}"


def _draw(axes: Axes, line: Sequence[QualityPoint]) -> Any:
    look = plots.STRATEGY.get(line[0].look, plots.OTHERS[-1])
    x, y = [point.speed for point in line], [point.quality for point in line]
    spread = [[point.speed - point.speed_low for point in line], [point.speed_high - point.speed for point in line]]
    axes.errorbar(
        x,
        y,
        xerr=spread,
        yerr=[point.error for point in line],
        fmt="none",
        ecolor=look.colour,
        elinewidth=0.7,
        alpha=0.6,
    )
    (handle,) = axes.plot(x, y, **look.line)
    for point in line:
        axes.annotate(
            point.budget,
            (point.speed, point.quality),
            textcoords="offset points",
            xytext=(4, 3),
            fontsize=plots.TEXT_PT - 2.5,
            color=look.colour,
        )
    return handle


def quality_pictures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the pictures of quality against measured speed, by file name; none if nothing was timed.

    ``quality`` is the added loss, the picture of this project; ``agreement``, ``rouge-l`` and ``score-<task>`` show the
    other measures in the same way.

    Raises:
        PackageMissingError: matplotlib is not installed.
    """
    rows = results["contenders"]
    full = next(row for row in rows if row["mode"] is None)
    tasks = list(dict.fromkeys(task for row in rows for task in row["questions"]))
    kinds: list[tuple[str, str, float, Any, bool]] = [
        ("quality", "added loss, nats per token (lower is better)", 0.0, added_loss, True),
        ("agreement", "agreement with the full model", 1.0, _agreement, False),
        ("rouge-l", "Rouge-L with the full model's text", 1.0, _rouge, False),
    ]
    for task in tasks:
        score = full["questions"].get(task)
        if score is not None:
            kinds.append((f"score-{task}", f"score, {task}", score["score"]["mean"], _score(task), False))
    found: dict[str, Figure] = {}
    speed_labels = {MODE_NAMES[mode]: _SPEED_LABELS[SPEEDS[mode]] for mode in MODES}
    for name, label, whole, figure_of, symlog in kinds:
        points = [point for mode in MODES for row in rows if row["mode"] == mode for point in _points(row, figure_of)]
        if points:
            found[name] = quality_against_speed(
                points, label=label, full=whole, speed_labels=speed_labels, symlog=symlog
            )
    return found


def _points(row: Mapping[str, Any], figure_of: Any) -> list[QualityPoint]:
    speed, figure = speedup(row), figure_of(row)
    if speed is None or speed["value"] is None or figure is None:
        return []
    nan = float("nan")
    low, high, error = (nan if each is None else each for each in (speed["low"], speed["high"], figure["error"]))
    compensated = row["compensation"] != "none"
    name = STRATEGY_NAMES.get(row["strategy"], row["strategy"])
    return [
        QualityPoint(
            MODE_NAMES[row["mode"]],
            f"{name}, {row['compensation']}" if compensated else name,
            look_key(row),
            row["budget"],
            speed["value"],
            low,
            high,
            figure["mean"],
            error,
        )
    ]


def _agreement(row: Mapping[str, Any]) -> Any:
    return text_figures(row, row["mode"]).get("agreement")


def _rouge(row: Mapping[str, Any]) -> Any:
    return (row["text"]["rouge_l"] or {}).get("all")


def _score(task: str) -> Any:
    return lambda row: (row["questions"].get(task) or {}).get("score")


def score_maps(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Return a map of scores by length and depth for each task that was asked at several, by file name.

    Raises:
        PackageMissingError: matplotlib is not installed.
    """
    rows = [row for row in results["contenders"] if row["questions"]]
    tasks = list(dict.fromkeys(task for row in rows for task in row["questions"]))
    found: dict[str, Figure] = {}
    for task in tasks:
        mine = [row for row in rows if row["questions"].get(task, {}).get("cells")]
        if mine:
            found[f"map-{task}"] = _map(task, mine)
    return found


def _map(task: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    cells = list(
        dict.fromkeys((cell["length"], cell["depth"]) for row in rows for cell in row["questions"][task]["cells"])
    )
    values = [
        [
            {(cell["length"], cell["depth"]): cell["score"]["mean"] for cell in row["questions"][task]["cells"]}.get(
                cell, float("nan")
            )
            for cell in cells
        ]
        for row in rows
    ]
    fig, axes = plots.figure(width_in=2.4 + max(0.45 * len(cells), 2.0), height_in=1.2 + 0.2 * len(rows))
    axes.grid(False)
    axes.imshow(values, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value == value:
                shade = "#010101" if value > 0.5 else "#fefefe"  # not INK: it stays so on a dark page
                axes.text(j, i, f"{value:.0%}", ha="center", va="center", fontsize=plots.TEXT_PT - 3, color=shade)
    labels = [f"{length:,}" + ("" if depth is None else f"\n{depth:.0%}") for length, depth in cells]
    axes.set_xticks(range(len(cells)), labels)
    names = [contender_label(row) + ("" if row["mode"] is None else f", {MODE_NAMES[row['mode']]}") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(labelsize=plots.TEXT_PT - 2.5, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    deep = any(depth is not None for _, depth in cells)
    axes.set_xlabel("tokens of the prompt, depth of the answer" if deep else "tokens of the prompt")
    plots.title(axes, f"{task}: score")
    return fig
