"""Finds the smallest budget that reaches a wanted speed-up, for strategies: :func:`smallest_budget`."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from ..errors import BudgetError, PlanError
from ..model.plan import DEFAULT_REFIT, Phase, SkipPlan
from ..model.profile import ProfileData
from .compensation import DEFAULT_COMPENSATION
from .request import PlanRequest

Strategy: TypeAlias = Callable[[ProfileData, PlanRequest], SkipPlan]


def smallest_budget(make: Strategy, profile: ProfileData, request: PlanRequest, speedup: float) -> PlanRequest:
    """Return the request with the smallest budget whose plan reaches a speed-up, instead of that speed-up.

    The times are those of ``CostModel.seconds``. Plans are tried without a compensation: it does not count this, and
    linear maps are large. The tokens that maps are fitted to count.
    """
    cost, context, faster = profile.cost, request.context, request.faster_phase
    phase: Phase = "decode" if faster == "decode" else "prefill"
    if cost is None:
        raise PlanError("the profile has no cost model to predict a speed-up from; calibrate again, or give n_skip")
    if context is None:
        raise PlanError("a speed-up depends on the length of the context; give context, in tokens")
    reached, plan = 1.0, None  # of the last plan
    for n_skip in range(2 * cost.n_layer + 1):
        wanted = replace(request, n_skip=n_skip, speedup=None)
        try:
            plan = make(profile, replace(wanted, compensation="none"))
        except BudgetError:
            if plan is None:
                raise
            break
        if plan.bulk is not None and profile.maps is not None and request.compensation == DEFAULT_COMPENSATION:
            plan = replace(plan, bulk=replace(plan.bulk, refit=DEFAULT_REFIT))
        reached = 1.0 if plan.is_whole else cost.speedup(plan, context, phase)
        if reached >= speedup:
            return wanted
    assert plan is not None
    least, whole = (cost.seconds(each, context, phase) for each in (plan, None))
    raise BudgetError(
        f"{request.strategy} cannot make {'a prompt' if faster == 'bulk' else faster} {speedup:g} times faster at "
        f"{context} tokens: with all {plan.skipped(faster).n_skip} sublayers skipped that it can skip, it is predicted "
        f"to take {least:.4g} s instead of {whole:.4g} s; ask for a speed-up of at most "
        f"{math.floor(reached * 100) / 100:.2f}"
    )
