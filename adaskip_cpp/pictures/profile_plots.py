"""Draws profiles, plans and frontiers, for ``adaskip-cpp plot``; raises PackageMissingError without matplotlib.

Several profiles, by the name to show, compare models. If their numbers of layers differ, the x axis is the depth.
Similarities are drawn as ``log(1 - similarity)``: those of skippable sublayers differ in the third decimal.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..model.arrays import Floats
from ..model.frontier import DEFAULT_LOSS, Frontier
from ..model.plan import SkipPlan
from ..model.skip_set import KIND_NAMES
from ..planning.profile import Profile
from . import plots

_CLOSEST = 1e-4  # similarities closer to 1 are drawn at this distance
_TICKS = (-1, -0.5, 0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
_HATCH = "/////"
LENGTHS = (2048, 8192, 32768)  # tokens of the prompts whose losses and speeds are drawn


def layers(profiles: Mapping[str, Profile]) -> plots.Figure:
    """Draw the IO similarity of whole layers in prefill, the paper's Fig. 2."""
    fig, (axes,) = plots.panels()
    series = {name: profile.prefill.layer_similarity for name, profile in profiles.items()}
    if len(profiles) == 1:
        _draw(axes, series, [plots.KIND["layer"]], "IO similarity of whole layers", *profiles)
    else:
        _draw(axes, series, plots.OTHERS, "IO similarity of whole layers")
        plots.legend(axes, loc="lower center")
    _scale(axes)
    return fig


def sublayers(profiles: Mapping[str, Profile]) -> plots.Figure:
    """Draw the IO similarity of attention and FFN by layer in prefill, the paper's Fig. 3; two panels if several."""
    if len(profiles) == 1:
        ((name, profile),) = profiles.items()
        fig, both = plots.panels()
        looks = [plots.KIND[kind] for kind in KIND_NAMES]
        _draw(both[0], dict(zip(KIND_NAMES, profile.similarity.T, strict=True)), looks, "IO similarity", name)
    else:
        fig, both = plots.panels(1, 2, height_in=3.2, sharey=True)
        for column, kind in enumerate(KIND_NAMES):
            series = {name: profile.similarity[:, column] for name, profile in profiles.items()}
            _draw(both[column], series, plots.OTHERS, "" if column else "IO similarity", kind)
    _scale(*both)
    plots.legend(both[-1], loc="lower center")
    return fig


def phases(profiles: Mapping[str, Profile]) -> plots.Figure:
    """Draw the IO similarity of attention and FFN in prefill and in decode, the paper's Fig. 4, a row per profile."""
    fig, every = plots.panels(len(profiles), 2, height_in=0.5 + 2.5 * len(profiles), sharey="row")
    for row, (name, profile) in enumerate(profiles.items()):
        both = every[2 * row : 2 * row + 2]
        for column, kind in enumerate(KIND_NAMES):
            series = {phase: getattr(profile, phase).similarity[:, column] for phase in plots.PHASE}
            title = kind if len(profiles) == 1 else f"{name}: {kind}"
            _draw(both[column], series, [*plots.PHASE.values()], "" if column else "IO similarity", title)
        _scale(*both)
    plots.legend(every[1], loc="lower center")
    if len(profiles) == 1:
        fig.suptitle(*profiles, fontsize=plots.TEXT_PT + 1, color=plots.INK, x=0.02, ha="left")
    return fig


