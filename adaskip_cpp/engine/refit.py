"""Fits the maps of a plan's bulk again to the prompt that is being read, for ``llama.py``: see :class:`Refit`.

Maps explain much less of a prompt than of the text they were fitted on. A few of the prompt's own tokens, which run
whole, narrow this gap. docs/dev/method.md has the measurements.
"""

from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from ..model.arrays import Vectors
from ..model.plan import Bulk
from .native import NativeContext
from .statistics import StatisticsBatch

_Pairs: TypeAlias = dict[tuple[int, int], tuple[Vectors, Vectors]]  # by layer and kind

# The map of the calibration counts as much as so many tokens. With 1,000 the divergence falls less, and with 100 copies
# lose more: docs/dev/method.md.
N_PRIOR = 300

# OpenBLAS keeps its threads busy for 0.1 s after a product. On 2 cores the next ubatch then takes a third longer, which
# is more than several threads save here.
_one_thread = partial(threadpool_limits, 1, "blas")


class Refit:
    """The second matrices of a bulk's maps, fitted to tokens that ran whole, after those of an ``earlier`` fit.

    A map is ``v := s u + up (down u)``. With z = down u and the rest r = v - s u, ridge regression of r on z gives
    ``up``. Its penalty is the distance from the calibration's ``up``, not from 0. ``down`` stays. On Qwen2.5-Coder and
    unseen text, the calibration's maps leave 63% of the variance. With 256 tokens, a fit of both matrices leaves 46%,
    and this one 48%.
    """

    def __init__(self, bulk: Bulk, earlier: "Refit | None" = None) -> None:
        self.skip, self._head = bulk.skip, bulk.head
        self.tokens: npt.NDArray[np.int32] = np.empty(0, np.int32)  # the text up to the last one
        self.is_put = False  # whether native code has these maps
        self._sums: _Pairs = dict(earlier._sums) if earlier else {}  # z zᵀ, and error times z
        self._n: int = earlier._n if earlier else 0  # tokens in these sums
        self._maps: _Pairs = {}  # down and up
        if self.skip.down is not None and self.skip.up is not None:
            for layer, kind in np.argwhere(self.skip.skip).tolist():
                if self.skip.up[layer, kind].any():
                    self._maps[layer, kind] = self.skip.down[layer, kind], self.skip.up[layer, kind]

    def add(self, batch: StatisticsBatch) -> None:
        """Add a ubatch, without the head, and the first token in any case. Norms are tens of times others' there."""
        later = np.flatnonzero(batch.positions >= max(self._head, 1))
        self._n += later.size
        for (layer, kind), (down, up) in self._maps.items():
            at, scale = (layer, kind), self.skip.scale[layer, kind]
            observed = batch.activations[layer] if batch.activations else (None, None)
            # If both sublayers of a layer are skipped, and only the FFN has a map, it stands for the whole layer.
            first, last = observed[0 if self._is_whole(layer) else kind], observed[kind]
            if first is None or last is None:
                continue
            u, v = first[0][later], last[1][later]
            with np.errstate(all="ignore"), _one_thread():
                z = u @ down.T
                error = v - np.float32(scale) * u - z @ up.T
                if self.skip.bias is not None:
                    error -= self.skip.bias[at]
                sums = z.T @ z, error.T @ z
            if all(np.isfinite(each).all() for each in sums):
                before = self._sums.get(at, (np.float32(0), np.float32(0)))
                self._sums[at] = sums[0] + before[0], sums[1] + before[1]

    def put(self, native: NativeContext) -> None:
        """Give native code the new ``up``, float32 ``[n_embd, rank]``, of each map, unless it has them."""
        if self.is_put:
            return
        for at, (_, up) in self._maps.items():
            if at in self._sums and self._n:
                squares, products = self._sums[at]
                ridge = N_PRIOR * np.trace(squares) / (self._n * len(squares))
                if ridge > 0:  # it is large, so float32 is exact to 1e-6, in three quarters of the time of float64
                    with _one_thread():
                        up = up + products @ np.linalg.inv(squares + ridge * np.eye(len(squares), dtype=np.float32))
            native.refit(*at, np.ascontiguousarray(up, np.float32))
        self.is_put = True

    def _is_whole(self, layer: int) -> bool:
        skip, bias = self.skip.skip[layer], self.skip.bias
        changes = (layer, 0) in self._maps or (bias is not None and bias[layer, 0].any())
        return bool(skip.all() and self.skip.scale[layer, 0] == 1 and not changes)
