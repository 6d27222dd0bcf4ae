"""adaskip_cpp.planning.profile: planning in every mode and for a speed-up."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.profiles import NAN, maps, profile, statistics

from adaskip_cpp import Profile
from adaskip_cpp.errors import (
    BudgetError,
    CompensationError,
    PlanError,
)
from adaskip_cpp.model.plan import OnlineStage
from adaskip_cpp.model.skip_set import SkipSet
from adaskip_cpp.planning.request import PlanRequest


@pytest.fixture
def mapped(example: Profile) -> Profile:
    return replace(example, maps=maps())


@pytest.fixture
def example() -> Profile:
    return profile([[0.5, 0.9], [0.99, NAN], [0.7, 0.99]])


# --- planning ---------------------------------------------------------------------------------------------------------


def test_the_most_similar_sublayers_of_both_kinds_are_skipped_first(example: Profile) -> None:
    plan = example.plan(3, mode="e2e")
    assert (plan.prefill.attention, plan.prefill.ffn) == ((1,), (0, 2))
    assert plan.prefill == plan.decode
    assert (plan.model, plan.strategy, plan.compensation) == (example.model, "adaskip", "affine")


def test_ties_go_to_attention_and_then_to_the_lower_layer() -> None:
    tied = profile(np.full((3, 2), 0.9))
    chosen = [(tied.plan(n, mode="e2e").prefill.attention, tied.plan(n, mode="e2e").prefill.ffn) for n in range(7)]
    attention = [(), (0,), (0, 1), (0, 1, 2)]
    assert chosen == [(a, ()) for a in attention] + [((0, 1, 2), f) for f in attention[1:]]


@given(st.lists(st.tuples(*[st.one_of(st.just(NAN), st.sampled_from([0.1, 0.5, 0.9]))] * 2), min_size=1), st.data())
def test_the_choice_is_a_stable_sort(similarity: list[tuple[float, float]], data: st.DataObject) -> None:
    ranked = sorted(
        (-value, kind, layer)
        for layer, row in enumerate(similarity)
        for kind, value in enumerate(row)
        if value == value
    )
    n = data.draw(st.integers(0, len(ranked)))
    plan = profile(similarity).plan(n, mode="e2e")
    expected = {(layer, kind) for _, kind, layer in ranked[:n]}
    assert {(layer, 0) for layer in plan.prefill.attention} | {(layer, 1) for layer in plan.prefill.ffn} == expected


def test_twelve_sublayers_end_to_end_with_the_best_compensation_by_default() -> None:
    plan = profile(np.full((8, 2), 0.9)).plan(mode="e2e")
    assert (plan.prefill.n_skip, plan.compensation, plan.mode) == (12, "affine", "e2e")


@pytest.mark.parametrize(("name", "scale"), [("paper", 1.5), ("none", 1.0), ("median", 0.75)])
def test_compensation(example: Profile, name: str, scale: float) -> None:
    plan = example.plan(2, compensation=name, mode="e2e")
    assert (plan.prefill.scale[plan.prefill.skip] == scale).all()
    assert plan.compensation == name
    assert plan.prefill.bias is None


def test_affine_adds_the_mean_error_after_the_median(example: Profile) -> None:
    plan = example.plan(2, compensation="affine", mode="e2e")
    assert plan.prefill.bias is not None
    assert example.prefill.mean_u is not None and example.prefill.mean_v is not None
    for layer, kind in ((1, 0), (2, 1)):
        error = example.prefill.mean_v[layer, kind] - 0.75 * example.prefill.mean_u[layer, kind]
        np.testing.assert_allclose(plan.prefill.bias[layer, kind], error, rtol=1e-6)
        assert plan.prefill.scale[layer, kind] == 0.75


def test_linear_takes_the_maps_of_the_profile_in_every_mode(mapped: Profile) -> None:
    assert mapped.maps is not None
    for mode in ("prefill", "decode", "e2e"):
        plan = mapped.plan(3, mode=mode)
        assert plan.compensation == "linear"
        assert (plan.decode.scale[plan.decode.skip] == 0.75**0.5).all(), "of prefill, where the maps were fitted"
        assert plan.decode.bias is None
        for name in ("down", "up"):
            skipped = getattr(plan.decode, name)[plan.decode.skip]
            np.testing.assert_array_equal(skipped, getattr(mapped.maps, name)[:, :2][plan.decode.skip])
        assert plan.prefill == (SkipSet.none(3) if mode == "decode" else plan.decode)
        assert plan.online is None or plan.online.scale == "median"


def test_without_maps_linear_is_affine_by_name_too(example: Profile) -> None:
    assert example.plan(3, compensation="linear", mode="e2e") == example.plan(3, compensation="affine", mode="e2e")
    assert example.plan(3, compensation="linear", mode="e2e").compensation == "affine"


# --- modes and the online stage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["prefill", "e2e"])
def test_the_fixed_set_holds_in_both_phases(example: Profile, mode: Any) -> None:
    plan = example.plan(3, compensation="paper", mode=mode)
    assert plan.prefill == plan.decode and plan.mode == mode
    assert (plan.decode.scale[plan.decode.skip] == 1.5).all(), "from prefill, where the set is first used"


def test_decode_mode_runs_the_full_model_in_prefill(example: Profile) -> None:
    plan = example.plan(3, compensation="paper", mode="decode")
    assert plan.prefill == SkipSet.none(3) and plan.mode == "decode"
    np.testing.assert_array_equal(plan.decode.skip, example.plan(3, mode="e2e").prefill.skip)
    assert (plan.decode.scale[plan.decode.skip] == 1.2).all(), "from decode"


def test_sublayers_are_ranked_by_prefill_in_every_mode() -> None:
    other = statistics([[0.9, 0.1], [0.1, 0.1]])
    known = profile([[0.1, 0.1], [0.1, 0.9]], decode=other)
    for mode in ("prefill", "decode", "e2e"):
        assert known.plan(1, mode=mode).decode.ffn == (1,)


def test_the_online_threshold_is_the_nth_largest_similarity(example: Profile) -> None:
    for n, threshold in ((1, 0.99), (2, 0.99), (3, 0.9), (4, 0.7), (5, 0.5)):
        for mode in ("decode", "e2e"):
            assert example.plan(n, compensation="paper", mode=mode).online == OnlineStage(20, threshold, "paper")


def test_the_online_stage_can_be_set_or_left_out(example: Profile) -> None:
    assert example.plan(3, online=False, mode="e2e").online is None
    assert example.plan(3, mode="prefill").online is None
    assert example.plan(0, mode="e2e").online is None, "nothing is to be skipped"


@pytest.mark.parametrize("n_skip", [-1, 6, 2.5, "two"])
def test_an_impossible_budget_is_refused_and_the_maximum_told(example: Profile, n_skip: Any) -> None:
    with pytest.raises(BudgetError, match="0 to 5"):
        example.plan(n_skip, mode="e2e")
    assert example.plan(5, mode="e2e").prefill.n_skip == 5
    assert example.plan(np.int64(0), mode="e2e").prefill.n_skip == 0


def test_unknown_names_are_refused_and_the_known_told(example: Profile) -> None:
    with pytest.raises(CompensationError, match=r"'best'.*none, paper, median, affine"):
        example.plan(1, compensation="best", mode="e2e")
    with pytest.raises(PlanError, match=r"'best'.*adaskip"):
        example.plan(1, strategy="best", mode="e2e")
    with pytest.raises(PlanError, match=r"'best'.*prefill, decode, e2e"):
        example.plan(1, mode="best")  # type: ignore[arg-type]


# --- speed-ups --------------------------------------------------------------------------------------------------------


class FakeCost:
    """Attention costs its context, an FFN its layer's number plus one, the rest 2; [n_layer, 2] in all."""

    n_layer = 3

    def seconds(self, skip: Any, context: int, phase: str, around: Any = None) -> float:
        skip = np.zeros((3, 2), bool) if skip is None else skip
        each = np.stack([np.full(3, context / 100), np.arange(1.0, 4.0)], axis=1)
        return float((each * ~skip).sum() + 2) * (1 if phase == "prefill" else 0.01)

    def to_dict(self) -> dict[str, Any]:
        return {"fake": [1.5, 2]}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeCost)


