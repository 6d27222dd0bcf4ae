"""Defines the look of all pictures, and wraps matplotlib for the modules that draw. Start at :func:`panels`.

The colours are Okabe and Ito's, which colour-blind readers can tell apart. Each has its own marker and line style, so
that pictures can be read in grey. Without pyplot, they need no display and no global state.
"""

import hashlib
import io
import os
import re
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PackageMissingError
from ..files import StrPath, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:
    Axes = Figure = Any  # matplotlib need not be installed, and takes long to import

INK = "#1b1b1d"  # text, axes and black lines; to_svg() replaces it with the text colour of the page
GRID = "#9a9a9a"  # thin lines, visible on white and on black
TEXT_PT = 9.0  # in a picture of 6.5 inches, the width of the text on a page


@dataclass(frozen=True)
class Look:
    """The look of one series, for ``axes.plot`` and ``axes.errorbar``: ``axes.plot(x, y, **look.line)``."""

    colour: str
    marker: str
    style: str | tuple[float, tuple[float, ...]]

    @property
    def line(self) -> dict[str, Any]:
        size = 6.0 if self.marker in "*P" else 4.5
        look = {"color": self.colour, "marker": self.marker, "markersize": size, "markeredgewidth": 0.0}
        return {**look, "linestyle": self.style, "linewidth": 1.4}


_DASHES, _DOTS = (0.0, (4.0, 1.6)), (0.0, (1.2, 1.4))
_DASH_DOT, _LONG = (0.0, (5.0, 1.4, 1.2, 1.4)), (0.0, (7.0, 2.0))

_BLUE, _VERMILION = Look("#0072B2", "o", "-"), Look("#D55E00", "s", _DASHES)
_GREEN, _PURPLE = Look("#009E73", "D", _DASH_DOT), Look("#CC79A7", "v", _DOTS)
_ORANGE, _SKY = Look("#E69F00", "^", _DASH_DOT), Look("#56B4E9", "P", _LONG)

PHASE = {"prefill": _BLUE, "decode": replace(_ORANGE, style=_DASHES)}
STRATEGY = {
    "full": Look(INK, "*", "none"),
    "adaskip": _BLUE,
    "paper": _SKY,
    "manual": _GREEN,
    "early_exit": _VERMILION,
    "skip_decode": _PURPLE,
    "unified_skipping": _ORANGE,
}
"""By strategy; ``full`` is the whole model, a single point; ``paper`` is AdaSkip in the paper's exact mode."""
_RESTYLED = replace(_ORANGE, style=_DOTS), replace(_PURPLE, style=_LONG), replace(_SKY, style=_DASH_DOT)
OTHERS = (_BLUE, _VERMILION, _GREEN, *_RESTYLED, Look(INK, "X", "-"))
"""For series without their own look, such as models and prompt lengths."""


def has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def panels(n: int = 1, *, width_in: float = 6.5, height_in: float = 3.4, **share: Any) -> tuple[Figure, list[Axes]]:
    """Return an empty picture and its panels, from left to right; ``share`` is for ``Figure.subplots``."""
    if not has_matplotlib():
        raise PackageMissingError('pictures need matplotlib; run: pip install "adaskip-cpp[plot]"')
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width_in, height_in), layout="constrained", facecolor="white")
    every = list(fig.subplots(1, n, squeeze=False, **share).flat)
    for axes in every:
        axes.set(facecolor="none", axisbelow=True)
        axes.grid(True, color=GRID, linewidth=0.4, alpha=0.45)
        axes.spines[:].set(color=INK, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", color=INK, labelcolor=INK, labelsize=TEXT_PT - 0.5, width=0.8, length=3)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=INK, fontsize=TEXT_PT)
    return fig, every


def legend(of: Axes | Figure, **options: Any) -> None:
    of.legend(**{"frameon": False, "fontsize": 8.0, "labelcolor": INK, "handlelength": 3.0, **options})


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=TEXT_PT + 1, color=INK, loc="left")


def save(fig: Figure, folder: StrPath, name: str) -> list[Path]:
    """Write a picture as ``name.png`` (200 dpi) and ``name.svg``, on white, into a folder, which is made if missing.

    Equal pictures give equal bytes with one release of matplotlib. Text in the SVG is drawn as outlines.
    """
    os.makedirs(folder, exist_ok=True)
    contents = {Path(folder, f"{name}.{form}"): _render(fig, form) for form in ("png", "svg")}
    for path, content in contents.items():
        write_atomically(path, content)
    return [*contents]


def to_svg(fig: Figure, *, name: str = "") -> str:
    """Return a picture as an ``<svg>`` element for a page of HTML; ``name`` is for readers who cannot see it.

    It has no background, and :data:`INK` becomes the page's text colour, for light and dark pages. Text stays text, in
    the page's font. Identifiers are unique, so that a page can have several pictures.
    """
    svg = _render(fig, "svg", fonttype="none").decode("utf-8")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :].rstrip(), flags=re.DOTALL)
    prefix = "p" + hashlib.sha256(svg.encode()).hexdigest()[:8] + "-"
    svg = re.sub(r'(\bid="|url\(#|href="#)', lambda found: found[1] + prefix, svg)
    svg = re.sub(f"{INK}|#000000", "currentColor", svg, flags=re.IGNORECASE)
    svg = re.sub(r'font-family:[^;"]*', "font-family: inherit", svg)
    label = f'role="img" aria-label="{escape(name, quote=True)}" ' if name else ""
    return svg.replace("<svg ", f'<svg fill="currentColor" {label}', 1)  # matplotlib omits black


def _render(fig: Figure, form: str, fonttype: str = "path") -> bytes:
    import matplotlib

    content = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
    face = "none" if fonttype == "none" else "white"
    with matplotlib.rc_context({"svg.hashsalt": "adaskip-cpp", "svg.fonttype": fonttype}):
        fig.savefig(content, format=form, dpi=200, metadata=metadata, facecolor=face)
    return content.getvalue()
