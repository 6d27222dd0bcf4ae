"""Computes a request's IO similarity, norm ratios and mean vectors, for ``calibrate``: ``RequestStatistics``."""

import numpy as np

from ..engine.statistics import StatisticsBatch
from ..model.arrays import Floats, Vectors
from ..model.statistics import PhaseStatistics

_EPS = np.float32(1e-8)  # the smallest divisor, as in ``torch.nn.functional.cosine_similarity``


class RequestStatistics:
    """Accumulates the statistics of one phase of one request, ubatch by ubatch."""

    def __init__(self, n_layer: int) -> None:
        self._shape = (n_layer, 2)
        self._cosine, self._u_sq, self._v_sq = np.zeros((3, *self._shape))
        self._layer_cosine = np.zeros(n_layer)
        self._ratios: list[Vectors] = []
        self._vectors: Floats = np.zeros(())  # u and v, [2, n_layer, 2, n_embd]
        self.n_tokens = 0

    def add(self, batch: StatisticsBatch) -> None:
        u_sq, v_sq = batch.u_sq, batch.v_sq
        self._vectors = self._vectors + np.stack([batch.sum_u, batch.sum_v])
        # Norms before their product: |u|^2 |v|^2 overflows float32 on massive activations.
        u, v = np.sqrt(u_sq, dtype=np.float32), np.sqrt(v_sq, dtype=np.float32)
        self._cosine += (batch.dot / np.maximum(u * v, _EPS)).sum(axis=2, dtype=np.float64)
        # A layer's input is its attention's, its output its FFN's.
        self._layer_cosine += (batch.layer_dot / np.maximum(u[:, 0] * v[:, 1], _EPS)).sum(axis=1, dtype=np.float64)
        self._u_sq += u_sq.sum(axis=2, dtype=np.float64)
        self._v_sq += v_sq.sum(axis=2, dtype=np.float64)
        self._ratios.append(np.divide(v, u, out=np.full(u.shape, np.nan, np.float32), where=u > 0))
        self.n_tokens += u_sq.shape[2]

    def result(self) -> PhaseStatistics:
        """Return the statistics so far, NaN for sublayers whose input or output is all 0 or not finite anywhere."""
        similarity = self._cosine / self.n_tokens
        observed = (self._u_sq > 0) & (self._v_sq > 0) & np.isfinite(similarity)
        observed &= np.isfinite(self._u_sq) & np.isfinite(self._v_sq)
        norm_ratio, median_ratio = np.full((2, *self._shape), np.nan)
        norm_ratio[observed] = np.sqrt(self._v_sq[observed] / self._u_sq[observed])
        median_ratio[observed] = np.nanmedian(np.concatenate(self._ratios, axis=2)[observed], axis=1)
        layer_similarity = self._layer_cosine / self.n_tokens
        layer_similarity[~np.isfinite(layer_similarity)] = np.nan
        similarity[~observed] = np.nan
        mean_u, mean_v = (self._vectors / self.n_tokens).astype(np.float32)
        return PhaseStatistics(similarity, norm_ratio, median_ratio, layer_similarity, mean_u, mean_v, self.n_tokens)
