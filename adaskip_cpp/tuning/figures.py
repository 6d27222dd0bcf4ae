"""From the scores of probes to the figures of a plan: quality by kind of answer, and pass keys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ..intervals import mean_error, mean_interval
from ..measuring.judge import KINDS, Probe, ProbeKind, Scores
from ..model.frontier import Passkeys, Point, Quality

_T = TypeVar("_T")
_SURE = np.log(2.0)
"""A pass key counts as found by the whole model where it prefers each of its tokens by so many nats to any other."""

_LITTLE = 1e-4
"""Nats per token that rounding alone costs: where plans lose no more than that, nothing can be said of their growth."""


def quality_of(
    probes: Sequence[Probe], scores: Sequence[Scores], kind: ProbeKind, n_prompt: int | None = None
) -> Quality:
    """Return what a plan changes in the answers of one kind, behind prompts of one length or of all: means over texts.

    How that grows with the prompt is left open, as 1.
    """
    texts: dict[str, list[Scores]] = {}
    for probe, each in zip(probes, scores, strict=True):
        if probe.kind == kind and n_prompt in (None, probe.n_prompt):
            texts.setdefault(probe.text, []).append(each)
    divergence, loss, agreement = (
        np.array([np.concatenate([getattr(each, name) for each in of]).mean() for of in texts.values()])
        for name in ("divergence", "loss", "agrees")
    )
    every = np.concatenate([each.divergence for of in texts.values() for each in of])
    excess = mean_interval(loss - divergence).low
    return Quality(
        mean_interval(divergence),
        mean_error(divergence)[1],
        mean_interval(loss),
        max(float(np.nan_to_num(excess)), 0.0),
        mean_interval(agreement),
        (float(np.quantile(every, 0.99)), float(np.quantile(every, 0.999))),
        len(texts),
        len(every),
        1.0,
    )


@dataclass(frozen=True)
class Judged:
    """What was measured of a plan behind prompts of one length, and behind their first halves.

    Attributes:
        continuation, copying, passkeys: behind the whole prompts.
        before: divergences behind the halves, in continuations and in copies, in nats per token.
    """

    continuation: Quality
    copying: Quality
    passkeys: Passkeys
    before: tuple[float, float]

    @classmethod
    def of(cls, probes: Sequence[Probe], scores: Sequence[Scores]) -> "Judged":
        """Return it of probes behind prompts of two lengths."""
        half, whole = sorted({probe.n_prompt for probe in probes})
        continuation, copying = (quality_of(probes, scores, kind, whole) for kind in KINDS[:2])
        before, before_copying = (quality_of(probes, scores, kind, half).divergence.value for kind in KINDS[:2])
        return cls(continuation, copying, passkeys_of(probes, scores), (before, before_copying))


def with_growth(points: Mapping[_T, tuple[Point, Judged]]) -> dict[_T, Point]:
    """Return the points of a frontier, with how what they lose grows with the prompt.

    That is measured of all of them together, for either kind of answer: for one it is mostly chance. Windows that have
    the same size at both lengths tell nothing of those that grow with the prompt, so points without count, if any.
    """
    plain = [each for each in points.values() if not each[0].plan.narrowed] or [*points.values()]
    growths = {}
    for i, kind in enumerate(("continuation", "copying")):
        short = sum(judged.before[i] for _, judged in plain) + _LITTLE
        long = sum(getattr(judged, kind).divergence.value for _, judged in plain) + _LITTLE
        growths[kind] = max(long / short, 1.0)
    return {
        key: replace(point, **{kind: replace(getattr(point, kind), growth=each) for kind, each in growths.items()})
        for key, (point, _) in points.items()
    }


def passkeys_of(probes: Sequence[Probe], scores: Sequence[Scores]) -> Passkeys:
    """Count pass keys. One that the whole model finds by luck, near a tie, does not count as lost."""
    asked = [each for probe, each in zip(probes, scores, strict=True) if probe.kind == "retrieval"]
    sure = [each for each in asked if (each.whole_margin >= _SURE).all()]
    return Passkeys(len(asked), len(sure), sum(bool(each.right.all()) for each in sure))
