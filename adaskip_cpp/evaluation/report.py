"""The files of an evaluation: results.json, results.md, pictures, and report.html, which needs no other file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from ..files import write_atomically
from ..pictures import plots, profile_plots
from ..planning.profile import Profile
from .plots import quality_pictures, score_maps
from .results import Results
from .tables import tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


def write_results(results: Results, folder: Path, profile: Profile | None) -> None:
    """Write all files of the results, also of an unfinished evaluation; the profile is for pictures of similarity."""
    write_atomically(folder / "results.json", results.to_json())
    pictures: dict[str, dict[str, Drawing]] = {}
    if plots.has_matplotlib():
        similarity = profile_plots.layers, profile_plots.sublayers, profile_plots.phases
        pictures = {
            "quality": quality_pictures(results),
            "scores": score_maps(results),
        }
        if profile is not None:
            drawn = {f"similarity-{draw.__name__}": draw({results.about.model: profile}) for draw in similarity}
            pictures["similarity"] = drawn
    else:
        notes = (*results.about.notes, 'There are no pictures: pip install "adaskip-cpp[plot]"')
        results = replace(results, about=replace(results.about, notes=notes))
    files = [plots.save(drawing, folder, name)[0].name for each in pictures.values() for name, drawing in each.items()]
    write_atomically(folder / "results.md", markdown_report(results, files))
    write_atomically(folder / "report.html", html_report(results, pictures))


def html_report(results: Results, pictures: "Mapping[str, Mapping[str, Drawing]]") -> str:
    return _rendered("report.html", results, pictures=pictures, svg=plots.to_svg, colour=_colour)


def markdown_report(results: Results, pictures: Sequence[str] = ()) -> str:
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
