"""adaskip_cpp.planning.profile: planning in every mode and for a speed-up."""

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

# --- planning ---------------------------------------------------------------------------------------------------------


def test_the_most_similar_sublayers_of_both_kinds_are_skipped_first() -> None:
    plan = EXAMPLE.plan(3, mode="e2e")
    assert (plan.prefill.attention, plan.prefill.ffn) == ((1,), (0, 2))
    assert plan.prefill == plan.decode
    assert (plan.model, plan.strategy, plan.compensation) == (EXAMPLE.model, "adaskip", "affine")


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


def test_linear_takes_the_maps_of_the_profile_in_every_mode() -> None:
    assert MAPPED_EXAMPLE.maps is not None
    for mode in ("prefill", "decode", "e2e"):
        plan = MAPPED_EXAMPLE.plan(3, mode=mode)
        assert plan.compensation == "linear"
        assert (plan.decode.scale[plan.decode.skip] == 0.75**0.5).all(), "of prefill, where the maps were fitted"
        assert plan.decode.bias is None
        for name in ("down", "up"):
            skipped = getattr(plan.decode, name)[plan.decode.skip]
            np.testing.assert_array_equal(skipped, getattr(MAPPED_EXAMPLE.maps, name)[:, :2][plan.decode.skip])
        assert plan.prefill == (SkipSet.none(3) if mode == "decode" else plan.decode)
        assert plan.online is None or plan.online.scale == "median"


def test_without_maps_linear_is_affine_by_name_too() -> None:
    assert EXAMPLE.plan(3, compensation="linear", mode="e2e") == EXAMPLE.plan(3, compensation="affine", mode="e2e")
    assert EXAMPLE.plan(3, compensation="linear", mode="e2e").compensation == "affine"


# --- modes and the online stage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["prefill", "e2e"])
def test_the_fixed_set_holds_in_both_phases(mode: Any) -> None:
    plan = EXAMPLE.plan(3, compensation="paper", mode=mode)
    assert plan.prefill == plan.decode and plan.mode == mode
    assert (plan.decode.scale[plan.decode.skip] == 1.5).all(), "from prefill, where the set is first used"


def test_decode_mode_runs_the_full_model_in_prefill() -> None:
    plan = EXAMPLE.plan(3, compensation="paper", mode="decode")
    assert plan.prefill == SkipSet.none(3) and plan.mode == "decode"
    np.testing.assert_array_equal(plan.decode.skip, EXAMPLE.plan(3, mode="e2e").prefill.skip)
    assert (plan.decode.scale[plan.decode.skip] == 1.2).all(), "from decode"


def test_sublayers_are_ranked_by_prefill_in_every_mode() -> None:
    other = statistics([[0.9, 0.1], [0.1, 0.1]])
    known = profile([[0.1, 0.1], [0.1, 0.9]], decode=other)
    for mode in ("prefill", "decode", "e2e"):
        assert known.plan(1, mode=mode).decode.ffn == (1,)


def test_the_online_threshold_is_the_nth_largest_similarity() -> None:
    for n, threshold in ((1, 0.99), (2, 0.99), (3, 0.9), (4, 0.7), (5, 0.5)):
        for mode in ("decode", "e2e"):
            assert EXAMPLE.plan(n, compensation="paper", mode=mode).online == OnlineStage(20, threshold, "paper")


def test_the_online_stage_can_be_set_or_left_out() -> None:
    assert EXAMPLE.plan(3, online=False, mode="e2e").online is None
    assert EXAMPLE.plan(3, mode="prefill").online is None
    assert EXAMPLE.plan(0, mode="e2e").online is None, "nothing is to be skipped"


# --- speed-ups --------------------------------------------------------------------------------------------------------


COSTED = profile([[0.97, 0.9], [0.93, 0.8], [0.9, 0.95]], cost=cost_model(2, [1, 1, 1], [1, 2, 3], size=100))
"""Layers cost 2, 3 and 4 of 11 s; at 100 tokens 2, 3 and 1 of 8 s, as only the last token runs the last FFN."""


def test_a_baseline_skips_layers_until_the_speed_up_is_reached() -> None:
    assert COSTED.plan(strategy="early_exit", speedup=1.1, context=100, mode="e2e").prefill.ffn == (2,)
    assert COSTED.plan(strategy="early_exit", speedup=1.2, context=100, mode="e2e").prefill.ffn == (1, 2)
    plan = COSTED.plan(strategy="skip_decode", speedup=1.6, context=100, mode="decode")
    assert plan.skipped("decode").ffn == (1, 2), "decode is the phase of mode decode; the last set counts"
    with pytest.raises(BudgetError, match="early_exit"):
        COSTED.plan(strategy="early_exit", speedup=6, context=100, mode="e2e")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensation": "best"}, "'best'.*none, paper, median, affine"),
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
        *(({name: 8}, f"mode 'e2e' takes no {name}; leave it out") for name in ("head", "tail", "windowed")),
        ({"ffn": [1]}, "strategy='manual'"),
    ],
)
def test_arguments_that_are_impossible_or_do_not_go_together_are_refused(options: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        COSTED.plan(**{"mode": "e2e", **options})


def test_a_request_says_it_all() -> None:
    request = PlanRequest(2, mode="decode", compensation="paper")
    assert COSTED.plan(request) == COSTED.plan(2, mode="decode", compensation="paper")
    assert COSTED.plan(request, mode="e2e") == COSTED.plan(2, mode="e2e", compensation="paper")
    assert (
        PlanRequest(speedup=1.3).at(10)
        == PlanRequest(speedup=1.3, context=10)
        == PlanRequest(speedup=1.3, context=10).at(99)
    )
    assert PlanRequest(2).at(10) == PlanRequest(2)


def test_a_speed_up_needs_a_cost_model() -> None:
    with pytest.raises(PlanError, match="calibrate again, or give n_skip"):
        EXAMPLE.plan(speedup=1.2, context=100, mode="e2e")
