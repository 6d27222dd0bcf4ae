"""adaskip_cpp.planning.profile and request: what a request makes of a profile, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.costs import cost_model
from oracles.profiles import EXAMPLE, MAPPED_EXAMPLE, NAN, profile, statistics

from adaskip_cpp.errors import BudgetError, PlanError
from adaskip_cpp.model.plan import OnlineStage
from adaskip_cpp.model.skip_set import SkipSet
from adaskip_cpp.planning.request import PlanRequest


@given(st.lists(st.tuples(*[st.one_of(st.just(NAN), st.sampled_from([0.1, 0.5, 0.9]))] * 2), min_size=1), st.data())
def test_the_choice_is_a_stable_sort(similarity: list[tuple[float, float]], data: st.DataObject) -> None:
    ranked = sorted(
        (-value, kind, layer)
        for layer, row in enumerate(similarity)
        for kind, value in enumerate(row)
        if value == value
    )
    n = data.draw(st.integers(0, len(ranked)))
    plan = profile(similarity).plan(np.int64(n), mode="e2e")
    expected = {(layer, kind) for _, kind, layer in ranked[:n]}
    assert {(layer, 0) for layer in plan.prefill.attention} | {(layer, 1) for layer in plan.prefill.ffn} == expected


@pytest.mark.parametrize(("name", "scale"), [("paper", 1.5), ("none", 1.0), ("median", 0.75), ("affine", 0.75)])
def test_compensation(name: str, scale: float) -> None:
    plan = EXAMPLE.plan(2, compensation=name, mode="e2e")
    assert (plan.prefill.scale[plan.prefill.skip] == scale).all()
    assert plan.compensation == name
    assert (plan.prefill.bias is None) == (name != "affine")
    assert plan.online is not None and plan.online.scale == ("median" if name == "affine" else name)


def test_linear_takes_the_maps_of_the_profile_in_every_mode_and_without_maps_is_affine_by_name_too() -> None:
    linear, affine = (EXAMPLE.plan(3, compensation=name, mode="e2e") for name in ("linear", "affine"))
    assert linear == affine and linear.compensation == "affine"
    assert MAPPED_EXAMPLE.maps is not None
    for mode in ("prefill", "decode", "e2e"):
        plan = MAPPED_EXAMPLE.plan(3, mode=mode)
        assert plan.compensation == "linear"
        assert (plan.decode.scale[plan.decode.skip] == 0.75**0.5).all(), "of prefill, where the maps were fitted"
        assert plan.decode.bias is None
        for name in ("down", "up"):
            skipped = getattr(plan.decode, name)[plan.decode.skip]
            np.testing.assert_array_equal(skipped, getattr(MAPPED_EXAMPLE.maps, name)[:, :2][plan.decode.skip])
        assert plan.online is None or plan.online.scale == "median"


@pytest.mark.parametrize(("mode", "scale"), [("prefill", 1.5), ("e2e", 1.5), ("decode", 1.2)])
def test_the_most_similar_sublayers_are_skipped_in_the_phases_of_the_mode(mode: Any, scale: float) -> None:
    """The phase that first uses a set gives its compensation."""
    plan = EXAMPLE.plan(3, compensation="paper", mode=mode)
    assert (plan.mode, plan.model, plan.strategy) == (mode, EXAMPLE.model, "adaskip")
    assert plan.prefill == (SkipSet.none(3) if mode == "decode" else plan.decode)
    assert (plan.decode.attention, plan.decode.ffn) == ((1,), (0, 2))
    assert (plan.decode.scale[plan.decode.skip] == scale).all()


def test_sublayers_are_ranked_by_prefill_in_every_mode() -> None:
    other = statistics([[0.9, 0.1], [0.1, 0.1]])
    known = profile([[0.1, 0.1], [0.1, 0.9]], decode=other)
    for mode in ("prefill", "decode", "e2e"):
        assert known.plan(1, mode=mode).decode.ffn == (1,)


def test_the_online_threshold_is_the_nth_largest_similarity_and_the_stage_can_be_left_out() -> None:
    for n, threshold in ((1, 0.99), (2, 0.99), (3, 0.9), (4, 0.7), (5, 0.5)):
        for mode in ("decode", "e2e"):
            assert EXAMPLE.plan(n, compensation="paper", mode=mode).online == OnlineStage(20, threshold, "paper")
    assert EXAMPLE.plan(3, online=False, mode="e2e").online is None
    assert EXAMPLE.plan(3, mode="prefill").online is None
    assert EXAMPLE.plan(0, mode="e2e").online is None, "nothing is to be skipped"


COSTED = profile([[0.97, 0.9], [0.93, 0.8], [0.9, 0.95]], cost=cost_model(2, [1, 1, 1], [1, 2, 3], size=100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensation": "best"}, "'best'.*none, paper, median, affine"),
        ({"compensation": []}, "unknown compensation"),
        ({"strategy": "best"}, "'best'.*adaskip"),
        ({"mode": "best"}, "'best'.*prefill, decode, e2e"),
        ({"speedup": 1.2}, "give context"),
        ({"speedup": 1.2, "context": 0}, "give context"),
        ({"speedup": 1.2, "context": 10, "n_skip": 3}, "two budgets"),
        ({"context": 10}, "give speedup too"),
        ({"speedup": 1.2, "context": 10, "strategy": "manual", "ffn": [1]}, "leave speedup out"),
        *(({"mode": "prompt", "head": value}, "from 0 on") for value in (-1, 1.5)),
        ({"mode": "prompt", "tail": 0}, "from 1 on"),
        ({"mode": "prompt", "windowed": -1}, "windowed is -1; use a whole number from 0 on"),
        ({"mode": "prompt", "window_size": 0}, "window_size is 0; use a whole number from 1 on"),
        ({"head": 8, "windowed": 8}, "mode 'e2e' takes no head and no windowed; leave it out"),
        ({"ffn": [1]}, "strategy='manual'"),
    ],
)
def test_arguments_that_are_impossible_or_do_not_go_together_are_refused(options: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        COSTED.plan(**{"mode": "e2e", **options})


@pytest.mark.parametrize("speedup", [0.99, -1, NAN, math.inf, True, "2"])
def test_a_speed_up_that_is_none_is_refused(speedup: float) -> None:
    with pytest.raises(BudgetError, match="from 1 on"):
        PlanRequest(speedup=speedup)


def test_a_request_says_it_all() -> None:
    request = PlanRequest(2, mode="decode", compensation="paper")
    assert COSTED.plan(request) == COSTED.plan(2, mode="decode", compensation="paper")
    assert COSTED.plan(request, mode="e2e") == COSTED.plan(2, mode="e2e", compensation="paper")
    at_10 = PlanRequest(speedup=1.3, context=10)
    assert PlanRequest(speedup=1.3).at(10) == at_10 == at_10.at(99)
    assert PlanRequest(2).at(10) == PlanRequest(2)
