"""Which plans are compared: every strategy, budget, mode and compensation that the profile gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.frontiers import frontier, point
from oracles.profiles import profile as profile_of

from adaskip_cpp import Profile, SkipPlan
from adaskip_cpp.errors import DataError
from adaskip_cpp.evaluation.contenders import FULL, Contender, contenders
from adaskip_cpp.evaluation.items import EvaluationOptions
from adaskip_cpp.files import content_hash
from adaskip_cpp.model.plan import Bulk, OnlineStage
from adaskip_cpp.model.plan_file import PlanFile
from adaskip_cpp.planning.modes import MODES
from adaskip_cpp.planning.request import PlanRequest

N_LAYER = 20


@pytest.fixture
def profile() -> Profile:
    return profile_of(np.linspace(0.5, 0.99, 2 * N_LAYER).reshape(N_LAYER, 2))


def every_request(n_layer: int, **lists: Any) -> tuple[PlanRequest, ...]:
    return EvaluationOptions(**lists).requests(n_layer)


def found(profile: Profile, **lists: Any) -> tuple[list[Contender], list[str]]:
    return contenders(profile, every_request(N_LAYER, **lists))


def test_by_default_all_strategies_skip_a_tenth_a_fifth_and_a_quarter_in_all_modes(profile: Profile) -> None:
    requests = every_request(N_LAYER)
    assert {request.strategy for request in requests} == {"adaskip", "early_exit", "skip_decode", "unified_skipping"}
    every, notes = contenders(profile, requests)
    assert every[0] is FULL and len(every) == 1 + 4 * 4 * 3 and notes == []
    plans = {each.name: each.plan for each in every}
    assert plans["adaskip-4-e2e-linear"] == profile.plan(4, compensation="linear", mode="e2e")
    for n_layer, budgets in ((18, [3, 7, 9]), (1, [1])):
        requests = every_request(n_layer, strategies=["adaskip"], modes=["e2e"])
        assert [request.n_skip for request in requests] == budgets


def test_budgets_out_of_reach_and_those_that_skip_the_same_are_left_out_with_a_note(profile: Profile) -> None:
    every, notes = found(profile, n_skips=[30], modes=["prefill"])
    assert "unified_skipping-30-prefill" not in [each.name for each in every]
    assert len(notes) == 1 and notes[0].startswith("unified_skipping-30-prefill is left out: cannot skip 30 sublayers")
    every, notes = found(profile, strategies=["early_exit"], n_skips=[6, 7], modes=["prefill"])
    assert [each.name for each in every] == ["full", "early_exit-6-prefill"]
    assert notes == ["early_exit-7-prefill is left out: it skips the same as early_exit-6-prefill"]


def test_what_gives_no_plan_to_compare_is_an_error_with_the_reasons(profile: Profile) -> None:
    with pytest.raises(DataError, match=r"nothing to compare.*early_exit-1-prefill.*the same as full"):
        found(profile, strategies=["early_exit"], n_skips=[1], modes=["prefill"])


def test_the_hash_of_a_plan_is_of_all_that_it_does_and_that_of_a_profile_of_its_arrays_too(
    profile: Profile, tmp_path: Path
) -> None:
    whole = SkipPlan.manual(profile.n_layer)
    different = [
        None,
        *(profile.plan(4, mode=mode) for mode in MODES),
        profile.plan(4, compensation="paper"),
        replace(profile.plan(4, mode="e2e"), online=OnlineStage(9, 0.5)),
        profile.plan(4, strategy="skip_decode"),
        replace(whole, bulk=Bulk(whole.prefill, windowed=(0,))),
        replace(whole, bulk=Bulk(whole.prefill, windowed=(0,), window_size=9)),
        profile,
        replace(profile, decode=replace(profile.decode, mean_v=2 * profile.decode.mean_v)),
    ]
    assert len({content_hash(each) for each in different}) == len(different)
    profile.save(tmp_path / "p.json")
    again = Profile.load(tmp_path / "p.json")
    assert content_hash(again) == content_hash(profile) and content_hash(again.plan(4)) == content_hash(profile.plan(4))


def test_each_promise_is_a_contender_that_runs_the_plan_chosen_for_the_length_of_the_prompt(profile: Profile) -> None:
    """Losses are taken for 1.3 times as large in prompts twice as long; a prompt of 300 tokens runs whole."""
    careful, fast = (SkipPlan.manual(N_LAYER, ffn=ffn, phase="bulk") for ffn in ([9], [8, 9]))
    points = [point(careful, 0.03, {1024: 1.2}, judged_at=1024), point(fast, 0.06, {1024: 1.5}, judged_at=1024)]
    saved = PlanFile(frontier=frontier(points))
    every, notes = contenders(None, (), saved, (0.001, 0.05, 0.06, 0.061, 0.1), (300, 1000, 2000))
    assert [each.name for each in every] == ["full", "promise 0.05", "promise 0.06", "promise 0.1"]
    plans: Any = [[each.plan_for(n) for n in (300, 1000, 2000)] for each in every]
    tails = (replace(each, bulk=replace(each.bulk, tail=128)) for each in (careful, fast) if each.bulk)
    careful_2, fast_2 = tails  # twice as long in prompts twice as long
    assert plans == [[None] * 3, [None, careful, careful_2], [None, fast, careful_2], [None, fast, fast_2]]
    assert [note for note in notes if "left out" in note] == [
        "promise 0.001 is left out: it skips the same as full",
        "promise 0.061 is left out: it skips the same as promise 0.06",
    ]
    assert "promise 0.05 runs the whole model for prompts of 300 tokens" in notes
    assert len({content_hash(each.key) for each in every}) == 4
    every, _ = contenders(profile, [PlanRequest(4)], saved, (0.05,), (1000,))
    assert [each.strategy for each in every] == ["full", "adaskip", "promise"]
    with pytest.raises(DataError, match=r"promise 0\.05 is left out.*longer prompts"):
        contenders(None, (), saved, (0.05,), (300,))
    with pytest.raises(DataError, match="run `adaskip-cpp tune`"):
        contenders(None, ())
    with pytest.raises(DataError, match="made from a profile"):
        contenders(None, [PlanRequest(4)], saved, (0.05,), (1000,))


def test_a_saved_plan_comes_last_unless_it_is_one_of_the_others_or_of_no_mode(profile: Profile) -> None:
    requests = every_request(N_LAYER, strategies=["adaskip"], n_skips=[4], modes=["prefill"])
    every, notes = contenders(profile, requests, PlanFile(profile.plan(7, mode="e2e")))
    assert [each.name for each in every][2:] == ["tuned"] and notes == []
    for plan, why in (
        (profile.plan(4, mode="prefill"), "it skips the same as adaskip-4-prefill-linear"),
        (SkipPlan.manual(N_LAYER, ffn=[1]), "its layers were listed by hand and belong to no mode"),
    ):
        every, notes = contenders(profile, requests, PlanFile(plan))
        assert len(every) == 2 and notes == [f"tuned is left out: {why}"]
