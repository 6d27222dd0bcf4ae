"""Which plan a request runs under."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import RequestError
from ..files import content_hash
from ..model.frontier import Frontier, Point, context_for
from ..model.plan import SkipPlan
from ..planning.profile import Profile
from ..planning.request import PlanRequest

_LEAST_CONTEXT = 1024
"""Tokens: shorter prompts get the plan for so many, as a shorter one has too little bulk for most speed-ups."""

WISHES = '"auto", "none", {"speedup": 1.5} or {"max_loss": 0.02}'


@dataclass(frozen=True)
class Choice:
    """What a request runs under: a plan, None for the whole model, what else it may read, and what that is called."""

    plan: SkipPlan | None = None
    name: str = "none"
    readable: tuple[SkipPlan, ...] = ()


class Plans:
    """The plans that a server has: a frontier or one plan, and those that a profile gives for a speed-up.

    Args:
        own: what ``"auto"`` means where there is no frontier, None for the whole model.
        frontier: what `tune` found, or None.
        max_loss: what ``"auto"`` promises of it, in nats per token.
        profile: where a speed-up is planned from without a frontier, None if there is no profile.
        most: tokens of the context.
    """

    def __init__(
        self, own: SkipPlan | None, frontier: Frontier | None, max_loss: float, profile: Profile | None, most: int
    ) -> None:
        self.own, self.frontier, self.max_loss, self.profile, self.most = own, frontier, max_loss, profile, most
        self._for_speedup = lru_cache(32)(self._plan_for_speedup)

    def choose(self, wish: Any, n_tokens: int) -> Choice:
        """Return what a prompt of so many tokens runs under.

        A speed-up is planned for the next power of two of tokens, so that a chat keeps its plan, and with it what was
        read, while it grows.

        Raises:
            RequestError: the wish is none, or cannot be met.
            PlanError: a speed-up cannot be had.
        """
        check_wish(wish)
        if wish == "none":
            return Choice()
        if wish == "auto":
            return self._promised(self.max_loss, n_tokens) if self.frontier else Choice(self.own, _name(self.own))
        ((kind, value),) = wish.items()
        if kind == "max_loss":
            return self._promised(float(value), n_tokens)
        if self.frontier is not None:
            return self._as_fast(float(value), n_tokens)
        context = min(max(context_for(n_tokens), _LEAST_CONTEXT), self.most)
        return Choice(self._for_speedup(float(value), context), f"speedup {value:g} at {context} tokens")

    def point(self, wish: Any, n_tokens: int) -> Point | None:
        """Return the point of the frontier that ``"auto"`` or a promise chooses."""
        max_loss = wish["max_loss"] if isinstance(wish, dict) and "max_loss" in wish else self.max_loss
        return None if self.frontier is None or wish == "none" else self.frontier.point(n_tokens, max_loss)

    def _promised(self, max_loss: float, n_tokens: int) -> Choice:
        if self.frontier is None:
            return Choice()
        plan = self.frontier.choose(n_tokens, max_loss)
        name = "none" if plan is None else f"auto, a loss of at most {max_loss:g} nats per token"
        return Choice(plan, name, self.frontier.readable(max_loss, self.most))

    def _as_fast(self, speedup: float, n_tokens: int) -> Choice:
        """The point that loses least of those that are predicted to be as fast, with what loses no more."""
        assert self.frontier is not None
        context = context_for(n_tokens)
        fast = [point for point in self.frontier.points if point.speedup(context) >= speedup]
        if not fast:
            most = max((point.speedup(context) for point in self.frontier.points), default=1.0)
            raise RequestError(f"no plan is {speedup:g} times as fast at {context} tokens; ask for at most {most:.2f}")
        point = min(fast, key=lambda each: each.harm(context))
        return Choice(point.plan_for(context), f"speedup {speedup:g} at {context} tokens")

    def _plan_for_speedup(self, speedup: float, context: int) -> SkipPlan | None:
        if self.profile is None:
            raise RequestError(
                "a speed-up is planned from a profile, and there is none beside the model; write one with "
                "`adaskip-cpp calibrate MODEL -o X.adaskip.json` for X.gguf, and start the server again"
            )
        plan = self.profile.plan(PlanRequest(mode="prompt", speedup=speedup, context=context))
        return None if plan.is_whole else plan


def _name(plan: SkipPlan | None) -> str:
    return "none" if plan is None else "auto"


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


@lru_cache(128)
def plan_key(plan: SkipPlan | None) -> str:
    """Return a name of what a plan skips: equal for equal plans, in every process."""
    return "whole" if plan is None else content_hash(plan)
