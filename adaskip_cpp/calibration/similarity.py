"""IO similarity, norm ratios and mean vectors of one request, from what the native evaluator delivers per ubatch."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..model.statistics import PhaseStatistics

__all__ = ["Reductions", "RequestStatistics"]

_EPS = np.float32(1e-8)
"""Smallest product of norms that is divided by, as in ``torch.nn.functional.cosine_similarity``."""


class Reductions(Protocol):
    """The part of a :class:`adaskip_cpp.engine.native.StatisticsBatch` that is read here; NaN where not observed.

    Attributes:
        dot, u_sq, v_sq: float32 ``[n_layer, 2, n_tokens]``: u·v, |u|², |v|².
        layer_dot: float32 ``[n_layer, n_tokens]``: a whole layer's input times its output.
        sum_u, sum_v: float32 ``[n_layer, 2, n_embd]``: sums over the tokens, or None.
    """

    @property
    def dot(self) -> npt.NDArray[np.float32]: ...
    @property
    def u_sq(self) -> npt.NDArray[np.float32]: ...
    @property
    def v_sq(self) -> npt.NDArray[np.float32]: ...
    @property
    def layer_dot(self) -> npt.NDArray[np.float32]: ...
    @property
    def sum_u(self) -> npt.NDArray[np.float32] | None: ...
    @property
    def sum_v(self) -> npt.NDArray[np.float32] | None: ...


class RequestStatistics:
    """Accumulates one phase of one request, fed in as many batches as the evaluator splits it into.

    Args:
        n_layer: number of layers of the model.
    """

    def __init__(self, n_layer: int) -> None:
        self._shape = (n_layer, 2)
        self._cosine_sum = np.zeros(self._shape)
        self._layer_cosine_sum = np.zeros(n_layer)
        self._u_sq_sum = np.zeros(self._shape)
        self._v_sq_sum = np.zeros(self._shape)
        self._ratios: list[npt.NDArray[np.float32]] = []
        self._vector_sums: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None
        self._has_vectors = True
        self.n_tokens = 0

    def add(self, batch: Reductions) -> None:
        """Add a batch.

        Raises:
            ValueError: the shapes differ from each other or from this model's.
        """
        dot, u_sq, v_sq = batch.dot, batch.u_sq, batch.v_sq
        if dot.shape[:2] != self._shape or dot.ndim != 3 or not dot.shape == u_sq.shape == v_sq.shape:
            raise ValueError(
                f"expected three arrays [{self._shape[0]}, 2, n_tokens], got {dot.shape}, {u_sq.shape}, {v_sq.shape}"
            )
        n_tokens = dot.shape[2]
        if batch.layer_dot.shape != (self._shape[0], n_tokens):
            raise ValueError(f"expected layer_dot [{self._shape[0]}, {n_tokens}], got {batch.layer_dot.shape}")
        # Norms before their product: |u|^2 |v|^2 overflows float32 on massive activations.
        u, v = np.sqrt(u_sq, dtype=np.float32), np.sqrt(v_sq, dtype=np.float32)
        self._cosine_sum += (dot / np.maximum(u * v, _EPS)).sum(axis=2, dtype=np.float64)
        # A layer's input is its attention's, its output its FFN's.
        layer_cosine = batch.layer_dot / np.maximum(u[:, 0] * v[:, 1], _EPS)
        self._layer_cosine_sum += layer_cosine.sum(axis=1, dtype=np.float64)
        self._u_sq_sum += u_sq.sum(axis=2, dtype=np.float64)
        self._v_sq_sum += v_sq.sum(axis=2, dtype=np.float64)
        ratio = np.full(u.shape, np.nan, np.float32)
        np.divide(v, u, out=ratio, where=u > 0)
        self._ratios.append(ratio)
        self._add_vectors(batch.sum_u, batch.sum_v)
        self.n_tokens += n_tokens

    def _add_vectors(self, sum_u: npt.NDArray[np.float32] | None, sum_v: npt.NDArray[np.float32] | None) -> None:
        if sum_u is None or sum_v is None:
            self._has_vectors = False
            return
        if sum_u.ndim != 3 or sum_u.shape[:2] != self._shape or sum_v.shape != sum_u.shape:
            raise ValueError(f"expected vectors [{self._shape[0]}, 2, n_embd], got {sum_u.shape}, {sum_v.shape}")
        if self._vector_sums is None:
            self._vector_sums = np.zeros(sum_u.shape), np.zeros(sum_u.shape)
        self._vector_sums[0][...] += sum_u
        self._vector_sums[1][...] += sum_v

    def result(self) -> PhaseStatistics:
        """Return the request's figures so far.

        A sublayer whose input or output is zero throughout, or not finite anywhere, has no norm ratio to compensate
        with and counts as not observed. There are mean vectors if every batch had sums.
        """
        if self.n_tokens == 0:
            unknown = np.full(self._shape, np.nan)
            return PhaseStatistics(unknown, unknown, unknown, unknown[:, 0])
        similarity = self._cosine_sum / self.n_tokens
        observed = (self._u_sq_sum > 0) & (self._v_sq_sum > 0) & np.isfinite(similarity)
        observed &= np.isfinite(self._u_sq_sum) & np.isfinite(self._v_sq_sum)
        norm_ratio = np.full(self._shape, np.nan)
        np.divide(self._v_sq_sum, self._u_sq_sum, out=norm_ratio, where=observed)
        np.sqrt(norm_ratio, out=norm_ratio)
        median_ratio = np.full(self._shape, np.nan)
        ratios = np.concatenate(self._ratios, axis=2)
        median_ratio[observed] = np.nanmedian(ratios[observed], axis=1)
        layer_similarity = self._layer_cosine_sum / self.n_tokens
        layer_similarity[~np.isfinite(layer_similarity)] = np.nan
        vectors: list[npt.NDArray[np.float32] | None] = [None, None]
        if self._has_vectors and self._vector_sums is not None:
            vectors = [(total / self.n_tokens).astype(np.float32) for total in self._vector_sums]
        return PhaseStatistics(
            np.where(observed, similarity, np.nan),
            norm_ratio,
            median_ratio,
            layer_similarity,
            vectors[0],
            vectors[1],
            self.n_tokens,
        )
