"""Similarities in the terminal: a heat map of all sublayers, and lines of block characters, one scale for all.

Both show steps of rank among all values, as a few sublayers change the stream a lot and the others little.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from ..model.skip_set import KIND_NAMES

_LABEL_WIDTH, _CELL = 11, 2
_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█", "01234567"

# From little to much similarity: dark violet, blue, teal, green, yellow; readable with common colour blindness.
_ANCHORS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)


def print_heatmap(
    console: Console, similarity: npt.NDArray[np.float64], skip: npt.NDArray[np.bool_] | None = None
) -> None:
    """Print the IO similarity ``[n_layer, 2]`` of every sublayer, two rows of one cell per layer, with a legend.

    On a terminal a cell is a colour, elsewhere a digit from 0 (least similar) to 9; ``x`` marks a sublayer of ``skip``,
    ``-`` one that cannot be skipped, whose similarity is NaN.
    """
    known = np.sort(similarity[~np.isnan(similarity)])
    if known.size == 0:
        console.print("No sublayer of this model can be skipped.")
        return
    level = np.where(np.isnan(similarity), np.nan, np.searchsorted(known, similarity) / max(known.size - 1, 1))
    marked = np.zeros(similarity.shape, np.bool_) if skip is None else skip
    colour = console.color_system is not None

    n_layer, per_line = len(similarity), max((console.width - _LABEL_WIDTH) // _CELL, 1)
    for start in range(0, n_layer, per_line):
        layers = range(start, min(start + per_line, n_layer))
        header = "".join(f"{layer:<{5 * _CELL}}" for layer in layers[::5])
        console.print(Text("layer".ljust(_LABEL_WIDTH) + header[: len(layers) * _CELL + 2].rstrip(), style="dim"))
        for kind, name in enumerate(KIND_NAMES):
            cells = (_cell(level[layer, kind], marked[layer, kind], colour) for layer in layers)
            console.print(Text.assemble(name.ljust(_LABEL_WIDTH), *cells, no_wrap=True))
    scale = (_cell(step, False, colour) for step in np.linspace(0, 1, 10))
    legend = f" {known[-1]:.3f}, by rank" + ("" if skip is None else "   x skipped")
    console.print(Text.assemble(f"{'':{_LABEL_WIDTH}}IO similarity {known[0]:.3f} ", *scale, legend))


def _cell(level: float, marked: bool, colour: bool) -> tuple[str, str]:
    if np.isnan(level):
        return "- ", "dim"
    if not colour:
        return f"{min(int(level * 10), 9)}{'x' if marked else ' '}", ""
    place = np.linspace(0, 1, len(_ANCHORS))
    rgb = ",".join(str(int(np.interp(level, place, channel))) for channel in _ANCHORS.T)
    return "x " if marked else "  ", f"bold {'black' if level > 0.5 else 'white'} on rgb({rgb})"


def print_series(out: Console, series: Mapping[str, npt.NDArray[np.float64]]) -> None:
    """Print a row of blocks for each series, one per value, with its lowest and its highest value."""
    known = np.sort(np.concatenate([values[~np.isnan(values)] for values in series.values()]))
    blocks = _BLOCKS if (out.encoding or "").lower().startswith("utf") else _PLAIN
    width = max(map(len, series)) + 2
    per_line = max(out.width - width - 16, 8)
    for name, values in series.items():
        step = np.minimum(np.searchsorted(known, values) * len(blocks) // max(len(known), 1), len(blocks) - 1)
        cells = "".join(np.where(np.isnan(values), "-", np.array(list(blocks))[step]))
        ends = "" if np.isnan(values).all() else f" {np.nanmin(values):.3f} to {np.nanmax(values):.3f}"
        for start in range(0, len(cells), per_line):
            label = "" if start else name
            end = ends if start + per_line >= len(cells) else ""
            out.print(Text(label.ljust(width) + cells[start : start + per_line] + end, no_wrap=True))
