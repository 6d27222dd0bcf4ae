"""adaskip_cpp.calibration.similarity: figures of a request from the statistics of its ubatches."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from oracles.profiles import FIGURES, measured

from adaskip_cpp.calibration.similarity import RequestStatistics
from adaskip_cpp.errors import ProfileError
from adaskip_cpp.model.statistics import PhaseStatistics

N_LAYER, N_TOKENS, N_EMBD = 3, 41, 16


@pytest.fixture
def streams() -> tuple[np.ndarray, np.ndarray]:
    """u and v, float64 [n_layer, 2, n_tokens, n_embd]."""
    rng = np.random.default_rng(1)
    u = rng.normal(size=(N_LAYER, 2, N_TOKENS, N_EMBD))
    u[:, :, 0] *= 1000  # a massive activation
    return u, u + 0.3 * rng.normal(size=u.shape)


def reduce(u: np.ndarray, v: np.ndarray) -> SimpleNamespace:
    """One ubatch of statistics, [n_layer, 2, n_tokens, n_embd] reduced as the evaluator does."""
    dot, u_sq, v_sq = (np.einsum("lktd,lktd->lkt", a, b).astype(np.float32) for a, b in ((u, v), (u, u), (v, v)))
    layer_dot = np.einsum("ltd,ltd->lt", u[:, 0], v[:, 1]).astype(np.float32)
    sums = [(a.sum(axis=2)).astype(np.float32) for a in (u, v)]
    return SimpleNamespace(dot=dot, u_sq=u_sq, v_sq=v_sq, layer_dot=layer_dot, sum_u=sums[0], sum_v=sums[1])


def constant(dot: np.ndarray, u_sq: np.ndarray, v_sq: np.ndarray) -> SimpleNamespace:
    """A ubatch of one layer, its vectors of ones."""
    ones = np.ones((1, 2, 4), np.float32)
    return SimpleNamespace(dot=dot, u_sq=u_sq, v_sq=v_sq, layer_dot=dot[:, 0], sum_u=ones, sum_v=ones)


def result_of(*batches: Any, n_layer: int = N_LAYER) -> PhaseStatistics:
    statistics = RequestStatistics(n_layer)
    for batch in batches:
        statistics.add(batch)
    return statistics.result()


@pytest.mark.parametrize("pieces", [[N_TOKENS], [1] * N_TOKENS, [7] * 5 + [6], [40, 1]])
def test_figures_are_those_of_the_whole_request_however_it_is_split(
    streams: tuple[np.ndarray, np.ndarray], pieces: list[int]
) -> None:
    parts = zip(*(np.split(each, np.cumsum(pieces)[:-1], axis=2) for each in streams), strict=True)
    result = result_of(*(reduce(u, v) for u, v in parts))
    expected = measured(*streams)
    assert result.n_tokens == N_TOKENS
    for name in FIGURES:  # vectors are sums of float32
        precision: Any = {"rtol": 1e-5, "atol": 1e-5} if "mean" in name else {"rtol": 1e-6}
        np.testing.assert_allclose(getattr(result, name), getattr(expected, name), **precision)


def test_what_was_not_observed_is_nan(streams: tuple[np.ndarray, np.ndarray]) -> None:
    batch = reduce(*streams)
    for array in (batch.dot, batch.u_sq, batch.v_sq, batch.sum_u, batch.sum_v):
        array[1, 0] = np.nan
    result = result_of(batch)
    expected = np.zeros((N_LAYER, 2), bool)
    expected[1, 0] = True
    for array in (result.similarity, result.norm_ratio, result.median_ratio):
        np.testing.assert_array_equal(np.isnan(array), expected)
    np.testing.assert_array_equal(np.isnan(result.layer_similarity), [False, True, False])
    assert np.isnan(result.mean_u[1, 0]).all() and np.isfinite(result.mean_u[~expected]).all()


def test_a_token_of_zero_norm_counts_as_unlike_and_has_no_ratio_and_zeros_throughout_are_not_observed() -> None:
    dot = np.array([1.0, 0.0, 1.0], np.float32) * np.ones((1, 2, 1), np.float32)
    result = result_of(constant(dot, dot, 4 * dot), n_layer=1)
    np.testing.assert_allclose(result.similarity, (0.5 + 0 + 0.5) / 3)
    np.testing.assert_allclose([result.norm_ratio, result.median_ratio], 2)
    zero, one, huge = (np.full((1, 2, 3), value, np.float32) for value in (0, 1, 1e30))
    for u_sq, v_sq in ((zero, one), (one, zero)):
        result = result_of(constant(zero, u_sq, v_sq), n_layer=1)
        assert np.isnan([result.similarity, result.norm_ratio, result.median_ratio]).all()
    similarity = result_of(constant(huge, huge, huge), n_layer=1).similarity
    np.testing.assert_allclose(similarity, 1, rtol=1e-6, err_msg="huge norms do not overflow")


@pytest.mark.parametrize("name", ["median_ratio", "layer_similarity"])
def test_an_infinite_figure_is_refused(streams: tuple[np.ndarray, np.ndarray], name: str) -> None:
    statistics = result_of(reduce(*streams))
    with pytest.raises(ProfileError, match="calibrate again"):
        replace(statistics, **{name: np.full_like(getattr(statistics, name), np.inf)})