@pytest.fixture
def costed() -> Profile:
    return profile([[0.97, 0.9], [0.93, 0.8], [0.9, 0.95]], cost=FakeCost())


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("context", [10, 100, 1000])
@pytest.mark.parametrize("speedup", [1, 1.1, 1.25, 1.5, 2.5])
@pytest.mark.parametrize("ranking", ["efficiency", "similarity"])
def test_a_speed_up_is_reached_with_nothing_to_spare(
    costed: Profile, ranking: Any, speedup: float, context: int, phase: Any
) -> None:
    cost = FakeCost()
    goal = cost.seconds(None, context, phase) / speedup
    skip = costed.plan(speedup=speedup, context=context, phase=phase, ranking=ranking, mode="e2e").decode.skip
    assert cost.seconds(skip, context, phase) <= goal
    if ranking == "similarity":  # the paper's ranking, cut off as early as it suffices
        n = int(skip.sum())
        np.testing.assert_array_equal(skip, costed.plan(n, mode="e2e").decode.skip)
        assert n == 0 or cost.seconds(costed.plan(n - 1, mode="e2e").decode.skip, context, phase) > goal
    else:  # no sublayer of it is skipped for nothing
        for sublayer in np.argwhere(skip):
            less = skip.copy()
            less[tuple(sublayer)] = False
            assert cost.seconds(less, context, phase) > goal


