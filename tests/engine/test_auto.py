"""AdaSkipLlama(plan="auto"): a plan of the frontier for each prompt, and the settings that were found.

Frontiers are made by hand: what plans lose and bring is said, not measured. Oracles: a fresh model, and a count of the
positions that are evaluated.
"""

import os
import pickle
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.costs import SETTINGS
from oracles.fixtures import Open, Tiny
from oracles.frontiers import frontier, point
from oracles.readable import evaluated, logits
from oracles.tiny_families import tokens

import adaskip_cpp.engine.llama
import adaskip_cpp.model.frontier
from adaskip_cpp import AdaSkipLlama, Frontier, SkipPlan
from adaskip_cpp.engine.settings import cost_settings
from adaskip_cpp.errors import PlanError, PlanFileError, ProfileMismatchError
from adaskip_cpp.model.identity import ModelInfo, fingerprint, plan_path
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.model.settings import Settings

LEAST = 32
"""Tokens: in these tests shorter prompts run whole."""


def in_bulk(attention: tuple[int, ...] = (), ffn: tuple[int, ...] = ()) -> SkipPlan:
    plan = SkipPlan.manual(3, attention, ffn, phase="bulk")
    assert plan.bulk is not None
    return replace(plan, bulk=replace(plan.bulk, head=2, tail=3))


MILD, STRONG = in_bulk(ffn=(1,)), in_bulk(attention=(1,), ffn=(1, 2))
FOUND = frontier([point(MILD, 0.01, {64: 1.2, 128: 1.3}), point(STRONG, 0.04, {64: 1.1, 128: 1.5})])
"""At up to 64 tokens MILD is the faster one, beyond them STRONG, which loses more."""


@pytest.fixture(autouse=True)
def short_prompts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaskip_cpp.model.frontier, "LEAST_CONTEXT", LEAST)


@pytest.fixture
def llm(open_tiny: Open) -> Any:
    return open_tiny(plan=FOUND)


# -- which plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "plan"), [(31, None), (32, MILD), (64, MILD), (65, STRONG), (128, STRONG)])
def test_each_prompt_is_read_under_the_fastest_plan_for_its_length(
    n: int, plan: SkipPlan | None, llm: Any, open_tiny: Open
) -> None:
    fresh = open_tiny(under=plan)
    for each in (llm, fresh):
        each.eval(tokens(n))
    assert llm.plan == plan
    assert (chosen := llm.point(n)) is None or chosen.plan == plan
    np.testing.assert_array_equal(logits(llm), logits(fresh))


def test_a_generated_answer_keeps_the_plan_of_its_prompt(llm: Any) -> None:
    steps = llm.generate(tokens(60), temp=0)
    for _ in range(10):
        next(steps)
    assert llm.n_tokens > 64 and llm.plan == MILD


# -- what is read again ----------------------------------------------------------------------------------------------


def test_a_chat_that_grows_through_all_plans_reads_every_token_once(llm: Any) -> None:
    prompt, plans, positions = tokens(120), [], []
    for begin in range(0, 120, 20):
        positions += evaluated(llm, lambda begin=begin: llm.eval(prompt[begin : begin + 20]))
        plans.append(llm.plan)
    assert plans == [None, MILD, MILD, STRONG, STRONG, STRONG]
    assert positions == list(range(120))


def test_a_chat_of_turns_reads_only_what_is_new(llm: Any) -> None:
    prompt = tokens(120, seed=1)
    for n in (20, 50, 80, 120):
        cached = llm.n_tokens
        n_before = llm.n_evaluated
        next(llm.generate(prompt[:n], temp=0))
        assert llm.n_evaluated - n_before <= n - cached + 1  # of no token llama.cpp counts 1


def test_a_tighter_promise_reads_what_was_read_under_a_plan_that_breaks_it_again(llm: Any, open_tiny: Open) -> None:
    llm.eval(tokens(100))
    assert llm.plan == STRONG
    llm.set_plan("auto", max_loss=0.02)
    positions = evaluated(llm, lambda: llm.eval([7]))
    assert llm.plan == MILD and positions == list(range(2, 101)), "all but the head, which the whole model read"
    fresh = open_tiny(plan=FOUND, max_loss=0.02)
    fresh.eval([*tokens(100), 7])
    # The head is in another batch, which rounds otherwise.
    np.testing.assert_allclose(logits(llm), logits(fresh), rtol=1e-4, atol=1e-5)


