"""From the results of single items to figures with standard errors: what ``results.json`` holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..intervals import mean_error, ratio_interval
from ..measuring.timing import N_SETTLE
from .contenders import FULL, Contender
from .evaluate import ANSWER, CONTINUATION, EVERYONE, PROMPT, SPEED, Work

if TYPE_CHECKING:
    from ..measuring.tasks import QuestionItem
    from .store import Key

__all__ = ["FORMAT_VERSION", "SPEEDS", "evaluation_results", "to_json"]

FORMAT_VERSION = 1

SPEEDS = {"prefill": "first_token", "decode": "per_token", "e2e": "request"}
"""By mode, the speed-up that quality is read against: of what the mode makes faster."""

_N_LENGTHS = 8
"""Lengths of a task's questions, at most, for a table by length."""

Records = Mapping["Key", Mapping[str, Any]]
Figure = dict[str, Any]


def evaluation_results(work: Work, records: Records, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return all figures, as plain JSON values.

    A figure is ``{"mean", "error", "n"}``: the mean over ``n`` items and its standard error, null for a single item.
    What is compared with the full model is compared item by item, on the items that both have. A speed-up is
    ``{"value", "low", "high", "n"}`` with a 95% interval over ``n`` rounds.

    Args:
        work: what was to be measured.
        records: what has been, by item, contender and measure; may be incomplete.
        about: what else is to stand in the results: model, profile, settings, notes.
    """
    expected = list(work.results())
    rows = []
    for contender in work.contenders:
        row = contender.to_dict()
        row["speed"] = _speed(contender.name, records)
        row["text"] = _text(contender, work, records)
        row["questions"] = _questions(contender.name, work, records)
        rows.append(row)
    return {
        "format": "adaskip-evaluation",
        "version": FORMAT_VERSION,
        "n_done": sum(key in records for key in expected),
        "n_results": len(expected),
        **about,
        "contenders": rows,
    }


def to_json(results: Mapping[str, Any]) -> str:
    """Return the text of ``results.json``."""
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


# -- speed -----------------------------------------------------------------------------------------------------------


def _speed(name: str, records: Records) -> dict[str, Any] | None:
    """Speed-ups against the full model, round by round; None if nothing was timed."""
    rounds = [record["times"] for key, record in sorted(records.items()) if key[1:] == (EVERYONE, SPEED)]
    rounds = [times for times in rounds if name in times and FULL.name in times]
    if not rounds:
        return None
    result: dict[str, Any] = {}
    for label, seconds in _SECONDS.items():
        own, full = [seconds(times[name]) for times in rounds], [seconds(times[FULL.name]) for times in rounds]
        mean, error = mean_error(own)
        result[label] = {
            "speedup": ratio_interval(full, own).to_dict(),
            "seconds": {"mean": mean, "error": _finite(error), "n": len(own)},
        }
    return result


def _per_token(time: Mapping[str, Any]) -> float:
    """Mean, not median: a request under an online stage or a schedule is slow at first and fast later."""
    return fmean(time["token_s"][min(N_SETTLE, len(time["token_s"]) - 1) :])


def _request(time: Mapping[str, Any]) -> float:
    return float(time["first_token_s"] + math.fsum(time["token_s"]))


_SECONDS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "first_token": lambda time: float(time["first_token_s"]),
    "per_token": _per_token,
    "request": _request,
}


# -- text ------------------------------------------------------------------------------------------------------------


def _text(contender: Contender, work: Work, records: Records) -> dict[str, Any]:
    """Figures of the text items, by measure and then by kind of text, ``"all"`` for all together.

    ``prompt`` holds what was read as a prompt, ``decode`` what was decoded; Rouge-L is of continuations in any case.
    """
    groups: dict[str, list[str]] = {"all": [item.id for item in work.texts]}
    for task in dict.fromkeys(item.task for item in work.texts):
        groups[task] = [item.id for item in work.texts if item.task == task]
    if len(groups) == 2:  # one kind of text
        groups = {"all": groups["all"]}
    result: dict[str, Any] = {}
    for name, measure in (("prompt", PROMPT), ("decode", CONTINUATION)):
        figures = {group: _text_figures(ids, contender.name, measure, records) for group, ids in groups.items()}
        result[name] = {group: each for group, each in figures.items() if each} or None
    result["rouge_l"] = {
        group: figure
        for group, ids in groups.items()
        if (figure := _mean(_values(ids, contender.name, CONTINUATION, "rouge_l", records).values()))
    } or None
    return result


def _text_figures(ids: Sequence[str], name: str, measure: str, records: Records) -> dict[str, Figure]:
    losses = _values(ids, name, measure, "loss", records)
    full = _values(ids, FULL.name, measure, "loss", records)
    figures = {
        "loss": _mean(losses.values()),
        "perplexity": _perplexity(losses.values()),
        "added_loss": _mean(losses[each] - full[each] for each in losses if each in full),
        "kl": _mean(_values(ids, name, measure, "kl", records).values()),
        "agreement": _mean(_values(ids, name, measure, "agreement", records).values()),
    }
    return {label: figure for label, figure in figures.items() if figure is not None}


def _perplexity(losses: Iterable[float]) -> Figure | None:
    """exp of the mean loss; its standard error is that of the loss times itself, as the exponential is that steep."""
    figure = _mean(losses)
    if figure is None or figure["mean"] > 700:  # where exp overflows
        return None
    value = math.exp(figure["mean"])
    return {"mean": value, "error": None if figure["error"] is None else value * figure["error"], "n": figure["n"]}


# -- questions -------------------------------------------------------------------------------------------------------


def _questions(name: str, work: Work, records: Records) -> dict[str, Any]:
    """Scores by task; by length and depth as well where a task has several of either."""
    result: dict[str, Any] = {}
    for task in dict.fromkeys(item.task for item in work.questions):
        items = [item for item in work.questions if item.task == task]
        ids = [item.id for item in items]
        scores = _values(ids, name, ANSWER, "score", records)
        full = _values(ids, FULL.name, ANSWER, "score", records)
        if not scores:
            continue
        result[task] = {
            "score": _mean(scores.values()),
            "difference": _mean(scores[each] - full[each] for each in scores if each in full),
            "cells": _cells(items, scores),
        }
    return result


def _cells(items: Sequence[QuestionItem], scores: Mapping[str, float]) -> list[dict[str, Any]]:
    """Scores by length and depth, where these were chosen; published questions are of as many lengths as there are."""
    by_cell: dict[tuple[int, float | None], list[float]] = {}
    for item in items:
        if item.id in scores:
            by_cell.setdefault((item.length, item.depth), []).append(scores[item.id])
    if len(by_cell) < 2 or len({length for length, _ in by_cell}) > _N_LENGTHS:
        return []
    order = sorted(by_cell, key=lambda cell: (cell[0], -1.0 if cell[1] is None else cell[1]))
    return [{"length": cell[0], "depth": cell[1], "score": _mean(by_cell[cell])} for cell in order]


# -- means -----------------------------------------------------------------------------------------------------------


def _values(ids: Sequence[str], name: str, measure: str, label: str, records: Records) -> dict[str, float]:
    """Values by item, NaN for what came out as no number, without what was not measured."""
    found = ((each, records.get((each, name, measure), {})) for each in ids)
    return {
        each: math.nan if record[label] is None else float(record[label]) for each, record in found if label in record
    }


def _mean(values: Iterable[float]) -> Figure | None:
    """None if there is no value, or if one is no number: a mean without it would hide the worst."""
    numbers = list(values)
    if not numbers or not all(map(math.isfinite, numbers)):
        return None
    mean, error = mean_error(numbers)
    return {"mean": mean, "error": _finite(error), "n": len(numbers)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
