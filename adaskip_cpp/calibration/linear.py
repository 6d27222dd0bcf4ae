"""Fits low-rank maps ``v := s u + up (down u)`` on calibration tokens, for ``calibrate``: start with ``LinearFit``.

Reduced-rank ridge regression on ``u`` (Izenman 1975) fits the rest, ``v - s u``, in closed form from second moments.
docs/dev/method.md explains why they are not centred. A map of a whole layer has s = 1. The first token of a request is
left out. In many models its norm is tens of times that of the others, so it alone would decide the fit.

Moments of a wide model can exceed the memory bound. Then inputs are projected on the directions of the first tokens,
and on random directions if these are too few. So one pass over the requests is enough for any model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..engine.statistics import Activations
from ..model.arrays import Floats, Vectors
from ..model.statistics import WHOLE

# On Python sources, SmolLM2 with 6 of 60 sublayers skipped loses 0.242, 0.219 and 0.215 with ranks 32, 64 and 128. With
# 12 skipped it loses 0.612, 0.570 and 0.546. Ranks 32 and 64 were equally fast there and on Gemma 3 270M.
DEFAULT_RANK = 64
RIDGE = 0.1  # added to the input's second moments, times its mean variance: measured in docs/dev/method.md
_OVERSAMPLING, _ITERATIONS = 8, 3  # of the randomised range finder (Halko, Martinsson and Tropp 2011)


class _Sums:
    """Sums over tokens of u, d = v - u, u uᵀ and d uᵀ, after subtracting ``mean``, which is that of the first ubatch.

    In many models some values of the stream are much larger than their variation, which float32 squares would lose.
    If ``n_sketch`` is below the width of the stream, ``basisᵀ u`` replaces u, with ``basis`` ``[n_embd, n_sketch]``.
    """

    def __init__(self, u: Vectors, v: Vectors, n_sketch: int) -> None:
        self.n, n_embd = 0, u.shape[1]
        self.basis: Vectors | None = None
        if n_sketch < n_embd:
            drawn = np.random.default_rng(0).standard_normal((n_sketch, n_embd))
            first = np.concatenate([u, drawn])[:n_sketch].astype(np.float64)
            self.basis = np.linalg.qr(first.T)[0].astype(np.float32)
        self.mean = [first.mean(axis=0, dtype=np.float64).astype(np.float32) for first in (u, v - u)]
        n_u = n_embd if self.basis is None else self.basis.shape[1]
        self.u, self.d = np.zeros(n_u), np.zeros(n_embd)
        self.uu, self.du = np.zeros((n_u, n_u), np.float32), np.zeros((n_embd, n_u), np.float32)

    def add(self, u: Vectors, v: Vectors) -> None:
        u, d = u - self.mean[0], v - u - self.mean[1]
        u = u if self.basis is None else u @ self.basis
        self.n += len(u)
        self.u += u.sum(axis=0, dtype=np.float64)
        self.d += d.sum(axis=0, dtype=np.float64)
        self.uu += u.T @ u
        self.du += d.T @ u


@dataclass
class LinearFit:
    """Gathers the moments of sublayers and whole layers, and fits their maps."""

    sublayers: Sequence[tuple[int, int]]  # (layer, kind); the kind of a whole layer is WHOLE
    most_bytes: int = 2 << 30  # of all moments together
    _sums: dict[tuple[int, int], _Sums] = field(default_factory=dict)

    def add(self, activations: Activations, positions: npt.NDArray[np.int32]) -> None:
        """Add a ubatch without a request's first token; leave out sublayers unobserved or not finite in it."""
        later = np.flatnonzero(positions > 0)
        for layer, kind in self.sublayers:
            first, last = activations[layer][0 if kind == WHOLE else kind], activations[layer][min(kind, 1)]
            if first is None or last is None or later.size == 0:
                continue
            u, v = first[0][later], last[1][later]
            if np.isfinite(u).all() and np.isfinite(v).all():
                if (layer, kind) not in self._sums:
                    self._sums[layer, kind] = _Sums(u, v, self._n_sketch(u.shape[1]))
                self._sums[layer, kind].add(u, v)

    def _n_sketch(self, n_embd: int) -> int:
        """Return the number of directions of the inputs that fit into memory."""
        n_numbers = self.most_bytes // (4 * max(len(self.sublayers), 1))
        n = int((np.sqrt(4.0 * n_embd * n_embd + 4 * n_numbers) - 2 * n_embd) / 2)  # n² + 2 n n_embd, the basis too
        return n_embd if 2 * n_embd * n_embd <= n_numbers else max(n, 1)

    def fit(self, rank: int, scale: Floats | None = None) -> dict[tuple[int, int], tuple[Vectors, Vectors]]:
        """Return down ``[rank, n_embd]`` and up ``[n_embd, rank]``, float32, of each sublayer with tokens and a scale.

        The rank is at most ``n_embd``. ``scale`` is s, ``[n_layer, 2]``, NaN if not known; None for 1.
        """
        scales = {at: 1.0 if scale is None or at[1] == WHOLE else float(scale[at]) for at in self._sums}
        return {at: _fit(sums, rank, scales[at]) for at, sums in self._sums.items() if np.isfinite(scales[at])}


