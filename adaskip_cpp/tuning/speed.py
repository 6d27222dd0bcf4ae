"""Measures how many times as fast a plan is as the full model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..intervals import Interval, ratio_interval
from ..measuring.timing import RequestTime, in_turn, time_request
from ..model.plan import SkipPlan
from ..model.promise import SpeedUp

if TYPE_CHECKING:
    from ..engine.llama import AdaSkipLlama

__all__ = ["measure_speed"]


def measure_speed(
    llm: AdaSkipLlama,
    plan: SkipPlan,
    prompt: Sequence[int],
    n_answer: int,
    *,
    n_rounds: int = 5,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[SpeedUp, ...]:
    """Time requests of the full model and of a plan in turn, after one of each that is not counted.

    Args:
        llm: the model; its context holds the prompt and the answer. Its plan is changed.
        plan: the plan.
        prompt: token ids.
        n_answer: tokens of the answer behind the first one, at least 1.
        n_rounds: requests of either.
        on_progress: called with the fraction of the work done.

    Returns:
        How many times as fast the plan reaches the first token, decodes, and answers the whole request.
    """
    contenders = (None, plan)
    times: tuple[list[RequestTime], list[RequestTime]] = ([], [])
    for n_round in range(-1, n_rounds):
        for which in in_turn(2, max(n_round, 0)):
            llm.set_plan(contenders[which])
            time = time_request(llm, prompt, n_answer)
            if n_round >= 0:
                times[which].append(time)
            if on_progress is not None:
                on_progress((2 * n_round + 3) / (2 * n_rounds + 2))
    llm.reset()

    def ratio(seconds: Callable[[RequestTime], float]) -> Interval:
        full, skipping = (list(map(seconds, side)) for side in times)
        return ratio_interval(full, skipping)

    return (
        SpeedUp("first token", len(prompt), n_answer, ratio(lambda time: time.first_token_s)),
        SpeedUp("decode", len(prompt), n_answer, ratio(lambda time: time.per_token_s())),
        SpeedUp("request", len(prompt), n_answer, ratio(lambda time: time.first_token_s + sum(time.token_s))),
    )
