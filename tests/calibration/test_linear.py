"""adaskip_cpp.calibration.linear: fitting the maps, against closed forms and float64 decompositions."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from adaskip_cpp.calibration import linear
from adaskip_cpp.calibration.linear import RIDGE, LinearFit
from adaskip_cpp.errors import ProfileError
from adaskip_cpp.model.statistics import WHOLE, LinearMaps, map_scale

N_EMBD, N_TOKENS = 24, 400
Array = npt.NDArray[np.floating[Any]]


def stream(seed: int = 0, n: int = N_TOKENS, rank: int | None = None, noise: float = 1.0) -> tuple[Array, Array]:
    """u with correlated values and a mean, and v = u + M u + c + noise, M of ``rank``; float32 [n, N_EMBD]."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(n, N_EMBD)) @ rng.normal(size=(N_EMBD, N_EMBD)) + 3 * rng.normal(size=N_EMBD)
    inner = rank or N_EMBD
    matrix = rng.normal(size=(N_EMBD, inner)) @ rng.normal(size=(inner, N_EMBD)) / N_EMBD
    v = u + u @ matrix.T + rng.normal(size=N_EMBD) + noise * rng.normal(size=u.shape)
    return u.astype(np.float32), v.astype(np.float32)


def gather(asked: list[tuple[int, int]], ubatches: Iterable[Any], *, first: int = 1, **options: Any) -> LinearFit:
    """A fit of some sublayers that has seen these ubatches, whose tokens are none of them a request's first."""
    gathered = LinearFit(asked, **options)
    for pairs in ubatches:
        n = next(len(pair[0]) for row in pairs for pair in row if pair is not None)
        gathered.add(pairs, np.arange(first, first + n, dtype=np.int32))
        first += n
    return gathered


def fit(u: Array, v: Array, rank: int = N_EMBD, *, scale: float = 1.0, pieces: int = 1) -> tuple[Array, Array]:
    """The map of one sublayer."""
    parts = np.array_split(np.arange(len(u)), pieces)
    return gather([(0, 1)], ([[None, (u[part], v[part])]] for part in parts)).fit(rank, np.array([[np.nan, scale]]))[
        0, 1
    ]


def ridge(u: Array, v: Array, scale: float = 1.0) -> Array:
    """Ridge regression of v - scale u on u, without a constant, float64, by least squares on rows for the penalty."""
    u, d = u.astype(np.float64), v.astype(np.float64) - scale * u.astype(np.float64)
    penalty = np.sqrt(RIDGE * u.var(axis=0).mean() * len(u)) * np.eye(u.shape[1])
    rows = np.concatenate([u, penalty]), np.concatenate([d, np.zeros_like(penalty)])
    return np.asarray(np.linalg.lstsq(*rows, rcond=None)[0].T)


