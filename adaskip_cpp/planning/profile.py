"""``Profile``, for users: the data of a calibration, and ``plan``, which makes plans from it."""

from dataclasses import replace
from typing import Any

from ..model.plan import SkipPlan
from ..model.profile import ProfileData
from .request import PlanRequest
from .strategies import make_plan


class Profile(ProfileData):
    """The result of a calibration of one model, from which plans are made. ``ProfileData`` lists its parts.

    Examples:
        >>> profile = calibrate(llm)
        >>> profile.save("model.adaskip.json")
        >>> llm.set_plan(profile.plan(speedup=1.25, context=4096))
    """

    def plan(self, n_skip: int | PlanRequest | None = None, **request: Any) -> SkipPlan:
        """Make a plan: choose sublayers to skip, and their compensation.

        Args:
            n_skip: number of sublayers to skip, 12 by default; or a whole ``PlanRequest``.
            **request: fields of ``PlanRequest`` by name, for example ``speedup=1.25, context=4096`` instead of
                ``n_skip``, ``mode="e2e"`` or ``strategy="early_exit"``.

        Raises:
            BudgetError: the model has fewer sublayers that can be skipped, or the speed-up is out of reach.
            NotSkippableError: the strategy or the list names a sublayer that the model cannot skip.
            PlanError: a field is impossible, or the profile lacks the measurements for it.
        """
        wanted = replace(n_skip, **request) if isinstance(n_skip, PlanRequest) else PlanRequest(n_skip, **request)
        return make_plan(self, wanted)
