"""From the results of single items to figures with standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, TypeAlias

from ..intervals import mean_error, ratio_interval
from ..measuring.timing import N_SETTLE
from .contenders import FULL, Contender
from .evaluate import ANSWER, CONTINUATION, EVERYONE, PROMPT, SPEED
from .results import About, Cell, Figure, Results, Row, Speed, TaskScores

if TYPE_CHECKING:
    from ..measuring.tasks import QuestionItem
    from ..measuring.timing import RequestTime
    from .evaluate import Work
    from .store import Key, Record

__all__ = ["evaluation_results"]

_N_LENGTHS = 8
"""Lengths of a task's questions, at most, for a table by length."""

Records: TypeAlias = "Mapping[Key, Record]"


def evaluation_results(work: Work, records: Records, about: About) -> Results:
    """Return all figures.

    What is compared with the full model is compared item by item, on the items that both have. A speed-up has a 95%
    interval over rounds.

    Args:
        work: what was to be measured.
        records: what has been, by item, contender and measure; may be incomplete.
        about: what was measured with what.
    """
    expected = list(work.results())
    return Results(
        n_done=sum(key in records for key in expected),
        n_results=len(expected),
        about=about,
        contenders=tuple(_row(contender, work, records) for contender in work.contenders),
    )


def _row(contender: Contender, work: Work, records: Records) -> Row:
    plan = contender.plan
    return Row(
        name=contender.name,
        strategy=contender.strategy,
        budget=contender.budget,
        mode=contender.mode,
        compensation=contender.compensation,
        n_skip_prefill=0 if plan is None else plan.prefill.n_skip,
        n_skip_decode=0 if plan is None else plan.skipped("decode").n_skip,
        online=plan is not None and plan.online is not None,
        speed=_speed(contender.name, records),
        text=_text(contender.name, work, records),
        questions=_questions(contender.name, work, records),
    )


def _speed(name: str, records: Records) -> dict[str, Speed]:
    """Speed-ups against the full model, round by round; {} if nothing was timed."""
    rounds = [record.times for key, record in sorted(records.items()) if key[1:] == (EVERYONE, SPEED)]
    rounds = [times for times in rounds if {name, FULL.name} <= times.keys()]
    own, full = ([_seconds(times[each]) for times in rounds] for each in (name, FULL.name))
    found: dict[str, Speed] = {}
    for label in own[0] if own else ():
        seconds, of_full = [each[label] for each in own], [each[label] for each in full]
        found[label] = Speed(ratio_interval(of_full, seconds), Figure(*mean_error(seconds), len(seconds)))
    return found


def _seconds(time: RequestTime) -> dict[str, float]:
    """Seconds by the names of speeds.

    Per token it is the mean, not the median: a request under an online stage or a schedule is slow at first and fast
    later.
    """
    settled = time.token_s[min(N_SETTLE, len(time.token_s) - 1) :]
    return {
        "first_token": time.first_token_s,
        "per_token": fmean(settled),
        "request": time.first_token_s + math.fsum(time.token_s),
    }


def _text(name: str, work: Work, records: Records) -> dict[str, dict[str, dict[str, Figure]]]:
    """Figures by measure, kind of text and name."""
    kinds: dict[str, list[str]] = {}
    for item in work.texts:
        kinds.setdefault(item.task, []).append(item.id)
    kinds = {"all": [item.id for item in work.texts], **(kinds if len(kinds) > 1 else {})}
    found = {
        measure: {kind: each for kind, ids in kinds.items() if (each := _figures(ids, name, measure, records))}
        for measure in (PROMPT, CONTINUATION)
    }
    return {measure: each for measure, each in found.items() if each}


def _figures(ids: Sequence[str], name: str, measure: str, records: Records) -> dict[str, Figure]:
    values = _values(ids, name, measure, records)
    if "loss" in values:
        full = _values(ids, FULL.name, measure, records).get("loss", {})
        values["added_loss"] = {each: loss - full[each] for each, loss in values["loss"].items() if each in full}
    figures = {label: figure for label, each in values.items() if (figure := _mean(each.values())) is not None}
    loss = figures.get("loss")
    if loss is not None and loss.mean < 700:  # where exp overflows
        # The error of an exponential is that of its exponent times itself, as it is that steep.
        figures["perplexity"] = Figure(math.exp(loss.mean), math.exp(loss.mean) * loss.error, loss.n)
    return figures


def _questions(name: str, work: Work, records: Records) -> dict[str, TaskScores]:
    found: dict[str, TaskScores] = {}
    for task in dict.fromkeys(item.task for item in work.questions):
        items = [item for item in work.questions if item.task == task]
        ids = [item.id for item in items]
        scores, full = (_values(ids, each, ANSWER, records).get("score", {}) for each in (name, FULL.name))
        score = _mean(scores.values())
        if score is not None:
            difference = _mean(scores[each] - full[each] for each in scores if each in full)
            found[task] = TaskScores(score, difference, _cells(items, scores))
    return found


def _cells(items: Sequence[QuestionItem], scores: Mapping[str, float]) -> tuple[Cell, ...]:
    """Scores by length and depth, where these were chosen; published questions are of as many lengths as there are."""
    by_cell: dict[tuple[int, float | None], list[float]] = {}
    for item in items:
        if item.id in scores:
            by_cell.setdefault((item.length, item.depth), []).append(scores[item.id])
    if len(by_cell) < 2 or len({length for length, _ in by_cell}) > _N_LENGTHS:
        return ()
    order = sorted(by_cell, key=lambda cell: (cell[0], -1.0 if cell[1] is None else cell[1]))
    means = ((cell, _mean(by_cell[cell])) for cell in order)
    return tuple(Cell(*cell, score) for cell, score in means if score is not None)


def _values(ids: Sequence[str], name: str, measure: str, records: Records) -> dict[str, dict[str, float]]:
    """Values by label and item, NaN for what came out as no number, without what was not measured."""
    found: dict[str, dict[str, float]] = {}
    for each in ids:
        record = records.get((each, name, measure))
        for label, value in record.values.items() if record else ():
            found.setdefault(label, {})[each] = math.nan if value is None else value
    return found


def _mean(values: Iterable[float]) -> Figure | None:
    """None if there is no value, or if one is no number: a mean without it would hide the worst."""
    numbers = list(values)
    if not numbers or not all(map(math.isfinite, numbers)):
        return None
    return Figure(*mean_error(numbers), len(numbers))
