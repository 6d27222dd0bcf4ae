"""Which plan a request runs under."""

from functools import lru_cache
from typing import Any

from ..errors import RequestError
from ..files import content_hash
from ..model.plan import SkipPlan
from ..model.promise import Tuning
from ..planning.profile import Profile
from ..planning.request import PlanRequest

_LEAST_CONTEXT = 1024
"""Tokens: shorter prompts get the plan for so many, as a shorter one has too little bulk for most speed-ups."""

WISHES = '"auto", "none", {"speedup": 1.5} or {"max_loss": 0.02}'


class Plans:
    """The plans that a server has: its own, and those that a profile gives for a speed-up.

    Args:
        own: what ``"auto"`` means, None for the whole model.
        tuning: what was measured of ``own``, if `tune` wrote it.
        profile: where a speed-up is planned from, None if there is no profile.
        most: tokens of the context.
    """

    def __init__(self, own: SkipPlan | None, tuning: Tuning | None, profile: Profile | None, most: int) -> None:
        self.own, self.tuning, self.profile, self.most = own, tuning, profile, most
        self._for_speedup = lru_cache(32)(self._plan_for_speedup)

    def choose(self, wish: Any, n_tokens: int) -> tuple[SkipPlan | None, str]:
        """Return the plan for a prompt, None for the whole model, and what it is called.

        A speed-up is planned for the next power of two of tokens, so that a chat keeps its plan, and with it what was
        read, while it grows.

        Raises:
            RequestError: the wish is none, or cannot be met.
            PlanError: a speed-up cannot be had.
        """
        check_wish(wish)
        if wish == "none":
            return None, "none"
        if wish == "auto":
            return self.own, "none" if self.own is None else "auto"
        ((kind, value),) = wish.items()
        if kind == "max_loss":
            measured = None if self.tuning is None or self.tuning.unbiased is False else self.tuning.loss.value
            if self.own is None or measured is None or measured > value:
                return None, "none"
            return self.own, f"auto, an added loss of {measured:.3f} nats per token as measured by tune"
        context = min(max(1 << (n_tokens - 1).bit_length(), _LEAST_CONTEXT), self.most)
        return self._for_speedup(float(value), context), f"speedup {value:g} at {context} tokens"

    def _plan_for_speedup(self, speedup: float, context: int) -> SkipPlan | None:
        if self.profile is None:
            raise RequestError(
                "a speed-up is planned from a profile, and there is none beside the model; write one with "
                "`adaskip-cpp calibrate MODEL -o X.adaskip.json` for X.gguf, and start the server again"
            )
        plan = self.profile.plan(PlanRequest(mode="prompt", speedup=speedup, context=context))
        return None if plan.is_whole else plan


def check_wish(wish: Any) -> None:
    """Refuse what is no wish."""
    match wish:
        case {"speedup": bool()} | {"max_loss": bool()}:
            pass
        case "auto" | "none":
            return
        case {"speedup": int() | float() as value} if len(wish) == 1 and 1 <= value <= 100:
            return
        case {"max_loss": int() | float() as value} if len(wish) == 1 and 0 <= value <= 100:
            return
    raise RequestError(f"adaskip.plan is {wish!r}; use one of: {WISHES}")


def plan_key(plan: SkipPlan | None) -> str:
    """Return a name of what a plan skips: equal for equal plans, in every process."""
    return "whole" if plan is None else content_hash(plan)
