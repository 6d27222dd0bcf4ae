"""adaskip_cpp.planning.profile: planning in every mode and for a speed-up, and the files."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cost import cost_model

from adaskip_cpp import Profile
from adaskip_cpp.errors import (
    BudgetError,
    CompensationError,
    PlanError,
    ProfileError,
    ProfileFormatError,
    ProfileMissingError,
    ProfileVersionError,
)
from adaskip_cpp.model.identity import ModelInfo
from adaskip_cpp.model.plan import OnlineStage
from adaskip_cpp.model.profile import Windows
from adaskip_cpp.model.skip_set import SkipSet
from adaskip_cpp.model.statistics import LinearMaps, PhaseStatistics
from adaskip_cpp.planning.request import PlanRequest

NAN = float("nan")


def statistics(similarity: Any, *, ratio: float = 1.5, **changes: Any) -> PhaseStatistics:
    similarity = np.array(similarity, float)
    observed = ~np.isnan(similarity)
    rng = np.random.default_rng(len(similarity))
    mean_u, mean_v = rng.normal(size=(2, *similarity.shape, 5)).astype(np.float32)
    fields = {
        "norm_ratio": np.where(observed, ratio, NAN),
        "median_ratio": np.where(observed, ratio / 2, NAN),
        "layer_similarity": similarity.mean(axis=1) if similarity.size else similarity,
        "mean_u": mean_u,
        "mean_v": mean_v,
        "n_tokens": 100,
        **changes,
    }
    return PhaseStatistics(similarity, **fields)


def profile(similarity: Any, **changes: Any) -> Profile:
    """A profile whose ratios are 1.5 and 0.75 in prefill, 1.2 and 0.6 in decode."""
    fields = {
        "prefill": statistics(similarity),
        "decode": statistics(similarity, ratio=1.2),
        "n_requests": 2,
        "n_tokens": 100,
        "model": ModelInfo("ab" * 32, "llama", len(similarity)),
        "corpus": "some text [with brackets], two pages",
        "package_version": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        **changes,
    }
    return Profile(**fields)


MAPPED = [0, 1, 2, 3, 6, 7, 8]
"""What :func:`maps` has maps of, counted over layers and columns."""


def maps(n_layer: int = 3, rank: int = 2, n_embd: int = 5) -> LinearMaps:
    """Random maps of all sublayers but one, the FFN of layer 1, and of the layers but this."""
    rng = np.random.default_rng(rank)
    shapes = (n_layer, 3, rank, n_embd), (n_layer, 3, n_embd, rank)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    for array in arrays:
        array[1, 1:] = NAN
    return LinearMaps(*arrays)


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


def test_affine_adds_the_mean_error_behind_the_median(example: Profile) -> None:
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


def test_profiles_are_equal_by_content_also_where_they_tell_divergence(example: Profile) -> None:
    alike = np.array(DIVERGENCE)
    one, other, third = (replace(example, divergence=alike, copying=value * alike) for value in (1, 2, 2))
    assert one == replace(one, divergence=alike.copy()) != other == third
    assert example != one and one != example
    assert replace(one, n_requests=9) != one


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


def test_a_name_that_no_request_has_is_refused_with_those_that_it_has(example: Profile) -> None:
    with pytest.raises(PlanError, match=r"no 'skip'; use some of: n_skip, speedup, .*, ffn"):
        example.plan(skip=3, mode="e2e")


def test_a_speed_up_needs_a_cost_model(example: Profile) -> None:
    with pytest.raises(PlanError, match="calibrate again, or give n_skip"):
        example.plan(speedup=1.2, context=100, mode="e2e")


# --- the object -------------------------------------------------------------------------------------------------------


def test_the_arrays_are_read_only_and_tell_what_is_skippable(example: Profile) -> None:
    with pytest.raises(ValueError, match="read-only"):
        example.similarity[0, 0] = 1
    np.testing.assert_array_equal(example.skippable, [[True, True], [True, False], [True, True]])


def test_a_profile_is_of_one_model(example: Profile) -> None:
    with pytest.raises(ProfileFormatError, match="4 layers, the model has 3"):
        replace(example, decode=statistics(np.ones((4, 2))))
    with pytest.raises(ProfileFormatError, match=r"lengths differ, 5 in prefill and 4 in decode.*calibrate again"):
        replace(example, decode=statistics(example.similarity, mean_u=np.ones((3, 2, 4)), mean_v=np.ones((3, 2, 4))))


@pytest.mark.parametrize("shape", [{"n_layer": 4}, {"n_layer": 2}, {"n_embd": 4}], ids=str)
def test_maps_are_of_the_profiles_model(example: Profile, shape: Any) -> None:
    with pytest.raises(ProfileFormatError, match=r"linear maps.*calibrate again"):
        replace(example, maps=maps(**shape))


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_profile_survives_its_files(example: Profile, tmp_path: Path) -> None:
    example.save(tmp_path / "p.json")
    loaded = Profile.load(str(tmp_path / "p.json"))
    assert loaded == example
    np.testing.assert_array_equal(loaded.similarity, example.similarity)
    np.testing.assert_array_equal(loaded.decode.mean_v, example.decode.mean_v)
    assert loaded.plan(3, mode="e2e") == example.plan(3, mode="e2e")
    assert sorted(os.listdir(tmp_path)) == ["p.bin", "p.json"]


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_linear_maps_survive_the_files(example: Profile, tmp_path: Path, rank: int) -> None:
    before = replace(example, maps=maps(rank=rank))
    before.save(tmp_path / "p.json")
    loaded = Profile.load(tmp_path / "p.json")
    assert loaded == before != example
    assert loaded.maps == before.maps and loaded.maps is not None and loaded.maps.up.shape[3] == rank
    assert (
        loaded.plan(4, mode="e2e") == before.plan(4, mode="e2e") and loaded.plan(4, mode="e2e").compensation == "linear"
    )
    assert sorted(os.listdir(tmp_path)) == ["p.bin", "p.json"]
    assert before.maps is not None
    expected = [array[divmod(at, 3)].ravel() for array in (before.maps.down, before.maps.up) for at in MAPPED]
    numbers = np.fromfile(tmp_path / "p.bin", np.uint8)[2 * 4 * 3 * 2 * 5 :]  # behind vectors alike in both phases
    np.testing.assert_array_equal(dequantize(numbers, GGMLQuantizationType.BF16), np.concatenate(expected))


def test_linear_maps_are_rounded_to_the_nearest_bf16() -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(3, 3, 4, 5)) * 10.0 ** rng.integers(-30, 30, (3, 3, 4, 5))).astype(np.float32)
    values.flat[:4] = np.float32([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 0])  # ties go to the even one
    expected = dequantize(quantize(values, GGMLQuantizationType.BF16), GGMLQuantizationType.BF16)
    found = LinearMaps(values, values.transpose(0, 1, 3, 2))
    np.testing.assert_array_equal(found.down, expected)
    np.testing.assert_array_equal(found.up, expected.transpose(0, 1, 3, 2))


def test_a_cost_model_is_part_of_the_file(example: Profile, tmp_path: Path) -> None:
    costed = replace(example, cost=cost_model(1 / 3, [1, 2, 3], [4, 5, 6], limit=[math.inf, 1024, math.inf]))
    costed.save(tmp_path / "p.json")
    loaded = Profile.load(tmp_path / "p.json")
    assert loaded == costed != example
    assert json.loads((tmp_path / "p.json").read_text())["cost"]["limit"] == [None, 1024.0, None]


DIVERGENCE = [[0.5, 0.25], [0.125, NAN], [0.0, 1e-12]]


COPYING = [[0.25, 0.5], [NAN, NAN], [0.0, 2.0]]
BOTH = {"divergence": np.array(DIVERGENCE), "copying": np.array(COPYING)}


@pytest.mark.parametrize("name", ["divergence", "copying"])
def test_what_continuations_and_copies_cost_are_part_of_the_file(example: Profile, tmp_path: Path, name: str) -> None:
    judged = replace(example, **BOTH)
    judged.save(tmp_path / "p.json")
    told = {"divergence": [[0.5, 0.25], [0.125, None], [0.0, 1e-12]], "copying": [[0.25, 0.5], [None] * 2, [0.0, 2.0]]}
    assert json.loads((tmp_path / "p.json").read_text())[name] == told[name]
    loaded = Profile.load(tmp_path / "p.json")
    np.testing.assert_array_equal(getattr(loaded, name), BOTH[name])
    assert loaded == judged != example
    assert loaded != replace(judged, **{name: 2 * BOTH[name]}) and example != judged
    assert loaded.plan(2, mode="prompt") == judged.plan(2, mode="prompt")
    with pytest.raises(ValueError, match="read-only"):
        getattr(loaded, name)[0] = 1


def test_what_is_lost_is_the_worse_of_both(example: Profile) -> None:
    np.testing.assert_array_equal(replace(example, **BOTH).lost, [[0.5, 0.5], [NAN, NAN], [0.0, 2.0]])
    assert example.lost is None


def test_one_of_both_alone_is_refused(example: Profile) -> None:
    for name, values in BOTH.items():
        with pytest.raises(ProfileFormatError, match="one of 'divergence' and 'copying' is missing; calibrate again"):
            replace(example, **{name: values})


def test_a_profile_whose_divergences_were_not_measured_has_null(example: Profile, tmp_path: Path) -> None:
    example.save(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["divergence"] is None
    assert Profile.load(tmp_path / "p.json").divergence is None


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        [],
        "much",
        [[0.5, 0.25], [0.125, None]],
        [[0.5, 0.25], [0.125, None], [0.0, 0.5], [0.5, 0.5]],
        [[0.5], [0.5], [0.5]],
        [[0.5, 0.5], [0.5], [0.5, 0.5]],
        [0.5, 0.5, 0.5],
        [[0.5, 0.25], [0.125, 0.5], [0.0, 0.5]],
        [[-0.5, 0.25], [0.125, None], [0.0, 0.5]],
        [["0.5", 0.25], [0.125, None], [0.0, 0.5]],
        [[10**400, 0.25], [0.125, None], [0.0, 0.5]],
        {"0": 0.5},
    ],
    ids=str,
)
def test_divergences_that_cannot_be_are_refused(example: Profile, tmp_path: Path, value: Any) -> None:
    path = tmp_path / "p.json"
    example.save(path)
    data = json.loads(path.read_text())
    data["divergence"] = data["copying"] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileFormatError, match=r"p\.json.*calibrate again"):
        Profile.load(path)


WINDOWS = Windows((0, 2), (0.0, 0.25, 0.5))


def test_windows_are_part_of_the_file(example: Profile, tmp_path: Path) -> None:
    measured = replace(example, windows=WINDOWS)
    measured.save(tmp_path / "p.json")
    told = json.loads((tmp_path / "p.json").read_text())["windows"]
    assert told == {"layers": [0, 2], "divergence": [0.0, 0.25, 0.5]}
    assert Profile.load(tmp_path / "p.json") == measured != example


@pytest.mark.parametrize(
    "value",
    [
        {"layers": [0, 2], "divergence": [0.0, 0.25]},
        {"layers": [2, 0], "divergence": [0.0, 0.25, 0.5]},
        {"layers": [2, 2], "divergence": [0.0, 0.25, 0.5]},
        {"layers": [0, 3], "divergence": [0.0, 0.25, 0.5]},
        {"layers": [0, 2], "divergence": [0.0, -0.25, 0.5]},
        {"layers": [0, 2], "divergence": [0.0, None, 0.5]},
        {"layers": "all", "divergence": [0.0]},
        [0, 2],
    ],
    ids=str,
)
def test_windows_that_cannot_be_are_refused(example: Profile, tmp_path: Path, value: Any) -> None:
    path = tmp_path / "p.json"
    example.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "windows": value}))
    with pytest.raises(ProfileFormatError, match=r"p\.json.*calibrate again"):
        Profile.load(path)


@pytest.mark.parametrize("value", [np.inf, -np.inf, -1e-9])
@pytest.mark.parametrize("name", ["divergence", "copying"])
def test_divergences_that_no_calibration_gives_are_refused(example: Profile, value: float, name: str) -> None:
    lost = {each: values.copy() for each, values in BOTH.items()}
    lost[name][2, 1] = value
    with pytest.raises(ProfileFormatError, match=f"'{name}'.*calibrate again"):
        replace(example, **lost)


def test_a_cost_model_is_of_the_profiles_model(example: Profile) -> None:
    with pytest.raises(ProfileFormatError, match="the cost model is of 2 layers, the model has 3; calibrate again"):
        replace(example, cost=cost_model(0.1, [1, 2], [3, 4]))


@pytest.mark.parametrize(
    ("name", "sidecar"), [("p.json", "p.bin"), ("m.adaskip.json", "m.adaskip.bin"), ("p", "p.bin")]
)
def test_the_vectors_lie_beside_the_profile(example: Profile, tmp_path: Path, name: str, sidecar: str) -> None:
    example.save(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == sorted([name, sidecar])
    parts = [getattr(example, phase) for phase in ("prefill", "decode")]
    expected = [vectors for part in parts for vectors in (part.mean_u, part.mean_v)]
    np.testing.assert_array_equal(np.fromfile(tmp_path / sidecar, "<f4").reshape(2, 3, 2, 5), expected[:2])
    np.testing.assert_array_equal(expected[2:], expected[:2], "the file has what is alike once")


def test_rows_of_nothing_take_no_room(tmp_path: Path) -> None:
    vectors = np.ones((2, 3, 2, 5), np.float32)
    vectors[0, 1] = NAN
    vectors[1, 2] = 0
    before = profile(
        [[0.5, 0.9], [NAN, NAN], [0.7, 0.99]],
        prefill=statistics([[0.5, 0.9], [NAN, NAN], [0.7, 0.99]], mean_u=vectors[0], mean_v=vectors[1]),
        decode=statistics([[0.5, 0.9], [NAN, NAN], [0.7, 0.99]], mean_u=vectors[0], mean_v=vectors[1]),
    )
    before.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == before
    assert (tmp_path / "p.bin").stat().st_size == 4 * 5 * 2, "of ones, in BF16, which both vectors share"


def test_the_file_is_strict_json_with_null_for_what_was_not_observed(example: Profile, tmp_path: Path) -> None:
    example.save(tmp_path / "p.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads((tmp_path / "p.json").read_text(), parse_constant=refuse)
    assert (data["format"], data["version"]) == ("adaskip-profile", 11)
    assert data["prefill"]["similarity"] == [[0.5, 0.9], [0.99, None], [0.7, 0.99]]
    assert data["prefill"]["layer_similarity"] == [pytest.approx(0.7), None, pytest.approx(0.845)]
    assert data["decode"]["norm_ratio"] == [[1.2, 1.2], [1.2, None], [1.2, 1.2]]
    assert data["corpus"] == "some text [with brackets], two pages"
    vectors = data.pop("vectors")
    assert vectors.pop("file") == "p.bin" and len(vectors.pop("sha256")) == 64 and not vectors
    assert data == json.loads(json.dumps(example.to_dict()))


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("fail", ["os.replace", "os.fsync", "second os.replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_save_keeps_the_old_files_and_leaves_no_others(
    example: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str, error: BaseException, old: bool
) -> None:
    path = tmp_path / "p.json"
    before = profile([[0.1, 0.2], [0.3, 0.4]])
    if old:
        before.save(path)
    calls, real = [], os.replace

    def broken(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if fail.startswith("second") and len(calls) != 2:
            return real(*args)
        raise error

    monkeypatch.setattr(fail.removeprefix("second "), broken)
    with pytest.raises(type(error)):
        example.save(path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == (["p.bin", "p.json"] if old else [])
    assert not old or Profile.load(path) == before


def symlink(link: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        link.symlink_to(target)
    if not link.is_symlink():
        pytest.skip("no symbolic links here")


def test_a_save_follows_a_link_and_replaces_no_device(example: Profile, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    symlink(link, tmp_path / "real.json")
    example.save(link)
    assert link.is_symlink() and Profile.load(tmp_path / "real.json") == Profile.load(link) == example
    assert sorted(os.listdir(tmp_path)) == ["link.json", "real.bin", "real.json"]
    with pytest.raises(OSError, match="not a regular file"):
        example.save(tmp_path)


def test_a_missing_file_is_both_errors_that_one_would_catch(tmp_path: Path) -> None:
    with pytest.raises(ProfileMissingError, match=r"no profile .*nope\.json.*calibrate") as caught:
        Profile.load(tmp_path / "nope.json")
    assert isinstance(caught.value, FileNotFoundError) and isinstance(caught.value, ProfileError)


def test_a_file_truncated_anywhere_is_refused(example: Profile, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    example.save(path)
    content = path.read_bytes()
    for size in range(0, len(content) - 2, 7):
        path.write_bytes(content[:size])
        with pytest.raises(ProfileFormatError, match=r"p\.json.*truncated"):
            Profile.load(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b"null", b"[]", b'{"a": 1}', b"3"])
def test_what_is_not_a_profile_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(ProfileFormatError, match=r"p\.json.*; calibrate again"):
        Profile.load(path)


@pytest.mark.parametrize("version", [0, 10, 12, "11", None, [11]])
def test_another_format_version_is_refused(example: Profile, tmp_path: Path, version: Any) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**example.to_dict(), "version": version}))
    with pytest.raises(ProfileVersionError, match=r"format version .* reads 11"):
        Profile.load(path)


# --- the vectors' file ------------------------------------------------------------------------------------------------


def test_missing_vectors_are_named_with_the_way_out(example: Profile, tmp_path: Path) -> None:
    example.save(tmp_path / "p.json")
    (tmp_path / "p.bin").unlink()
    with pytest.raises(ProfileFormatError, match=r"p\.json.*p\.bin', is missing; put it back.*; calibrate again"):
        Profile.load(tmp_path / "p.json")


@pytest.mark.parametrize("damage", ["truncated", "empty", "a bit flipped", "another profile's"])
def test_vectors_that_are_not_those_of_the_profile_are_refused(example: Profile, tmp_path: Path, damage: str) -> None:
    example.save(tmp_path / "p.json")
    path = tmp_path / "p.bin"
    content = bytearray(path.read_bytes())
    if damage == "a bit flipped":
        content[len(content) // 2] ^= 1
    elif damage == "another profile's":
        profile([[0.5, 0.9]]).save(tmp_path / "q.json")
        content = bytearray((tmp_path / "q.bin").read_bytes())
    path.write_bytes(content[: {"truncated": -1, "empty": 0}.get(damage)])
    with pytest.raises(
        ProfileFormatError,
        match=r"p\.json.*p\.bin', is truncated or of another one.*; calibrate again",
    ):
        Profile.load(tmp_path / "p.json")


def test_a_renamed_profile_still_finds_its_vectors(example: Profile, tmp_path: Path) -> None:
    example.save(tmp_path / "p.json")
    (tmp_path / "p.json").rename(tmp_path / "other.json")
    assert Profile.load(tmp_path / "other.json") == example


@pytest.mark.parametrize("name", ["../p.bin", "/etc/passwd", "..", "", 5, None])
def test_the_vectors_are_read_from_beside_the_profile_only(example: Profile, tmp_path: Path, name: Any) -> None:
    example.save(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text())
    data["vectors"]["file"] = name
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(ProfileFormatError, match=r"beside it|\.file"):
        Profile.load(tmp_path / "p.json")


def rewrite(path: Path, content: bytes) -> None:
    """Write the vectors' file of a profile anew, and its hash, as whoever makes such a file knows to."""
    path.with_suffix(".bin").write_bytes(content)
    data = json.loads(path.read_text())
    data["vectors"]["sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(data))


def refused(path: Path) -> str:
    with pytest.raises(ProfileFormatError, match=r"p\.json' cannot be used: .*; calibrate again$") as caught:
        Profile.load(path)
    return str(caught.value)


@pytest.mark.parametrize("change", [-4, -1, 1, 4, -(10**6), 10**6])
def test_vectors_of_another_length_are_refused(mapped: Profile, tmp_path: Path, change: int) -> None:
    mapped.save(tmp_path / "p.json")
    content = (tmp_path / "p.bin").read_bytes()
    rewrite(tmp_path / "p.json", content[:change] if change < 0 else content + bytes(change))
    assert "the file of its vectors" in refused(tmp_path / "p.json")


@pytest.mark.parametrize("at", [0, 4 * 3 * 2 * 5, -2], ids=["a mean", "a map's down", "a map's up"])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_vectors_with_impossible_values_are_refused(mapped: Profile, tmp_path: Path, at: int, value: float) -> None:
    mapped.save(tmp_path / "p.json")
    halves = np.fromfile(tmp_path / "p.bin", "<u2")
    halves[[at, at + 1]] = np.float32([value]).view("<u2")[1]  # of a float32 the upper half is the sign and exponent
    rewrite(tmp_path / "p.json", halves.tobytes())
    assert "values that calibration cannot give" in refused(tmp_path / "p.json")


def changed(profile: Profile, folder: Path, change: Callable[[Any], None]) -> Path:
    """The profile's file, saying something else."""
    path = folder / "p.json"
    profile.save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("value", [[], [0], [0] * 7, [9, *MAPPED[1:]], [-1, *MAPPED[1:]], MAPPED[::-1], "0", None])
def test_maps_of_other_sublayers_than_there_are_are_refused(mapped: Profile, tmp_path: Path, value: Any) -> None:
    refused(changed(mapped, tmp_path, put(value, "maps", "up", "rows")))


# --- files from elsewhere ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("size", [10**6, 2**24, 2**62, 10**30, 0, -1, 1.5, True])
def test_absurd_sizes_are_refused_before_memory_is_taken(mapped: Profile, tmp_path: Path, axis: int, size: Any) -> None:
    refused(changed(mapped, tmp_path, put(size, "maps", "down", "shape", axis)))
    refused(changed(mapped, tmp_path, put([1 << 24] * 4, "maps", "down", "shape")))


def test_arrays_that_share_numbers_are_not_read_without_end(mapped: Profile, tmp_path: Path) -> None:
    def change(data: Any) -> None:
        data["maps"]["down"]["shape"] = [1 << 14, 3, 1 << 14, 1]
        data["maps"]["down"]["rows"] = []
        data["maps"]["up"] = data["maps"]["down"]

    assert "larger model than any" in refused(changed(mapped, tmp_path, change))


@pytest.mark.skipif(not os.path.isabs(os.devnull), reason="devices are no files here")
def test_a_device_is_refused(example: Profile, tmp_path: Path) -> None:
    example.save(tmp_path / "p.json")
    (tmp_path / "p.bin").unlink()
    symlink(tmp_path / "p.bin", Path(os.devnull))
    assert "not a regular file" in refused(tmp_path / "p.json")


def test_a_json_file_longer_than_any_is_refused(
    example: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example.save(tmp_path / "p.json")
    monkeypatch.setattr("adaskip_cpp.model.stored.MOST_JSON", 1000)
    assert "has more than 1,000 bytes" in refused(tmp_path / "p.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """A profile with all that one can have, and the bytes of its two files."""
    path = tmp_path_factory.mktemp("fuzzed") / "p.json"
    costs = cost_model(0.1, [1, 2, 3], [4, 5, 6])
    profile([[0.5, 0.9], [0.99, NAN], [0.7, 0.99]], cost=costs, maps=maps(), **BOTH).save(path)
    return path, path.read_bytes(), path.with_suffix(".bin").read_bytes()


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(of_vectors=st.booleans(), changes=CHANGES, cut=st.none() | st.integers(0, 1 << 16), known=st.booleans())
def test_damaged_files_end_in_our_errors_or_not_at_all(
    saved: tuple[Path, bytes, bytes], of_vectors: bool, changes: list[Any], cut: int | None, known: bool
) -> None:
    path, text, binary = saved
    content = bytearray(binary if of_vectors else text)
    for at, part in changes:
        at %= len(content)
        content[at : at + len(part)] = part
    content = content[:cut]
    if of_vectors and known:  # whoever makes such a file knows how to hash it
        digests = (hashlib.sha256(each).hexdigest().encode() for each in (binary, content))
        text = text.replace(*digests)
    path.write_bytes(text if of_vectors else content)
    path.with_suffix(".bin").write_bytes(content if of_vectors else binary)
    try:
        Profile.load(path)
    except ProfileError as error:
        assert "calibrate again" in str(error)


# --- the fields -------------------------------------------------------------------------------------------------------


def drop(*keys: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


def put(value: Any, *keys: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        drop("model"),
        drop("n_requests"),
        drop("prefill"),
        drop("decode"),
        drop("vectors"),
        drop("vectors", "sha256"),
        drop("prefill", "mean_u", "bf16"),
        put("1", "prefill", "mean_u", "start"),
        put([3, 2], "prefill", "mean_u", "shape"),
        put(5, "cost"),
        drop("prefill", "median_ratio"),
        drop("decode", "n_tokens"),
        put(0.5, "decode", "layer_similarity"),
        put([[0.5, 0.5]] * 3, "decode", "layer_similarity"),
        put([], "vectors"),
        drop("model", "n_layer"),
        drop("n_tokens"),
        put(None, "model"),
        put([], "corpus"),
        put(5, "prefill"),
        put("x", "prefill", "similarity"),
        put(4, "model", "n_layer"),
        put(0, "model", "n_layer"),
        put(True, "n_requests"),
        put(-3, "n_tokens"),
        put("0.5", "prefill", "similarity", 0, 0),
        put(True, "prefill", "similarity", 0, 0),
        put([0.5], "prefill", "similarity", 0),
        put([0.5, 0.5, 0.5], "prefill", "norm_ratio", 0),
        put(None, "prefill", "norm_ratio", 0, 0),
        put(10**400, "prefill", "norm_ratio", 0, 0),
    ],
)
def test_a_profile_with_a_field_missing_or_malformed_is_refused(
    example: Profile, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    path = tmp_path / "p.json"
    example.save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileFormatError, match=r"p\.json.*calibrate again"):
        Profile.load(path)