def test_a_cheap_attention_is_not_skipped_for_nothing_but_a_dear_one_is(costed: Profile) -> None:
    # The similarest sublayer is the attention of layer 0: of 2% of the time at 10 tokens, of 26% at 1,000.
    assert costed.plan(speedup=1.3, context=10, mode="e2e").prefill.attention == ()
    assert costed.plan(speedup=1.3, context=10, ranking="similarity", mode="e2e").prefill.attention == (0,)
    assert costed.plan(speedup=1.3, context=1000, mode="e2e").prefill.attention == (0,)


def test_the_choice_loses_little_more_than_the_best_of_all(costed: Profile) -> None:
    lost = 1 - costed.similarity
    for speedup in (1.1, 1.25, 1.5, 2):
        goal = FakeCost().seconds(None, 100, "prefill") / speedup
        best = np.inf
        for n in range(7):
            for chosen in combinations(range(6), n):
                skip = np.isin(np.arange(6), chosen).reshape(3, 2)
                if FakeCost().seconds(skip, 100, "prefill") <= goal:
                    best = min(best, lost[skip].sum())
        assert lost[costed.plan(speedup=speedup, context=100, mode="e2e").prefill.skip].sum() <= 1.5 * best


def test_a_baseline_skips_layers_until_the_speed_up_is_reached(costed: Profile) -> None:
    # At 100 tokens layers cost 2, 3 and 4 of 11 s.
    assert costed.plan(strategy="early_exit", speedup=1.5, context=100, mode="e2e").prefill.ffn == (2,)
    assert costed.plan(strategy="early_exit", speedup=1.6, context=100, mode="e2e").prefill.ffn == (1, 2)
    plan = costed.plan(strategy="skip_decode", speedup=1.6, context=100, mode="decode")
    assert plan.skipped("decode").ffn == (1, 2), "decode is the phase of mode decode; the last set counts"


def test_a_speed_up_out_of_reach_tells_how_far_one_can_go(costed: Profile) -> None:
    for ranking in ("efficiency", "similarity"):
        with pytest.raises(BudgetError, match=r"6 sublayers .* 2 s instead of 11 s.*at most 5\.50"):
            costed.plan(speedup=6, context=100, ranking=ranking, mode="e2e")
    assert costed.plan(speedup=5.5, context=100, mode="e2e").prefill.n_skip == 6
    with pytest.raises(BudgetError, match="early_exit"):
        costed.plan(speedup=6, context=100, strategy="early_exit", mode="e2e")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speedup": 1.2}, "give context"),
        ({"speedup": 1.2, "context": 0}, "give context"),
        ({"speedup": 0.9, "context": 10}, "from 1 on"),
        ({"speedup": NAN, "context": 10}, "from 1 on"),
        ({"speedup": 1.2, "context": 10, "n_skip": 3}, "two budgets"),
        ({"context": 10}, "give speedup too"),
        ({"phase": "decode"}, "give speedup too"),
        ({"speedup": 1.2, "context": 10, "phase": "both"}, "'prefill' or 'decode'"),
        ({"speedup": 1.2, "context": 10, "ranking": "best"}, "'efficiency' or 'similarity'"),
        ({"speedup": 1.2, "context": 10, "mode": "decode", "phase": "prefill"}, "phase='decode'"),
        ({"speedup": 1.2, "context": 10, "strategy": "manual", "ffn": [1]}, "leave speedup out"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(costed: Profile, options: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        costed.plan(**{"mode": "e2e", **options})


def test_a_request_says_it_all_and_names_itself_for_tables(costed: Profile) -> None:
    request = PlanRequest(2, mode="decode", compensation="paper")
    assert costed.plan(request) == costed.plan(2, mode="decode", compensation="paper")
    assert costed.plan(request, mode="e2e") == costed.plan(2, mode="e2e", compensation="paper")
    assert (
        PlanRequest(speedup=1.3).at(10)
        == PlanRequest(speedup=1.3, context=10)
        == PlanRequest(speedup=1.3, context=10).at(99)
    )
    assert PlanRequest(2).at(10) == PlanRequest(2)
    by_hand = PlanRequest(strategy="manual", attention=[1, 2], ffn=(0,))  # type: ignore[arg-type]
    requests = (PlanRequest(), PlanRequest(7), PlanRequest(speedup=1.25, strategy="early_exit"), by_hand)
    assert [each.name for each in requests] == ["adaskip 12", "adaskip 7", "early_exit 1.25 x", "2 attention, 1 FFN"]


def test_a_speed_up_needs_a_cost_model(example: Profile) -> None:
    with pytest.raises(PlanError, match="calibrate again, or give n_skip"):
        example.plan(speedup=1.2, context=100, mode="e2e")
