"""adaskip_cpp.model.quality: the smallest promise that is kept, and how often the rule is wrong, by simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest
from oracles.frontiers import quality

from adaskip_cpp.intervals import Interval, mean_error

SIGMA, N_TEXTS, N_POINTS, STEP = 0.35, 4, 7, 1.5


def broken(promise: float, by_mean_alone: bool) -> float:
    """The share of choices whose plan loses more than promised on all texts there are.

    A text is harder or easier for all plans alike, by a lognormal factor of mean 1. A path grows by ``STEP`` from a
    first loss that lies anywhere between 0.01 and ``STEP`` times that.
    """
    rng, n_broken, n_chosen = np.random.default_rng(0), 0, 0
    for _ in range(4000):
        true = 0.01 * STEP ** (rng.uniform() + np.arange(N_POINTS))
        measured = true[:, None] * rng.lognormal(-(SIGMA**2) / 2, SIGMA, N_TEXTS)
        kept = [each for each in range(N_POINTS) if keeps(measured[each], promise, by_mean_alone)]
        if kept:
            n_chosen += 1
            n_broken += bool(true[kept[-1]] > promise)
    return n_broken / n_chosen


def keeps(divergences: np.ndarray, promise: float, by_mean_alone: bool) -> bool:
    mean, error = mean_error(divergences)
    return replace(quality(mean), error=0.0 if by_mean_alone else error).needs <= promise


@pytest.mark.parametrize("promise", [0.02, 0.05, 0.1])
def test_of_20_choices_by_four_texts_at_most_one_breaks_the_promise(promise: float) -> None:
    assert broken(promise, by_mean_alone=False) <= 1 / 20
    assert broken(promise, by_mean_alone=True) > 1 / 10, "which is why the standard error counts"


def test_what_is_lost_beyond_chance_counts_and_a_mean_that_is_not_certain_keeps_less() -> None:
    assert replace(quality(0.04), excess=0.02).harm == pytest.approx(0.06)
    assert replace(quality(0.04), excess=0.02).needs == quality(0.06).needs
    assert replace(quality(0.03), error=0.01).needs == pytest.approx(0.046)
    assert replace(quality(0.03), error=math.nan).needs == math.inf, "of one text"
    lost = replace(quality(0.03), loss=Interval(0.09, -0.1, 0.2, 4))
    assert lost.harm == 0.03 and lost.needs == 0.09, "the mean added loss, however uncertain"
