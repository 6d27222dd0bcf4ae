"""Intervals: they hold the truth as often as they say, find no difference where there is none, and find 3%."""

import math
import statistics

import numpy as np
import pytest

from adaskip_cpp.errors import DataError
from adaskip_cpp.intervals import Interval, mean_error, mean_interval, ratio_interval

N_EXPERIMENTS = 250


def times(rng: np.random.Generator, n: int, noise: float, *, outliers: bool = False) -> np.ndarray:
    """Seconds around 1, with noise; one in ten is disturbed."""
    log = rng.normal(0, noise, n)
    if outliers:
        log += (rng.random(n) < 0.1) * rng.exponential(8 * noise, n)
    return np.exp(log)


@pytest.mark.parametrize("n", [3, 5, 8, 12, 20])
@pytest.mark.parametrize(("noise", "outliers"), [(0.03, False), (0.2, False), (0.03, True)])
def test_where_there_is_no_difference_none_is_found_but_for_one_in_twenty(n: int, noise: float, outliers: bool) -> None:
    rng = np.random.default_rng(n)
    found = sum(
        ratio_interval(times(rng, n, noise, outliers=outliers), times(rng, n, noise, outliers=outliers)).excludes()
        for _ in range(N_EXPERIMENTS)
    )
    assert found / N_EXPERIMENTS <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / N_EXPERIMENTS)


def test_a_drift_of_both_sides_is_no_difference() -> None:
    rng = np.random.default_rng(0)
    # The machine gets slower by 5% from run to run, and the order within a round alternates.
    slots = np.arange(24).reshape(12, 2)
    slots[1::2] = slots[1::2, ::-1]
    found = 0
    for _ in range(N_EXPERIMENTS):
        a, b = (times(rng, 12, 0.03) * np.exp(0.05 * slots[:, side]) for side in (0, 1))
        found += ratio_interval(a, b).excludes()
    assert found / N_EXPERIMENTS <= 0.08


@pytest.mark.parametrize("noise", [0.02, 0.025])
def test_a_difference_of_3_percent_is_found_in_20_pairs(noise: float) -> None:
    rng = np.random.default_rng(1)
    found = [
        ratio_interval(1.03 * times(rng, 20, noise / math.sqrt(2)), times(rng, 20, noise / math.sqrt(2)))
        for _ in range(N_EXPERIMENTS)
    ]
    assert sum(interval.low > 1 for interval in found) / N_EXPERIMENTS >= 0.95
    assert statistics.mean(interval.value for interval in found) == pytest.approx(1.03, abs=0.003)


def test_the_ratio_of_pairs_that_differ_alike_is_exact_however_much_the_sides_vary() -> None:
    interval = ratio_interval([3.0, 6.0, 9.0], [2.0, 4.0, 6.0])
    assert (interval.value, interval.low, interval.high) == pytest.approx((1.5, 1.5, 1.5))
    assert interval.n == 3 and interval.excludes() and not interval.excludes(interval.value)


def test_one_wild_run_moves_the_ratio_little() -> None:
    assert ratio_interval([1.0] * 9 + [50.0], [1.0] * 10).value == 1.0


def test_the_interval_of_few_pairs_is_that_of_student() -> None:
    # Of fewer than 5 nothing is trimmed, so it is about mean +- t s / sqrt(n) of the log ratios, t = 4.303 for n = 3.
    logs = [0.01, 0.02, 0.06]
    half = 4.303 * statistics.stdev(logs) / math.sqrt(3)
    interval = ratio_interval(np.exp(logs), np.ones(3))
    assert math.log(interval.value) == pytest.approx(0.03)
    assert math.log(interval.high) - 0.03 == pytest.approx(half, rel=0.05)
    assert 0.03 - math.log(interval.low) == pytest.approx(half, rel=0.05)


def test_swapped_sides_give_the_reciprocal() -> None:
    rng = np.random.default_rng(3)
    a, b = times(rng, 7, 0.1), times(rng, 7, 0.1)
    there, back = ratio_interval(a, b), ratio_interval(b, a)
    assert (1 / back.value, 1 / back.high, 1 / back.low) == pytest.approx((there.value, there.low, there.high))


def test_one_pair_has_no_interval_and_proves_nothing_and_an_end_that_touches_1_is_no_difference() -> None:
    interval = ratio_interval([2.0], [1.0])
    assert interval.value == pytest.approx(2.0) and math.isnan(interval.low) and math.isnan(interval.high)
    assert not interval.excludes() and not Interval(1.1, 1.0, 1.2, 5).excludes()
    assert Interval(1.1, 1.01, 1.2, 5).excludes() and Interval(0.9, 0.8, 0.99, 5).excludes()


@pytest.mark.parametrize(
    ("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([1.0, 0.0], [1.0, 1.0]), ([1.0], [math.nan]), ([1.0], [-1.0])]
)
def test_what_has_no_ratio_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(DataError, match=r"per round|rounds without"):
        ratio_interval(a, b)


def test_the_error_of_a_mean_is_the_textbook_one_and_one_value_has_none() -> None:
    assert mean_error([1.0, 2.0, 3.0, 6.0]) == (3.0, pytest.approx(statistics.stdev([1, 2, 3, 6]) / 2))
    mean, error = mean_error([2.0])
    assert mean == 2.0 and math.isnan(error)


@pytest.mark.parametrize("n", [4, 8, 30])
def test_the_interval_of_a_mean_holds_it_19_times_in_20(n: int) -> None:
    rng = np.random.default_rng(n)
    missed = sum(mean_interval(rng.normal(0.5, 0.2, n)).excludes(0.5) for _ in range(N_EXPERIMENTS))
    assert missed / N_EXPERIMENTS <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / N_EXPERIMENTS)


@pytest.mark.parametrize("function", [mean_error, mean_interval])
def test_a_mean_of_nothing_is_refused(function: type) -> None:
    with pytest.raises(DataError, match="at least one"):
        function([])
