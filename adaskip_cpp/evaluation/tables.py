"""The tables of an evaluation, for Markdown and for HTML alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.plan import MODES
from .results import SPEEDS
from .rows import (
    MODE_NAMES,
    SPEED_NAMES,
    Row,
    added_loss,
    contender_label,
    look_key,
    speedup,
    text_figures,
)

__all__ = ["Table", "summary", "tables", "to_markdown"]

_MOST_QUESTION_COLUMNS = 3

MODE_TEXT = {
    "prefill": "The same sublayers are skipped in both phases. Loss, KL divergence and agreement are of prompts.",
    "decode": "The full model reads the prompt; the plan and its online stage work on the tokens behind it. Loss, KL "
    "divergence and agreement are of those.",
    "e2e": "The plan works in both phases, and its online stage on the tokens behind the prompt. Loss, KL divergence "
    "and agreement are of those.",
}


@dataclass(frozen=True)
class Table:
    """A table; the first column is text, all others are figures.

    Attributes:
        title: what it shows.
        text: what a reader must know, in a sentence or two.
        header: names of the columns.
        rows: cells, as text.
        marks: per row, its :func:`look_key`.
        folded: for those who want it; shown elsewhere in another form.
    """

    title: str
    text: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marks: tuple[str, ...]
    folded: bool = False


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Return every table that the results have something for."""
    rows: list[Row] = results["contenders"]
    found = [_mode_table(rows, mode, results) for mode in MODES]
    found += _kind_tables(rows)
    found += _question_tables(rows)
    return [table for table in found if table is not None and table.rows]


def to_markdown(table: Table) -> str:
    """Return a table as Markdown, with its title and text."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(table.header) - 1)
    body = "\n".join([line(table.header), rule, *(line(row) for row in table.rows)])
    return f"## {table.title}\n\n{table.text}\n\n{body}\n"


def summary(results: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Return a short table for each mode, narrow enough for a terminal: title, header and rows.

    Questions have a column each, of their mean score; more than three have one together, the mean over the tasks.
    """
    found: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = []
    for mode in MODES:
        full = [row for row in results["contenders"] if row["mode"] is None]
        mine = sorted((row for row in results["contenders"] if row["mode"] == mode), key=_by_speed)
        if not mine:
            continue
        columns: dict[str, list[str]] = {
            f"{SPEED_NAMES[SPEEDS[mode]]}, x as fast": [_interval(speedup(row)) for row in mine],
            "added loss": [_figure(added_loss(row), 3, sign=True) for row in mine],
            "agreement, %": [_figure(text_figures(row, mode).get("agreement"), 1, scale=100) for row in mine],
        }
        questions = _question_columns([*full, *mine])
        if questions:  # a score says little without that of the full model
            mine = [*full, *mine]
            columns = {name: [*["-"] * len(full), *cells] for name, cells in columns.items()} | questions
        columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
        cells = list(zip(map(contender_label, mine), *columns.values(), strict=True))
        found.append((f"mode {MODE_NAMES[mode]}", ("", *columns), cells))
    return found


def _question_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    scores = {
        task: [(row["questions"].get(task) or {}).get("score") for row in rows]
        for task in dict.fromkeys(task for row in rows for task in row["questions"])
    }
    if len(scores) <= _MOST_QUESTION_COLUMNS:
        return {f"{task}, %": [_figure(score, 1, scale=100) for score in each] for task, each in scores.items()}
    means = []
    for each in zip(*scores.values(), strict=True):
        known = [score["mean"] for score in each if score is not None]
        means.append(f"{100 * sum(known) / len(known):.1f}" if len(known) == len(each) else "-")
    return {f"mean of {len(scores)} tasks, %": means}


def _by_speed(row: Row) -> float:
    """At equal speed, not at equal count: so tables are in the order of speed."""
    return (speedup(row) or {"value": None})["value"] or 0.0


def _mode_table(rows: Sequence[Row], mode: str, results: Mapping[str, Any]) -> Table | None:
    mine = [row for row in rows if row["mode"] == mode]
    full = [row for row in rows if row["mode"] is None]
    if not mine:
        return None
    several = len({row["compensation"] for row in mine if row["compensation"] != "none"}) > 1
    mine = sorted(mine, key=_by_speed)
    cells = []
    for row in [*full, *mine]:
        figures = text_figures(row, mode)
        rouge = (row["text"]["rouge_l"] or {}).get("all")
        speeds = [None if row["speed"] is None else row["speed"][name]["speedup"] for name in SPEEDS.values()]
        skipped = (
            ""
            if row["mode"] is None
            else str(row["n_skip_prefill"])
            if row["n_skip_prefill"] == row["n_skip_decode"]
            else f"{row['n_skip_prefill']} / {row['n_skip_decode']}"
        )
        whole = row["mode"] is None
        cells.append(
            (
                contender_label(row, several=several),
                skipped,
                *("1" if whole and speed else _interval(speed) for speed in speeds),
                _figure(figures.get("loss"), 3),
                "" if whole else _figure(figures.get("added_loss"), 3, sign=True),
                _perplexity(figures.get("perplexity")),
                "" if whole else _figure(figures.get("kl"), 3),
                "" if whole else _figure(figures.get("agreement"), 1, scale=100),
                "" if whole else _figure(rouge, 3),
            )
        )
    n = next((text_figures(row, mode)["loss"]["n"] for row in [*full, *mine] if text_figures(row, mode)), 0)
    header = (
        "contender",
        "skipped",
        *(f"{SPEED_NAMES[name]}, times as fast" for name in SPEEDS.values()),
        "loss, nats",
        "added loss",
        "perplexity",
        "KL, nats",
        "agreement, %",
        "Rouge-L",
    )
    marks = tuple(look_key(row) for row in [*full, *mine])
    text = f"{MODE_TEXT[mode]} By measured speed; {n} items, mean ± standard error over items."
    return Table(f"Mode {MODE_NAMES[mode]}", text, header, tuple(cells), marks)


