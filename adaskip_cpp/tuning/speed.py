"""Measures how many times as fast a plan is as the full model."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Literal

from ..engine.llama import AdaSkipLlama
from ..intervals import ratio_interval
from ..measuring.timing import RequestTime, in_turn, time_request
from ..model.plan import SkipPlan
from ..model.promise import SpeedUp


def measure_speed(
    llm: AdaSkipLlama,
    plan: SkipPlan,
    prompt: Sequence[int],
    n_answer: int,
    *,
    n_rounds: int = 5,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[SpeedUp, ...]:
    """Time ``n_rounds`` requests of the full model and of a plan in turn, after one of each that is not counted.

    The model's context must hold the prompt and ``n_answer`` tokens behind the answer's first one; its plan is changed.
    Returned is how many times as fast the plan reaches the first token, decodes, and answers the whole request; the
    first alone if ``n_answer`` is 0. ``on_progress`` is called with the fraction of the work done.
    """
    times: tuple[list[RequestTime], list[RequestTime]] = ([], [])
    for n_round in range(-1, n_rounds):
        for which in in_turn(2, max(n_round, 0)):
            llm.set_plan(plan if which else None)
            time = time_request(llm, prompt, n_answer)
            if n_round >= 0:
                times[which].append(time)
            if on_progress is not None:
                on_progress((2 * n_round + 3) / (2 * n_rounds + 2))
    llm.reset()

    def faster(of: Literal["first token", "decode", "request"], seconds: Callable[[RequestTime], float]) -> SpeedUp:
        full, own = (list(map(seconds, side)) for side in times)
        return SpeedUp(of, len(prompt), n_answer, ratio_interval(full, own), (median(full), median(own)))

    first = faster("first token", lambda time: time.first_token_s)
    if n_answer == 0:
        return (first,)
    return (
        first,
        faster("decode", lambda time: time.per_token_s()),
        faster("request", lambda time: time.first_token_s + sum(time.token_s)),
    )
