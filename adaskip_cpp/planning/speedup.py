"""From a wanted speed-up to a plan: how much must be skipped, by the cost model of a profile."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from ..errors import BudgetError, PlanError
from ..model.plan import SkipPlan
from .modes import PlanOptions, compensated_plan
from .selection import choose
from .strategies import get_strategy

if TYPE_CHECKING:
    from ..calibration.cost import CostModel
    from .profile import Profile

__all__ = ["Phase", "Ranking", "reach"]

Phase: TypeAlias = Literal["prefill", "decode"]
Ranking: TypeAlias = Literal["efficiency", "similarity"]


def reach(
    profile: Profile,
    strategy: str,
    speedup: float,
    context: int | None,
    phase: Phase | None,
    ranking: Ranking,
    options: PlanOptions,
) -> SkipPlan:
    """Return a plan whose fixed skip set is predicted to make a phase ``speedup`` times faster, see ``Profile.plan``.

    An online stage makes decode faster still; a schedule counts with its last set.

    Raises:
        BudgetError: ``speedup`` is out of reach; the message says how far one can go.
        PlanError: an argument is unknown or impossible, or the profile has no cost model.
    """
    make = get_strategy(strategy)
    phase = ("decode" if options.mode == "decode" else "prefill") if phase is None else phase
    cost, context = _check(profile, strategy, speedup, context, phase, ranking, options)
    if strategy == "adaskip":
        skip = choose(profile.similarity, cost, speedup, context, phase, ranking)
        return compensated_plan(profile, skip, options, strategy)
    goal = cost.seconds(None, context, phase) / speedup
    most = np.zeros((profile.n_layer, 2), np.bool_)
    for n_skip in range(2 * profile.n_layer + 1):
        try:
            plan = make(profile, n_skip, options)
        except BudgetError:
            break
        most = _skipped(plan, phase)
        if cost.seconds(most, context, phase) <= goal:
            return plan
    full, least = cost.seconds(None, context, phase), cost.seconds(most, context, phase)
    reachable = math.floor(full / least * 100) / 100
    raise BudgetError(
        f"{strategy} cannot make {phase} {speedup:g} times faster at {context} tokens: with all {most.sum()} sublayers "
        f"skipped that it can skip, it is predicted to take {least:.4g} s instead of {full:.4g} s, {reachable:.2f} "
        f"times faster, and {speedup:g} times would take {goal:.4g} s; ask for a speed-up of at most {reachable:.2f}"
    )


def _check(
    profile: Profile, strategy: str, speedup: Any, context: Any, phase: Any, ranking: Any, options: PlanOptions
) -> tuple[CostModel, int]:
    if profile.cost is None:
        raise PlanError("the profile has no cost model to predict a speed-up from; calibrate again, or give n_skip")
    if strategy == "manual":
        raise PlanError("strategy 'manual' skips what is listed, whatever the speed-up; leave speedup out")
    if not (isinstance(speedup, int | float) and math.isfinite(speedup) and speedup >= 1):
        raise PlanError(f"the speed-up is {speedup!r}; use a number from 1 on, such as 1.25")
    if not (isinstance(context, int | np.integer) and context >= 1):
        raise PlanError(f"a speed-up depends on the length of the context; give context, in tokens, not {context!r}")
    if phase not in get_args(Phase):
        raise PlanError(f"unknown phase {phase!r}; use 'prefill' or 'decode'")
    if ranking not in get_args(Ranking):
        raise PlanError(f"unknown ranking {ranking!r}; use 'efficiency' or 'similarity'")
    if options.mode == "decode" and phase == "prefill":
        raise PlanError("mode 'decode' runs the full model in prefill; use phase='decode' or another mode")
    return profile.cost, int(context)


def _skipped(plan: SkipPlan, phase: Phase) -> npt.NDArray[np.bool_]:
    if phase == "prefill":
        return plan.prefill.skip
    return plan.schedule[-1][1].skip if plan.schedule else plan.decode.skip
