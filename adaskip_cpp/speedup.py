"""From a wanted speed-up to a plan: how much must be skipped, by the cost model of a profile."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from .errors import BudgetError, PlanError
from .modes import PlanOptions, compensated_plan
from .plan import SkipPlan
from .strategies import get_strategy

if TYPE_CHECKING:
    from .cost import CostModel
    from .profile import Profile

__all__ = ["Phase", "Ranking", "reach", "seconds_saved"]

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
    choose = get_strategy(strategy)
    phase = ("decode" if options.mode == "decode" else "prefill") if phase is None else phase
    cost, context = _check(profile, strategy, speedup, context, phase, ranking, options)
    goal = cost.seconds(None, context, phase) / speedup
    if strategy == "adaskip" and ranking == "efficiency":
        skip = _cheapest(profile, cost, goal, context, phase)
        if skip is not None:
            return compensated_plan(profile, skip, options, strategy)
        most = profile.skippable
    else:
        most = np.zeros((profile.n_layer, 2), np.bool_)
        for n_skip in range(2 * profile.n_layer + 1):
            try:
                plan = choose(profile, n_skip, options)
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


def seconds_saved(cost: CostModel, n_layer: int, context: int, phase: Phase) -> npt.NDArray[np.float64]:
    """Return the predicted seconds that skipping each sublayer alone saves, float64 ``[n_layer, 2]``."""
    full = cost.seconds(None, context, phase)
    saved = np.zeros((n_layer, 2))
    for layer, kind in np.ndindex(n_layer, 2):
        skip = np.zeros((n_layer, 2), np.bool_)
        skip[layer, kind] = True
        saved[layer, kind] = full - cost.seconds(skip, context, phase)
    return saved


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


def _cheapest(
    profile: Profile, cost: CostModel, goal: float, context: int, phase: Phase
) -> npt.NDArray[np.bool_] | None:
    """Choose sublayers that bring a phase down to ``goal`` seconds, losing little similarity.

    Taken one after another by the least similarity lost per second saved, where any single one that completes the set
    at a smaller loss ends it: the greedy rule of covering knapsacks. Then what is not needed after all is put back, the
    greatest loss first. None if all together do not suffice.
    """
    saved = seconds_saved(cost, profile.n_layer, context, phase)
    lost = 1.0 - profile.similarity
    useful = profile.skippable & (saved > 0)
    price = np.divide(lost, saved, out=np.full(lost.shape, np.inf), where=useful)
    skip = np.zeros(lost.shape, np.bool_)
    best: npt.NDArray[np.bool_] | None = skip.copy() if cost.seconds(skip, context, phase) <= goal else None
    for _ in range(0 if best is not None else int(useful.sum())):
        left = useful & ~skip
        enough = left & (cost.seconds(skip, context, phase) - saved <= goal)
        if enough.any():
            last = np.unravel_index(np.argmin(np.where(enough, lost, np.inf)), lost.shape)
            complete = skip.copy()
            complete[last] = True
            reached = cost.seconds(complete, context, phase) <= goal
            if reached and (best is None or lost[complete].sum() < lost[best].sum()):
                best = complete
        skip[np.unravel_index(np.argmin(np.where(left, price, np.inf)), lost.shape)] = True
        if cost.seconds(skip, context, phase) <= goal:
            if best is None or lost[skip].sum() < lost[best].sum():
                best = skip
            break
    if best is None:
        return None
    for layer, kind in sorted(np.argwhere(best).tolist(), key=lambda each: -lost[tuple(each)]):
        best[layer, kind] = False
        best[layer, kind] = cost.seconds(best, context, phase) > goal
    return best


def _skipped(plan: SkipPlan, phase: Phase) -> npt.NDArray[np.bool_]:
    if phase == "prefill":
        return plan.prefill.skip
    return plan.schedule[-1][1].skip if plan.schedule else plan.decode.skip
