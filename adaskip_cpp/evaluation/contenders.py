"""The contenders of an evaluation: the full model, and a plan for each strategy, budget, mode and compensation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import BudgetError, CompensationError, DataError, NotSkippableError
from ..model.plan import MODES, Mode, SkipPlan
from ..planning.compensation import DEFAULT_COMPENSATION
from ..planning.request import PlanRequest
from ..planning.strategies import STRATEGIES, make_plan

if TYPE_CHECKING:
    from ..planning.profile import Profile

__all__ = ["FULL", "Contender", "contenders", "every_request"]

_COMPENSATED = "adaskip"
"""The strategy that has a compensation; the baselines have none."""

_SHARES = (1 / 10, 1 / 5, 1 / 4)


@dataclass(frozen=True)
class Contender:
    """One way to run the model.

    Attributes:
        name: tells it from the others, ``"adaskip-12-e2e-affine"``.
        strategy: name of the strategy, ``"full"`` for the whole model.
        budget: what was asked for: ``"12"`` sublayers, or a speed-up of ``"1.2x"``.
        mode: one of :data:`adaskip_cpp.model.plan.MODES`; None for the whole model.
        compensation: its name, ``"none"`` for strategies that compensate nothing.
        plan: None for the whole model.
    """

    name: str
    strategy: str
    budget: str
    mode: Mode | None
    compensation: str
    plan: SkipPlan | None


FULL = Contender("full", "full", "0", None, "none", None)
"""The whole model, which all others are measured against."""


def every_request(
    n_layer: int,
    *,
    strategies: Sequence[str] | None = None,
    n_skips: Sequence[int] | None = None,
    speedups: Sequence[float] | None = None,
    modes: Sequence[Mode] | None = None,
    compensations: Sequence[str] | None = None,
) -> tuple[PlanRequest, ...]:
    """Return a request for every strategy, then compensation, then budget, then mode.

    Args:
        n_layer: of the model.
        strategies: names; None or empty for all that choose for themselves.
        n_skips: budgets, numbers of sublayers; None for a tenth, a fifth and a quarter, unless there are speed-ups.
        speedups: budgets, predicted speed-ups.
        modes: None or empty for all.
        compensations: names, for the strategy that has one; None for the default.
    """
    if not n_skips and not speedups:
        n_skips = sorted({max(int(share * 2 * n_layer), 1) for share in _SHARES})
    budgets = [*(PlanRequest(n) for n in n_skips or ()), *(PlanRequest(speedup=each) for each in speedups or ())]
    return tuple(
        replace(budget, strategy=strategy, compensation=compensation, mode=mode)
        for strategy in strategies or [name for name in STRATEGIES if name != "manual"]
        for compensation in ((compensations or [DEFAULT_COMPENSATION]) if strategy == _COMPENSATED else ["none"])
        for budget in budgets
        for mode in modes or MODES
    )


def contenders(
    profile: Profile, requests: Sequence[PlanRequest], saved: SkipPlan | None = None
) -> tuple[list[Contender], list[str]]:
    """Return the full model and every plan that the profile gives, and a note on each that it does not.

    A plan that skips the same as another one of its strategy, or nothing, is left out too.

    Args:
        profile: of the model.
        requests: the plans that are wanted, in this order; a speed-up with its context.
        saved: a plan as `tune` finds it, which comes last.

    Raises:
        DataError: there is no plan but the full model.
        PlanError: a strategy is unknown, or the profile has no cost model to predict speed-ups.
    """
    found, notes = [FULL], []
    for request in requests:
        strategy, compensation = request.strategy, request.compensation
        budget = f"{request.speedup:g}x" if request.speedup is not None else str(request.n_skip)
        name = "-".join([strategy, budget, request.mode, *([compensation] if strategy == _COMPENSATED else [])])
        try:
            plan = make_plan(profile, request)
        except (BudgetError, NotSkippableError, CompensationError) as error:
            notes.append(f"{name} is left out: {error}")
            continue
        rivals = (each for each in found if each is FULL or each.strategy == strategy)
        twin = next((each.name for each in rivals if _alike(each.plan, plan)), None)
        if twin is not None:
            notes.append(f"{name} is left out: it skips the same as {twin}")
        else:
            found.append(Contender(name, strategy, budget, request.mode, compensation, plan))
    if saved is not None:
        twin = next((each.name for each in found if _alike(each.plan, saved)), None)
        if saved.mode == "manual" or twin is not None:
            why = "its layers were listed, for no mode" if twin is None else f"it skips the same as {twin}"
            notes.append(f"the tuned plan is left out: {why}")
        else:
            found.append(Contender("tuned", "tuned", "tuned", saved.mode, saved.compensation, saved))
    if len(found) == 1:
        raise DataError(
            f"there is nothing to compare with the full model ({'; '.join(notes)}); choose other budgets (--skip)"
        )
    return found, notes


def _alike(a: SkipPlan | None, b: SkipPlan) -> bool:
    if a is None:
        return b.prefill.n_skip == b.decode.n_skip == 0 and not b.schedule and b.online is None
    return (a.mode, a.prefill, a.decode, a.schedule, a.online) == (b.mode, b.prefill, b.decode, b.schedule, b.online)
