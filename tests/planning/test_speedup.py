"""adaskip_cpp.planning.speedup: skip sets for a speed-up, on cost models written by hand."""

import itertools
from typing import Any

import numpy as np
import pytest
from oracles.costs import cost_model

from adaskip_cpp.errors import BudgetError
from adaskip_cpp.planning.request import PlanRequest
from adaskip_cpp.planning.speedup import Goal, cheapest_set, seconds_saved

# Seconds for a decoded token, a hundredth of a ubatch: 1 for the rest, then attention (1, 2, 4), FFN (2, 2, 2).
COST = cost_model(fixed=100.0, attention=[100, 200, 400], ffn=[200, 200, 200], size=256)
TIMES = np.array([[1, 2], [2, 2], [4, 2]])
FULL = 1 + TIMES.sum()


def goal(speedup: float) -> Goal:
    return Goal(COST, speedup, 256, "decode")


def lost(skip: np.ndarray, similarity: np.ndarray) -> float:
    return float((1 - similarity)[skip].sum())


def test_what_each_sublayer_saves() -> None:
    np.testing.assert_allclose(seconds_saved(COST, 256, "decode"), TIMES)


def test_the_least_lost_per_second_goes_first() -> None:
    # Per second: attention 0.1, 0.1, 0.04; FFN 0.15, 0.2, 0.25.
    similarity = np.array([[0.9, 0.7], [0.8, 0.6], [0.84, 0.5]])
    skip = cheapest_set(1 - similarity, goal(FULL / (FULL - 4)))
    assert np.argwhere(skip).tolist() == [[2, 0]]


def test_what_is_not_needed_after_all_is_put_back() -> None:
    # Attention of layer 0 is the cheapest per second, but that of layer 2 alone reaches the time.
    similarity = np.array([[0.999, 0.1], [0.1, 0.1], [0.9, 0.1]])
    skip = cheapest_set(1 - similarity, goal(FULL / (FULL - 4)))
    assert np.argwhere(skip).tolist() == [[2, 0]]


@pytest.mark.parametrize("ranking", ["efficiency", "similarity"])
@pytest.mark.parametrize("seed", range(20))
def test_every_set_reaches_the_time_with_nothing_to_spare(seed: int, ranking: Any) -> None:
    """No sublayer is skipped for nothing; in the paper's ranking, the last one that joined is needed."""
    rng = np.random.default_rng(seed)
    similarity, speedup = rng.uniform(0.3, 1, (3, 2)), rng.uniform(1, 6)
    skip = cheapest_set(1 - similarity, goal(speedup), ranking)
    assert FULL - TIMES[skip].sum() <= FULL / speedup + 1e-9
    needed = np.argwhere(skip)
    if ranking == "similarity":
        order = np.argsort(-similarity, axis=None)[: len(needed)]
        assert skip.flat[order].all()
        needed = np.argwhere(skip & (similarity == similarity[skip].min()))
    assert all(FULL - TIMES[skip].sum() + TIMES[tuple(each)] > FULL / speedup for each in needed)


def test_on_average_it_loses_little_more_than_the_best_of_all_sets() -> None:
    excess = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        similarity, speedup = rng.uniform(0.3, 1, (3, 2)), rng.uniform(1.1, 4)
        every = (np.array(flags).reshape(3, 2) for flags in itertools.product((False, True), repeat=6))
        best = min(lost(s, similarity) for s in every if FULL - TIMES[s].sum() <= FULL / speedup)
        excess.append(lost(cheapest_set(1 - similarity, goal(speedup)), similarity) / best)
    assert min(excess) >= 1 - 1e-12 and np.mean(excess) < 1.15


def test_a_speed_up_of_one_skips_nothing() -> None:
    for ranking in ("efficiency", "similarity"):
        assert not cheapest_set(np.full((3, 2), 0.1), goal(1), ranking).any()  # type: ignore[arg-type]


def test_what_cannot_be_skipped_is_not_skipped() -> None:
    similarity = np.array([[np.nan, 0.5], [0.5, 0.5], [np.nan, 0.5]])
    skip = cheapest_set(1 - similarity, goal(FULL / (FULL - 8)))
    assert np.argwhere(skip).tolist() == [[0, 1], [1, 0], [1, 1], [2, 1]]


def test_a_speed_up_out_of_reach_is_refused_with_what_can_be_reached() -> None:
    similarity = np.full((3, 2), 0.9)
    similarity[2, 0] = np.nan  # the rest and this attention remain: 5 of 14 s, 2.8 times faster
    with pytest.raises(BudgetError, match=r"5 sublayers.* 5 s instead of 14 s, 2\.80 times.*at most 2\.80"):
        cheapest_set(1 - similarity, goal(2.9))
    assert cheapest_set(1 - similarity, goal(2.8)).sum() == 5


@pytest.mark.parametrize("speedup", [0.99, 0, -1, float("nan"), float("inf"), True, "2"])
def test_a_speed_up_that_is_none_is_refused(speedup: float) -> None:
    with pytest.raises(BudgetError, match="from 1 on"):
        PlanRequest(speedup=speedup)
