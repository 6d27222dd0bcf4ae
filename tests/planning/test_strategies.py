"""adaskip_cpp.planning.strategies: the sublayers that each chooses, against second formulations."""

from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import pytest
from oracles.profiles import NAN, profile

from adaskip_cpp import Profile
from adaskip_cpp.errors import BudgetError, NotSkippableError, PlanError
from adaskip_cpp.model.skip_set import SkipSet
from adaskip_cpp.planning.request import PlanRequest
from adaskip_cpp.planning.strategies import adaskip, early_exit, manual, skip_decode, unified_skipping

BUDGETS = [(n_layer, k) for n_layer in (12, 18, 24, 30, 32) for k in range(n_layer + 1)]


def blank(n_layer: int) -> Profile:
    return profile(np.ones((n_layer, 2)))


RISING = np.linspace(0.5, 0.99, 24).reshape(12, 2)


def layers(skip_set: SkipSet) -> list[int]:
    """The layers skipped, all of them whole and without compensation."""
    assert skip_set.attention == skip_set.ffn and (skip_set.scale == 1).all() and skip_set.bias is None
    return list(skip_set.attention)


@pytest.mark.parametrize(("n_layer", "k"), BUDGETS)
def test_early_exit_skips_the_last_layers(n_layer: int, k: int) -> None:
    plan = early_exit(blank(n_layer), PlanRequest(2 * k, mode="e2e"))
    expected = [layer for layer in range(n_layer) if n_layer - 1 - layer < k]  # with fewer than k layers above
    assert layers(plan.prefill) == layers(plan.decode) == expected


