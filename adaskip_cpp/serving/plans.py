"""Chooses the plan for a request. Start at :meth:`Plans.choose`."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import RequestError
from ..files import content_hash
from ..model.edits import Edits
from ..model.frontier import LEAST_CONTEXT, Frontier, Point, context_for
from ..model.plan import SkipPlan

WISHES = '"auto", "none", {"speedup": 1.5} or {"max_loss": 0.02}'


@dataclass(frozen=True)
class Choice:
    """The plan for a request."""

    plan: SkipPlan | None = None  # None for the whole model
    name: str = "none"
    readable: tuple[SkipPlan, ...] = ()  # plans whose KV cells this plan may read too
    max_loss: float | None = None  # the promise that chose the plan from a frontier, in nats per token
    point: Point | None = None  # the frontier's point with the plan
    speedup: float | None = None  # of the point, predicted for the length of the prompt; 2: twice as fast
    edits: Edits | None = None  # how runs of an earlier prompt may be moved, if the frontier decides; None: not at all


@dataclass(eq=False)
class Plans:
    """The plans of a server: those of a frontier, or one plan."""

    own: SkipPlan | None  # the plan for "auto" without a frontier; None for the whole model
    frontier: Frontier | None  # the plans that `tune` found
    max_loss: float  # the promise for "auto" with a frontier, in nats per token
    most: int  # tokens in the context

    def choose(self, wish: Any, n_tokens: int, *, edited: bool = False) -> Choice:
        """Return the plan for a prompt of ``n_tokens`` tokens and a ``wish`` that passed :func:`check_wish`. ``edited``
        allows moving runs of an earlier prompt, if that keeps the promise. Raises RequestError if no plan meets it.
        """
        if wish == "none":
            return Choice()
        frontier, asks_speedup = self.frontier, "speedup" in wish
        if frontier is None and asks_speedup:
            raise RequestError("a speed-up needs the plans of `adaskip-cpp tune`; run it, and start the server again")
        if frontier is None:  # the loss of the one plan was not measured, so it cannot keep a promise
            return Choice() if self.own is None or wish != "auto" else Choice(self.own, "auto")
        max_loss = float(*wish.values()) if isinstance(wish, dict) else self.max_loss
        if asks_speedup:
            max_loss, edited = _least_promise(frontier, max_loss, n_tokens), False
        plan = frontier.choose(n_tokens, max_loss, edited=edited)
        point = frontier.point(n_tokens, max_loss, edited=edited)
        moves = frontier.edit_point(n_tokens, max_loss) if edited else None
        name = "none" if point is None else f"promise {max_loss:.4g}"
        speedup = None if point is None else point.speedup(context_for(n_tokens))
        readable = frontier.readable(max_loss, self.most, edited=edited)
        return Choice(plan, name, readable, max_loss, point, speedup, None if moves is None else moves.edits)

    @property
    def listing(self) -> dict[str, Any]:
        """The frontier and its promise, for the list of models; {} without a frontier."""
        if self.frontier is None:
            return {}
        points = [
            {"loss_measured": each.harm(each.judged_at), "speedups_predicted": each.speedups}
            for each in self.frontier.points
        ]
        return {"adaskip": {"max_loss": self.max_loss, "points": points}}


def _least_promise(frontier: Frontier, speedup: float, n_tokens: int) -> float:
    """Return the least promise whose plan has the predicted speed-up; 0 for prompts too short for any plan."""
    context = context_for(n_tokens)
    if speedup <= 1 or n_tokens < LEAST_CONTEXT:
        return 0.0
    points = [each for each in frontier.points if math.isfinite(each.needs(context))]
    kept = [each.needs(context) for each in points if each.speedup(context) >= speedup]
    if not kept:
        most = max((each.speedup(context) for each in points), default=1.0)
        raise RequestError(f"no plan is {speedup:g} times as fast at {context} tokens; ask for at most {most:.4g}")
    return min(kept)


def check_wish(wish: Any) -> None:
    match wish:
        case "auto" | "none":
            return
        case {"speedup": int() | float() as value} if len(wish) == 1 and type(value) is not bool and 1 <= value <= 100:
            return
        case {"max_loss": int() | float() as value} if len(wish) == 1 and type(value) is not bool and 0 <= value <= 100:
            return
    raise RequestError(f"adaskip.plan is {wish!r}; use one of: {WISHES}")


@lru_cache(128)
def plan_key(plan: SkipPlan | None) -> str:
    """Return a name that is equal for equal plans, in every process."""
    return "whole" if plan is None else content_hash(plan)