def _kind_tables(rows: Sequence[Row]) -> list[Table]:
    """Added loss by kind of text, where there are several."""
    groups = list(
        dict.fromkeys(
            group
            for row in rows
            for measured in (row["text"]["prompt"], row["text"]["decode"])
            for group in (measured or {})
            if group != "all"
        )
    )
    if not groups:
        return []
    mine = [row for row in rows if row["mode"] is not None]
    cells = tuple(
        (
            contender_label(row),
            MODE_NAMES[row["mode"]],
            *(_figure(text_figures(row, row["mode"], group).get("added_loss"), 3, sign=True) for group in groups),
        )
        for row in mine
    )
    text = "Added loss against the full model in nats per token, mean ± standard error over items."
    return [Table("By kind of text", text, ("contender", "mode", *groups), cells, tuple(map(look_key, mine)))]


def _question_tables(rows: Sequence[Row]) -> list[Table]:
    tasks = list(dict.fromkeys(task for row in rows for task in row["questions"]))
    if not tasks:
        return []
    cells, marks = [], []
    for row in rows:
        scores = [(row["questions"].get(task) or {}).get("score") for task in tasks]
        mode = "" if row["mode"] is None else MODE_NAMES[row["mode"]]
        cells.append(
            (
                contender_label(row),
                mode,
                "1" if row["mode"] is None else _interval(speedup(row)),
                *(_figure(score, 1, scale=100) for score in scores),
            )
        )
        marks.append(look_key(row))
    n = {task: max((row["questions"].get(task) or {"score": {"n": 0}})["score"]["n"] for row in rows) for task in tasks}
    header = ("contender", "mode", "times as fast", *(f"{task} ({n[task]})" for task in tasks))
    text = "Scores in percent, mean ± standard error over questions; their number in brackets."
    found = [Table("Questions", text, header, tuple(cells), tuple(marks))]
    for task in tasks:
        table = _cell_table(rows, task)
        if table is not None:
            found.append(table)
    return found


def _cell_table(rows: Sequence[Row], task: str) -> Table | None:
    """Scores of a task by length and depth."""
    by_row = {
        row["name"]: {
            (cell["length"], cell["depth"]): cell["score"]
            for cell in (row["questions"].get(task) or {"cells": []})["cells"]
        }
        for row in rows
    }
    columns = list(dict.fromkeys(cell for cells in by_row.values() for cell in cells))
    if not columns:
        return None
    names = [f"{length:,}" + ("" if depth is None else f" at {depth:.0%}") for length, depth in columns]
    cells = tuple(
        (
            contender_label(row),
            "" if row["mode"] is None else MODE_NAMES[row["mode"]],
            *(_figure(by_row[row["name"]].get(column), 0, scale=100, error=False) for column in columns),
        )
        for row in rows
    )
    text = "Scores in percent by the prompt's length in tokens, and by where in it the answer lies."
    title, header = f"{task}, by length and depth", ("contender", "mode", *names)
    return Table(title, text, header, cells, tuple(map(look_key, rows)), folded=True)


def _figure(
    figure: Mapping[str, Any] | None, digits: int, *, scale: float = 1.0, sign: bool = False, error: bool = True
) -> str:
    if figure is None:
        return "-"
    value = scale * figure["mean"]
    text = f"{value:{'+' if sign else ''}.{digits}f}" if abs(value) < 1e5 else f"{value:.2g}"
    if not error or figure["error"] is None:
        return text
    spread = scale * figure["error"]
    return f"{text} ± {spread:.{digits}f}" if spread < 1e5 else f"{text} ± {spread:.2g}"


def _perplexity(figure: Mapping[str, Any] | None) -> str:
    """With fewer decimals the larger it is, as perplexities of bad plans are enormous."""
    if figure is None or figure["mean"] < 1000:
        return _figure(figure, 1 if figure is not None and figure["mean"] >= 100 else 2)
    error = "" if figure["error"] is None else f" ± {figure['error']:,.0f}"
    return f"{figure['mean']:,.0f}{error}" if figure["mean"] < 1e6 else f"{figure['mean']:.1e}"


def _interval(interval: Mapping[str, Any] | None) -> str:
    if interval is None or interval["value"] is None:
        return "-"
    if interval["low"] is None:
        return f"{interval['value']:.2f}"
    return f"{interval['value']:.2f} ({interval['low']:.2f}–{interval['high']:.2f})"
