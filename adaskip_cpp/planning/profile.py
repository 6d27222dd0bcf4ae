"""``Profile``, for users: the data of a calibration, and ``plan``, which makes plans from it."""

from typing import Any

from ..model.plan import SkipPlan
from ..model.profile import ProfileData
from .request import PlanRequest
from .strategies import make_plan


class Profile(ProfileData):
    """What calibration learned about one model; see :class:`adaskip_cpp.model.profile.ProfileData` for its parts."""

    def plan(self, n_skip: int | PlanRequest | None = None, **request: Any) -> SkipPlan:
        """Choose sublayers to skip.

        Args:
            n_skip: number of sublayers to skip; 12 if neither this nor ``speedup`` is given. Or a whole request.
            **request: what else is wanted, by the names of :class:`adaskip_cpp.planning.request.PlanRequest`: for
                example ``speedup=1.25, context=4096``, ``mode="e2e"`` or ``strategy="early_exit"``.

        Raises:
            BudgetError, CompensationError, PlanError: as the request; or it is out of reach, or was not measured for.
            SublayerRangeError, NotSkippableError: the model has no such layer, or cannot skip what was chosen.
        """
        return make_plan(self, PlanRequest.of(n_skip, **request))
