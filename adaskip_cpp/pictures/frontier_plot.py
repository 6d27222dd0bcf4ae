"""The picture of frontiers: what answers lose against the time to the first token, a curve per length of prompts."""

from collections.abc import Mapping
from typing import Any

from ..model.frontier import DEFAULT_LOSS, Frontier
from . import plots

_LENGTHS = (2048, 8192, 32768)


def frontiers(every: Mapping[str, Frontier]) -> Any:
    """Draw one panel for each frontier, by name."""
    fig, panels = plots.panels(1, len(every), height_in=3.4)
    for axes, (name, frontier) in zip(panels, every.items(), strict=True):
        fastest = 1.0
        for i, length in enumerate(_LENGTHS):
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
