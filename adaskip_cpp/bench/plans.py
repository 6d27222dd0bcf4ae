"""The plans of a benchmark, by the names that its tables call them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..model.plan import Mode, SkipPlan
from ..planning.request import PlanRequest
from ..planning.strategies import make_plan

if TYPE_CHECKING:
    from ..planning.profile import Profile

__all__ = ["WantedPlans"]


@dataclass(frozen=True)
class WantedPlans:
    """The plans asked for.

    Attributes:
        strategies: each makes a plan of every budget.
        skips: budgets, numbers of sublayers.
        speedups: budgets, predicted speed-ups.
        attention: lists of layers; each is a plan that skips just their attention.
        ffn: lists of layers; each is a plan that skips just their FFN.
        mode: of all plans.
        compensation: of all plans; the baselines have none.
        tuned: whether the profile's tuned plan is one, as it is.
        both: pairs of such lists; each is a plan that skips these attentions and these FFNs.
    """

    strategies: tuple[str, ...]
    skips: tuple[int, ...]
    speedups: tuple[float, ...]
    attention: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]
    mode: Mode
    compensation: str
    tuned: bool = False
    both: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self.skips or self.speedups or self.attention or self.ffn or self.both or self.tuned)

    @property
    def needs_profile(self) -> bool:
        """Whether they cannot be made of a number of layers alone."""
        by_hand = not (self.skips or self.speedups or self.tuned)
        return self.any and not (by_hand and self.compensation == "none")

    def make(self, source: Profile | int, context: int) -> dict[str, SkipPlan]:
        """Make them.

        Args:
            source: the model's profile, or its number of layers where :attr:`needs_profile` is false.
            context: tokens of the prompt that speed-ups are predicted for.

        Raises:
            AdaSkipError: the profile cannot give such a plan.
        """
        plans: dict[str, SkipPlan] = {}

        def add(name: str, plan: SkipPlan) -> None:
            n = sum(known == name or known.startswith(f"{name} (") for known in plans)
            plans[f"{name} ({n + 1})" if n else name] = plan

        if self.tuned and not isinstance(source, int):
            add("tuned", source.tuned_plan())
        for request in self.requests():
            add(request.name, make_plan(source, request.at(context)))
        return plans

    def requests(self) -> list[PlanRequest]:
        """Return what they are, but for the tuned plan."""
        alike = PlanRequest(mode=self.mode, compensation=self.compensation)
        found = []
        for strategy in self.strategies:
            found += [replace(alike, strategy=strategy, n_skip=n) for n in self.skips]
            found += [replace(alike, strategy=strategy, speedup=ratio) for ratio in self.speedups]
        lists = [(layers, ()) for layers in self.attention] + [((), layers) for layers in self.ffn] + [*self.both]
        found += [replace(alike, strategy="manual", attention=attention, ffn=ffn) for attention, ffn in lists]
        return found
