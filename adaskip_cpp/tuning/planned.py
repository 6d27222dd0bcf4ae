"""Makes plans of sets of sublayers, and predicts their times. Used by ``tune.py``: see :class:`Planned`."""

from dataclasses import replace
from typing import Any

from ..model.plan import DEFAULT_HEAD, DEFAULT_REFIT, Bulk, SkipPlan
from ..model.skip_set import SkipSet, late_layers
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from ..planning.strategies import compensated_plan
from .losses import PART_OF, Candidate


class Planned:
    """The plans of candidates for a profile, and the ``layers`` whose sublayers may be left out.

    Plans are judged after ``judged_at`` tokens. A sublayer is not left out if that saves no time in such prompts, nor
    in those of ``longest`` tokens, as in the last layer, of which a bulk computes only K and V.
    """

    def __init__(self, profile: Profile, judged_at: int, longest: int) -> None:
        assert profile.cost is not None
        self.profile, self.cost, self.judged_at = profile, profile.cost, judged_at
        last = late_layers(profile.n_layer)[::-1]
        whole = {n: self.seconds(Candidate(), n) for n in (judged_at, longest)}
        layers = {
            "attention": [layer for layer in last if profile.in_bulk[layer, 0]],
            "ffn": [layer for layer in last if profile.in_bulk[layer, 1]],
            "windowed": profile.windowable[::-1],
            "sliding": profile.sliding[::-1],
        }

        def saves(part: str, layer: int) -> bool:
            alone: dict[str, Any] = {PART_OF.get(part, part): (layer,)}
            return any(self.seconds(Candidate(**alone), n) < (1 - 1e-6) * takes for n, takes in whole.items())

        self.layers = {part: tuple(layer for layer in of if saves(part, layer)) for part, of in layers.items()}

    def plan(self, candidate: Candidate) -> SkipPlan:
        """Return the plan for prompts of ``judged_at`` tokens. Its windows have as many tokens in shorter prompts."""
        request = PlanRequest(mode="prompt", window_size=self._window_size(candidate))
        plan = compensated_plan(self.profile, candidate.skip(self.profile.n_layer), request, "tuned")
        assert plan.bulk is not None
        # Without maps too, so that the judge cuts the prompts of all plans alike.
        return replace(plan, bulk=replace(plan.bulk, windowed=candidate.windowed, refit=DEFAULT_REFIT))

    def seconds(self, candidate: Candidate, context: int) -> float:
        none, size = SkipSet.none(self.profile.n_layer), self._window_size(candidate)
        judged = Bulk(none, windowed=candidate.windowed, window_size=size, refit=DEFAULT_REFIT)
        around = judged.scaled(context, self.judged_at)
        return self.cost.seconds(candidate.skip(self.profile.n_layer), context, "bulk", around=around)

    def speedup(self, candidate: Candidate, context: int) -> float:
        return self.cost.seconds(None, context, "prefill") / self.seconds(candidate, context)

    def _window_size(self, candidate: Candidate) -> int:
        """Return the window that is the set's share of a judged prompt together with the head."""
        return self.judged_at // candidate.share - DEFAULT_HEAD
