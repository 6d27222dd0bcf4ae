"""Which plans are compared: every strategy, budget, mode and compensation that the profile gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaskip_cpp import Profile
from adaskip_cpp.errors import DataError, PlanError
from adaskip_cpp.evaluation.contenders import FULL, contenders, content_hash, default_budgets, default_strategies
from adaskip_cpp.model.identity import ModelInfo
from adaskip_cpp.model.statistics import PhaseStatistics

N_LAYER = 20


@pytest.fixture
def profile() -> Profile:
    ones = np.ones((N_LAYER, 2))
    similarity = np.linspace(0.5, 0.99, 2 * N_LAYER).reshape(N_LAYER, 2)
    vectors = np.zeros((N_LAYER, 2, 4), np.float32)
    prefill = PhaseStatistics(similarity, 1.1 * ones, 1.2 * ones, np.ones(N_LAYER), vectors, vectors, 10)
    return Profile(prefill, prefill, 1, 10, ModelInfo("ab" * 32, "llama", N_LAYER))


def names(profile: Profile, **options: Any) -> list[str]:
    return [each.name for each in contenders(profile, **options)[0]]


def test_default_budgets_are_a_tenth_a_fifth_and_a_quarter_of_the_sublayers() -> None:
    assert default_budgets(30) == (6, 12, 15)
    assert default_budgets(18) == (3, 7, 9)
    assert default_budgets(1) == (1,)


def test_by_default_all_strategies_but_that_by_hand_run_in_all_modes(profile: Profile) -> None:
    assert default_strategies() == ("adaskip", "early_exit", "skip_decode", "unified_skipping")
    found, notes = contenders(profile)
    assert found[0] is FULL
    assert len(found) == 1 + 4 * 3 * 3
    assert notes == []


def test_a_plan_is_that_of_the_profile(profile: Profile) -> None:
    found, _ = contenders(profile, strategies=["adaskip"], n_skip=[4], modes=["e2e"], compensations=["paper"])
    assert [each.name for each in found] == ["full", "adaskip-4-e2e-paper"]
    assert found[1].plan == profile.plan(4, compensation="paper")


def test_every_compensation_is_of_the_strategy_that_has_one(profile: Profile) -> None:
    assert names(profile, n_skip=[4], modes=["prefill"], compensations=["affine", "paper"]) == [
        "full",
        "adaskip-4-prefill-affine",
        "adaskip-4-prefill-paper",
        "early_exit-4-prefill",
        "skip_decode-4-prefill",
        "unified_skipping-4-prefill",
    ]


def test_a_budget_out_of_a_strategys_reach_is_a_note(profile: Profile) -> None:
    found, notes = contenders(profile, n_skip=[30], modes=["prefill"])
    assert "unified_skipping-30-prefill" not in [each.name for each in found]
    (note,) = notes
    assert note.startswith("unified_skipping-30-prefill is left out: cannot skip 30 sublayers")


def test_budgets_that_skip_the_same_are_measured_once(profile: Profile) -> None:
    found, notes = contenders(profile, strategies=["early_exit"], n_skip=[6, 7], modes=["prefill"])
    assert [each.name for each in found] == ["full", "early_exit-6-prefill"]
    assert notes == ["early_exit-7-prefill is left out: it skips the same as early_exit-6-prefill"]


def test_nothing_but_the_full_model_is_an_error_with_the_reasons(profile: Profile) -> None:
    with pytest.raises(DataError, match=r"nothing to compare.*early_exit-1-prefill.*the same as full"):
        contenders(profile, strategies=["early_exit"], n_skip=[1], modes=["prefill"])


def test_an_unknown_strategy_or_a_speed_up_without_times_is_an_error(profile: Profile) -> None:
    with pytest.raises(PlanError, match="unknown strategy"):
        contenders(profile, strategies=["best"])
    with pytest.raises(PlanError, match="no cost model"):
        contenders(profile, speedups=[1.2])


def test_the_hash_of_a_plan_is_of_all_that_it_does(profile: Profile) -> None:
    plans = [
        None,
        profile.plan(4),
        profile.plan(5),
        profile.plan(4, compensation="paper"),
        profile.plan(4, mode="prefill"),
        profile.plan(4, mode="decode"),
        profile.plan(4, window=9),
        profile.plan(4, strategy="skip_decode"),
    ]
    assert len({content_hash(plan) for plan in plans}) == len(plans)
    assert content_hash(profile.plan(4)) == content_hash(profile.plan(4))


def test_the_hash_of_a_profile_is_of_its_arrays_too(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.json")
    assert content_hash(Profile.load(tmp_path / "p.json")) == content_hash(profile)
    vectors = np.full((N_LAYER, 2, 4), 1e-3, np.float32)
    other = replace(profile, decode=replace(profile.decode, mean_v=vectors))
    assert content_hash(other) != content_hash(profile)


def test_the_row_of_a_contender_says_what_it_skips_in_each_phase(profile: Profile) -> None:
    found, _ = contenders(profile, strategies=["skip_decode"], n_skip=[8], modes=["decode"])
    row = found[1].to_dict()
    assert (row["n_skip_prefill"], row["n_skip_decode"]) == (0, 8)
    assert found[0].to_dict()["mode"] is None
