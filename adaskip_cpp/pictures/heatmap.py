"""Prints heat maps of similarities in the terminal, one cell per layer. Start at :func:`print_heatmap`.

Colours show ranks among all values, because a few sublayers change the stream a lot and the others little.
"""

from collections.abc import Mapping

import numpy as np
from rich.console import Console
from rich.text import Text

from ..model.arrays import Flags, Floats
from ..model.skip_set import KIND_NAMES

_CELL = 2

# From little to much similarity: dark violet, blue, teal, green, yellow; readable with common colour blindness.
_ANCHORS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)


def print_heatmap(console: Console, similarity: Floats, skip: Flags | None = None) -> None:
    """Print the IO similarities ``[n_layer, 2]`` of all sublayers; ``x`` marks those of ``skip``."""
    marked = None if skip is None else dict(zip(KIND_NAMES, skip.T, strict=True))
    print_rows(console, dict(zip(KIND_NAMES, similarity.T, strict=True)), marked)


def print_rows(console: Console, rows: Mapping[str, Floats], skip: Mapping[str, Flags] | None = None) -> None:
    """Print rows of similarities, ``[n_layer]`` each, and a legend.

    A cell is a colour on a terminal, elsewhere a digit from 0 (least similar) to 9. ``x`` marks a sublayer of ``skip``,
    ``-`` one that cannot be skipped, whose similarity is NaN.
    """
    values = np.array([*rows.values()])
    known = np.sort(values[~np.isnan(values)])
    if known.size == 0:
        console.print("No sublayer of this model can be skipped.")
        return
    level = np.where(np.isnan(values), np.nan, np.searchsorted(known, values) / max(known.size - 1, 1))
    colour, width = console.color_system is not None, max(map(len, rows)) + 2

    n_layer, per_line = values.shape[1], max((console.width - width) // _CELL, 1)
    for start in range(0, n_layer, per_line):
        layers = range(start, min(start + per_line, n_layer))
        header = "".join(f"{layer:<{5 * _CELL}}" for layer in layers[::5])
        console.print(Text("layer".ljust(width) + header[: len(layers) * _CELL + 2].rstrip(), style="dim"))
        for row, name in enumerate(rows):
            cells = (_cell(level[row, at], skip is not None and bool(skip[name][at]), colour) for at in layers)
            console.print(Text.assemble(name.ljust(width), *cells, no_wrap=True))
    scale = (_cell(step, False, colour) for step in np.linspace(0, 1, 10))
    legend = f" {known[-1]:.3f}, by rank" + ("" if skip is None else "   x skipped")
    console.print(Text.assemble(f"{'':{width}}IO similarity {known[0]:.3f} ", *scale, legend))


def _cell(level: float, marked: bool, colour: bool) -> tuple[str, str]:
    if np.isnan(level):
        return "- ", "dim"
    if not colour:
        return f"{min(int(level * 10), 9)}{'x' if marked else ' '}", ""
    place = np.linspace(0, 1, len(_ANCHORS))
    rgb = ",".join(str(int(np.interp(level, place, channel))) for channel in _ANCHORS.T)
    return "x " if marked else "  ", f"bold {'black' if level > 0.5 else 'white'} on rgb({rgb})"