def assert_maps(u: Array, found: tuple[Array, Array], expected: Array, tolerance: float = 1e-3) -> None:
    """The map adds to inputs what is expected, up to a part of the largest value."""
    down, up = found
    np.testing.assert_allclose(u @ (up.astype(float) @ down).T, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("scale", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("n_tokens, pieces", [(400, 1), (24, 1), (5, 1), (2, 1), (400, 2), (400, 7), (400, 400)])
def test_at_full_rank_it_is_ridge_regression_of_what_is_left(n_tokens: int, pieces: int, scale: float) -> None:
    u, v = stream(n=n_tokens)
    for rank in (N_EMBD, N_EMBD + 1, 4096):
        down, up = fit(u, v, rank, scale=scale, pieces=pieces)
        assert down.shape == up.shape == (N_EMBD, N_EMBD)
        assert down.dtype == up.dtype == np.float32
        assert_maps(u, (down, up), u @ ridge(u, v, scale).T, 1e-3 if pieces == 1 else 2e-4)


def test_neither_a_large_mean_nor_a_value_that_never_varies_hides_the_variance() -> None:
    # As in real models: one value of the stream is 5,000 and moves by 1. Squares in float32 have 7 digits.
    u, v = stream(noise=0.1)
    offset = np.where(np.arange(N_EMBD) == 3, np.float32(5000), np.float32(0))
    assert_maps(u + offset, fit(u + offset, v + offset), (u + offset) @ ridge(u + offset, v + offset).T, 0.01)
    u, v = stream()
    u[:, 5] = 0
    assert_maps(u, fit(u, v), u @ ridge(u, v).T, 2e-4)


@pytest.mark.parametrize(("rank", "scale"), [(1, 1.0), (3, 1.0), (8, 1.0), (20, 1.0), (3, 0.3), (3, 2.5)])
def test_at_low_rank_it_loses_what_the_smallest_singular_values_carry(rank: int, scale: float) -> None:
    # Among maps of this rank none is nearer to the one of full rank on inputs of the ridge's moments: Eckart-Young.
    u, v = stream()
    down, up = fit(u, v, rank, scale=scale)
    matrix = ridge(u, v, scale)
    wide = u.astype(np.float64)
    values, axes = np.linalg.eigh(wide.T @ wide / len(u) + RIDGE * wide.var(axis=0).mean() * np.eye(N_EMBD))
    root = (axes * np.sqrt(values)) @ axes.T
    best = np.linalg.svd(matrix @ root, compute_uv=False)[rank:]
    assert np.linalg.matrix_rank(up.astype(float) @ down.astype(float), tol=1e-4) == rank
    lost = np.linalg.norm((matrix - up.astype(float) @ down.astype(float)) @ root)
    assert lost == pytest.approx(np.linalg.norm(best), rel=1e-3)


@pytest.mark.parametrize("scale", [None, 0.3, np.nan])
def test_the_map_of_a_layer_is_fitted_from_its_input_to_its_output_after_a_scale_of_1(scale: float | None) -> None:
    u, v = stream()
    between = stream(9)[0]
    gathered = gather([(1, WHOLE)], [[[None, None], [(u, between), (between, v)]]])
    found = gathered.fit(3, None if scale is None else np.full((2, 2), scale))[1, WHOLE]
    for actual, wanted in zip(found, fit(u, v, 3), strict=True):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("least", [-1e-9, -0.01, -0.5])
def test_where_moments_are_not_positive_definite_the_ridge_grows_until_they_are(least: float) -> None:
    root = linear._root(np.diag([1.0, least, 2.0]), 1e-3)
    added = root @ root.T - np.diag([1.0, least, 2.0])
    np.testing.assert_allclose(added, added[0, 0] * np.eye(3), atol=1e-12)
    assert max(1e-3, -least) <= added[0, 0] * (1 + 1e-9) and added[0, 0] <= max(1.001e-3, -10.001 * least)


def test_a_first_ubatch_unlike_all_others_gives_finite_maps() -> None:
    rng = np.random.default_rng(1)
    u = (rng.normal(size=(200, N_EMBD)) + 1).astype(np.float32)
    u[:, 0] *= 1e6
    u[1:, 0] += 1e9
    down, up = gather([(0, 0)], ([[(part, part + 1), None]] for part in (u[:1], u[1:]))).fit(4)[0, 0]
    assert np.isfinite(down).all() and np.isfinite(up).all()


def test_the_first_token_of_a_request_is_left_out() -> None:
    u, v = stream()
    expected = fit(u[1:], v[1:])
    u[0], v[0] = 1e4, -1e4
    found = gather([(0, 1)], [[[None, (u, v)]]], first=0).fit(N_EMBD)[0, 1]
    for actual, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


ALIKE = np.tile(stream()[0][:1], (30, 1))


@pytest.mark.parametrize("u", [ALIKE[:1], ALIKE, stream()[0] * np.float32(1e30)], ids=["one", "alike", "large"])
def test_where_inputs_do_not_vary_or_are_too_large_to_square_the_map_is_zero(u: Array) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        down, up = fit(u, u * stream(1, len(u))[0], 3)
    assert (down.shape, up.shape) == ((3, N_EMBD), (N_EMBD, 3))
    assert not down.any() and not up.any()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_ubatch_with_a_value_that_is_not_finite_is_left_out(value: float, which: int) -> None:
    good, bad = stream(), stream(1)
    bad[which][7, 3] = value
    found = gather([(0, 1)], ([[None, pair]] for pair in (bad, good, bad))).fit(4)[0, 1]
    for actual, expected in zip(found, fit(*good, 4), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_only_what_is_asked_for_and_seen_is_fitted_if_its_scale_is_known() -> None:
    seen: list[Any] = [[stream(0), None], [None, stream(1)], [stream(2), stream(3)]]
    asked = [(0, 0), (0, 1), (0, WHOLE), (1, WHOLE), (2, 0), (2, 1), (2, WHOLE)]
    found = gather(asked, [seen]).fit(3, np.array([[1.0, 1.0], [1.0, 1.0], [np.nan, 1.0]]))
    assert set(found) == {(0, 0), (2, 1), (2, WHOLE)}
    for layer, kind in ((0, 0), (2, 1)):
        np.testing.assert_array_equal(found[layer, kind][0], fit(*seen[layer][kind], 3)[0])


@pytest.mark.parametrize("most_bytes", [2_000, 6_000, 9_000, 4 * 2 * 2 * N_EMBD**2, 1 << 30])
def test_the_moments_of_all_sublayers_take_no_more_memory_than_they_may(most_bytes: int) -> None:
    gathered = gather([(0, 0), (0, 1)], [[[stream(0), stream(1)]]] * 2, most_bytes=most_bytes)
    parts = [part for sums in gathered._sums.values() for part in (sums.uu, sums.du, sums.basis)]
    held = sum(part.nbytes for part in parts if part is not None)
    assert 0.7 * min(most_bytes, 4 * 2 * 2 * N_EMBD**2) < held <= most_bytes
    assert np.isfinite(np.concatenate([part.ravel() for pair in gathered.fit(3).values() for part in pair])).all()


def sketched(u: Array, v: Array, n_sketch: int, rank: int, first: int) -> tuple[Array, Array]:
    """The map of a fit that has memory for so many directions of the inputs; ``first`` tokens come before the rest."""
    parts = ([[(u[part], v[part]), None]] for part in (slice(0, first), slice(first, len(u))))
    gathered = gather([(0, 0)], parts, most_bytes=4 * (n_sketch**2 + 2 * n_sketch * N_EMBD))
    (sums,) = gathered._sums.values()
    assert sums.basis is not None and sums.basis.shape == (N_EMBD, n_sketch)
    return gathered.fit(rank)[0, 0]


@pytest.mark.parametrize("rank", [2, 7])
def test_a_sketch_of_all_directions_that_inputs_lie_in_gives_the_same_map(rank: int) -> None:
    rng = np.random.default_rng(0)
    u = ((rng.normal(size=(N_TOKENS, 6)) + 1) @ rng.normal(size=(6, N_EMBD))).astype(np.float32)
    v = u + u @ rng.normal(size=(N_EMBD, N_EMBD)).astype(np.float32) + rng.normal(size=u.shape).astype(np.float32)
    down, up = fit(u, v, rank)
    expected = u @ down.T @ up.T
    assert_maps(u, sketched(u, v, 8, rank, first=20), expected)


def test_a_first_ubatch_of_few_tokens_leaves_the_sketch_its_width() -> None:
    u, v = stream(rank=1, noise=0.1)
    down, up = sketched(u, v, 16, 8, first=3)
    assert down.shape == (8, N_EMBD) and up.shape == (N_EMBD, 8)
    assert np.linalg.norm(u + u @ down.T @ up.T - v) < 0.7 * np.linalg.norm(u - v)


PARTS = {"down": np.ones((3, 3, 2, 5), np.float32), "up": np.ones((3, 3, 5, 2), np.float32)}


def test_the_maps_are_read_only_copies() -> None:
    given = PARTS["up"].copy()
    maps = LinearMaps(PARTS["down"], given)
    given[0] = 2
    assert (maps.up == 1).all() and not maps.up.flags.writeable and not maps.down.flags.writeable


@pytest.mark.parametrize(
    ("name", "array"),
    [
        *(("down", np.zeros(shape)) for shape in [(3, 3, 5), (3, 3, 0, 5), (3, 3, 3, 5), (2, 3, 2, 5), (3, 2, 2, 5)]),
        *(("up", np.zeros(shape)) for shape in [(), (3, 3, 2, 5), (3, 3, 4, 2), (3, 3, 5, 0), (3, 3, 5, 2, 1)]),
        ("down", np.where(np.arange(5) == 4, np.nan, PARTS["down"])),
        ("up", np.where(np.arange(2) == 1, np.inf, PARTS["up"])),
    ],
)
def test_maps_that_do_not_fit_each_other_or_are_not_finite_are_refused(name: str, array: Array) -> None:
    with pytest.raises(ProfileError, match="calibrate again"):
        LinearMaps(**{**PARTS, name: array})


def test_the_scale_is_the_square_root_of_the_median_ratio_and_one_within_two_percent() -> None:
    ratio = np.array([[1.21, 0.81], [1.04, 1.05], [0.97, np.nan]])
    np.testing.assert_allclose(map_scale(ratio), [[1.1, 0.9], [1, 1.05**0.5], [1, np.nan]], rtol=1e-12)