def _fit(sums: _Sums, rank: int, scale: float) -> tuple[Vectors, Vectors]:
    rest_u, rest_d = sums.u / sums.n, sums.d / sums.n
    first = sums.mean[0] if sums.basis is None else sums.mean[0] @ sums.basis
    mean_u, mean_d = first + rest_u, sums.mean[1] + rest_d
    n_embd, rank = len(mean_d), min(rank, len(mean_u))
    second = sums.uu.astype(np.float64) / sums.n - np.outer(rest_u, rest_u)  # the covariance so far
    variance = float(np.trace(second)) / n_embd
    second += np.outer(mean_u, mean_u)
    cross = sums.du.astype(np.float64) / sums.n - np.outer(rest_d, rest_u) + np.outer(mean_d, mean_u)
    # From d = v - u to the rest v - s u = d - (s - 1) u.
    cross -= (scale - 1) * (second if sums.basis is None else sums.basis @ second)
    if not (0 < variance < np.inf and np.isfinite(cross).all()):  # one token, or all equal: nothing to fit
        return np.zeros((rank, n_embd), np.float32), np.zeros((n_embd, rank), np.float32)
    root = _root(second, RIDGE * variance)
    # The best map of full rank is cross second⁻¹ = whitened root⁻¹. In whitened inputs its error is that of `whitened`,
    # so the best map of lower rank keeps the largest singular values of `whitened`.
    whitened = np.linalg.solve(root, cross.T).T
    left, singular, right = _truncated_svd(whitened, rank)
    down = np.linalg.solve(root.T, right.T).T
    down = down if sums.basis is None else down @ sums.basis.T
    return down.astype(np.float32), (left * singular).astype(np.float32)


def _root(second: Floats, ridge: float) -> Floats:
    """Return L of ``second + ridge I = L Lᵀ``."""
    while True:
        try:
            return np.asarray(np.linalg.cholesky(second + ridge * np.eye(len(second))), np.float64)
        except np.linalg.LinAlgError:
            ridge *= 10  # rounding of float32 sums may exceed the ridge


def _truncated_svd(matrix: Floats, rank: int) -> tuple[Floats, Floats, Floats]:
    """Return the ``rank`` largest singular values and their vectors; randomised, because all would take minutes."""
    n_columns = min(rank + _OVERSAMPLING, matrix.shape[1])
    basis = matrix @ np.random.default_rng(0).standard_normal((matrix.shape[1], n_columns))
    for _ in range(_ITERATIONS):
        basis = matrix @ np.linalg.qr(matrix.T @ np.linalg.qr(basis)[0])[0]
    basis = np.linalg.qr(basis)[0]
    left, singular, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], singular[:rank], right[:rank]
