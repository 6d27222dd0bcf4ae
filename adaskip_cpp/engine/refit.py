"""Fits the maps of a plan's bulk again to the prompt that is being read, for ``llama.py``: see :class:`Refit`.

Maps explain much less of a prompt than of the text they were fitted on. A few of the prompt's own tokens, which run
whole, narrow this gap. docs/dev/method.md has the measurements.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from ..model.arrays import Vectors
from ..model.plan import Bulk
from .native import NativeContext
from .statistics import StatisticsBatch

_At: TypeAlias = tuple[int, int]  # layer and kind
_Pair: TypeAlias = tuple[Vectors, Vectors]
_Pairs: TypeAlias = dict[_At, _Pair]

# The map of the calibration counts as much as so many tokens. With 1,000 the divergence falls less, and with 100 copies
# lose more: docs/dev/method.md.
N_PRIOR = 300


def _of_each(maps: Iterable[_At], compute: Callable[[_At], _Pair | None], n_threads: int) -> _Pairs:
    """Compute a pair for each map, each in one thread.

    OpenBLAS has no threads of its own meanwhile. It keeps them busy for 0.1 s after a product, and on 2 cores the next
    ubatch then takes a third longer.
    """
    maps = [*maps]
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(n_threads) as pool:
        return {at: pair for at, pair in zip(maps, pool.map(compute, maps), strict=True) if pair is not None}


class Refit:
    """The second matrices of a bulk's maps, fitted to tokens that ran whole, after those of an ``earlier`` fit.

    A map is ``v := s u + up (down u)``. With z = down u and the rest r = v - s u, ridge regression of r on z gives
    ``up``. Its penalty is the distance from the calibration's ``up``, not from 0. ``down`` stays. On Qwen2.5-Coder and
    unseen text, the calibration's maps leave 63% of the variance. With 256 tokens, a fit of both matrices leaves 46%,
    and this one 48%. ``n_threads``, 1 or more, fit maps side by side.
    """

    def __init__(self, bulk: Bulk, earlier: "Refit | None", n_threads: int) -> None:
        self.skip, self._head, self._n_threads = bulk.skip, bulk.head, n_threads
        self.tokens: npt.NDArray[np.int32] = np.empty(0, np.int32)  # the text up to the last one
        self.is_put = False  # whether native code has these maps
        self._sums: _Pairs = dict(earlier._sums) if earlier else {}  # z zᵀ, and r zᵀ
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

        def sums(at: _At) -> _Pair | None:
            layer, kind = at
            observed = batch.activations[layer] if batch.activations else (None, None)
            # If both sublayers of a layer are skipped, and only the FFN has a map, it stands for the whole layer.
            first, last = observed[0 if self._is_whole(layer) else kind], observed[kind]
            if first is None or last is None:
                return None
            u, v = first[0][later], last[1][later]
            with np.errstate(all="ignore"):
                z, rest = u @ self._maps[at][0].T, v - np.float32(self.skip.scale[at]) * u
                if self.skip.bias is not None:
                    rest -= self.skip.bias[at]
                found = z.T @ z, rest.T @ z
            if not all(np.isfinite(each).all() for each in found):
                return None
            before = self._sums.get(at, (np.float32(0), np.float32(0)))
            return found[0] + before[0], found[1] + before[1]

        self._sums |= _of_each(self._maps, sums, self._n_threads)

    def put(self, native: NativeContext) -> None:
        """Give native code the new ``up``, float32 ``[n_embd, rank]``, of each map, unless it has them."""
        if self.is_put:
            return

        def fitted(at: _At) -> _Pair:
            (down, up), (squares, products) = self._maps[at], self._sums[at]
            ridge = N_PRIOR * np.trace(squares) / (self._n * len(squares))
            if ridge > 0:  # it is large, so float32 is exact to 1e-6, in three quarters of the time of float64
                inverse = np.linalg.inv(squares + ridge * np.eye(len(squares), dtype=np.float32))
                up = (products + ridge * up) @ inverse
            return down, up

        known = self._sums.keys() if self._n else ()
        for at, (_, up) in (self._maps | _of_each(known, fitted, self._n_threads)).items():
            native.refit(*at, np.ascontiguousarray(up, np.float32))
        self.is_put = True

    def _is_whole(self, layer: int) -> bool:
        skip, bias = self.skip.skip[layer], self.skip.bias
        changes = (layer, 0) in self._maps or (bias is not None and bias[layer, 0].any())
        return bool(skip.all() and self.skip.scale[layer, 0] == 1 and not changes)
