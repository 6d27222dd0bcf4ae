"""Finds the sublayers to skip for a wanted speed-up, for strategies: ``cheapest_set``, and ``smallest_budget``.

A cost model predicts the times. It ignores an online stage, and a schedule counts with its last set.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..errors import BudgetError, PlanError
from ..model.arrays import Flags, Floats
from ..model.cost_model import CostModel
from ..model.plan import Bulk, Phase, SkipPlan
from ..model.profile import ProfileData
from ..model.skip_set import SkipSet, ranked
from .modes import bulk_of
from .request import PlanRequest, Ranking


@dataclass(frozen=True)
class Goal:
    """The wanted speed-up of a phase, as predicted. Phase ``"bulk"`` is a whole prompt, read as ``around`` says."""

    cost: CostModel
    speedup: float
    context: int
    phase: Phase
    around: Bulk | None = None

    @classmethod
    def of(cls, profile: ProfileData, request: PlanRequest) -> "Goal":
        if profile.cost is None:
            raise PlanError("the profile has no cost model to predict a speed-up from; calibrate again, or give n_skip")
        if request.context is None or request.speedup is None:
            raise PlanError("a speed-up depends on the length of the context; give context, in tokens")
        around = bulk_of(profile, request, SkipSet.none(profile.n_layer))
        return cls(profile.cost, request.speedup, int(request.context), request.faster_phase, around)

    def seconds(self, skip: Flags | None) -> float:
        """Predict the seconds of the phase with sublayers skipped; None for the whole model, which has no bulk."""
        phase = "prefill" if skip is None and self.phase == "bulk" else self.phase
        return self.cost.seconds(skip, self.context, phase, around=self.around)

    @cached_property
    def most_seconds(self) -> float:
        return self.seconds(None) / self.speedup

    def reached(self, skip: Flags) -> bool:
        return self.seconds(skip) <= self.most_seconds

    def out_of_reach(self, most: Flags, strategy: str = "adaskip") -> BudgetError:
        """Return the error that names the largest possible speed-up, which skips ``most``."""
        full, least, what = self.seconds(None), self.seconds(most), {"bulk": "a prompt"}.get(self.phase, self.phase)
        reachable = math.floor(full / least * 100) / 100
        return BudgetError(
            f"{strategy} cannot make {what} {self.speedup:g} times faster at {self.context} tokens: with all "
            f"{most.sum()} sublayers skipped that it can skip, it is predicted to take {least:.4g} s instead of "
            f"{full:.4g} s, {reachable:.2f} times faster; ask for a speed-up of at most {reachable:.2f}"
        )


def smallest_budget(
    make: Callable[[ProfileData, PlanRequest], SkipPlan], profile: ProfileData, request: PlanRequest
) -> SkipPlan:
    """Return the plan by ``make`` that skips the fewest sublayers and reaches the speed-up of a request."""
    goal = Goal.of(profile, request)
    most = np.zeros((goal.cost.n_layer, 2), np.bool_)
    for n_skip in range(2 * goal.cost.n_layer + 1):
        try:
            plan = make(profile, replace(request, n_skip=n_skip, speedup=None))
        except BudgetError:
            break
        most = plan.skipped(goal.phase).skip
        if goal.reached(most):
            return plan
    raise goal.out_of_reach(most, request.strategy)


def seconds_saved(cost: CostModel, context: int, phase: Phase, around: Bulk | None = None) -> Floats:
    """Predict the seconds that skipping each sublayer alone saves, float64 ``[n_layer, 2]``."""
    alone = np.eye(2 * cost.n_layer, dtype=np.bool_).reshape(-1, cost.n_layer, 2)
    seconds = [cost.seconds(skip, context, phase, around=around) for skip in alone]
    return np.maximum(cost.seconds(None, context, phase, around=around) - np.reshape(seconds, (-1, 2)), 0.0)


def cheapest_set(lost: Floats, goal: Goal, ranking: Ranking = "efficiency") -> Flags:
    """Choose sublayers, bool ``[n_layer, 2]``, that reach a goal with little loss.

    ``lost``, float64 ``[n_layer, 2]``, is the loss from skipping each, NaN if it cannot be skipped. ``"similarity"``
    takes the least loss first, as in the paper, until the goal is reached; ``"efficiency"`` is :func:`_cover`.
    """
    may = ~np.isnan(lost)
    if not goal.reached(may):
        raise goal.out_of_reach(may)
    if ranking == "efficiency":
        return _cover(lost, may, goal)
    skip = np.zeros(may.shape, np.bool_)
    for index in ranked(lost):
        if goal.reached(skip):
            break
        skip.flat[index] = True
    return skip


def _cover(lost: Floats, may: Flags, goal: Goal) -> Flags:
    """Choose a set by the greedy rule of covering knapsacks.

    Sublayers join by least loss per second saved. Before each, the set plus the one sublayer of least loss that reaches
    the goal is a candidate. The candidate of least loss wins. Sublayers that it does not need are dropped, worst first.
    """
    saved = seconds_saved(goal.cost, goal.context, goal.phase, goal.around)
    price = np.divide(lost, saved, out=np.full(lost.shape, np.inf), where=may & (saved > 0))
    candidates = [may]
    skip = np.zeros(lost.shape, np.bool_)
    for index in ranked(price):
        if goal.reached(skip):
            break
        for other in sorted(np.flatnonzero(may & ~skip), key=lambda each: lost.flat[each]):
            completed = skip.copy()
            completed.flat[other] = True
            if goal.reached(completed):
                candidates.append(completed)
                break
        skip.flat[index] = may.flat[index]
    if goal.reached(skip):
        candidates.append(skip)
    kept: Flags = min(candidates, key=lambda each: float(lost[each].sum())).copy()
    for index in np.flatnonzero(kept)[np.argsort(-lost[kept], kind="stable")]:
        kept.flat[index] = False
        kept.flat[index] = not goal.reached(kept)
    return kept
