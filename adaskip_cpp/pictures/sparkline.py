"""Lines of block characters for the terminal: one row per series, one column per layer, one scale for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_series"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN = "01234567"


def print_series(out: Console, series: Mapping[str, npt.NDArray[np.float64]]) -> None:
    """Print a row of blocks for each series, with its lowest and its highest value.

    Heights are steps of rank among all values, as a few sublayers change the stream a lot and the others little. Where
    the terminal's encoding has no blocks, digits from 0 to 7 stand for them; ``-`` is what has no value.

    Args:
        out: where to print.
        series: float64 ``[n]`` by name, NaN for no value.
    """
    from rich.text import Text

    known = np.sort(np.concatenate([values[~np.isnan(values)] for values in series.values()]))
    blocks = _BLOCKS if (out.encoding or "").lower().startswith("utf") else _PLAIN
    width = max(map(len, series)) + 2
    per_line = max(out.width - width - 16, 8)
    for name, values in series.items():
        level = np.searchsorted(known, values) * len(blocks) // max(len(known), 1)
        cells = ["-" if np.isnan(value) else blocks[min(step, len(blocks) - 1)]
                 for value, step in zip(values, level, strict=True)]  # fmt: skip
        own = values[~np.isnan(values)]
        ends = f" {own.min():.3f} to {own.max():.3f}" if own.size else ""
        for start in range(0, len(cells), per_line):
            last = start + per_line >= len(cells)
            label = name if start == 0 else ""
            out.print(Text(label.ljust(width) + "".join(cells[start : start + per_line]) + ends * last, no_wrap=True))
