"""adaskip_cpp.tuning.search: the search, on invented harms and times whose best answer is known."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from adaskip_cpp.tuning.search import Judge, back_off, fastest_within, least_harm, rank

N_LAYER = 8
N = 2 * N_LAYER
ORDER = list(range(N))
NAN = float("nan")

Harm = Callable[[np.ndarray], Sequence[float]]


def count(skip: np.ndarray) -> float:
    """Sublayers that run: all take the same time."""
    return float(skip.size - skip.sum())


def additive(cost: Sequence[float], noise: float = 0.0, n_texts: int = 8) -> Harm:
    """Each sublayer harms by a figure of its own; each text differs from the mean by up to ``noise`` of it."""
    weights = np.linspace(1 - noise, 1 + noise, n_texts)

    def harm(skip: np.ndarray) -> Sequence[float]:
        return (float(np.asarray(cost)[skip.ravel()].sum()) * weights).tolist()

    return harm


def flags(*indices: int) -> np.ndarray:
    skip = np.zeros((N_LAYER, 2), bool)
    skip.flat[list(indices)] = True
    return skip


def within(judge: Judge, limit: float) -> Callable[[np.ndarray], bool]:
    return lambda skip: judge(skip).keeps(limit)


def chosen(judged: Any) -> list[int]:
    return np.flatnonzero(judged.skip).tolist()


# --- bisection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(N + 1))
def test_bisection_finds_how_many_of_the_ranking_keep_the_limit(n: int) -> None:
    judge = Judge(N_LAYER, additive([1.0] * N), count)
    found = fastest_within(judge, ORDER, n + 0.5, n_exchange=0)
    assert chosen(found) == ORDER[:n]
    assert judge.n_evaluations <= N.bit_length() == 5


def test_where_every_sublayer_harms_too_much_nothing_is_skipped() -> None:
    judge = Judge(N_LAYER, additive([1.0] * N), count)
    found = fastest_within(judge, ORDER, 0.5)
    assert not found.skip.any() and (found.harm.value, found.harm.high) == (0.0, 0.0)


def test_where_nothing_harms_all_is_skipped() -> None:
    judge = Judge(N_LAYER, additive([0.0] * N), count)
    assert chosen(fastest_within(judge, ORDER, 0.0)) == ORDER


def test_the_limit_is_kept_by_the_interval_and_not_by_the_mean() -> None:
    calm = fastest_within(Judge(N_LAYER, additive([1.0] * N), count), ORDER, 6.0)
    noisy = fastest_within(Judge(N_LAYER, additive([1.0] * N, noise=0.5), count), ORDER, 6.0)
    assert len(chosen(calm)) == 6
    # Five have a mean of 5, but of 8 texts between 2.5 and 7.5 its interval reaches beyond 6.
    assert len(chosen(noisy)) == 4 and noisy.harm.value == pytest.approx(4.0)
    assert noisy.harm.high <= 6.0 < noisy.harm.high * 5 / 4


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_a_harm_that_is_no_number_keeps_nothing(value: float) -> None:
    def harm(skip: np.ndarray) -> Sequence[float]:
        return [0.0, value if skip.sum() > 3 else 0.0, 0.0]

    assert len(chosen(fastest_within(Judge(N_LAYER, harm, count), ORDER, 1.0))) == 3


def test_where_the_harm_does_not_rise_with_the_number_the_result_still_keeps_the_limit() -> None:
    rng = np.random.default_rng(0)
    table = {n: float(rng.uniform(0, 2)) for n in range(1, N + 1)}

    def harm(skip: np.ndarray) -> Sequence[float]:
        return [table[int(skip.sum())]] * 4

    found = fastest_within(Judge(N_LAYER, harm, count), ORDER, 1.0)
    assert found.skip.sum() == 0 or table[int(found.skip.sum())] <= 1.0


# --- exchange ---------------------------------------------------------------------------------------------------------


def test_exchange_passes_over_one_that_is_ranked_too_high() -> None:
    cost = [1.0] * N
    cost[3] = 50.0
    judge = Judge(N_LAYER, additive(cost), count)
    found = fastest_within(judge, ORDER, 6.5, n_exchange=16)
    assert chosen(found) == [0, 1, 2, 4, 5, 6]


def test_exchange_swaps_for_one_that_harms_less_and_then_has_room_for_more() -> None:
    cost = [1.0, 1.0, 1.0, 3.0, 0.5, 2.4, *[9.0] * (N - 6)]
    judge = Judge(N_LAYER, additive(cost), count)
    # The first three keep 3.4, and no other one fits beside them but the fifth; the fourth harms most of all near it.
    assert chosen(fastest_within(judge, ORDER, 3.4, n_exchange=0)) == [0, 1, 2]
    assert chosen(fastest_within(judge, ORDER, 3.5, n_exchange=16)) == [0, 1, 2, 4]


@pytest.mark.parametrize("limit", [1.0, 2.0, 3.0])
def test_on_small_problems_exchange_comes_near_the_best_of_all_sets(limit: float) -> None:
    rng = np.random.default_rng(int(limit))
    cost = np.sort(rng.uniform(0.1, 1.5, 6))[rng.permutation(6)]
    best = max(n for n in range(7) for each in itertools.combinations(cost, n) if sum(each) <= limit)

    def harm(skip: np.ndarray) -> Sequence[float]:
        return [float(cost[skip.ravel()].sum())] * 4

    found = fastest_within(Judge(3, harm, count), list(range(6)), limit, n_exchange=60)
    assert best - 1 <= found.skip.sum() <= best


def test_a_swap_that_saves_more_time_is_taken() -> None:
    def seconds(skip: np.ndarray) -> float:
        return 100.0 - skip[:, 0].sum() - 3.0 * skip[:, 1].sum()

    cost = [1.0, 5.0, 1.0, 1.2] + [9.0] * (N - 4)
    judge = Judge(N_LAYER, additive(cost), seconds)
    found = fastest_within(judge, [0, 2, 3, 1, *range(4, N)], 2.3, n_exchange=16)
    assert chosen(found) in ([0, 3], [2, 3])
    assert found.seconds == 96.0


@pytest.mark.parametrize("n_exchange", [0, 1, 5, 16])
def test_exchange_evaluates_no_more_than_it_may_and_nothing_twice(n_exchange: int) -> None:
    seen: list[bytes] = []
    inner = additive(np.random.default_rng(1).uniform(0, 1, N).tolist())

    def harm(skip: np.ndarray) -> Sequence[float]:
        seen.append(skip.tobytes())
        return inner(skip)

    judge = Judge(N_LAYER, harm, count)
    fastest_within(judge, ORDER, 2.0, n_exchange=n_exchange)
    assert len(seen) == len(set(seen)) == judge.n_evaluations <= N.bit_length() + n_exchange


# --- a time to reach --------------------------------------------------------------------------------------------------


def test_a_time_is_reached_with_the_first_of_the_ranking() -> None:
    judge = Judge(N_LAYER, additive(list(range(1, N + 1))), count)
    found = least_harm(judge, ORDER, N - 5.0)
    assert found is not None and chosen(found) == [0, 1, 2, 3, 4]


def test_what_is_not_needed_for_the_time_is_put_back() -> None:
    def seconds(skip: np.ndarray) -> float:
        return 20.0 - (np.array([1, 1, 10, *[1] * (N - 3)]) * skip.ravel()).sum()

    found = least_harm(Judge(N_LAYER, additive([1.0] * N), seconds), ORDER, 10.0)
    assert found is not None and chosen(found) == [2]


def test_a_swap_that_harms_less_at_the_same_time_is_taken() -> None:
    cost = [1.0, 1.0, 8.0, 0.5, *[9.0] * (N - 4)]
    found = least_harm(Judge(N_LAYER, additive(cost), count), ORDER, N - 3.0)
    assert found is not None and chosen(found) == [0, 1, 3]


def test_a_time_out_of_reach_has_no_set() -> None:
    judge = Judge(N_LAYER, additive([0.0] * N), count)
    assert least_harm(judge, ORDER[:4], N - 5.0) is None
    assert judge.n_evaluations == 0


# --- with a prediction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.02, 0.3, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("n", [0, 3, 9, N])
def test_a_prediction_that_is_wrong_by_a_factor_alone_takes_three_evaluations_at_most(n: int, factor: float) -> None:
    cost = np.arange(1.0, N + 1)
    judge = Judge(N_LAYER, additive(cost.tolist()), count)
    predicted = factor * np.concatenate([[0.0], np.cumsum(cost)])
    found = fastest_within(judge, ORDER, cost[:n].sum() + 0.5, n_exchange=0, predicted=predicted)
    assert chosen(found) == ORDER[:n] and judge.n_evaluations <= 3


def test_a_prediction_of_the_wrong_shape_still_keeps_the_limit_in_few_evaluations() -> None:
    for seed in range(20):
        cost = np.random.default_rng(seed).exponential(1.0, N).tolist()
        judge = Judge(N_LAYER, additive(cost), count)
        found = fastest_within(judge, ORDER, 6.0, n_exchange=0, predicted=np.linspace(0, 1, N + 1) ** 3)
        assert found.keeps(6.0) and judge.n_evaluations <= 5
        best = int(np.searchsorted(np.cumsum(cost), 6.0))
        assert best - len(chosen(found)) <= 2


def test_a_prediction_of_nothing_and_a_harm_that_is_no_number_end_in_what_keeps_the_limit() -> None:
    def harm(skip: np.ndarray) -> Sequence[float]:
        return [0.0, NAN if skip.sum() > 3 else 0.0]

    found = fastest_within(Judge(N_LAYER, harm, count), ORDER, 1.0, n_exchange=0, predicted=np.zeros(N + 1))
    assert len(chosen(found)) == 3


# --- the check on other text ------------------------------------------------------------------------------------------


def test_what_fails_on_other_text_is_put_back_one_by_one_last_of_the_ranking_first() -> None:
    judge = Judge(N_LAYER, additive([1.0] * N), count)
    kept = back_off(within(judge, 2.5), [5, 3, 1, 0], flags(0, 1, 3, 5))
    assert np.flatnonzero(kept).tolist() == [3, 5]
    assert judge.n_evaluations == 3


def test_what_holds_on_other_text_is_left_as_it_is() -> None:
    judge = Judge(N_LAYER, additive([1.0] * N), count)
    skip = flags(0, 1)
    assert np.flatnonzero(back_off(within(judge, 2.0), ORDER, skip)).tolist() == [0, 1]
    assert judge.n_evaluations == 1


def test_where_nothing_holds_on_other_text_the_model_is_left_whole() -> None:
    skip = flags(0, 1)
    assert not back_off(within(Judge(N_LAYER, additive([1.0] * N), count), 0.5), ORDER, skip).any()
    assert skip.sum() == 2  # what was handed in is not changed


def test_where_it_must_be_fast_twice_as_many_are_put_back_each_time() -> None:
    judge = Judge(N_LAYER, additive([1.0] * N), count)
    kept = back_off(within(judge, 10.0), ORDER, flags(*ORDER), faster=True)
    assert np.flatnonzero(kept).tolist() == ORDER[: N - 7]  # of 16 first one, then two, then four
    assert judge.n_evaluations == 4


# --- the ranking ------------------------------------------------------------------------------------------------------


def test_equal_times_give_the_papers_ranking_ties_included() -> None:
    similarity = np.array([[0.5, 0.9], [0.9, 0.5], [NAN, 0.7]])
    assert rank(1.0 - similarity, np.ones((3, 2))) == [2, 1, 5, 0, 3]


def test_what_saves_more_comes_first_at_the_same_similarity_and_what_saves_nothing_never() -> None:
    lost = np.full((2, 2), 0.1)
    assert rank(lost, np.array([[1.0, 2.0], [0.0, 4.0]])) == [3, 1, 0]
