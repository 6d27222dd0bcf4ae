"""adaskip_cpp.pictures.plots: files that are the same every time, and pictures that stand in a page of any colour."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaskip_cpp.errors import PackageMissingError
from adaskip_cpp.pictures import plots

pytest.importorskip("matplotlib")


def picture() -> Any:
    fig, (axes,) = plots.panels(width_in=4, height_in=2)
    for name, look in plots.STRATEGY.items():
        axes.plot(np.arange(3), np.arange(3), label=name, **look.line)
    axes.set_xlabel("layer")
    plots.title(axes, "a & b")
    plots.legend(axes)
    return fig


def test_a_picture_is_saved_as_png_with_200_dots_per_inch_and_as_svg_the_same_every_time(tmp_path: Path) -> None:
    png, svg = plots.save(picture(), tmp_path / "new", "p")
    assert (png.name, svg.name) == ("p.png", "p.svg")
    content, text = png.read_bytes(), svg.read_text()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")) == (800, 400)
    assert ET.fromstring(text).tag.endswith("svg") and "fill: #ffffff" in text
    assert "<text" not in text and "font-family" not in text, "it needs no font"
    again = plots.save(picture(), tmp_path / "again", "p")
    assert [path.read_bytes() for path in again] == [content, svg.read_bytes()]


def test_an_inline_svg_takes_text_colour_and_type_of_its_page() -> None:
    svg = plots.to_svg(picture(), name='quality "against" speed')
    root = ET.fromstring(svg)
    assert root.get("aria-label") == 'quality "against" speed' and root.get("role") == "img"
    assert "currentColor" in svg and plots.INK not in svg and "#000000" not in svg and "#ffffff" not in svg
    assert "<text" in svg and "a &amp; b" in svg
    assert set(re.findall(r"font-family: ([^;\"]*)", svg)) == {"inherit"}


def test_inline_svgs_of_one_page_share_no_identifiers() -> None:
    first, other = plots.panels(width_in=3)[0], picture()
    ids = [set(re.findall(r'\bid="([^"]*)"', plots.to_svg(fig))) for fig in (first, other)]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    svg = plots.to_svg(other)
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', svg)) <= ids[1]


def test_looks_differ_in_colour_and_in_marker() -> None:
    for table in (list(plots.PHASE.values()), list(plots.STRATEGY.values()), plots.OTHERS):
        assert len({look.colour for look in table}) == len({look.marker for look in table}) == len(table)


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert not plots.has_matplotlib()
    with pytest.raises(PackageMissingError, match=r'pip install "adaskip-cpp\[plot\]"'):
        plots.panels()