def plan_strip(name: str, plan: SkipPlan) -> plots.Figure:
    """Draw a plan as two rows of cells, attention and FFN, one cell per layer; of a schedule, its last set.

    Filled cells are skipped in both phases, or in the bulk if there is one. Hatched cells are skipped in decode only,
    empty cells run. Lightly filled attentions see a window.
    """
    fig, (axes,) = plots.panels(height_in=1.5)
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch, Rectangle

    bulk, prompt, decode = plan.bulk, plan.skipped("bulk"), plan.skipped("decode")
    axes.grid(False)
    axes.set(xlim=(-0.6, plan.n_layer - 0.4), xticks=_ticks(plan.n_layer), xlabel="layer")
    axes.set(ylim=(2.05, -0.05), yticks=(0.5, 1.5), yticklabels=KIND_NAMES)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for layer, column in np.ndindex(plan.n_layer, 2):
        colour = plots.KIND[KIND_NAMES[column]].colour
        cell = Rectangle((layer - 0.42, column + 0.1), 0.84, 0.8, facecolor="none", edgecolor=plots.GRID, linewidth=0.6)
        if prompt.skip[layer, column]:
            cell.set_facecolor(colour)
        elif column == 0 and layer in plan.narrowed:
            cell.set_facecolor(to_rgba(colour, 0.3))
        if decode.skip[layer, column]:
            over = bulk is not None and bool(prompt.skip[layer, column])
            hatch = _HATCH if over or not prompt.skip[layer, column] else None
            cell.set(edgecolor=plots.INK if over else colour, linewidth=0.9, hatch=hatch)
        axes.add_patch(cell)
    online = ", and FFNs that each answer adds" if plan.online is not None else ""
    n_prompt, n_decode = prompt.n_skip, decode.n_skip
    apart = bulk is not None or n_prompt != n_decode
    counts = f"{n_prompt} (decode {n_decode})" if apart else f"{n_decode}"
    plots.title(axes, f"{name}: {counts} of {2 * plan.n_layer} sublayers skipped{online}")
    if apart:
        filled, hatched = ("the bulk", "decode") if bulk else ("prefill and decode", "decode only")
        cells = [
            Patch(facecolor=plots.GRID, edgecolor=plots.GRID, label=f"skipped in {filled}"),
            Patch(facecolor="none", edgecolor=plots.GRID, hatch=_HATCH, label=f"in {hatched}"),
        ]
        if bulk and bulk.narrowed:
            light = to_rgba(plots.KIND[KIND_NAMES[0]].colour, 0.3)
            cells.append(Patch(facecolor=light, label=f"window of {bulk.window_size:,} tokens"))
        plots.legend(axes, handles=cells, loc="upper left", bbox_to_anchor=(0, -0.35), ncols=3, handlelength=1.5)
    return fig


def frontiers(every: Mapping[str, Frontier]) -> plots.Figure:
    """Draw loss against the time to the first token: a panel per frontier, a curve per prompt length."""
    fig, panels = plots.panels(1, len(every), height_in=3.4)
    for axes, (name, frontier) in zip(panels, every.items(), strict=True):
        fastest = 1.0
        for i, length in enumerate(LENGTHS):
            rows = [(1.0, 0.0), *((1 / point.speedup(length), point.harm(length)) for point in frontier.points)]
            times, losses = zip(*sorted(rows, reverse=True), strict=True)
            fastest = min(fastest, *times)
            axes.plot(times, losses, label=f"prompts of {length:,} tokens", **plots.other(i).line)
        axes.axhline(DEFAULT_LOSS, color=plots.INK, linewidth=0.7, linestyle=":")
        plots.title(axes, name)
        axes.set_xlabel("time to the first token, share of the whole model's")
        axes.set_ylabel("loss, nats per token")
        axes.set_xlim(1.02, min(0.3, fastest - 0.02))
        plots.legend(axes)
    return fig


def _draw(axes: plots.Axes, series: Mapping[str, Floats], looks: Sequence[plots.Look], y: str, title: str = "") -> None:
    """Draw similarities by layer, or by depth if the series differ in length."""
    alike = len({len(values) for values in series.values()}) == 1
    for i, (name, values) in enumerate(series.items()):
        x = np.arange(len(values)) / (1 if alike else max(len(values) - 1, 1))
        axes.plot(x, values, label=name, **looks[i % len(looks)].line)
    if alike:
        axes.set_xticks(_ticks(len(values)))
    axes.set(xlabel="layer" if alike else "depth: layer / last layer", ylabel=y)
    plots.title(axes, title)


def _scale(*row: plots.Axes) -> None:
    """Give axes that share their y axis the scale of similarity, over the range of their lines."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), np.float64) for axes in row for line in axes.lines])
    low, high = (float(np.nanmin(drawn)), float(np.nanmax(drawn))) if not np.isnan(drawn).all() else (0.0, 1.0)
    # Up to the next tick on either side, so that there are at least two.
    low = min(max((tick for tick in _TICKS if tick <= low), default=-1), 0.99)
    high = min((tick for tick in _TICKS if tick >= high), default=1.0)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    row[0].set_yscale("function", functions=(_finer, lambda y: 1.0 - 10.0**-y))
    row[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    row[0].minorticks_off()
    row[0].set_ylim(low - 0.03 * (1 - low), 1.0 - 0.95 * max(1.0 - high, _CLOSEST))


def _finer(similarity: Floats) -> Floats:
    return np.asarray(-np.log10(np.maximum(1.0 - np.asarray(similarity), _CLOSEST)))


def _ticks(n_layer: int) -> range:
    return range(0, n_layer, next(step for step in (1, 2, 5, 10, 20, 50, n_layer) if n_layer <= 10 * step))
