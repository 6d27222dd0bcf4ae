"""Linear maps that stand in for sublayers: ``v := u + up (down u) + b``, of low rank, fitted on calibration tokens.

Much of what a sublayer adds to the stream is a linear function of its input: on SmolLM2-135M a map of rank 32 explains
about half of the variance of what attentions add. It costs ``2 * rank * n_embd`` multiplications per token, a few
hundredths of what the sublayer itself costs.

The fit is reduced-rank ridge regression of ``v - u`` on ``u`` (Izenman 1975), in closed form from the moments of both.
The first token of a request is left out: in many models its norm is tens of times that of the others, and would decide
the fit alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .errors import ProfileFormatError

__all__ = ["DEFAULT_RANK", "LinearFit", "LinearMaps", "moments_bytes"]

DEFAULT_RANK = 32

RIDGE = 1e-3
"""Added to the input's covariance, as a share of its mean variance: it keeps directions that few tokens show out."""

Moments = npt.NDArray[np.float32]
_OVERSAMPLING, _ITERATIONS = 8, 3  # of the randomised range finder (Halko, Martinsson and Tropp 2011)


@dataclass(frozen=True, eq=False)
class LinearMaps:
    """One map per sublayer: ``v := u + up (down u) + bias``. Arrays are read-only, and NaN where nothing was fitted.

    Attributes:
        down: float32 ``[n_layer, 2, rank, n_embd]``.
        up: float32 ``[n_layer, 2, n_embd, rank]``.
        bias: float32 ``[n_layer, 2, n_embd]``.

    Raises:
        ProfileFormatError: the shapes do not fit each other.
    """

    down: npt.NDArray[np.float32]
    up: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        shape = np.shape(self.bias)
        rank = np.shape(self.down)[2] if np.ndim(self.down) == 4 else 0
        if len(shape) != 3 or shape[1] != 2 or rank < 1:
            raise ProfileFormatError("the linear maps have an impossible shape; calibrate again")
        if np.shape(self.down) != (*shape[:2], rank, shape[2]) or np.shape(self.up) != (*shape, rank):
            raise ProfileFormatError("the linear maps' shapes do not fit each other; calibrate again")
        fitted = ~np.isnan(self.bias).any(axis=2)
        for name in ("down", "up", "bias"):
            array = np.array(getattr(self, name), np.float32)
            if not np.isfinite(array[fitted]).all():
                raise ProfileFormatError("the linear maps have values that calibration cannot give; calibrate again")
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LinearMaps):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, name), getattr(other, name), equal_nan=True) for name in ("down", "up", "bias")
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def n_layer(self) -> int:
        """Number of layers of the model."""
        return int(self.bias.shape[0])

    @property
    def n_embd(self) -> int:
        """Length of the stream's vectors."""
        return int(self.bias.shape[2])

    @property
    def rank(self) -> int:
        """Rank of every map."""
        return int(self.down.shape[2])

    @property
    def fitted(self) -> npt.NDArray[np.bool_]:
        """bool ``[n_layer, 2]``: the sublayers that have a map."""
        return np.asarray(~np.isnan(self.bias).any(axis=2))


def moments_bytes(n_embd: int) -> int:
    """Bytes that :class:`LinearFit` holds per sublayer."""
    return 2 * n_embd * n_embd * 4


@dataclass
class _Sums:
    """Sums over tokens: of u, of d = v - u, of u uᵀ and of d uᵀ."""

    n: int = 0
    u: npt.NDArray[np.float64] | float = 0.0
    d: npt.NDArray[np.float64] | float = 0.0
    uu: Moments | None = None
    du: Moments | None = None


@dataclass
class LinearFit:
    """Gathers the moments of some sublayers' inputs and outputs, and fits their maps.

    Attributes:
        sublayers: those to fit, as (layer, kind).
    """

    sublayers: Sequence[tuple[int, int]]
    _sums: dict[tuple[int, int], _Sums] = field(default_factory=dict)

    def add(
        self,
        activations: Sequence[Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None]],
        positions: npt.NDArray[np.int32],
    ) -> None:
        """Add the tokens of one ubatch, without the first of a request.

        Args:
            activations: ``[n_layer][2]``: u and v, float32 ``[n_tokens, n_embd]``, or None.
            positions: int32 ``[n_tokens]``.
        """
        later = np.flatnonzero(positions > 0)
        for layer, kind in self.sublayers:
            pair = activations[layer][kind]
            if pair is None or later.size == 0:
                continue
            u, d = pair[0][later], (pair[1] - pair[0])[later]
            if not (np.isfinite(u).all() and np.isfinite(d).all()):
                continue
            sums = self._sums.setdefault((layer, kind), _Sums())
            sums.n += len(u)
            sums.u = sums.u + u.sum(axis=0, dtype=np.float64)
            sums.d = sums.d + d.sum(axis=0, dtype=np.float64)
            uu, du = u.T @ u, d.T @ u
            if sums.uu is None or sums.du is None:
                sums.uu, sums.du = uu, du
            else:
                sums.uu += uu
                sums.du += du

    def fit(self, rank: int) -> dict[tuple[int, int], tuple[Moments, Moments, Moments]]:
        """Return down ``[rank, n_embd]``, up ``[n_embd, rank]`` and bias ``[n_embd]`` of each sublayer with tokens.

        A rank beyond ``n_embd`` counts as ``n_embd``.
        """
        return {where: _fit(sums, rank) for where, sums in self._sums.items()}

    def clear(self) -> None:
        """Give the memory of the moments back."""
        self._sums.clear()


def _fit(sums: _Sums, rank: int) -> tuple[Moments, Moments, Moments]:
    assert sums.uu is not None and sums.du is not None
    mean_u, mean_d = np.asarray(sums.u) / sums.n, np.asarray(sums.d) / sums.n
    covariance = sums.uu.astype(np.float64) / sums.n - np.outer(mean_u, mean_u)
    cross = sums.du.astype(np.float64) / sums.n - np.outer(mean_d, mean_u)
    n_embd = len(mean_u)
    variance = float(np.trace(covariance)) / n_embd
    if not variance > 0:  # one token, or all alike: there is nothing to regress on
        empty = np.zeros((min(rank, n_embd), n_embd), np.float32)
        return empty, empty.T.copy(), mean_d.astype(np.float32)
    root = np.linalg.cholesky(covariance + RIDGE * variance * np.eye(n_embd))
    # The best map of full rank is cross covariance⁻¹ = whitened root⁻¹; its error is that of `whitened` in the norm
    # of whitened inputs, so the best of lower rank keeps the largest singular values of `whitened`.
    whitened = np.linalg.solve(root, cross.T).T
    left, singular, right = _truncated_svd(whitened, min(rank, n_embd))
    up = left * singular
    down = np.linalg.solve(root.T, right.T).T
    bias = mean_d - up @ (down @ mean_u)
    return down.astype(np.float32), up.astype(np.float32), bias.astype(np.float32)


def _truncated_svd(
    matrix: npt.NDArray[np.float64], rank: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The ``rank`` largest singular values and their vectors; randomised, as all of them would take minutes."""
    n_columns = min(rank + _OVERSAMPLING, matrix.shape[1])
    basis = matrix @ np.random.default_rng(0).standard_normal((matrix.shape[1], n_columns))
    for _ in range(_ITERATIONS):
        basis, _ = np.linalg.qr(matrix.T @ np.linalg.qr(basis)[0])
        basis = matrix @ basis
    basis, _ = np.linalg.qr(basis)
    left, singular, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], singular[:rank], right[:rank]
