"""Finds the smallest budget that reaches a wanted speed-up, for strategies. Start at :func:`smallest_budget`.

A cost model predicts the times. It ignores an online stage, and a schedule counts with its last set.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..errors import BudgetError, PlanError
from ..model.arrays import Floats
from ..model.cost_model import CostModel
from ..model.plan import DEFAULT_REFIT, Phase, SkipPlan
from ..model.profile import ProfileData
from .compensation import DEFAULT_COMPENSATION
from .request import PlanRequest


def smallest_budget(
    make: Callable[[ProfileData, PlanRequest], SkipPlan], profile: ProfileData, request: PlanRequest
) -> PlanRequest:
    """Return the request with the smallest budget, instead of a speed-up, whose plan by ``make`` reaches the speed-up.

    Plans are tried without a compensation: the cost model does not count it, and linear maps are large. The tokens that
    maps are fitted to count.
    """
    cost, context, faster = profile.cost, request.context, request.faster_phase
    phase: Phase = "decode" if faster == "decode" else "prefill"
    if cost is None:
        raise PlanError("the profile has no cost model to predict a speed-up from; calibrate again, or give n_skip")
    if context is None or request.speedup is None:
        raise PlanError("a speed-up depends on the length of the context; give context, in tokens")
    reached, plan = 1.0, None  # of the last plan
    for n_skip in range(2 * cost.n_layer + 1):
        wanted = replace(request, n_skip=n_skip, speedup=None)
        try:
            plan = make(profile, replace(wanted, compensation="none"))
            if plan.bulk is not None and profile.maps is not None and request.compensation == DEFAULT_COMPENSATION:
                plan = replace(plan, bulk=replace(plan.bulk, refit=DEFAULT_REFIT))
        except BudgetError:
            if plan is None:
                raise
            break
        reached = 1.0 if plan.is_whole else cost.speedup(plan, context, phase)
        if reached >= request.speedup:
            return wanted
    assert plan is not None
    least, whole = (cost.seconds(each, context, phase) for each in (plan, None))
    raise BudgetError(
        f"{request.strategy} cannot make {'a prompt' if faster == 'bulk' else faster} {request.speedup:g} times faster "
        f"at {context} tokens: with all {plan.skipped(faster).n_skip} sublayers skipped that it can skip, it is "
        f"predicted to take {least:.4g} s instead of {whole:.4g} s; ask for a speed-up of at most "
        f"{math.floor(reached * 100) / 100:.2f}"
    )


def seconds_saved(cost: CostModel, context: int, phase: Phase) -> Floats:
    """Predict the seconds that skipping each sublayer alone saves, float64 ``[n_layer, 2]``."""
    alone = np.eye(2 * cost.n_layer, dtype=np.bool_).reshape(-1, cost.n_layer, 2)
    seconds = [cost.seconds(skip, context, phase) for skip in alone]
    return np.maximum(cost.seconds(None, context, phase) - np.reshape(seconds, (-1, 2)), 0.0)
