"""The report of an evaluation: Markdown, and one HTML file that needs nothing else, neither files nor the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from ..pictures import plots
from .results import Results
from .tables import tables

__all__ = ["Picture", "html_report", "markdown_report"]


@dataclass(frozen=True)
class Picture:
    """A picture in the report.

    Attributes:
        title: its heading, "" for none.
        caption: what it shows and how to read it.
        svg: an ``<svg>`` element without references to anything outside.
        wide: of several panels side by side, which a narrow page scrolls; else it shrinks with the page.
    """

    title: str
    caption: str
    svg: str = ""
    wide: bool = False


def html_report(
    results: Results,
    *,
    quality: Sequence[Picture] = (),
    scores: Sequence[Picture] = (),
    similarity: Sequence[Picture] = (),
) -> str:
    """Return the page.

    Args:
        results: what was found.
        quality: pictures above the tables, of quality against speed.
        scores: pictures behind the tables, of questions.
        similarity: pictures behind those, of the profile.
    """
    return _rendered("report.html", results, quality=quality, scores=scores, similarity=similarity, colour=_colour)


def markdown_report(results: Results, pictures: Sequence[str] = ()) -> str:
    """Return the same as Markdown.

    Args:
        results: what was found.
        pictures: names of picture files beside it.
    """
    return _rendered("report.md", results, pictures=pictures)


def _rendered(template: str, results: Results, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(results=results, tables=tables(results), **values)


def _colour(mark: str) -> str:
    look = plots.STRATEGY.get(mark)
    return "currentColor" if look is None or look.colour == plots.INK else look.colour
