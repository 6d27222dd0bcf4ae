"""Makes the tables of an evaluation, for reports (:func:`tables`) and for the terminal (:func:`summary`)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from ..intervals import Interval
from ..planning.modes import MODES
from .results import SPEED_NAMES, SPEEDS, TAILS, Figure, Results, Row

_MODE_TEXT = {
    "prompt": "The plan skips in the bulk of a prompt only.",
    "prefill": "The plan skips the same sublayers in the prompt and in the answer.",
    "decode": "The whole model reads the prompt; the plan and its online stage skip in the answer.",
    "e2e": "The plan skips in the prompt and in the answer, its online stage in the answer only.",
}

_Columns: TypeAlias = Mapping[str, Callable[[Row], str]]  # by heading, a function for the text of a row's cell

_MODE: _Columns = {"mode": lambda row: row.mode or ""}


@dataclass(frozen=True)
class Table:
    """A table. The first column is text, all others are figures."""

    title: str
    text: str  # an explanation in a few sentences
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _table(title: str, text: str, rows: Sequence[Row], columns: _Columns) -> Table:
    cells = tuple((row.label, *(say(row) for say in columns.values())) for row in rows)
    return Table(title, text, ("contender", *columns), cells)


def tables(results: Results) -> list[Table]:
    found = [_mode_table(results, mode) for mode in MODES if results.of_mode(mode)]
    return found + _kind_tables(results) + _question_tables(results)


def summary(results: Results) -> list[Table]:
    """Return the tables that fit into a terminal, without empty columns."""
    found = [_mode_table(results, mode, is_brief=True) for mode in MODES]
    return [table for table in found if len(table.header) > 1] + _question_tables(results)[:1]


def _mode_table(results: Results, mode: str, *, is_brief: bool = False) -> Table:
    rows = [results.full, *results.of_mode(mode)]
    columns: _Columns = {
        "skipped": _skipped,
        **{f"{name}, times as fast": partial(_speed, speed) for speed, name in SPEED_NAMES.items()},
        "loss, nats": lambda row: _figure(row.figure("loss"), 3),
        "added loss": _of_plan("added_loss", 3, sign=True),
        "perplexity": lambda row: _figure(row.figure("perplexity"), 2),
        "KL, nats": _of_plan("kl", 3),
        **{f"KL {percent:g}%, nats": _of_plan(f"kl_{percent:g}", 2) for percent in TAILS},
        "agreement, %": _of_plan("agreement", 1, scale=100),
    }
    if is_brief:
        wanted = (f"{SPEED_NAMES[SPEEDS[mode]]}, times as fast", "added loss", "agreement, %")
        cells = {name: {columns[name](row) for row in rows[1:]} for name in wanted}
        columns = {name: columns[name] for name in wanted if cells[name] - {"", "-"}}
    n = next((loss.n for row in rows if (loss := row.figure("loss")) is not None), 0)
    text = (
        f"{_MODE_TEXT[mode]} Loss, KL divergence and agreement are of tokens that follow a prompt. The slowest plan is "
        f"first. Figures are means ± standard errors over {n} items."
    )
    if any(row.figure(f"kl_{TAILS[0]:g}") is not None for row in rows):
        text += " KL 99% is the divergence that 99% of all tokens do not exceed."
    return _table(f"Mode {mode}", text, rows, columns)


def _kind_tables(results: Results) -> list[Table]:
    kinds = dict.fromkeys(kind for row in results.contenders for kind in row.text)
    columns: _Columns = {kind: _of_plan("added_loss", 3, sign=True, kind=kind) for kind in kinds if kind != "all"}
    text = "Loss added to the whole model's, in nats per token: mean ± standard error over items."
    return [_table("By kind of text", text, results.contenders[1:], {**_MODE, **columns})] if columns else []


def _question_tables(results: Results) -> list[Table]:
    if not results.tasks:
        return []
    scores = {task: [score for row in results.contenders if (score := row.score(task))] for task in results.tasks}
    columns: _Columns = {
        **_MODE,
        "times as fast": lambda row: "1" if row.mode is None else _interval(row.speedup),
        **{f"{task} ({max(score.n for score in each)})": partial(_score, task) for task, each in scores.items()},
    }
    text = "Scores in percent: mean ± standard error over questions. The number of questions is in brackets."
    return [_table("Questions", text, results.contenders, columns), _same_table(results)]


def _same_table(results: Results) -> Table:
    def shares(task: str, row: Row) -> str:
        scores = row.questions.get(task)
        both = (None, None) if scores is None else (scores.same_answer, scores.same_score)
        return " / ".join(_figure(each, 1, scale=100, error=False) for each in both)

    text = (
        "Percent of the questions with exactly the whole model's answer / with its score. Equal mean scores can hide "
        "that some answers became better and others worse."
    )
    columns: _Columns = {**_MODE, **{task: partial(shares, task) for task in results.tasks}}
    return _table("Answers that stay the same", text, results.contenders[1:], columns)


def _of_plan(name: str, digits: int, *, kind: str = "all", **form: Any) -> Callable[[Row], str]:
    return lambda row: "" if row.mode is None else _figure(row.figure(name, kind), digits, **form)


def _skipped(row: Row) -> str:
    return " / ".join(map(str, dict.fromkeys((row.n_skip_prefill, row.n_skip_decode)))) if row.mode else ""


def _speed(name: str, row: Row) -> str:
    if name not in row.speed:
        return "-"
    return "1" if row.mode is None else _interval(row.speed[name].speedup)


def _score(task: str, row: Row) -> str:
    return _figure(row.score(task), 1, scale=100)


def _figure(figure: Figure | None, digits: int, *, scale: float = 1.0, sign: bool = False, error: bool = True) -> str:
    if figure is None:
        return "-"
    value, spread = scale * figure.mean, scale * figure.error
    text = f"{value:{'+' if sign else ''}.{digits}f}" if abs(value) < 1e5 else f"{value:.2g}"
    if not error or math.isnan(spread):
        return text
    return f"{text} ± {spread:.{digits}f}" if spread < 1e5 else f"{text} ± {spread:.2g}"


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    if math.isnan(interval.low):
        return f"{interval.value:.2f}"
    return f"{interval.value:.2f} ({interval.low:.2f}–{interval.high:.2f})"
