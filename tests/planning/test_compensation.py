"""adaskip_cpp.planning.compensation: what stands in for a skipped sublayer."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adaskip_cpp.calibration.linear import LinearFit
from adaskip_cpp.errors import CompensationError
from adaskip_cpp.model.skip_set import SkipSet
from adaskip_cpp.model.statistics import WHOLE, LinearMaps, PhaseStatistics, map_scale
from adaskip_cpp.planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION, get_compensation

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


def maps(rank: int = 2, whole: bool = False) -> LinearMaps:
    """Random maps of all sublayers, and of whole layers if wanted."""
    rng = np.random.default_rng(5)
    shapes = (N_LAYER, 3, rank, N_EMBD), (N_LAYER, 3, N_EMBD, rank)
    parts = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    for part in parts:
        part[:, WHOLE] = part[:, WHOLE] if whole else np.nan
    return LinearMaps(*parts)


def test_linear_is_the_median_and_the_map_without_a_bias(streams: Any) -> None:
    skip, fitted, statistics = EVERY.copy(), maps(), measure(*streams)
    skip[0, 1] = False
    chosen = COMPENSATIONS["linear"].skip_set(skip, statistics, fitted)
    np.testing.assert_array_equal(chosen.scale, np.where(skip, map_scale(statistics.median_ratio), 1))
    assert chosen.bias is None
    for name in ("down", "up"):
        array = getattr(chosen, name)
        np.testing.assert_array_equal(array[skip], getattr(fitted, name)[:, :2][skip])
        assert not array[0, 1].any()


def test_without_maps_linear_is_affine(streams: Any) -> None:
    chosen, statistics = COMPENSATIONS["linear"].skip_set(EVERY, measure(*streams)), measure(*streams)
    assert chosen == COMPENSATIONS["affine"].skip_set(EVERY, statistics)
    assert chosen.bias is not None and chosen.down is chosen.up is None


@pytest.mark.parametrize("name", ["none", "paper", "median", "affine"])
def test_the_others_do_not_use_the_maps(streams: Any, name: str) -> None:
    statistics = measure(*streams)
    assert COMPENSATIONS[name].skip_set(EVERY, statistics, maps()) == COMPENSATIONS[name].skip_set(EVERY, statistics)


def test_of_a_layer_that_is_skipped_whole_the_one_map_of_it_stands_in(streams: Any) -> None:
    skip, fitted, statistics = EVERY.copy(), maps(whole=True), measure(*streams)
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


def test_a_whole_layer_needs_no_maps_of_its_sublayers(streams: Any) -> None:
    fitted = without_maps_of(2, [0, 1], whole=True)
    chosen = COMPENSATIONS["linear"].skip_set(EVERY, measure(*streams), fitted)
    assert chosen.bias is None and chosen.up is not None and chosen.scale[2].tolist() == [1, 1]
    np.testing.assert_array_equal(chosen.up[2, 1], fitted.up[2, WHOLE])


def test_a_sublayer_without_a_map_gets_what_affine_gives_it(streams: Any) -> None:
    u, v = streams
    statistics = measure(u, v)
    chosen = COMPENSATIONS["linear"].skip_set(EVERY, statistics, without_maps_of(2, 1))
    assert chosen.bias is not None and chosen.down is not None and chosen.up is not None
    mapped = [[True, True], [True, True], [True, False]]
    assert chosen.up.any(axis=(2, 3)).tolist() == mapped
    assert chosen.bias.any(axis=2).tolist() == np.logical_not(mapped).tolist()
    ratio = np.median(np.linalg.norm(v[2, 1], axis=1) / np.linalg.norm(u[2, 1], axis=1))
    assert chosen.scale[2, 1] == pytest.approx(ratio)
    np.testing.assert_allclose(chosen.bias[2, 1], (v[2, 1] - ratio * u[2, 1]).mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(chosen.scale[:2], map_scale(statistics.median_ratio)[:2])


def test_where_no_skipped_sublayer_has_a_map_linear_is_affine(streams: Any) -> None:
    skip, statistics = np.zeros_like(EVERY), measure(*streams)
    skip[2] = True
    chosen = COMPENSATIONS["linear"].skip_set(skip, statistics, without_maps_of(2, [0, 1, 2]))
    assert chosen == COMPENSATIONS["affine"].skip_set(skip, statistics) and chosen.down is None


def test_skipping_nothing_takes_no_maps(streams: Any) -> None:
    assert COMPENSATIONS["linear"].skip_set(EVERY & False, measure(*streams), maps()) == SkipSet.none(N_LAYER)


def test_linear_is_the_default_and_leaves_less_error_than_affine_where_an_output_depends_on_its_input() -> None:
    rng = np.random.default_rng(0)
    u = rng.normal(size=(N_LAYER, 2, N_TOKENS, N_EMBD))
    matrix = rng.normal(size=(N_EMBD, 1)) @ rng.normal(size=(1, N_EMBD))
    v = u + u @ matrix.T + 1 + 0.1 * rng.normal(size=u.shape)
    fit = LinearFit([(layer, kind) for layer in range(N_LAYER) for kind in (0, 1)])
    pairs = [[(u[at].astype(np.float32), v[at].astype(np.float32)) for at in ((i, 0), (i, 1))] for i in range(N_LAYER)]
    fit.add(pairs, np.arange(1, N_TOKENS + 1, dtype=np.int32))
    fitted = fit.fit(1, map_scale(measure(u, v).median_ratio))
    parts = [np.full((N_LAYER, 3, *fitted[0, 0][i].shape), np.nan, np.float32) for i in range(2)]
    for (at, pair), i in itertools.product(fitted.items(), range(2)):
        parts[i][at] = pair[i]
    linear_maps = LinearMaps(*parts)
    errors = {}
    for name in ("affine", "linear"):
        chosen = COMPENSATIONS[name].skip_set(EVERY, measure(u, v), linear_maps)
        out = chosen.scale[..., None, None] * u
        if chosen.bias is not None:
            out = out + chosen.bias[:, :, None]
        if chosen.down is not None and chosen.up is not None:
            out = out + np.einsum("lkte,lkre,lkfr->lktf", u, chosen.down, chosen.up)
        errors[name] = ((out - v) ** 2).sum(axis=(2, 3))
    # Not near zero, although v - u is of rank 1: after a scale s there is (1 - s) u as well, which is of full rank.
    assert (errors["linear"] < errors["affine"]).all()
    assert DEFAULT_COMPENSATION == "linear"


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
    with pytest.raises(CompensationError, match="none, paper, median, affine, linear"):
        get_compensation(name)
    assert get_compensation(DEFAULT_COMPENSATION).name == DEFAULT_COMPENSATION