@pytest.mark.parametrize(("n_layer", "k"), [(n_layer, k) for n_layer, k in BUDGETS if k <= n_layer // 2])
def test_unified_skipping_skips_one_layer_of_every_stretch(n_layer: int, k: int) -> None:
    plan = unified_skipping(blank(n_layer), PlanRequest(2 * k, mode="e2e"))
    # The second layer of every stretch of n_layer // k layers, the last stretch perhaps cut short.
    expected = []
    if k:
        stretch = n_layer // k
        expected = [part[1] for part in np.split(np.arange(n_layer), range(stretch, n_layer, stretch)) if len(part) > 1]
    assert layers(plan.prefill) == layers(plan.decode) == expected


@pytest.mark.parametrize(("n_layer", "k"), [(n_layer, k) for n_layer, k in BUDGETS if k < n_layer])
def test_skip_decode_skips_the_first_layers_but_one_in_the_papers_prefill_experiments(n_layer: int, k: int) -> None:
    plan = skip_decode(blank(n_layer), PlanRequest(2 * k, mode="prefill"))
    assert layers(plan.prefill) == layers(plan.decode) == list(range(n_layer))[1 : 1 + k]
    assert plan.schedule == ()


@pytest.mark.parametrize("mode", ["e2e", "decode"])
@pytest.mark.parametrize(("n_layer", "k"), [(n_layer, k) for n_layer, k in BUDGETS if k < n_layer])
def test_skip_decode_skips_more_layers_the_more_tokens_are_decoded(n_layer: int, k: int, mode: Any) -> None:
    plan = skip_decode(blank(n_layer), PlanRequest(2 * k, mode=mode))
    schedule = plan.decode_sets
    starts = [start for start, _ in schedule]
    for t in range(600):
        m = min(k, ceil(Fraction(t, 512) * (k - 1)) + 1)
        in_force = schedule[int(np.searchsorted(starts, t, side="right")) - 1][1]
        assert layers(in_force) == list(range(1, m + 1)), t
    assert len(schedule) == len({each for _, each in schedule}), "a set that does not change is not switched"
    assert (plan.schedule == ()) == (k < 2)
    assert layers(plan.prefill) == ([1] if k and mode == "e2e" else [])


@pytest.mark.parametrize("strategy", [early_exit, unified_skipping])
def test_baselines_leave_the_prompt_to_the_full_model_in_decode_mode(strategy: Any) -> None:
    for mode in ("prefill", "decode", "e2e"):
        plan = strategy(blank(12), PlanRequest(6, mode=mode))
        assert plan.prefill == (SkipSet.none(12) if mode == "decode" else plan.decode)
        assert (plan.decode.n_skip, plan.mode, plan.online) == (6, mode, None)


@pytest.mark.parametrize("strategy", [early_exit, skip_decode, unified_skipping])
def test_a_baseline_takes_nothing_from_a_profile(strategy: Any) -> None:
    known, request = profile(np.full((12, 2), 0.9)), PlanRequest(6, mode="e2e")
    plan = strategy(known, request)
    assert plan == strategy(blank(12), request) and plan.model == known.model
    assert (plan.compensation, plan.strategy) == ("none", strategy.__name__)
    assert known.plan(6, strategy=strategy.__name__, mode="e2e") == plan


@pytest.mark.parametrize("strategy", [early_exit, skip_decode, unified_skipping])
def test_the_odd_sublayer_of_a_budget_is_left_over(strategy: Any) -> None:
    assert strategy(blank(12), PlanRequest(7, mode="e2e")) == strategy(blank(12), PlanRequest(6, mode="e2e"))
    assert strategy(blank(12), PlanRequest(1, mode="e2e")).prefill.n_skip == 0
    assert strategy(blank(30), PlanRequest(mode="prefill")).prefill.n_skip == 12


@pytest.mark.parametrize("strategy, most", [(adaskip, 24), (early_exit, 24), (skip_decode, 22), (unified_skipping, 13)])
def test_an_impossible_budget_is_refused_and_the_maximum_told(strategy: Any, most: int) -> None:
    for n_skip in (-1, most + 1, 2.5, "two"):
        with pytest.raises(BudgetError, match=rf"use a.* number from 0 to {most}$"):
            strategy(profile(np.full((12, 2), 0.9)), PlanRequest(n_skip, mode="e2e"))  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", [early_exit, skip_decode, unified_skipping, manual])
def test_a_sublayer_that_cannot_be_skipped_is_named(strategy: Any) -> None:
    similarity = np.full((4, 2), 0.9)
    similarity[1, 0] = similarity[3, 1] = NAN
    by_hand = PlanRequest(strategy="manual", attention=(1,), ffn=(3,), mode="e2e")
    request = by_hand if strategy is manual else PlanRequest(4, mode="prefill")
    with pytest.raises(NotSkippableError, match=r"attention of layer 1|FFN of layer 3"):
        strategy(profile(similarity), request)


@pytest.mark.parametrize("strategy", [adaskip, early_exit, skip_decode, unified_skipping])
def test_in_the_prompt_mode_the_bulk_alone_skips(strategy: Any) -> None:
    known = profile(RISING)
    plan, prefill = strategy(known, PlanRequest(6, mode="prompt")), strategy(known, PlanRequest(6, mode="prefill"))
    assert plan.bulk.skip == prefill.prefill and plan.bulk.skip.n_skip == 6
    assert plan.prefill == plan.decode == SkipSet.none(12)
    assert (plan.mode, plan.schedule, plan.online) == ("prompt", (), None)
    assert (plan.bulk.head, plan.bulk.tail) == (4, 64)
    other = strategy(known, PlanRequest(6, mode="prompt", head=0, tail=1))
    assert other.bulk == replace(plan.bulk, head=0, tail=1)


@pytest.mark.parametrize("n_layer", [3, 4, 12])
def test_a_prompt_skips_the_last_layers_first_but_none_of_the_first_third(n_layer: int) -> None:
    known = profile(np.full((n_layer, 2), 0.9))
    order = [(layer, kind) for layer in reversed(range(n_layer // 3, n_layer)) for kind in (0, 1)]
    for n_skip in range(len(order) + 1):
        bulk = known.plan(n_skip, mode="prompt").bulk
        assert bulk is not None
        assert sorted(map(tuple, np.argwhere(bulk.skip.skip).tolist())) == sorted(order[:n_skip])
    with pytest.raises(BudgetError, match=f"0 to {len(order)}"):
        known.plan(len(order) + 1, mode="prompt")


def test_what_the_bulk_alone_can_skip_is_skipped_there_alone() -> None:
    known = replace(profile([[0.9, 0.5], [0.99, 0.6], [0.8, 0.7]]), bulk_only=(1,))
    assert known.plan(4, mode="prompt").skipped("bulk").attention == (1, 2)
    assert known.plan(1, mode="e2e").prefill.attention == (0,) and known.plan(5, mode="e2e").prefill.n_skip == 5
    with pytest.raises(BudgetError, match="0 to 5"):
        known.plan(6, mode="e2e")
    with pytest.raises(NotSkippableError, match="attention of layer 1"):
        known.plan(strategy="manual", attention=[1], mode="e2e")


def test_listed_layers_are_skipped_with_the_profiles_compensation_and_lists_that_do_not_fit_are_refused() -> None:
    known = profile(np.full((4, 2), 0.9))
    plan = known.plan(strategy="manual", attention=[2], ffn=[0, 2], compensation="paper", mode="e2e")
    assert (plan.prefill.attention, plan.prefill.ffn, plan.strategy, plan.online) == ((2,), (0, 2), "manual", None)
    assert (plan.prefill.scale[plan.prefill.skip] == 1.5).all()
    with pytest.raises(PlanError, match="0 to 3"):
        known.plan(strategy="manual", ffn=[4], mode="e2e")
    with pytest.raises(BudgetError, match="1 sublayers are listed, not 3"):
        known.plan(3, strategy="manual", ffn=[1], mode="e2e")
