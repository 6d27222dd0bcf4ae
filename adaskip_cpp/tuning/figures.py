"""Makes the figures of a plan from the scores of its probes: quality by kind of answer, and pass keys.

Start at :func:`judged_plan`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..intervals import mean_error, mean_interval
from ..measuring.judge import Judge, Scores
from ..measuring.probes import KINDS, Probe, ProbeKind
from ..model.plan import SkipPlan
from ..model.quality import Passkeys, Quality

_SURE = np.log(10.0)
"""Nats by which the whole model must prefer each token of a pass key to any other, to find it clearly. Losing such a
key takes a divergence of 0.39 at one token. A key by a factor of 2 is lost by 0.06, hardly more than the promise."""


def quality_of(probes: Sequence[Probe], scores: Sequence[Scores], kind: ProbeKind) -> Quality:
    """Return what a plan changes in the answers of one kind, as means over texts.

    A pass key is the right answer to its question. So its divergence counts only at tokens that the plan makes less
    likely. Plans often find keys that the whole model misses: docs/dev/method.md.
    """
    texts: dict[str, list[Scores]] = {}
    for probe, each in zip(probes, scores, strict=True):
        if probe.kind == kind:
            loses = (each.loss > 0) | (kind != "retrieval")
            texts.setdefault(probe.text, []).append(replace(each, divergence=np.where(loses, each.divergence, 0.0)))
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
    )


@dataclass(frozen=True)
class Judged:
    """The figures of one plan."""

    kinds: tuple[Quality, Quality, Quality]  # in the order of KINDS
    passkeys: Passkeys

    @classmethod
    def of(cls, probes: Sequence[Probe], scores: Sequence[Scores]) -> "Judged":
        continuation, copying, retrieval = (quality_of(probes, scores, kind) for kind in KINDS)
        return cls((continuation, copying, retrieval), passkeys_of(probes, scores))


def judged_plan(judge: Judge, plan: SkipPlan) -> tuple[Judged | str, int]:
    """Judge a plan, until it loses a clear pass key: no promise allows such a plan.

    Return its figures, or the text whose key it lost, and the tokens that were read with the plan.
    """
    judge.read_whole()
    scores, before = list[Scores](), judge.n_evaluated
    for probe, each in zip(judge.probes, judge.each(plan), strict=True):
        scores.append(each)
        keys = passkeys_of([probe], [each])
        if keys.plan < keys.whole:
            return probe.text, judge.n_evaluated - before
    return Judged.of(judge.probes, scores), judge.n_evaluated - before


def passkeys_of(probes: Sequence[Probe], scores: Sequence[Scores]) -> Passkeys:
    """Count pass keys. One that the whole model finds only by less than :data:`_SURE` cannot be lost."""
    asked = [each for probe, each in zip(probes, scores, strict=True) if probe.kind == "retrieval"]
    sure = [each for each in asked if (each.whole_margin >= _SURE).all()]
    return Passkeys(len(asked), len(sure), sum(bool(each.right.all()) for each in sure))
