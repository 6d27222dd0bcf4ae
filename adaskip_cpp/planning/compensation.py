"""Ways to compensate a skipped sublayer: what stands in for it, in every phase.

=========  ==============================================  ======================================
name       v :=                                            FFNs added online
=========  ==============================================  ======================================
none       ``u``                                           ``u``
paper      ``s * u``, s the norm ratio                     the same, s being the window's own
           ``||V||_F / ||U||_F``
median     ``s * u``, s the median per token of            the same, s being the window's own
           ``|v| / |u|``
affine     ``s * u + b``, s as in ``median``, b the mean   as ``median``
           of ``v - s * u``
linear     ``s * u + up (down u)``, s near the square      as ``median``
           root of that in ``median``, see
           :mod:`adaskip_cpp.calibration.linear`
=========  ==============================================  ======================================

The paper's ratio is dominated by tokens of huge norm, as the first one of many models, and scales all others by it.
``affine`` also replaces the mean of what the sublayer would have added, ``linear`` what a linear map of low rank can
tell of it. A profile that was calibrated with rank 0 has no maps; there ``linear`` is ``affine``. The online stage
learns no vectors, so that an FFN it adds gets a scale alone. ``benchmarks/compensation.py`` compares all of them on
held-out text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import CompensationError
from ..model.maps import LinearMaps, map_scale
from ..model.plan import OnlineScale
from ..model.skip_set import SkipSet
from ..model.statistics import PhaseStatistics

__all__ = ["COMPENSATIONS", "DEFAULT_COMPENSATION", "Compensation", "get_compensation"]


@dataclass(frozen=True)
class Compensation:
    """One way to compensate.

    Attributes:
        name: its name in the API and on the command line.
        scale: from a phase's statistics to ``s``, float64 ``[n_layer, 2]``.
        bias: from the statistics and ``s`` to ``b``, float32 ``[n_layer, 2, n_embd]``; None for no bias. Maps, where
            they are used, come without.
        online: what the online stage uses for the FFNs that it adds.
        uses_maps: whether linear maps with their own ``s`` stand in where there are maps, and not ``s`` and ``b``.
    """

    name: str
    scale: Callable[[PhaseStatistics], npt.NDArray[np.float64]]
    bias: Callable[[PhaseStatistics, npt.NDArray[np.float64]], npt.NDArray[np.float32]] | None
    online: OnlineScale
    uses_maps: bool = False

    def skip_set(
        self, skip: npt.NDArray[np.bool_], statistics: PhaseStatistics, maps: LinearMaps | None = None
    ) -> SkipSet:
        """Return the set that skips ``skip``, bool ``[n_layer, 2]``, compensated from the statistics of one phase.

        Args:
            skip: the sublayers to skip.
            statistics: of the phase; with maps of the one that they were fitted in.
            maps: linear maps, for a compensation that uses them.

        Raises:
            CompensationError: the statistics or maps lack what this compensation needs, for a sublayer that is skipped.
        """
        if self.uses_maps and maps is not None and skip.any():
            return SkipSet(skip, map_scale(statistics.median_ratio), None, maps.down, maps.up)
        scale = self.scale(statistics)
        bias = self.bias(statistics, scale) if self.bias is not None and skip.any() else None
        return SkipSet(skip, scale, bias)


def _mean_error(statistics: PhaseStatistics, scale: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return the mean over tokens of ``v - s * u``."""
    if statistics.mean_u is None or statistics.mean_v is None:
        raise CompensationError(
            'compensation "affine" needs the vectors of a profile, which this one lacks; calibrate again, '
            'or use compensation="median"'
        )
    return (statistics.mean_v - scale[:, :, None] * statistics.mean_u.astype(np.float64)).astype(np.float32)


COMPENSATIONS: dict[str, Compensation] = {
    each.name: each
    for each in (
        Compensation("none", lambda statistics: np.ones_like(statistics.norm_ratio), None, "none"),
        Compensation("paper", lambda statistics: statistics.norm_ratio, None, "paper"),
        Compensation("median", lambda statistics: statistics.median_ratio, None, "median"),
        Compensation("affine", lambda statistics: statistics.median_ratio, _mean_error, "median"),
        Compensation("linear", lambda statistics: statistics.median_ratio, _mean_error, "median", uses_maps=True),
    )
}

DEFAULT_COMPENSATION = "linear"


def get_compensation(name: str) -> Compensation:
    """Look a compensation up.

    Raises:
        CompensationError: there is none of this name.
    """
    try:
        return COMPENSATIONS[name]
    except (KeyError, TypeError):
        raise CompensationError(f"unknown compensation {name!r}; use one of: {', '.join(COMPENSATIONS)}") from None
