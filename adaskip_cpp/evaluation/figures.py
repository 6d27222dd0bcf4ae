"""From the results of single items to figures with standard errors."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from statistics import fmean

import numpy as np

from ..intervals import mean_error, ratio_interval
from ..measuring.tasks import QuestionItem
from ..measuring.timing import N_SETTLE, RequestTime
from .contenders import FULL, Contender
from .evaluate import ANSWER, CONTINUATION, EVERYONE, PROMPT, SPEED, Work
from .results import TAILS, About, Cell, Figure, Named, Results, Row, Speed, TaskScores
from .store import Key, Record

_N_LENGTHS = 8  # lengths of a task's questions, at most, for a table by length


def evaluation_results(work: Work, records: Mapping[Key, Record], about: About) -> Results:
    """Return all figures of what has been measured, which may be incomplete.

    What is compared with the full model is compared item by item, on the items that both have. A speed-up has a 95%
    interval over rounds.
    """
    expected = list(work.results())
    rows = tuple(_Measured(contender, work, records).row() for contender in work.contenders)
    return Results(sum(key in records for key in expected), len(expected), about, rows)


class _Measured:
    def __init__(self, contender: Contender, work: Work, records: Mapping[Key, Record]) -> None:
        self._contender, self._work, self._records = contender, work, records

    def row(self) -> Row:
        contender, plan = self._contender, self._contender.plan_for(self._work.longest_prompt)
        return Row(
            **{each.name: getattr(contender, each.name) for each in fields(Named)},
            n_skip_prefill=0 if plan is None else plan.skipped(plan.prompt_phase).n_skip,
            n_skip_decode=0 if plan is None else plan.skipped("decode").n_skip,
            online=plan is not None and plan.online is not None,
            speed=self._speed(),
            text=self._text(),
            questions=self._questions(),
        )

    def _speed(self) -> dict[str, Speed]:
        """Speed-ups against the full model, round by round; {} if nothing was timed."""
        name = self._contender.name
        rounds = [record.times for key, record in sorted(self._records.items()) if key[1:] == (EVERYONE, SPEED)]
        pairs = [
            (_seconds(times[FULL.name]), _seconds(times[name])) for times in rounds if {name, FULL.name} <= times.keys()
        ]
        found = {}
        for label in pairs[0][0] if pairs else ():
            full, own = zip(*((full[label], own[label]) for full, own in pairs), strict=True)
            found[label] = Speed(ratio_interval(full, own), Figure(*mean_error(own), len(own)))
        return found

    def _text(self) -> dict[str, dict[str, dict[str, Figure]]]:
        kinds: dict[str, list[str]] = {"all": []}
        for item in self._work.texts:
            kinds["all"].append(item.id)
            kinds.setdefault(item.task, []).append(item.id)
        if len(kinds) == 2:  # one kind is all
            del kinds[self._work.texts[0].task]
        found = {
            measure: {kind: each for kind, ids in kinds.items() if (each := self._figures(ids, measure))}
            for measure in (PROMPT, CONTINUATION)
        }
        return {measure: each for measure, each in found.items() if each}

    def _figures(self, ids: Sequence[str], measure: str) -> dict[str, Figure]:
        own, full = self._values(ids, measure), self._values(ids, measure, FULL.name)
        if "loss" in own:
            own["added_loss"] = _differences(own["loss"], full.get("loss", {}))
        figures = {label: figure for label, each in own.items() if (figure := _mean(each.values())) is not None}
        loss = figures.get("loss")
        if loss is not None and loss.mean < 700:  # where exp overflows
            # The error of an exponential is that of its exponent times itself, as it is that steep.
            figures["perplexity"] = Figure(math.exp(loss.mean), math.exp(loss.mean) * loss.error, loss.n)
        return figures | _tails(self._record(each, measure) for each in ids)

    def _questions(self) -> dict[str, TaskScores]:
        found = {}
        for task in dict.fromkeys(item.task for item in self._work.questions):
            items = [item for item in self._work.questions if item.task == task]
            ids = [item.id for item in items]
            own, full = (self._values(ids, ANSWER, name).get("score", {}) for name in (None, FULL.name))
            if (score := _mean(own.values())) is not None:
                pairs = [(self._record(each, ANSWER), self._record(each, ANSWER, FULL.name)) for each in ids]
                alike = [mine.text.strip() == theirs.text.strip() for mine, theirs in pairs if mine and theirs]
                differences = _differences(own, full).values()
                same_score = _mean(float(each == 0) for each in differences)
                found[task] = TaskScores(
                    score, _mean(differences), _mean(map(float, alike)), same_score, _cells(items, own)
                )
        return found

    def _record(self, item: str, measure: str, name: str | None = None) -> Record | None:
        return self._records.get((item, name or self._contender.name, measure))

    def _values(self, ids: Sequence[str], measure: str, name: str | None = None) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for each in ids:
            record = self._record(each, measure, name)
            for label, value in record.values.items() if record else ():
                found.setdefault(label, {})[each] = math.nan if value is None else value
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


def _cells(items: Sequence[QuestionItem], scores: Mapping[str, float]) -> tuple[Cell, ...]:
    """Scores by length and depth, where these were chosen; published questions are of as many lengths as there are."""
    by_cell: dict[tuple[int, float | None], list[float]] = {}
    for item in items:
        if item.id in scores:
            by_cell.setdefault((item.length, item.depth), []).append(scores[item.id])
    if len(by_cell) < 2 or len({length for length, _ in by_cell}) > _N_LENGTHS:
        return ()
    order = sorted(by_cell, key=lambda cell: (cell[0], -1.0 if cell[1] is None else cell[1]))
    return tuple(Cell(*cell, score) for cell in order if (score := _mean(by_cell[cell])) is not None)


def _differences(own: Mapping[str, float], full: Mapping[str, float]) -> dict[str, float]:
    """By item, of those that both have."""
    return {item: value - full[item] for item, value in own.items() if item in full}


def _tails(records: Iterable[Record | None]) -> dict[str, Figure]:
    """Quantiles of the divergence over all tokens; none if one is no number."""
    values = [math.nan if each is None else each for record in records if record for each in record.divergences]
    if not values or not all(map(math.isfinite, values)):
        return {}
    quantiles = np.quantile(values, [percent / 100 for percent in TAILS]).tolist()
    return {
        f"kl_{percent:g}": Figure(value, math.nan, len(values)) for percent, value in zip(TAILS, quantiles, strict=True)
    }


def _mean(values: Iterable[float]) -> Figure | None:
    """None if there is no value, or if one is no number: a mean without it would hide the worst."""
    numbers = list(values)
    if not numbers or not all(map(math.isfinite, numbers)):
        return None
    return Figure(*mean_error(numbers), len(numbers))
