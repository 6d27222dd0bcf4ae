"""adaskip_cpp.planning.compensation: what stands in for a skipped sublayer."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracles.profiles import measured

from adaskip_cpp.errors import PlanError
from adaskip_cpp.model.skip_set import SkipSet
from adaskip_cpp.model.statistics import WHOLE, LinearMaps, PhaseStatistics, map_scale
from adaskip_cpp.planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION, get_compensation

N_LAYER, N_TOKENS, N_EMBD = 3, 200, 8


@pytest.fixture
def streams() -> tuple[np.ndarray, np.ndarray]:
    """Outputs are the inputs plus a constant vector of each sublayer, plus noise."""
    rng = np.random.default_rng(3)
    u = rng.normal(size=(N_LAYER, 2, N_TOKENS, N_EMBD))
    return u, u + 2 * rng.normal(size=(N_LAYER, 2, 1, N_EMBD)) + 0.1 * rng.normal(size=u.shape)


@pytest.fixture
def statistics(streams: Any) -> PhaseStatistics:
    return measured(*streams)


EVERY = np.ones((N_LAYER, 2), bool)


@pytest.mark.parametrize(("name", "figure"), [("none", None), ("paper", "norm_ratio"), ("median", "median_ratio")])
def test_a_scalar_is_a_figure_of_the_statistics(statistics: PhaseStatistics, name: str, figure: str | None) -> None:
    chosen = COMPENSATIONS[name].skip_set(EVERY, statistics)
    np.testing.assert_array_equal(chosen.scale, 1.0 if figure is None else getattr(statistics, figure))
    assert chosen.bias is None


def test_affine_leaves_no_mean_error_and_less_error_than_any_scalar(streams: Any, statistics: PhaseStatistics) -> None:
    u, v = streams

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


def maps(rank: int = 2, whole: bool = False) -> LinearMaps:
    """Random maps of all sublayers, and of whole layers if wanted."""
    rng = np.random.default_rng(5)
    shapes = (N_LAYER, 3, rank, N_EMBD), (N_LAYER, 3, N_EMBD, rank)
    parts = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    for part in parts:
        part[:, WHOLE] = part[:, WHOLE] if whole else np.nan
    return LinearMaps(*parts)


def test_linear_is_the_median_and_the_map_without_a_bias(statistics: PhaseStatistics) -> None:
    skip, fitted = EVERY.copy(), maps()
    skip[0, 1] = False
    chosen = COMPENSATIONS["linear"].skip_set(skip, statistics, fitted)
    np.testing.assert_array_equal(chosen.scale, np.where(skip, map_scale(statistics.median_ratio), 1))
    assert chosen.bias is None
    for name in ("down", "up"):
        array = getattr(chosen, name)
        np.testing.assert_array_equal(array[skip], getattr(fitted, name)[:, :2][skip])
        assert not array[0, 1].any()


@pytest.mark.parametrize("name", ["none", "paper", "median", "affine"])
def test_the_others_do_not_use_the_maps(statistics: PhaseStatistics, name: str) -> None:
    assert COMPENSATIONS[name].skip_set(EVERY, statistics, maps()) == COMPENSATIONS[name].skip_set(EVERY, statistics)


def test_of_a_layer_that_is_skipped_whole_the_one_map_of_it_stands_in(statistics: PhaseStatistics) -> None:
    skip, fitted = EVERY.copy(), maps(whole=True)
    skip[0, 1] = skip[1, 0] = False
    chosen = COMPENSATIONS["linear"].skip_set(skip, statistics, fitted)
    assert chosen.down is not None and chosen.up is not None and chosen.bias is None
    scale = map_scale(statistics.median_ratio)
    np.testing.assert_array_equal(chosen.scale, [[scale[0, 0], 1], [1, scale[1, 1]], [1, 1]])
    for name in ("down", "up"):
        found, given = getattr(chosen, name), getattr(fitted, name)
        for at, expected in (((0, 0), given[0, 0]), ((1, 1), given[1, 1]), ((2, 1), given[2, WHOLE])):
            np.testing.assert_array_equal(found[at], expected)
        assert not found[2, 0].any() and not found[0, 1].any() and not found[1, 0].any()


def without_maps_of(layer: int, kinds: Any, *, whole: bool = False) -> LinearMaps:
    parts = {name: np.array(getattr(maps(whole=whole), name)) for name in ("down", "up")}
    for array in parts.values():
        array[layer, kinds] = np.nan
    return LinearMaps(**parts)


def test_a_whole_layer_needs_no_maps_of_its_sublayers(statistics: PhaseStatistics) -> None:
    fitted = without_maps_of(2, [0, 1], whole=True)
    chosen = COMPENSATIONS["linear"].skip_set(EVERY, statistics, fitted)
    assert chosen.bias is None and chosen.up is not None and chosen.scale[2].tolist() == [1, 1]
    np.testing.assert_array_equal(chosen.up[2, 1], fitted.up[2, WHOLE])


def test_a_sublayer_without_a_map_gets_what_affine_gives_it(streams: Any, statistics: PhaseStatistics) -> None:
    u, v = streams
    chosen = COMPENSATIONS["linear"].skip_set(EVERY, statistics, without_maps_of(2, 1))
    assert chosen.bias is not None and chosen.down is not None and chosen.up is not None
    mapped = [[True, True], [True, True], [True, False]]
    assert chosen.up.any(axis=(2, 3)).tolist() == mapped
    assert chosen.bias.any(axis=2).tolist() == np.logical_not(mapped).tolist()
    ratio = np.median(np.linalg.norm(v[2, 1], axis=1) / np.linalg.norm(u[2, 1], axis=1))
    assert chosen.scale[2, 1] == pytest.approx(ratio)
    np.testing.assert_allclose(chosen.bias[2, 1], (v[2, 1] - ratio * u[2, 1]).mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(chosen.scale[:2], map_scale(statistics.median_ratio)[:2])


@pytest.mark.parametrize("fitted", [None, without_maps_of(2, [0, 1, 2])], ids=["no maps", "none of these"])
def test_where_no_skipped_sublayer_has_a_map_linear_is_affine(
    statistics: PhaseStatistics, fitted: LinearMaps | None
) -> None:
    skip = np.zeros_like(EVERY)
    skip[2] = True
    chosen = COMPENSATIONS["linear"].skip_set(skip, statistics, fitted)
    assert chosen == COMPENSATIONS["affine"].skip_set(skip, statistics)
    assert chosen.bias is not None and chosen.down is chosen.up is None


@pytest.mark.parametrize("name", ["affine", "linear"])
def test_skipping_nothing_takes_no_vectors_and_maps(statistics: PhaseStatistics, name: str) -> None:
    assert COMPENSATIONS[name].skip_set(EVERY & False, statistics, maps()) == SkipSet.none(N_LAYER)


def test_what_was_not_observed_cannot_be_compensated(statistics: PhaseStatistics) -> None:
    figures = {}
    for name in ("similarity", "norm_ratio", "median_ratio"):
        figures[name] = getattr(statistics, name).copy()
        figures[name][2, 1] = np.nan
    with pytest.raises(PlanError, match="FFN of layer 2"):
        COMPENSATIONS["median"].skip_set(EVERY, replace(statistics, **figures))


@pytest.mark.parametrize("name", ["best", None, []])
def test_an_unknown_name_is_refused_and_the_known_told(name: Any) -> None:
    with pytest.raises(PlanError, match="none, paper, median, affine, linear"):
        get_compensation(name)
    assert get_compensation(DEFAULT_COMPENSATION).name == "linear"