def test_what_was_read_under_a_plan_that_keeps_the_tighter_promise_stays(llm: Any) -> None:
    llm.eval(tokens(60))
    assert llm.plan == MILD
    llm.set_plan("auto", max_loss=0.02)
    assert evaluated(llm, lambda: llm.eval(tokens(41)[1:])) == list(range(60, 100))
    assert llm.plan == MILD


def test_a_looser_promise_reads_nothing_again(open_tiny: Open) -> None:
    llm = open_tiny(plan=FOUND, max_loss=0.02)
    llm.eval(tokens(100))
    llm.set_plan("auto")
    assert evaluated(llm, lambda: llm.eval([7])) == [100] and llm.plan == STRONG


def test_an_equal_prompt_under_another_promise_is_evaluated_before_sampling(llm: Any) -> None:
    prompt = tokens(100)
    next(llm.generate(prompt, temp=0))
    llm.set_plan("auto", max_loss=0.0)
    assert len(evaluated(llm, lambda: next(llm.generate(prompt, temp=0)))) >= 98 and llm.plan is None


# -- other plans -----------------------------------------------------------------------------------------------------


def test_without_a_plan_it_is_the_whole_model_bit_for_bit_again(llm: Any, open_tiny: Open) -> None:
    whole = open_tiny()
    llm.eval(tokens(100))
    llm.set_plan(None)
    llm.reset()
    for each in (llm, whole):
        each.eval(tokens(100))
    assert llm.plan is None and llm.point(100) is None
    np.testing.assert_array_equal(llm.scores[:100], whole.scores[:100])


def test_a_plan_set_by_hand_stays_until_auto_is_set_again(llm: Any) -> None:
    llm.set_plan(MILD)
    llm.eval(tokens(100))
    assert llm.plan == MILD
    llm.reset()
    llm.set_plan("auto")
    llm.eval(tokens(100))
    assert llm.plan == STRONG


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    """A model with that frontier beside it."""
    path = Path(shutil.copy(tiny(), tmp_path / "m.Q4.gguf"))
    save_plan(plan_path(path), FOUND)
    return path


def test_auto_reads_the_frontier_beside_the_model(model: Path, open_model: Open) -> None:
    llm = open_model(model, plan="auto", max_loss=0.02)
    llm.eval(tokens(100))
    assert llm.plan == MILD and len(llm.frontier.points) == 2
    save_plan(plan_path(model), frontier([]))
    whole = open_model(model, plan="auto")
    whole.eval(tokens(100))
    assert whole.plan is None, "where nothing can be skipped"


def test_auto_uses_the_one_plan_of_a_file_and_reads_nothing_else(model: Path, open_model: Open) -> None:
    plan = replace(SkipPlan.manual(3, [2], [0], scale=0.9), model=ModelInfo(fingerprint(model), "llama", 3))
    assert Path(plan_path(model)).name == "m.Q4.adaskip-plan.json"
    save_plan(plan_path(model), plan)
    model.with_suffix(".adaskip.json").write_text("this is no profile")
    llm, by_hand = open_model(model, plan="auto"), open_model(model, plan=plan)
    assert llm.plan == plan and llm.elided_kv == (2,)
    for each in (llm, by_hand):
        each.eval(tokens(9))
    np.testing.assert_array_equal(logits(llm), logits(by_hand))


def test_auto_refuses_what_is_no_plan_for_the_model(model: Path, open_model: Open) -> None:
    save_plan(plan_path(model), replace(MILD, model=ModelInfo("ab" * 32, "llama", 3)))
    with pytest.raises(ProfileMismatchError, match=r"another model.*tune"):
        open_model(model, plan="auto")
    os.remove(plan_path(model))
    with pytest.raises(PlanFileError, match=r"m\.Q4\.adaskip-plan\.json.*`adaskip-cpp tune .*m\.Q4\.gguf`"):
        open_model(model, plan="auto")


