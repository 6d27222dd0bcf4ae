"""The paper's figures from profiles: similarity of whole layers, of attention and FFN, of both in prefill and decode.

Several profiles in one picture compare models; where their numbers of layers differ, the x axis is the depth,
layer / (number of layers - 1). The scale of similarity grows finer towards 1 (it is that of ``log(1 - similarity)``),
as a few sublayers change the stream a lot, and those that can be skipped differ in the third decimal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..model.plan import KIND_NAMES, PHASES
from . import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..model.plan import SkipPlan
    from ..planning.profile import Profile

__all__ = ["layers", "phases", "plan_strip", "sublayers"]


_CLOSEST = 1e-4
"""Similarities nearer to 1 than this are drawn here."""
_TICKS = (-1, -0.5, 0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


def layers(profiles: Mapping[str, Profile]) -> Figure:
    """Draw the IO similarity of whole layers in prefill, the paper's Fig. 2.

    Args:
        profiles: profiles by the name to show; at least one.

    Raises:
        PackageMissingError: matplotlib is not installed.
    """
    fig, axes = plots.figure()
    for i, (name, profile) in enumerate(profiles.items()):
        look = plots.KIND["layer"] if len(profiles) == 1 else plots.other(i)
        axes.plot(_x(profiles, profile), profile.prefill.layer_similarity, label=name, **look.line)
    _label(axes, profiles, "IO similarity of whole layers")
    _scale(axes)
    if len(profiles) > 1:
        plots.legend(axes, loc="lower center")
    else:
        plots.title(axes, next(iter(profiles)))
    return fig


def sublayers(profiles: Mapping[str, Profile]) -> Figure:
    """Draw the IO similarity of attention and FFN by layer in prefill, the paper's Fig. 3.

    One profile gives one pair of axes with both; several give one pair of axes for each kind.

    Args:
        profiles: profiles by the name to show; at least one.

    Raises:
        PackageMissingError: matplotlib is not installed.
    """
    if len(profiles) == 1:
        ((name, profile),) = profiles.items()
        fig, axes = plots.figure()
        for column, kind in enumerate(KIND_NAMES):
            axes.plot(_x(profiles, profile), profile.similarity[:, column], label=kind, **plots.KIND[kind].line)
        _label(axes, profiles, "IO similarity")
        _scale(axes)
        plots.title(axes, name)
        plots.legend(axes, loc="lower center")
        return fig
    fig, both = plots.panels(1, 2, height_in=3.2, sharey=True)
    for column, (axes, kind) in enumerate(zip(both, KIND_NAMES, strict=True)):
        for i, (name, profile) in enumerate(profiles.items()):
            look = plots.other(i)
            axes.plot(_x(profiles, profile), profile.similarity[:, column], label=name, **look.line)
        _label(axes, profiles, "IO similarity" if column == 0 else "")
        plots.title(axes, kind)
    _scale(*both)
    plots.legend(both[1], loc="lower center")
    return fig


def phases(profiles: Mapping[str, Profile]) -> Figure:
    """Draw the IO similarity of attention and FFN in prefill and in decode, the paper's Fig. 4, a row per profile.

    Args:
        profiles: profiles by the name to show; at least one.

    Raises:
        PackageMissingError: matplotlib is not installed.
    """
    height = 0.5 + 2.5 * len(profiles)
    fig, every = plots.panels(len(profiles), 2, height_in=height, sharey="row")
    for row, (name, profile) in enumerate(profiles.items()):
        for column, kind in enumerate(KIND_NAMES):
            axes = every[2 * row + column]
            for phase in PHASES:
                similarity = getattr(profile, phase).similarity[:, column]
                axes.plot(np.arange(profile.n_layer), similarity, label=phase, **plots.PHASE[phase].line)
            _label(axes, {name: profile}, "IO similarity" if column == 0 else "")
            plots.title(axes, kind if len(profiles) == 1 else f"{name}: {kind}")
        _scale(*every[2 * row : 2 * row + 2])
    plots.legend(every[1], loc="lower center")
    if len(profiles) == 1:
        fig.suptitle(next(iter(profiles)), fontsize=plots.TEXT_PT + 1, color=plots.INK, x=0.02, ha="left")
    return fig


def plan_strip(name: str, plan: SkipPlan) -> Figure:
    """Draw a plan as two rows of cells, attention and FFN, one cell per layer.

    Skipped in both phases is filled, skipped in decode only is hatched, what runs is empty. A schedule shows its last
    set.

    Args:
        name: what to write above it.
        plan: the plan.

    Raises:
        PackageMissingError: matplotlib is not installed.
    """
    fig, axes = plots.figure(height_in=1.5)
    from matplotlib.patches import Patch, Rectangle

    decode = plan.skipped("decode")
    axes.grid(False)
    axes.set(xlim=(-0.6, plan.n_layer - 0.4), ylim=(2.05, -0.05), yticks=(0.5, 1.5), yticklabels=KIND_NAMES)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    for layer, column in np.ndindex(plan.n_layer, 2):
        colour = plots.KIND[KIND_NAMES[column]].colour
        in_prefill, in_decode = plan.prefill.skip[layer, column], decode.skip[layer, column]
        axes.add_patch(
            Rectangle(
                (layer - 0.42, column + 0.1),
                0.84,
                0.8,
                facecolor=colour if in_prefill else "none",
                edgecolor=colour if in_decode else plots.GRID,
                hatch="/////" if in_decode and not in_prefill else None,
                linewidth=0.9 if in_decode else 0.6,
            )
        )
    axes.set_xticks(_ticks(plan.n_layer))
    axes.set_xlabel("layer")
    online = ", and FFNs that each answer adds" if plan.online is not None else ""
    plots.title(axes, f"{name}: {_counts(plan)} of {2 * plan.n_layer} sublayers skipped{online}")
    if plan.prefill.n_skip != decode.n_skip:
        cells = [
            Patch(facecolor=plots.GRID, edgecolor=plots.GRID, label="skipped in prefill and decode"),
            Patch(facecolor="none", edgecolor=plots.GRID, hatch="/////", label="in decode only"),
        ]
        plots.legend(axes, handles=cells, loc="upper left", bbox_to_anchor=(0, -0.35), ncols=2, handlelength=1.5)
    return fig


def _counts(plan: SkipPlan) -> str:
    decode = plan.skipped("decode")
    if plan.prefill.n_skip == decode.n_skip:
        return str(decode.n_skip)
    return f"{plan.prefill.n_skip} (decode {decode.n_skip})"


def _x(profiles: Mapping[str, Profile], profile: Profile) -> npt.NDArray[np.float64]:
    x = np.arange(profile.n_layer, dtype=np.float64)
    return x if _alike(profiles) else x / max(profile.n_layer - 1, 1)


def _alike(profiles: Mapping[str, Profile]) -> bool:
    return len({profile.n_layer for profile in profiles.values()}) == 1


def _label(axes: Axes, profiles: Mapping[str, Profile], y: str) -> None:
    if _alike(profiles):
        n_layer = next(iter(profiles.values())).n_layer
        axes.set_xticks(_ticks(n_layer))
        axes.set_xlabel("layer")
    else:
        axes.set_xlabel("depth: layer / last layer")
    axes.set_ylabel(y)


def _scale(*row: Axes) -> None:
    """Give axes that share it the scale of similarity, over what is drawn in them."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), np.float64) for axes in row for line in axes.lines])
    low, high = (float(np.nanmin(drawn)), float(np.nanmax(drawn))) if not np.isnan(drawn).all() else (0.0, 1.0)
    # To the next tick on either side, so that there are two of them at least.
    low = min(max((tick for tick in _TICKS if tick <= low), default=-1), 0.99)
    high = min((tick for tick in _TICKS if tick >= high), default=1.0)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    row[0].set_yscale("function", functions=(_finer, lambda y: 1.0 - 10.0**-y))
    row[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    row[0].minorticks_off()
    row[0].set_ylim(low - 0.03 * (1 - low), 1.0 - 0.95 * max(1.0 - high, _CLOSEST))


def _finer(similarity: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(-np.log10(np.maximum(1.0 - np.asarray(similarity), _CLOSEST)))


def _ticks(n_layer: int) -> range:
    """Whole layers, ten or fewer."""
    return range(0, n_layer, next(step for step in (1, 2, 5, 10, 20, 50, n_layer) if n_layer <= 10 * step))
