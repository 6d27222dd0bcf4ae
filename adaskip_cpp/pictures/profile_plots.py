"""Draws profiles and frontiers, for ``adaskip-cpp plot``; raises PackageMissingError without matplotlib.

Similarities are drawn as ``log(1 - similarity)``: those of skippable sublayers differ in the third decimal.
"""

import numpy as np

from ..model.frontier import DEFAULT_LOSS, Frontier
from ..model.skip_set import KIND_NAMES
from ..planning.profile import Profile
from . import plots

_CLOSEST = 1e-4  # similarities closer to 1 are drawn at this distance
_TICKS = (-1, -0.5, 0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
_LENGTHS = (2048, 8192, 32768)  # tokens of the prompts whose losses and speeds are shown


def similarity(profile: Profile) -> plots.Figure:
    """Draw the IO similarity of whole layers, attentions and FFNs in prefill and decode, the paper's Fig. 2 to 4."""
    fig, panels = plots.panels(3, width_in=9.5, height_in=3.2, sharey=True)
    layers = range(profile.n_layer)
    for phase, look in plots.PHASE.items():
        measured = getattr(profile, phase)
        for axes, values in zip(panels, (measured.layer_similarity, *measured.similarity.T), strict=True):
            axes.plot(layers, values, label=phase, **look.line)
    step = next(step for step in (1, 2, 5, 10, 20, 50, profile.n_layer) if profile.n_layer <= 10 * step)
    for axes, name in zip(panels, ("whole layers", *KIND_NAMES), strict=True):
        axes.set(xlabel="layer", xticks=layers[::step])
        plots.title(axes, name)
    panels[0].set_ylabel("IO similarity")
    _scale(panels)
    plots.legend(panels[-1], loc="lower center")
    return fig


def shown_lengths(frontier: Frontier) -> list[int]:
    """Return the lengths, in tokens, of the prompts to show: those for which speeds are predicted."""
    longest = max((n for point in frontier.points for n, _ in point.speedups), default=_LENGTHS[-1])
    return [length for length in _LENGTHS if length <= longest]


def losses(frontier: Frontier) -> plots.Figure:
    """Draw a frontier's losses against times to the first token, without plans that lose more than a faster one."""
    fig, (axes,) = plots.panels()
    fastest = 1.0
    for length, look in zip(shown_lengths(frontier), plots.OTHERS, strict=False):
        every = sorted([(1.0, 0.0), *((1 / point.speedup(length), point.harm(length)) for point in frontier.points)])
        rows = [row for i, row in enumerate(every) if all(row[1] <= loss for _, loss in every[:i])]
        times, lost = zip(*reversed(rows), strict=True)
        fastest = min(fastest, *times)
        axes.plot(times, lost, label=f"prompts of {length:,} tokens", **look.line)
    axes.axhline(DEFAULT_LOSS, color=plots.INK, linewidth=0.7, linestyle=":")
    axes.set(xlabel="time to the first token, share of the whole model's", ylabel="loss, nats per token")
    axes.set_xlim(1.02, min(0.3, fastest - 0.02))
    plots.legend(axes)
    return fig


def _scale(row: list[plots.Axes]) -> None:
    """Give axes that share their y axis the scale of similarity, over the range of their lines."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), np.float64) for axes in row for line in axes.lines])
    low, high = (float(np.nanmin(drawn)), float(np.nanmax(drawn))) if not np.isnan(drawn).all() else (0.0, 1.0)
    # Up to the next tick on either side, so that there are at least two.
    low = min(max((tick for tick in _TICKS if tick <= low), default=-1), 0.99)
    high = min((tick for tick in _TICKS if tick >= high), default=1.0)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    row[0].set_yscale("function", functions=(lambda x: -np.log10(np.maximum(1 - x, _CLOSEST)), lambda y: 1 - 10.0**-y))
    row[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    row[0].minorticks_off()
    row[0].set_ylim(low - 0.03 * (1 - low), 1.0 - 0.95 * max(1.0 - high, _CLOSEST))
