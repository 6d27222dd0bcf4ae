"""The contenders of an evaluation: the full model, and a plan for each strategy, budget, mode and compensation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import BudgetError, CompensationError, DataError, NotSkippableError
from ..model.mode import MODES, ModeName
from ..model.plan import SkipPlan
from ..planning.compensation import DEFAULT_COMPENSATION
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from ..planning.strategies import STRATEGIES, make_plan
from .results import Named

_COMPENSATED = "adaskip"  # the strategy that has a compensation; the baselines have none


@dataclass(frozen=True)
class Contender(Named):
    """One way to run the model; without a plan it is the whole model."""

    plan: SkipPlan | None


FULL = Contender("full", "full", "0", None, "none", None)
"""The whole model, which all others are measured against."""


def every_request(
    n_layer: int,
    *,
    strategies: Sequence[str] | None = None,
    n_skips: Sequence[int] | None = None,
    speedups: Sequence[float] | None = None,
    modes: Sequence[ModeName] | None = None,
    compensations: Sequence[str] | None = None,
) -> tuple[PlanRequest, ...]:
    """Return a request for every strategy, then compensation, then budget, then mode; of what is not given, for all.

    Without budgets they are a tenth, a fifth and a quarter of the sublayers, without compensations the default.
    """
    if not n_skips and not speedups:
        n_skips = sorted({max(2 * n_layer // parts, 1) for parts in (10, 5, 4)})
    budgets = [*(PlanRequest(n) for n in n_skips or ()), *(PlanRequest(speedup=each) for each in speedups or ())]
    return tuple(
        replace(budget, strategy=strategy, compensation=compensation, mode=mode)
        for strategy in strategies or [name for name in STRATEGIES if name != "manual"]
        for compensation in ((compensations or [DEFAULT_COMPENSATION]) if strategy == _COMPENSATED else ["none"])
        for budget in budgets
        for mode in modes or MODES
        if strategies or strategy != "suffix" or MODES[mode].in_bulk  # elsewhere it is Early Exit
    )


def contenders(
    profile: Profile, requests: Iterable[PlanRequest], saved: SkipPlan | None = None
) -> tuple[list[Contender], list[str]]:
    """Return the full model and every plan that the profile gives, and a note on each that it does not.

    A plan that skips the same as another one of its strategy, or nothing, is left out too. ``saved`` is a plan as
    `tune` finds it, which comes last.
    """
    found, notes = [FULL], []
    for request in requests:
        strategy, compensation = request.strategy, request.compensation or DEFAULT_COMPENSATION
        budget = f"{request.speedup:g}x" if request.speedup is not None else str(request.n_skip)
        name = "-".join([strategy, budget, request.mode, *([compensation] if strategy == _COMPENSATED else [])])
        try:
            plan = make_plan(profile, request)
        except (BudgetError, NotSkippableError, CompensationError) as error:
            notes.append(f"{name} is left out: {error}")
            continue
        if (twin := _twin(plan, (each for each in found if each.strategy in ("full", strategy)))) is not None:
            notes.append(f"{name} is left out: it skips the same as {twin}")
        else:
            found.append(Contender(name, strategy, budget, request.mode, compensation, plan))
    if saved is not None:
        if (twin := _twin(saved, found)) is not None:
            notes.append(f"the tuned plan is left out: it skips the same as {twin}")
        elif saved.mode == "manual":
            notes.append("the tuned plan is left out: its layers were listed, for no mode")
        else:
            found.append(Contender("tuned", "tuned", "tuned", saved.mode, saved.compensation, saved))
    if len(found) == 1:
        raise DataError(
            f"there is nothing to compare with the full model ({'; '.join(notes)}); choose other budgets (--skip)"
        )
    return found, notes


def _twin(plan: SkipPlan, found: Iterable[Contender]) -> str | None:
    def skips(plan: SkipPlan) -> tuple[object, ...]:
        return plan.mode, plan.prefill, plan.decode, plan.schedule, plan.online, plan.bulk

    nothing = plan.is_whole and plan.online is None
    alike = (each.name for each in found if (nothing if each.plan is None else skips(each.plan) == skips(plan)))
    return next(alike, None)
