"""adaskip_cpp.planning.compensation: figures of invented streams, whose best compensation is known."""

from typing import Any

import numpy as np
import pytest
from oracles.profiles import maps, measured

from adaskip_cpp.model.skip_set import SkipSet
from adaskip_cpp.model.statistics import WHOLE, LinearMaps, PhaseStatistics, map_scale
from adaskip_cpp.planning.compensation import COMPENSATIONS

N_LAYER, N_TOKENS, N_EMBD = 3, 200, 8
EVERY = np.ones((N_LAYER, 2), bool)
MAPS = maps(n_embd=N_EMBD)
"""None for the FFN of layer 1, nor for all of that layer."""


@pytest.fixture
def streams() -> tuple[np.ndarray, np.ndarray]:
    """Outputs are the inputs plus a constant vector of each sublayer, plus noise."""
    rng = np.random.default_rng(3)
    u = rng.normal(size=(N_LAYER, 2, N_TOKENS, N_EMBD))
    return u, u + 2 * rng.normal(size=(N_LAYER, 2, 1, N_EMBD)) + 0.1 * rng.normal(size=u.shape)


@pytest.fixture
def figures(streams: Any) -> PhaseStatistics:
    return measured(*streams)


@pytest.mark.parametrize(("name", "figure"), [("none", None), ("paper", "norm_ratio"), ("median", "median_ratio")])
def test_a_scalar_is_a_figure_of_the_statistics(figures: PhaseStatistics, name: str, figure: str | None) -> None:
    chosen = COMPENSATIONS[name].skip_set(EVERY, figures, MAPS)
    np.testing.assert_array_equal(chosen.scale, 1.0 if figure is None else getattr(figures, figure))
    assert chosen.bias is chosen.down is chosen.up is None


def test_affine_leaves_no_mean_error_and_less_error_than_any_scalar(streams: Any, figures: PhaseStatistics) -> None:
    u, v = streams

    def error(name: str) -> np.ndarray:
        chosen = COMPENSATIONS[name].skip_set(EVERY, figures, MAPS)
        assert chosen.down is chosen.up is None
        bias = 0 if chosen.bias is None else chosen.bias[:, :, None]
        return np.asarray(v - (chosen.scale[..., None, None] * u + bias))

    np.testing.assert_allclose(error("affine").mean(axis=2), 0, atol=1e-6)
    scale = COMPENSATIONS["affine"].skip_set(EVERY, figures).scale
    np.testing.assert_array_equal(scale, figures.median_ratio)
    for name in ("none", "paper", "median"):
        assert ((error("affine") ** 2).sum(axis=(2, 3)) < (error(name) ** 2).sum(axis=(2, 3))).all()


def assert_maps(chosen: SkipSet, expected: dict[tuple[int, int], int]) -> None:
    """These sublayers have the map of a column of their layer, and the others none."""
    for name in ("down", "up"):
        wanted = np.zeros_like(getattr(MAPS, name)[:, :2])
        for (layer, kind), column in expected.items():
            wanted[layer, kind] = getattr(MAPS, name)[layer, column]
        np.testing.assert_array_equal(getattr(chosen, name), wanted)


def test_linear_is_a_map_after_a_scale_and_one_for_a_whole_layer(figures: PhaseStatistics) -> None:
    chosen = COMPENSATIONS["linear"].skip_set(np.array([[1, 1], [1, 0], [0, 1]], bool), figures, MAPS)
    scale = map_scale(figures.median_ratio)
    np.testing.assert_array_equal(chosen.scale, [[1, 1], [scale[1, 0], 1], [1, scale[2, 1]]])
    assert chosen.bias is None
    assert_maps(chosen, {(0, 1): WHOLE, (1, 0): 0, (2, 1): 1})


def test_a_sublayer_without_a_map_gets_what_affine_gives_it(streams: Any, figures: PhaseStatistics) -> None:
    """A layer that is skipped whole needs no maps of its sublayers."""
    u, v = streams
    parts = MAPS.down.copy(), MAPS.up.copy()
    for array in parts:
        array[2, :WHOLE] = np.nan
    chosen = COMPENSATIONS["linear"].skip_set(EVERY, figures, LinearMaps(*parts))
    assert_maps(chosen, {(0, 1): WHOLE, (1, 0): 0, (2, 1): WHOLE})
    ratio = np.median(np.linalg.norm(v[1, 1], axis=1) / np.linalg.norm(u[1, 1], axis=1))
    np.testing.assert_allclose(chosen.scale, [[1, 1], [map_scale(figures.median_ratio)[1, 0], ratio], [1, 1]])
    assert chosen.bias is not None and np.argwhere(chosen.bias.any(axis=2)).tolist() == [[1, 1]]
    np.testing.assert_allclose(chosen.bias[1, 1], (v[1, 1] - ratio * u[1, 1]).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("fitted", [None, MAPS], ids=["no maps", "none of this"])
def test_linear_without_maps_is_affine_and_nothing_skipped_takes_no_vectors(
    figures: PhaseStatistics, fitted: LinearMaps | None
) -> None:
    skip = np.zeros_like(EVERY)
    skip[1, 1] = True
    chosen = COMPENSATIONS["linear"].skip_set(skip, figures, fitted)
    assert chosen == COMPENSATIONS["affine"].skip_set(skip, figures)
    assert chosen.bias is not None and chosen.down is chosen.up is None
    for name in ("affine", "linear"):
        assert COMPENSATIONS[name].skip_set(EVERY & False, figures, fitted) == SkipSet.none(N_LAYER)
