"""The plans of a benchmark, by the names that its tables call them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..model.plan import Mode, SkipPlan
from ..planning.modes import PlanOptions
from ..planning.strategies import manual

if TYPE_CHECKING:
    from ..planning.profile import Profile
    from ..planning.speedup import Phase

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

        if not isinstance(source, int):
            if self.tuned:
                add("tuned", source.tuned_plan())
            phase: Phase = "decode" if self.mode == "decode" else "prefill"
            for strategy in self.strategies:
                for n in self.skips:
                    add(f"{strategy} {n}", source.plan(n, self.compensation, mode=self.mode, strategy=strategy))
                for ratio in self.speedups:
                    plan = source.plan(
                        None,
                        self.compensation,
                        mode=self.mode,
                        strategy=strategy,
                        speedup=ratio,
                        context=context,
                        phase=phase,
                    )
                    add(f"{strategy} {ratio:g} x", plan)
        for layers in self.attention:
            options = PlanOptions(mode=self.mode, compensation=self.compensation, attention=layers)
            add(f"{len(set(layers))} attention", manual(source, None, options))
        for layers in self.ffn:
            options = PlanOptions(mode=self.mode, compensation=self.compensation, ffn=layers)
            add(f"{len(set(layers))} FFN", manual(source, None, options))
        for attention, ffn in self.both:
            options = PlanOptions(mode=self.mode, compensation=self.compensation, attention=attention, ffn=ffn)
            add(f"{len(set(attention))} attention, {len(set(ffn))} FFN", manual(source, None, options))
        return plans