TUNED = Settings(flash_attn=True, repack=False, n_batch=64, n_ubatch=32, n_threads=1, n_threads_batch=2)


def settings_of(path: Path, plan: Frontier | None, **arguments: Any) -> Settings:
    """The settings of a model that is opened with a frontier."""
    with closing(AdaSkipLlama(str(path), plan=plan, n_ctx=128, verbose=False, **arguments)) as llm:
        found, repack = cost_settings(llm), bool(llm.model_params.use_extra_bufts)
        threads = found.n_threads, found.n_threads_batch
        return Settings(found.flash_attention, repack, found.n_batch, found.n_ubatch, *threads)


@pytest.mark.parametrize(
    "given", [{}, {"flash_attn": False}, {"repack": True}, {"n_batch": 128}, {"n_threads": 3}], ids=str
)
def test_settings_are_used_on_the_machine_that_they_were_found_on_and_arguments_win(
    given: dict[str, Any], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaskip_cpp.engine.llama, "is_here", lambda machine: True)
    assert settings_of(tiny(), replace(FOUND, settings=TUNED), **given) == replace(TUNED, **given)


@pytest.mark.parametrize("machine", [None, SETTINGS], ids=["of no machine", "of another machine"])
def test_settings_that_were_not_found_here_are_not_used(machine: Any, tiny: Tiny) -> None:
    assert settings_of(tiny(), replace(FOUND, settings=TUNED, machine=machine)) == settings_of(tiny(), None)


# -- promises that make no sense -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "promise", "why"),
    [
        (None, {"max_loss": 0.1}, 'pass it with plan="auto"'),
        (MILD, {"max_loss": 0.1}, 'pass it with plan="auto"'),
        ("best", {}, "unknown plan 'best'"),
    ],
    ids=["no plan", "a plan", "another name"],
)
def test_a_promise_without_auto_and_another_name_are_refused(
    plan: Any, promise: Any, why: str, tiny: Tiny, llm: Any
) -> None:
    with pytest.raises(PlanError, match=why):
        AdaSkipLlama(str(tiny()), plan=plan, verbose=False, **promise)
    with pytest.raises(PlanError, match=why):
        llm.set_plan(plan, **promise)


@pytest.mark.parametrize("max_loss", [-0.1, float("nan"), float("inf"), "0.1", True])
def test_a_promise_that_is_no_loss_is_refused_and_the_one_before_stays(max_loss: Any, llm: Any) -> None:
    with pytest.raises(PlanError, match="a number from 0 on"):
        llm.set_plan("auto", max_loss=max_loss)
    llm.eval(tokens(100))
    assert llm.plan == STRONG


def test_auto_on_a_model_without_a_frontier_is_refused(open_tiny: Open) -> None:
    with pytest.raises(PlanError, match='open the model with plan="auto"'):
        open_tiny().set_plan("auto")


# -- copies, and fewer tokens ----------------------------------------------------------------------------------------


def test_a_pickled_model_keeps_frontier_and_promise(open_tiny: Open) -> None:
    llm = open_tiny(plan=FOUND, max_loss=0.02)
    copy = pickle.loads(pickle.dumps(llm))
    for each in (llm, copy):
        each.eval(tokens(100))
    assert isinstance(copy.frontier, Frontier) and copy.plan == MILD
    np.testing.assert_array_equal(logits(llm), logits(copy))
    copy.close()


@pytest.mark.parametrize("name", ["llama", "jamba"])
def test_a_truncated_model_goes_on_as_one_that_read_no_more(name: str, open_tiny: Open) -> None:
    # jamba keeps a state, which cannot give back what it has read: it reads the first ones again.
    llm, fresh = open_tiny(name), open_tiny(name)
    llm.eval(tokens(40))
    llm.truncate(25)
    assert llm.n_tokens == 25
    llm.eval([5, 6])
    fresh.eval([*tokens(40)[:25], 5, 6])
    np.testing.assert_allclose(logits(llm), logits(fresh), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [-1, 40, 50])
def test_there_is_nothing_to_truncate_beyond_what_was_read(n: int, open_tiny: Open) -> None:
    llm = open_tiny()
    llm.eval(tokens(40))
    llm.truncate(n)
    assert llm.n_tokens == 40
