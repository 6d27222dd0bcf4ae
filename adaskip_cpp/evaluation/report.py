"""Writes the files of an evaluation: results.json, results.md, pictures, and report.html, which needs no other file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jinja2

from ..files import write_atomically
from ..pictures import plots
from .plots import quality_pictures
from .results import Results
from .tables import tables


def write_results(results: Results, folder: Path) -> None:
    """Write all files, also for an unfinished evaluation."""
    write_atomically(folder / "results.json", results.to_json())
    pictures: dict[str, plots.Figure] = {}
    if plots.has_matplotlib():
        pictures = quality_pictures(results)
    else:
        notes = (*results.about.notes, 'Pictures need matplotlib. Run: pip install "adaskip-cpp[plot]"')
        results = replace(results, about=replace(results.about, notes=notes))
    files = [plots.save(drawing, folder, name)[0].name for name, drawing in pictures.items()]
    write_atomically(folder / "results.md", rendered("md", results, files))
    write_atomically(folder / "report.html", rendered("html", results, pictures))


def rendered(
    form: Literal["html", "md"], results: Results, pictures: Mapping[str, plots.Figure] | Sequence[str]
) -> str:
    """Return a report: HTML with its pictures by name inside, or Markdown with the names of their files."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    values = {"pictures": pictures, "svg": plots.to_svg, "colour": _colour}
    return environment.get_template(f"report.{form}").render(results=results, tables=tables(results), **values)


def _colour(mark: str) -> str:
    look = plots.STRATEGY.get(mark)
    return "currentColor" if look is None or look.colour == plots.INK else look.colour
