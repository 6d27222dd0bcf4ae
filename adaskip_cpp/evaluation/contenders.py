"""The contenders of an evaluation: the full model, plans of a profile, and what `adaskip-cpp tune` found."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BudgetError, CompensationError, DataError, NotSkippableError
from ..model.frontier import Frontier
from ..model.mode import MODES, ModeName
from ..model.plan import SkipPlan
from ..model.plan_file import PlanFile
from ..planning.compensation import DEFAULT_COMPENSATION
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from ..planning.strategies import STRATEGIES, make_plan
from .results import Named

_COMPENSATED = "adaskip"  # the strategy that has a compensation; the baselines have none


@dataclass(frozen=True)
class Contender(Named):
    """One way to run the model: under a plan, or that which a frontier chooses for each prompt, or without any."""

    plan: SkipPlan | None = None
    frontier: Frontier | None = None
    max_loss: float = 0.0

    def plan_for(self, n_tokens: int) -> SkipPlan | None:
        """Return the plan for a prompt of so many tokens; None for the whole model."""
        return self.plan if self.frontier is None else self.frontier.choose(n_tokens, self.max_loss)

    @property
    def key(self) -> Any:
        """All that its results depend on."""
        return self.plan if self.frontier is None else (self.frontier.points, self.max_loss)


FULL = Contender("full", "full", "0", None, "none")
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
    profile: Profile | None,
    requests: Iterable[PlanRequest],
    saved: PlanFile | None = None,
    max_losses: Iterable[float] = (),
    lengths: Sequence[int] = (),
) -> tuple[list[Contender], list[str]]:
    """Return the full model and whatever is compared with it, and a note on each that is not.

    A plan that skips the same as another one of its strategy, or nothing, is left out too.

    Args:
        profile: of the requests; None where there are none.
        saved: a plan file's plan, or frontier with a contender for each promise, which come last.
        max_losses: these promises, in nats per token.
        lengths: tokens of the prompts that are measured.
    """
    found, notes = [FULL], []
    for request in requests:
        if profile is None:
            raise DataError("plans for these options are made from a profile; give one (--profile)")
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
    if saved is not None and saved.frontier is not None:
        known: dict[tuple[int | None, ...], str] = {(None,) * len(lengths): FULL.name}
        for max_loss in max_losses:
            budget = f"{max_loss:g}"
            name = f"promise {budget}"
            promise = Contender(name, "promise", budget, "prompt", "none", None, saved.frontier, max_loss)
            plans = [promise.plan_for(n) for n in lengths]
            chosen = tuple(None if each is None else id(each) for each in plans)
            if (twin := known.setdefault(chosen, name)) != name:
                notes.append(f"{name} is left out: for these prompts it skips the same as {twin}")
                continue
            found.append(promise)
            if short := [n for n, each in zip(lengths, plans, strict=True) if each is None]:
                notes.append(f"{name} runs the whole model for prompts of {', '.join(map(str, sorted(short)))} tokens")
    elif saved is not None and (tuned := saved.plan) is not None:
        if (same := _twin(tuned, found)) is not None:
            notes.append(f"the tuned plan is left out: it skips the same as {same}")
        elif tuned.mode == "manual":
            notes.append("the tuned plan is left out: its layers were listed, for no mode")
        else:
            found.append(Contender("tuned", "tuned", "tuned", tuned.mode, tuned.compensation, tuned))
    if len(found) == 1:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(
            f"there is nothing to compare with the full model{why}; choose other budgets (--skip), longer prompts "
            "(--tokens) or promises (--max-loss), or run `adaskip-cpp tune`"
        )
    return found, notes


def _twin(plan: SkipPlan, found: Iterable[Contender]) -> str | None:
    def skips(plan: SkipPlan) -> tuple[object, ...]:
        return plan.mode, plan.prefill, plan.decode, plan.schedule, plan.online, plan.bulk

    nothing = plan.is_whole and plan.online is None
    alike = (each.name for each in found if (nothing if each.plan is None else skips(each.plan) == skips(plan)))
    return next(alike, None)
