"""IO similarity and norm ratios of one request, from the per-token reductions that the native evaluator delivers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["RequestSimilarity", "RequestStatistics"]

_EPS = np.float32(1e-8)
"""Smallest product of norms that is divided by, as in ``torch.nn.functional.cosine_similarity``."""


@dataclass(frozen=True, eq=False)
class RequestSimilarity:
    """What one request says about each sublayer; float64 ``[n_layer, 2]``, NaN where a sublayer was not observed.

    Attributes:
        similarity: mean over the request's tokens of the cosine of a sublayer's input ``u`` and output ``v``.
        norm_ratio: ``||V||_F / ||U||_F`` over all tokens of the request.
        median_ratio: median over the tokens of ``|v| / |u|``.
        n_tokens: tokens seen.
    """

    similarity: npt.NDArray[np.float64]
    norm_ratio: npt.NDArray[np.float64]
    median_ratio: npt.NDArray[np.float64]
    n_tokens: int


class RequestStatistics:
    """Accumulates one request, fed in as many batches as the evaluator splits it into.

    Args:
        n_layer: number of layers of the model.
    """

    def __init__(self, n_layer: int) -> None:
        self._shape = (n_layer, 2)
        self._cosine_sum = np.zeros(self._shape)
        self._u_sq_sum = np.zeros(self._shape)
        self._v_sq_sum = np.zeros(self._shape)
        self._ratios: list[npt.NDArray[np.float32]] = []
        self.n_tokens = 0

    def add(self, dot: npt.NDArray[np.float32], u_sq: npt.NDArray[np.float32], v_sq: npt.NDArray[np.float32]) -> None:
        """Add a batch.

        Args:
            dot: float32 ``[n_layer, 2, n_tokens]``, the dot product of u and v per token; NaN where not observed.
            u_sq: the same shape, ``|u|^2``.
            v_sq: the same shape, ``|v|^2``.

        Raises:
            ValueError: the shapes differ from each other or from this model's.
        """
        if dot.shape[:2] != self._shape or dot.ndim != 3 or not dot.shape == u_sq.shape == v_sq.shape:
            raise ValueError(
                f"expected three arrays [{self._shape[0]}, 2, n_tokens], got {dot.shape}, {u_sq.shape}, {v_sq.shape}"
            )
        # Norms before their product: |u|^2 |v|^2 overflows float32 on massive activations.
        u, v = np.sqrt(u_sq, dtype=np.float32), np.sqrt(v_sq, dtype=np.float32)
        cosine = dot / np.maximum(u * v, _EPS)
        self._cosine_sum += cosine.sum(axis=2, dtype=np.float64)
        self._u_sq_sum += u_sq.sum(axis=2, dtype=np.float64)
        self._v_sq_sum += v_sq.sum(axis=2, dtype=np.float64)
        ratio = np.full(u.shape, np.nan, np.float32)
        np.divide(v, u, out=ratio, where=u > 0)
        self._ratios.append(ratio)
        self.n_tokens += dot.shape[2]

    def result(self) -> RequestSimilarity:
        """Return the request's figures so far.

        A sublayer whose input or output is zero throughout, or not finite anywhere, has no norm ratio to compensate
        with and counts as not observed.
        """
        if self.n_tokens == 0:
            unknown = np.full(self._shape, np.nan)
            return RequestSimilarity(unknown, unknown.copy(), unknown.copy(), 0)
        similarity = self._cosine_sum / self.n_tokens
        observed = (self._u_sq_sum > 0) & (self._v_sq_sum > 0) & np.isfinite(similarity)
        observed &= np.isfinite(self._u_sq_sum) & np.isfinite(self._v_sq_sum)
        norm_ratio = np.full(self._shape, np.nan)
        np.divide(self._v_sq_sum, self._u_sq_sum, out=norm_ratio, where=observed)
        np.sqrt(norm_ratio, out=norm_ratio)
        median_ratio = np.full(self._shape, np.nan)
        ratios = np.concatenate(self._ratios, axis=2)
        median_ratio[observed] = np.nanmedian(ratios[observed], axis=1)
        return RequestSimilarity(np.where(observed, similarity, np.nan), norm_ratio, median_ratio, self.n_tokens)
