"""adaskip_cpp.similarity: figures of one request, against float64 computations on whole matrices."""

import numpy as np
import pytest

from adaskip_cpp.similarity import RequestStatistics

N_LAYER, N_TOKENS, N_EMBD = 3, 41, 16


@pytest.fixture
def streams() -> tuple[np.ndarray, np.ndarray]:
    """u and v, float64 [n_layer, 2, n_tokens, n_embd]."""
    rng = np.random.default_rng(1)
    u = rng.normal(size=(N_LAYER, 2, N_TOKENS, N_EMBD))
    u[:, :, 0] *= 1000  # a massive activation
    return u, u + 0.3 * rng.normal(size=u.shape)


def reduce(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    dot, u_sq, v_sq = (np.einsum("lktd,lktd->lkt", a, b) for a, b in ((u, v), (u, u), (v, v)))
    return dot.astype(np.float32), u_sq.astype(np.float32), v_sq.astype(np.float32)


def accumulate(u: np.ndarray, v: np.ndarray, pieces: list[int]) -> RequestStatistics:
    statistics = RequestStatistics(N_LAYER)
    start = 0
    for n in pieces:
        statistics.add(*reduce(u[:, :, start : start + n], v[:, :, start : start + n]))
        start += n
    assert start == N_TOKENS
    return statistics


def test_figures_are_those_of_the_whole_request(streams: tuple[np.ndarray, np.ndarray]) -> None:
    u, v = streams
    result = accumulate(u, v, [N_TOKENS]).result()
    norm_u, norm_v = np.linalg.norm(u, axis=3), np.linalg.norm(v, axis=3)
    cosine = (u * v).sum(axis=3) / (norm_u * norm_v)
    np.testing.assert_allclose(result.similarity, cosine.mean(axis=2), rtol=1e-6)
    frobenius = [
        [np.linalg.norm(v[layer, k]) / np.linalg.norm(u[layer, k]) for k in (0, 1)] for layer in range(N_LAYER)
    ]
    np.testing.assert_allclose(result.norm_ratio, frobenius, rtol=1e-6)
    np.testing.assert_allclose(result.median_ratio, np.median(norm_v / norm_u, axis=2), rtol=1e-6)
    assert result.n_tokens == N_TOKENS
    assert result.similarity.dtype == result.norm_ratio.dtype == result.median_ratio.dtype == np.float64


@pytest.mark.parametrize("pieces", [[1] * N_TOKENS, [7] * 5 + [6], [40, 1]])
def test_they_do_not_depend_on_how_it_is_split(streams: tuple[np.ndarray, np.ndarray], pieces: list[int]) -> None:
    whole, split = accumulate(*streams, [N_TOKENS]).result(), accumulate(*streams, pieces).result()
    np.testing.assert_allclose(split.similarity, whole.similarity, rtol=1e-12)
    np.testing.assert_allclose(split.norm_ratio, whole.norm_ratio, rtol=1e-12)
    np.testing.assert_array_equal(split.median_ratio, whole.median_ratio)


def test_what_was_not_observed_is_nan(streams: tuple[np.ndarray, np.ndarray]) -> None:
    dot, u_sq, v_sq = reduce(*streams)
    for array in (dot, u_sq, v_sq):
        array[1, 0] = np.nan
    statistics = RequestStatistics(N_LAYER)
    statistics.add(dot, u_sq, v_sq)
    result = statistics.result()
    expected = np.zeros((N_LAYER, 2), bool)
    expected[1, 0] = True
    for array in (result.similarity, result.norm_ratio, result.median_ratio):
        np.testing.assert_array_equal(np.isnan(array), expected)


def test_nothing_fed_is_nothing_observed() -> None:
    result = RequestStatistics(N_LAYER).result()
    assert np.isnan(result.similarity).all() and result.n_tokens == 0


def test_a_token_of_zero_norm_counts_as_unlike_and_has_no_ratio() -> None:
    dot = np.array([1.0, 0.0, 1.0], np.float32) * np.ones((1, 2, 1), np.float32)
    statistics = RequestStatistics(1)
    statistics.add(dot, dot, 4 * dot)
    result = statistics.result()
    np.testing.assert_allclose(result.similarity, (0.5 + 0 + 0.5) / 3)
    np.testing.assert_allclose(result.norm_ratio, 2)
    np.testing.assert_allclose(result.median_ratio, 2)


def test_a_sublayer_that_is_zero_throughout_is_not_observed() -> None:
    zero, one = np.zeros((1, 2, 3), np.float32), np.ones((1, 2, 3), np.float32)
    for u_sq, v_sq in ((zero, one), (one, zero)):
        statistics = RequestStatistics(1)
        statistics.add(zero, u_sq, v_sq)
        result = statistics.result()
        assert np.isnan([result.similarity, result.norm_ratio, result.median_ratio]).all()


def test_huge_norms_do_not_overflow() -> None:
    huge = np.full((1, 2, 3), 1e30, np.float32)
    statistics = RequestStatistics(1)
    statistics.add(huge, huge, huge)
    np.testing.assert_allclose(statistics.result().similarity, 1, rtol=1e-6)


def test_wrong_shapes_are_refused() -> None:
    good = np.ones((N_LAYER, 2, 5), np.float32)
    for bad in (good[:2], good[:, :1], good[..., :4], good[..., None]):
        with pytest.raises(ValueError, match="expected three arrays"):
            RequestStatistics(N_LAYER).add(good, good, bad)
