"""adaskip_cpp.planning.strategies: the smallest budget that reaches a speed-up, and what is out of reach."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracles.costs import cost_model
from oracles.profiles import NAN, maps, profile

from adaskip_cpp.errors import BudgetError, PlanError
from adaskip_cpp.planning.request import PlanRequest

RISING = np.linspace(0.5, 0.99, 24).reshape(12, 2)
COSTS = cost_model(1, [1] * 12, [2] * 12, size=64, kept=[0.5] * 12)
UNLIKE = cost_model(fixed=100.0, attention=[100, 200, 400], ffn=[200, 200, 200], size=256)
"""A decoded token takes a hundredth of a ubatch: 1 s for the rest, then attention (1, 2, 4), FFN (2, 2, 2)."""
GROWING = cost_model(1, [1] * 4, [1] * 4, size=64, growth=[0.01] * 4, kept=[0.5] * 4)
"""The time of attentions is nearly all growth with the context, which windows save."""


@pytest.mark.parametrize("strategy", ["adaskip", "early_exit", "skip_decode"])
@pytest.mark.parametrize(("mode", "phase"), [("prompt", "bulk"), ("prefill", "prefill"), ("decode", "decode")])
def test_a_speed_up_takes_the_fewest_sublayers_that_reach_it(mode: Any, phase: Any, strategy: str) -> None:
    known, step = profile(RISING, cost=COSTS), 1 if strategy == "adaskip" else 2
    timed: Any = "decode" if mode == "decode" else "prefill"
    for speedup in (1.0, 1.1, 1.3, 1.7):
        plan = known.plan(mode=mode, strategy=strategy, speedup=speedup, context=1000)
        n_skip = plan.skipped(phase).n_skip
        assert plan == known.plan(n_skip, mode=mode, strategy=strategy) and (n_skip == 0) == (speedup == 1.0)
        assert COSTS.speedup(plan, 1000, timed) >= speedup
        if n_skip:
            fewer = known.plan(n_skip - step, mode=mode, strategy=strategy)
            assert COSTS.speedup(fewer, 1000, timed) < speedup
    assert all(known.plan(mode=mode, speedup=1, context=context).is_whole for context in (1, 69, 100, 513))


def test_tokens_that_maps_are_fitted_to_count() -> None:
    known = profile(RISING, cost=COSTS, maps=maps(12))
    for compensation, refit in (("linear", 128), ("affine", 0)):
        plan = known.plan(speedup=1.3, context=1000, compensation=compensation)
        fewer = known.plan(plan.skipped("bulk").n_skip - 1, compensation=compensation)
        assert plan.bulk is not None and plan.bulk.refit == refit
        assert COSTS.speedup(fewer, 1000, "prefill") < 1.3 <= COSTS.speedup(plan, 1000, "prefill")


def test_a_speed_up_out_of_reach_is_refused_with_what_can_be_reached_and_one_without_costs() -> None:
    """A token takes 14 s. The rest and the attention that cannot be skipped take 5 s of them."""
    np.testing.assert_allclose(UNLIKE.seconds_saved(256, "decode"), [[1, 2], [2, 2], [4, 2]])
    similarity = np.full((3, 2), 0.9)
    similarity[2, 0] = NAN
    known = profile(similarity, cost=UNLIKE)
    with pytest.raises(BudgetError, match=r"5 sublayers.* 5 s instead of 14 s; ask for a speed-up of at most 2\.80"):
        known.plan(speedup=2.9, context=256, mode="decode")
    assert known.plan(speedup=2.8, context=256, mode="decode").decode.n_skip == 5
    with pytest.raises(BudgetError, match="unified_skipping cannot make a prompt 50 times faster"):
        profile(RISING, cost=COSTS).plan(strategy="unified_skipping", speedup=50, context=1000)
    with pytest.raises(PlanError, match="calibrate again, or give n_skip"):
        profile(RISING).plan(speedup=1.2, context=100)


def test_windows_make_speed_ups_possible_that_skipping_alone_does_not_reach() -> None:
    similarity = np.full((4, 2), NAN)
    similarity[3] = 0.9
    known = profile(similarity, cost=GROWING, windowable=(0, 1, 2))
    with pytest.raises(BudgetError, match="at most"):
        known.plan(mode="prompt", speedup=1.5, context=8000)
    plan = known.plan(mode="prompt", speedup=1.5, context=8000, windowed=3)
    assert plan.narrowed == (0, 1, 2) and GROWING.speedup(plan, 8000, "prefill") >= 1.5


def test_a_window_is_an_eighth_of_the_prompt_whatever_chooses_the_plan() -> None:
    known = profile(np.full((4, 2), 0.9), cost=GROWING, windowable=(0, 1, 2, 3))
    request = PlanRequest(mode="prompt", windowed=2)
    for wanted, size in (
        (replace(request, speedup=1.3, context=8000, strategy="early_exit"), 1020),
        (replace(request, n_skip=1).at(8000), 1020),
        (replace(request, n_skip=1, window_size=9).at(8000), 9),
        (replace(request, n_skip=1), 252),
    ):
        bulk = known.plan(wanted).bulk
        assert bulk is not None and bulk.window_size == size
    for wanted in (PlanRequest(n_skip=0), PlanRequest(speedup=1.2, context=100)):
        with pytest.raises(BudgetError, match="4 attentions can look back at a window, not 5; ask for at most 4"):
            known.plan(replace(wanted, windowed=5))
