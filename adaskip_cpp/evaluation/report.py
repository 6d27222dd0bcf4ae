"""Writes the files of an evaluation: results.json, a picture, and report.html, which needs no other file."""

from dataclasses import replace
from pathlib import Path

import jinja2

from ..files import write_atomically
from ..pictures import plots
from .plots import quality_picture
from .results import Results
from .tables import tables


def write_results(results: Results, folder: Path) -> None:
    """Write all files, also for an unfinished evaluation."""
    write_atomically(folder / "results.json", results.to_json())
    picture: plots.Figure | None = None
    if not plots.has_matplotlib():
        notes = (*results.about.notes, 'The picture needs matplotlib. Run: pip install "adaskip-cpp[plot]"')
        results = replace(results, about=replace(results.about, notes=notes))
    elif (picture := quality_picture(results)) is not None:
        plots.save(picture, folder, "quality")
    write_atomically(folder / "report.html", rendered(results, picture))


def rendered(results: Results, picture: plots.Figure | None) -> str:
    """Return the report as HTML, with its picture inside."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template("report.html")
    return template.render(results=results, tables=tables(results), picture=picture, svg=plots.to_svg)
