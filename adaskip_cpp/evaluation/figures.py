"""Makes figures with standard errors from the results of single items. Start at :func:`evaluation_results`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

import numpy as np

from ..intervals import mean_error, ratio_interval
from ..model.arrays import Floats
from .contenders import FULL, Contender
from .evaluate import ANSWER, CONTINUATION, SPEED, Key, Record, Work
from .results import SPEED_NAMES, TAILS, About, Figure, Named, Results, Row, Speed, TaskScores


def evaluation_results(work: Work, records: Mapping[Key, Record], about: About) -> Results:
    """Return all figures of the results so far; comparisons use only items and rounds that both contenders have."""
    expected = work.results()
    rows = tuple(_Measured(contender, work, records).row() for contender in work.contenders)
    return Results(sum(key in records for key in expected), len(expected), about, rows)


class _Measured:
    def __init__(self, contender: Contender, work: Work, records: Mapping[Key, Record]) -> None:
        self._contender, self._work, self._records = contender, work, records

    def row(self) -> Row:
        plan = self._contender.plan_for(max(self._work.prompt_lengths, default=0))
        return Row(
            **{each.name: getattr(self._contender, each.name) for each in fields(Named)},
            n_skip_prefill=0 if plan is None else plan.skipped(plan.prompt_phase).n_skip,
            n_skip_decode=0 if plan is None else plan.skipped("decode").n_skip,
            speed=self._speed(),
            text=self._text(),
            questions=self._questions(),
        )

    def _speed(self) -> dict[str, Speed]:
        """Return speed-ups against the whole model; {} if nothing was timed."""
        pairs = self._pairs([f"round/{i}" for i in range(self._work.n_rounds)], SPEED)
        found = {}
        for label in SPEED_NAMES if pairs else ():
            own, full = (_values(side, label) for side in zip(*pairs, strict=True))
            found[label] = Speed(ratio_interval(full, own), Figure(*mean_error(own), len(own)))
        return found

    def _text(self) -> dict[str, dict[str, Figure]]:
        kinds = {"all": [item.id for item in self._work.texts]}
        for item in self._work.texts:
            kinds.setdefault(item.task, []).append(item.id)
        if len(kinds) == 2:  # one kind is all
            del kinds[self._work.texts[0].task]
        return {kind: each for kind, ids in kinds.items() if (each := self._figures(ids))}

    def _figures(self, ids: Sequence[str]) -> dict[str, Figure]:
        records = self._of(ids, CONTINUATION).values()
        values = {"added_loss": _added(self._pairs(ids, CONTINUATION), "loss")}
        for label in dict.fromkeys(label for record in records for label in record.values):
            values[label] = _values([record for record in records if label in record.values], label)
        figures = {label: figure for label, each in values.items() if (figure := _mean(each)) is not None}
        if (loss := figures.get("loss")) is not None and loss.mean < 700:  # where exp overflows
            # The derivative of exp is exp itself, so the error of the loss is multiplied by it.
            figures["perplexity"] = Figure(math.exp(loss.mean), math.exp(loss.mean) * loss.error, loss.n)
        tokens = np.array([each for record in records for each in record.divergences], np.float64)
        if tokens.size and np.isfinite(tokens).all():
            tails = zip(TAILS, np.quantile(tokens, np.divide(TAILS, 100)).tolist(), strict=True)
            figures |= {f"kl_{percent:g}": Figure(value, math.nan, tokens.size) for percent, value in tails}
        return figures

    def _questions(self) -> dict[str, TaskScores]:
        found = {}
        for task in dict.fromkeys(item.task for item in self._work.questions):
            items = [item.id for item in self._work.questions if item.task == task]
            if (score := _mean(_values(self._of(items, ANSWER).values(), "score"))) is not None:
                pairs = self._pairs(items, ANSWER)
                alike = np.array([own.text.strip() == full.text.strip() for own, full in pairs], np.float64)
                same_score = np.array(_added(pairs, "score") == 0, np.float64)
                found[task] = TaskScores(score, _mean(alike), _mean(same_score))
        return found

    def _of(self, ids: Iterable[str], measure: str, name: str = "") -> dict[str, Record]:
        """Return the measured results by item, of this contender or of the one with this name."""
        keys = ((each, name or self._contender.name, measure) for each in ids)
        return {key[0]: self._records[key] for key in keys if key in self._records}

    def _pairs(self, ids: Iterable[str], measure: str) -> list[tuple[Record, Record]]:
        """Return the contender's result and the whole model's for each item that both have."""
        full = self._of(ids, measure, FULL.name)
        return [(own, full[each]) for each, own in self._of(ids, measure).items() if each in full]


def _values(records: Iterable[Record], label: str) -> Floats:
    return np.array([record.values[label] for record in records], np.float64)  # None, for NaN on disk, becomes NaN


def _added(pairs: Sequence[tuple[Record, Record]], label: str) -> Floats:
    """Return the difference of a value from the whole model's, item by item."""
    return _values([own for own, _ in pairs], label) - _values([full for _, full in pairs], label)


def _mean(values: Floats) -> Figure | None:
    """Return the mean; None without values, or if one is not finite, as a mean without it would hide the worst."""
    return Figure(*mean_error(values), len(values)) if values.size and np.isfinite(values).all() else None
