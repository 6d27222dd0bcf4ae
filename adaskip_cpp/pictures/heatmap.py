"""A heat map of all sublayers for the terminal: two rows, attention and FFN, one cell per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_heatmap"]

_ROWS = ("attention", "FFN")
_LABEL_WIDTH = 11

# From little to much similarity: dark violet, blue, teal, green, yellow; readable with common colour blindness.
_ANCHORS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)


def print_heatmap(
    console: Console, similarity: npt.NDArray[np.float64], skip: npt.NDArray[np.bool_] | None = None
) -> None:
    """Print the IO similarity of every sublayer, with a legend.

    On a terminal a cell is a colour, elsewhere a digit from 0 (least similar) to 9; ``x`` marks a skipped sublayer and
    ``-`` one that cannot be skipped.

    Args:
        console: where to print; its width decides how many layers stand on a line.
        similarity: float64 ``[n_layer, 2]``, NaN where not skippable.
        skip: bool ``[n_layer, 2]``, the sublayers to mark.
    """
    from rich.text import Text

    n_layer = similarity.shape[0]
    observed = similarity[~np.isnan(similarity)]
    if observed.size == 0:
        console.print("No sublayer of this model can be skipped.")
        return
    low, high = float(observed.min()), float(observed.max())
    # A few sublayers change the stream a lot, the others little: steps of rank show more than steps of value.
    level = np.full(similarity.shape, np.nan)
    level[~np.isnan(similarity)] = np.searchsorted(np.sort(observed), observed) / max(observed.size - 1, 1)

    cell = 2
    per_line = max((console.width - _LABEL_WIDTH) // cell, 1)
    for start in range(0, n_layer, per_line):
        layers = range(start, min(start + per_line, n_layer))
        header = "".join(f"{layer:<{5 * cell}}" for layer in layers if layer % 5 == start % 5)
        console.print(Text("layer".ljust(_LABEL_WIDTH) + header[: len(layers) * cell + 2].rstrip(), style="dim"))
        for kind, name in enumerate(_ROWS):
            line = Text(name.ljust(_LABEL_WIDTH), end="\n", no_wrap=True)
            for layer in layers:
                marked = skip is not None and bool(skip[layer, kind])
                _append_cell(line, float(level[layer, kind]), marked, console.color_system is not None)
            console.print(line)
    legend = Text(" " * _LABEL_WIDTH)
    legend.append(f"IO similarity {low:.3f} ")
    for step in np.linspace(0, 1, 10):
        _append_cell(legend, float(step), False, console.color_system is not None)
    legend.append(f" {high:.3f}, by rank")
    if skip is not None:
        legend.append("   x skipped")
    console.print(legend)


def _append_cell(line: object, level: float, marked: bool, colour: bool) -> None:
    from rich.text import Text

    assert isinstance(line, Text)
    if np.isnan(level):
        line.append("- ", style="dim")
    elif not colour:
        line.append(f"{min(int(level * 10), 9)}{'x' if marked else ' '}")
    else:
        red, green, blue = (
            int(np.interp(level, np.linspace(0, 1, len(_ANCHORS)), _ANCHORS[:, channel])) for channel in range(3)
        )
        ink = "black" if level > 0.5 else "white"
        line.append("x " if marked else "  ", style=f"bold {ink} on rgb({red},{green},{blue})")
