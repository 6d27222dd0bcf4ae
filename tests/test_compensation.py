"""adaskip_cpp.compensation: what stands in for a skipped sublayer."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adaskip_cpp.compensation import COMPENSATIONS, DEFAULT_COMPENSATION, get_compensation
from adaskip_cpp.errors import CompensationError
from adaskip_cpp.statistics import PhaseStatistics

N_LAYER, N_TOKENS, N_EMBD = 3, 200, 8


def measure(u: np.ndarray, v: np.ndarray) -> PhaseStatistics:
    """Statistics of u and v, float64 [n_layer, 2, n_tokens, n_embd], by whole matrices."""
    norm_u, norm_v = np.linalg.norm(u, axis=3), np.linalg.norm(v, axis=3)
    return PhaseStatistics(
        ((u * v).sum(axis=3) / (norm_u * norm_v)).mean(axis=2),
        np.sqrt((v**2).sum(axis=(2, 3)) / (u**2).sum(axis=(2, 3))),
        np.median(norm_v / norm_u, axis=2),
        np.ones(N_LAYER),
        u.mean(axis=2).astype(np.float32),
        v.mean(axis=2).astype(np.float32),
        N_TOKENS,
    )


@pytest.fixture
def streams() -> tuple[np.ndarray, np.ndarray]:
    """Outputs are the inputs plus a constant vector of each sublayer, plus noise."""
    rng = np.random.default_rng(3)
    u = rng.normal(size=(N_LAYER, 2, N_TOKENS, N_EMBD))
    return u, u + 2 * rng.normal(size=(N_LAYER, 2, 1, N_EMBD)) + 0.1 * rng.normal(size=u.shape)


EVERY = np.ones((N_LAYER, 2), bool)


@pytest.mark.parametrize(("name", "figure"), [("none", None), ("paper", "norm_ratio"), ("median", "median_ratio")])
def test_a_scalar_is_a_figure_of_the_statistics(streams: Any, name: str, figure: str | None) -> None:
    statistics = measure(*streams)
    chosen = COMPENSATIONS[name].skip_set(EVERY, statistics)
    np.testing.assert_array_equal(chosen.scale, 1.0 if figure is None else getattr(statistics, figure))
    assert chosen.bias is None


def test_the_papers_ratio_scales_the_input_to_the_frobenius_norm_of_the_output(streams: Any) -> None:
    u, v = streams
    scale = COMPENSATIONS["paper"].skip_set(EVERY, measure(u, v)).scale
    np.testing.assert_allclose(
        [[np.linalg.norm(scale[i, k] * u[i, k]) for k in (0, 1)] for i in range(N_LAYER)],
        [[np.linalg.norm(v[i, k]) for k in (0, 1)] for i in range(N_LAYER)],
    )


def test_affine_leaves_no_mean_error_and_less_error_than_any_scalar(streams: Any) -> None:
    u, v = streams
    statistics = measure(u, v)

    def error(name: str) -> np.ndarray:
        chosen = COMPENSATIONS[name].skip_set(EVERY, statistics)
        bias = 0 if chosen.bias is None else chosen.bias[:, :, None]
        return np.asarray(v - (chosen.scale[..., None, None] * u + bias))

    np.testing.assert_allclose(error("affine").mean(axis=2), 0, atol=1e-6)
    np.testing.assert_array_equal(
        COMPENSATIONS["affine"].skip_set(EVERY, statistics).scale, statistics.median_ratio, "its scale is the median"
    )
    for name in ("none", "paper", "median"):
        assert ((error("affine") ** 2).sum(axis=(2, 3)) < (error(name) ** 2).sum(axis=(2, 3))).all()


def test_only_what_is_skipped_is_compensated(streams: Any) -> None:
    skip = np.zeros((N_LAYER, 2), bool)
    skip[1, 0] = True
    chosen = COMPENSATIONS["affine"].skip_set(skip, measure(*streams))
    assert chosen.bias is not None
    np.testing.assert_array_equal(chosen.bias.any(axis=2), skip)
    assert (chosen.scale[~skip] == 1).all()
    assert COMPENSATIONS["affine"].skip_set(skip & False, measure(*streams)).bias is None


def test_affine_needs_vectors_and_says_what_does_not(streams: Any) -> None:
    statistics = replace(measure(*streams), mean_u=None, mean_v=None)
    with pytest.raises(CompensationError, match=r"calibrate again.*median"):
        COMPENSATIONS["affine"].skip_set(EVERY, statistics)
    assert COMPENSATIONS["median"].skip_set(EVERY, statistics).n_skip == 2 * N_LAYER
    assert COMPENSATIONS["affine"].skip_set(EVERY & False, statistics).n_skip == 0


def test_what_was_not_observed_cannot_be_compensated(streams: Any) -> None:
    figures = {}
    for name in ("similarity", "norm_ratio", "median_ratio"):
        figures[name] = getattr(measure(*streams), name).copy()
        figures[name][2, 1] = np.nan
    statistics = replace(measure(*streams), **figures)
    with pytest.raises(CompensationError, match="FFN of layer 2"):
        COMPENSATIONS["median"].skip_set(EVERY, statistics)


def test_the_online_stage_has_no_vectors_so_that_affine_and_linear_are_the_median_there() -> None:
    assert {name: each.online for name, each in COMPENSATIONS.items()} == {
        "none": "none",
        "paper": "paper",
        "median": "median",
        "affine": "median",
        "linear": "median",
    }


@pytest.mark.parametrize("name", ["best", None, []])
def test_an_unknown_name_is_refused_and_the_known_told(name: Any) -> None:
    with pytest.raises(CompensationError, match="none, paper, median, affine"):
        get_compensation(name)
    assert get_compensation(DEFAULT_COMPENSATION).name == DEFAULT_COMPENSATION
