"""The report of an evaluation: one HTML file that needs nothing else, neither files nor the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import Any

from ..pictures import plots
from .rows import headline
from .tables import Table, tables, to_markdown

__all__ = ["Picture", "html_report", "markdown_report"]

_SCROLL = 'class="scroll" tabindex="0" role="region"'


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
    svg: str
    wide: bool = False


def html_report(
    results: Mapping[str, Any],
    *,
    first: Sequence[Picture] = (),
    scores: Sequence[Picture] = (),
    last: Sequence[Picture] = (),
) -> str:
    """Return the page.

    Args:
        results: what :func:`adaskip_cpp.evaluation.results.evaluation_results` returns, with ``title``, ``about`` (a
            line under it), ``configuration`` (name and value) and ``command`` beside.
        first: pictures above the tables; of quality against speed.
        scores: pictures behind the tables; of questions.
        last: pictures behind those; of the profile.
    """
    parts = [f"<h1>{escape(results['title'])}</h1>", f'<p class="about">{escape(results["about"])}</p>']
    sentences = headline(results)
    if sentences:
        parts.append(f'<div class="headline">{"".join(f"<p>{escape(each)}</p>" for each in sentences)}</div>')
    parts.append(_notes(results))
    if first:
        parts.append("<h2>Quality against measured speed</h2>")
        parts += map(_figure, first)
    parts += [_table(table) for table in tables(results)]
    if scores:
        parts.append("<h2>Scores by length and depth</h2>")
        parts += map(_figure, scores)
    if last:
        parts.append("<h2>How alike each sublayer's input and output are</h2>")
        parts += map(_figure, last)
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in results["configuration"].items()
    )
    parts += [
        "<h2>Configuration</h2>",
        f"<dl>{rows}</dl>",
        "<h2>How to repeat this</h2>",
        f"<pre>{escape(results['command'])}</pre>",
        '<p class="text">Every single result is in <code>items.jsonl</code>, all figures are in '
        "<code>results.json</code>, the tables in <code>results.md</code>, beside this file.</p>",
        "<footer>Written by adaskip-cpp. Intervals of speed-ups are 95% bootstrap intervals over rounds in which all "
        "contenders ran in turn; ± is the standard error over items.</footer>",
    ]
    page = Template(resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(title=escape(results["title"]), body="\n".join(part for part in parts if part))


def markdown_report(results: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """Return the same as Markdown.

    Args:
        results: as for :func:`html_report`.
        pictures: names of picture files beside it.
    """
    parts = [f"# {results['title']}\n", f"{results['about']}\n"]
    parts += [f"{sentence}\n" for sentence in headline(results)]
    parts += ["".join(f"- {note}\n" for note in _all_notes(results))]
    parts += [f"![{name.rsplit('.', 1)[0]}]({name})\n" for name in pictures]
    parts += [to_markdown(table) for table in tables(results)]
    parts.append("## Configuration\n")
    parts += [f"- {name}: {value}" for name, value in results["configuration"].items()]
    parts.append(f"\n## How to repeat this\n\n```sh\n{results['command']}\n```\n")
    return "\n".join(parts)


def _all_notes(results: Mapping[str, Any]) -> list[str]:
    notes = list(results["notes"])
    if results["n_done"] < results["n_results"]:
        notes.insert(
            0, f"This is not finished: {results['n_done']} of {results['n_results']} results are there. Run it again."
        )
    return notes


def _notes(results: Mapping[str, Any]) -> str:
    notes = _all_notes(results)
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if notes else ""


def _figure(picture: Picture) -> str:
    title = f"<h3>{escape(picture.title)}</h3>" if picture.title else ""
    kind = ' class="wide"' if picture.wide else ""
    label = escape(picture.title or picture.caption, quote=True)
    return (
        f'{title}<figure{kind}><div {_SCROLL} aria-label="{label}">{picture.svg}</div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    body = "".join(
        f"<tr>{''.join(_cell(cell, mark if i == 0 else None) for i, cell in enumerate(row))}</tr>"
        for row, mark in zip(table.rows, table.marks, strict=True)
    )
    content = (
        f'<p class="text">{escape(table.text)}</p>'
        f'<div {_SCROLL} aria-label="{escape(table.title, quote=True)}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    if table.folded:
        return f"<details><summary>{escape(table.title)}</summary>{content}</details>"
    return f"<h2>{escape(table.title)}</h2>{content}"


def _cell(text: str, mark: str | None) -> str:
    if mark is None:
        return f"<td>{escape(text)}</td>"
    look = plots.STRATEGY.get(mark)
    colour = "currentColor" if look is None or look.colour == plots.INK else look.colour
    return f'<td><span class="dot" style="background: {colour}"></span>{escape(text)}</td>'
