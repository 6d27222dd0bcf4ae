"""Makes the plans that are compared with the whole model. Start at :func:`contenders`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BudgetError, DataError, NotSkippableError
from ..model.frontier import Frontier
from ..model.plan import SkipPlan
from ..model.plan_file import PlanFile
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from ..planning.strategies import make_plan
from .results import Named

COMPENSATED = "adaskip"  # the strategy that has a compensation; the baselines have none


@dataclass(frozen=True)
class Contender(Named):
    """One way to run the model: with a plan, with the plan that a frontier chooses for each prompt, or without one."""

    plan: SkipPlan | None = None
    frontier: Frontier | None = None
    max_loss: float = 0.0

    def plan_for(self, n_tokens: int) -> SkipPlan | None:
        """Return the plan for a prompt of so many tokens; None for the whole model."""
        return self.plan if self.frontier is None else self.frontier.choose(n_tokens, self.max_loss)

    @property
    def key(self) -> Any:
        """Everything that its results depend on."""
        return self.plan if self.frontier is None else (self.frontier.points, self.max_loss)


FULL = Contender("full", "full", "", None, "none")  # the whole model: all others are compared with it


def contenders(
    profile: Profile | None,
    requests: Iterable[PlanRequest],
    saved: PlanFile | None = None,
    max_losses: Iterable[float] = (),
    lengths: Sequence[int] = (),
) -> tuple[list[Contender], list[str]]:
    """Return the contenders, the whole model first, and a note for each one that is left out.

    A contender is also left out if it skips nothing, or the same as another one of its strategy. ``profile`` makes the
    plans of the requests. A saved plan is one contender; a saved frontier is one for each promise of ``max_losses``, in
    nats per token. ``lengths`` are the tokens of the measured prompts.
    """
    found, notes = [FULL], list[str]()

    def add(each: Contender) -> None:
        skipped = [_skipped(each.plan_for(n)) for n in lengths or (1,)]
        for other in found:
            alike = each.strategy == "tuned" or other.strategy in ("full", each.strategy)
            if alike and skipped == [_skipped(other.plan_for(n)) for n in lengths or (1,)]:
                notes.append(f"{each.name} is left out: it skips the same as {other.name}")
                return
        found.append(each)
        if each.frontier is not None and (whole := [str(n) for n in sorted(lengths) if each.plan_for(n) is None]):
            notes.append(f"{each.name} runs the whole model for prompts of {', '.join(whole)} tokens")

    for request in requests:
        if profile is None:
            raise DataError("these options need plans made from a profile; give one (profile, --profile)")
        strategy, compensation, budget = request.strategy, request.compensation, str(request.n_skip)
        name = "-".join([strategy, budget, request.mode, *([compensation] if strategy == COMPENSATED else [])])
        try:
            add(Contender(name, strategy, budget, request.mode, compensation, make_plan(profile, request)))
        except (BudgetError, NotSkippableError) as error:
            notes.append(f"{name} is left out: {error}")
    if saved is not None and saved.frontier is not None:
        for loss in max_losses:
            add(Contender(f"promise {loss:g}", "promise", f"{loss:g}", "prompt", "none", None, saved.frontier, loss))
    elif saved is not None and (tuned := saved.plan) is not None:
        if tuned.mode == "manual":
            notes.append("tuned is left out: its layers were listed by hand and belong to no mode")
        else:
            add(Contender("tuned", "tuned", "", tuned.mode, tuned.compensation, tuned))
    if len(found) == 1:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(
            f"there is nothing to compare with the whole model{why}; choose other budgets (n_skips, --skip), longer "
            "prompts (n_tokens, --tokens) or promises (max_losses, --max-loss), or run `adaskip-cpp tune`"
        )
    return found, notes


def _skipped(plan: SkipPlan | None) -> tuple[object, ...] | None:
    """Return what a plan skips; None if nothing."""
    if plan is None or (plan.is_whole and plan.online is None):
        return None
    return plan.mode, plan.prefill, plan.decode, plan.schedule, plan.online, plan.bulk
