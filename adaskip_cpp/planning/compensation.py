"""The compensations of skipped sublayers, ``v := s * u + b + up (down u)``, for strategies: ``COMPENSATIONS``.

docs/dev/method.md compares them. ``linear`` is ``affine`` for sublayers without a map. Online FFNs get a scale alone.
"""

from dataclasses import dataclass

import numpy as np

from ..model.arrays import Flags
from ..model.plan import OnlineScale
from ..model.skip_set import SkipSet
from ..model.statistics import WHOLE, LinearMaps, PhaseStatistics, map_scale

DEFAULT_COMPENSATION = "linear"


@dataclass(frozen=True)
class Compensation:
    """One way to compensate."""

    online: OnlineScale  # how s is found, also for the FFNs that the online stage adds
    adds_mean: bool = False  # whether b is added
    uses_maps: bool = False  # whether linear maps with their own s replace s and b where the profile has maps

    def skip_set(self, skip: Flags, statistics: PhaseStatistics, maps: LinearMaps | None = None) -> SkipSet:
        """Return the set that skips ``skip``, bool ``[n_layer, 2]``; with maps, ``statistics`` are of their phase."""
        ratio = statistics.median_ratio
        scale = {"none": np.ones_like(ratio), "paper": statistics.norm_ratio, "median": ratio}[self.online]
        mapped = np.zeros(skip.shape, np.bool_)
        down = up = None
        if self.uses_maps and maps is not None and skip.any():
            mapped = skip & maps.fitted[:, :2]
            scale = np.where(mapped, map_scale(ratio), scale)
            down, up = maps.down[:, :2].copy(), maps.up[:, :2].copy()
            # If both sublayers of a layer are skipped, the map of the whole layer becomes the map of its FFN.
            whole = skip.all(axis=1) & maps.fitted[:, WHOLE]
            scale[whole], mapped[whole] = 1.0, True
            down[whole, 1], up[whole, 1] = maps.down[whole, WHOLE], maps.up[whole, WHOLE]
            down[whole, 0] = up[whole, 0] = 0.0
            down[~mapped] = up[~mapped] = 0.0
        if not (self.adds_mean and (skip & ~mapped).any()):
            return SkipSet(skip, scale, None, down, up)
        error = statistics.mean_v - scale[:, :, None] * statistics.mean_u.astype(np.float64)
        error[mapped] = 0.0
        return SkipSet(skip, scale, error.astype(np.float32), down, up)


COMPENSATIONS: dict[str, Compensation] = {
    "none": Compensation("none"),
    "paper": Compensation("paper"),
    "median": Compensation("median"),
    "affine": Compensation("median", adds_mean=True),
    "linear": Compensation("median", adds_mean=True, uses_maps=True),
}
