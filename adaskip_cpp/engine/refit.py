"""Fits the maps of a plan's bulk again to the prompt that is being read, for ``llama.py``: see :class:`Refit`.

Maps explain much less of a prompt than of the text they were fitted on. A few of the prompt's own tokens, which run
whole, narrow this gap. docs/dev/method.md has the measurements.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from ..model.arrays import Vectors
from ..model.plan import Bulk
from ..model.skip_set import SkipSet
from .statistics import StatisticsBatch

# The map of the calibration counts as much as so many tokens. With 1,000 the divergence falls less, and with 100 copies
# lose more: docs/dev/method.md.
N_PRIOR = 300

# OpenBLAS keeps its threads busy for 0.1 s after a product. On 2 cores the next ubatch then takes a third longer, which
# is more than several threads save here.
_one_thread = partial(threadpool_limits, 1, "blas")


@dataclass
class Refit:
    """The second matrices of a set's maps, fitted to tokens that ran whole.

    A map is ``v := s u + up (down u)``. With z = down u and the rest r = v - s u, ridge regression of r on z gives
    ``up``. Its penalty is the distance from the calibration's ``up``, not from 0. ``down`` stays. On Qwen2.5-Coder and
    unseen text, the calibration's maps leave 63% of the variance. With 256 tokens, a fit of both matrices leaves 46%,
    and this one 48%.
    """

    skip: SkipSet
    head: int  # tokens of a text's beginning that are no part of the fit, as the plan's head
    tokens: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # the text up to the last one
    is_put: bool = False  # whether native code has these maps
    _sums: dict[tuple[int, int], tuple[Vectors, Vectors]] = field(default_factory=dict)  # z zᵀ, and error times z
    _n: int = 0

    @classmethod
    def after(cls, earlier: "Refit | None", bulk: Bulk) -> "Refit":
        """Return a fit of a bulk's maps to the tokens of an earlier one, to which more can be added."""
        of = bulk.skip, bulk.head
        return cls(*of) if earlier is None else cls(*of, _sums=dict(earlier._sums), _n=earlier._n)

    def add(self, batch: StatisticsBatch) -> None:
        """Add a ubatch, without the head, and the first token in any case. Norms are tens of times others' there."""
        later = np.flatnonzero(batch.positions >= max(self.head, 1))
        self._n += later.size
        for layer, kind in self._mapped():
            at, scale = (layer, kind), self.skip.scale[layer, kind]
            observed = batch.activations[layer] if batch.activations else (None, None)
            # If both sublayers of a layer are skipped, and only the FFN has a map, it stands for the whole layer.
            first, last = observed[0 if self._is_whole(layer) else kind], observed[kind]
            if first is None or last is None:
                continue
            u, v = first[0][later], last[1][later]
            down, up = self._map(at)
            with np.errstate(all="ignore"), _one_thread():
                z = u @ down.T
                error = v - np.float32(scale) * u - z @ up.T
                if self.skip.bias is not None:
                    error -= self.skip.bias[at]
                sums = z.T @ z, error.T @ z
            if all(np.isfinite(each).all() for each in sums):
                before = self._sums.get(at, (np.float32(0), np.float32(0)))
                self._sums[at] = sums[0] + before[0], sums[1] + before[1]

    def maps(self) -> Iterator[tuple[int, int, Vectors]]:
        """Yield layer, kind and the new ``up``, float32 ``[n_embd, rank]``, of each map."""
        for at in self._mapped():
            up = self._map(at)[1]
            if at in self._sums and self._n:
                squares, products = self._sums[at]
                ridge = N_PRIOR * np.trace(squares) / (self._n * len(squares))
                if ridge > 0:  # it is large, so float32 is exact to 1e-6, in three quarters of the time of float64
                    with _one_thread():
                        up = up + products @ np.linalg.inv(squares + ridge * np.eye(len(squares), dtype=np.float32))
            yield *at, np.ascontiguousarray(up, np.float32)

    def _mapped(self) -> Iterator[tuple[int, int]]:
        for layer, kind in np.argwhere(self.skip.skip).tolist():
            if self.skip.up is not None and self._map((layer, kind))[1].any():
                yield layer, kind

    def _is_whole(self, layer: int) -> bool:
        skip, scale, attention = self.skip.skip[layer], self.skip.scale[layer], (layer, 0)
        changes = self._map(attention)[1].any() or (self.skip.bias is not None and self.skip.bias[attention].any())
        return bool(skip.all() and scale[0] == 1 and not changes)

    def _map(self, at: tuple[int, int]) -> tuple[Vectors, Vectors]:
        assert self.skip.down is not None and self.skip.up is not None
        return self.skip.down[at], self.skip.up[at]
