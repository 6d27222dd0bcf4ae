"""AdaSkipLlama(plan="auto"): a plan of the frontier for each prompt, and the settings that were found.

Frontiers are made by hand: what plans lose and bring is said. Oracles: a fresh model, and counts of evaluations.
"""

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
from oracles.frontiers import edit_points, frontier, point
from oracles.readable import evaluated, logits
from oracles.tiny_families import tokens

import adaskip_cpp.engine.llama
import adaskip_cpp.model.frontier
from adaskip_cpp import AdaSkipLlama, Frontier, SkipPlan
from adaskip_cpp.engine.settings import cost_settings
from adaskip_cpp.errors import PlanError, PlanFileError, ProfileMismatchError
from adaskip_cpp.model.edits import Edits
from adaskip_cpp.model.identity import ModelInfo, fingerprint, plan_path
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.model.settings import Settings


def in_bulk(attention: tuple[int, ...] = (), ffn: tuple[int, ...] = ()) -> SkipPlan:
    plan = SkipPlan.manual(3, attention, ffn, phase="bulk")
    assert plan.bulk is not None
    return replace(plan, bulk=replace(plan.bulk, head=2, tail=3))


MILD, STRONG = in_bulk(ffn=(1,)), in_bulk(attention=(1,), ffn=(1, 2))
FOUND = frontier([point(MILD, 0.01, {64: 1.2, 128: 1.3}), point(STRONG, 0.04, {64: 1.1, 128: 1.5})])
"""At up to 64 tokens MILD is the faster one, beyond them STRONG, which loses more."""


@pytest.fixture(autouse=True)
def short_prompts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaskip_cpp.model.frontier, "LEAST_CONTEXT", 32)


@pytest.fixture
def llm(open_tiny: Open) -> Any:
    return open_tiny(plan=FOUND)


@pytest.mark.parametrize(("n", "plan"), [(31, None), (32, MILD), (64, MILD), (65, STRONG)])
def test_each_prompt_is_read_under_the_fastest_plan(n: int, plan: SkipPlan | None, llm: Any, open_tiny: Open) -> None:
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


def test_a_chat_that_grows_through_all_plans_reads_every_token_once(llm: Any) -> None:
    prompt, plans, positions = tokens(120), [], []
    for end in range(20, 121, 20):
        positions += evaluated(llm, lambda end=end: next(llm.generate(prompt[:end], temp=0)))
        plans.append(llm.plan)
    assert plans == [None, MILD, MILD, STRONG, STRONG, STRONG]
    assert positions == list(range(120))


def test_plans_with_other_tails_share_cells_and_a_hash(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing the maps of a large model takes long, and each prompt chooses a plan."""
    llm: Any = open_tiny(plan=frontier([point(STRONG, 0.01, {32: 1.2}, judged_at=32)]))
    hashed, tails, find = list[SkipPlan](), list[int](), llm._adaskip.bulk_set_ids
    monkeypatch.setattr(llm._adaskip, "bulk_set_ids", lambda plans: hashed.extend(plans) or find(plans))
    for begin, end in ((0, 40), (40, 100), (100, 110)):
        positions = evaluated(llm, lambda end=end: next(llm.generate(tokens(end), temp=0)))
        assert positions == list(range(begin, end))
        tails.append(llm.plan.bulk.tail)
    assert tails == [4, 12, 12] and len(hashed) == 1


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


def test_a_promise_that_is_kept_reads_nothing_again(llm: Any) -> None:
    for before, after, plan in ((0.02, 0.05, STRONG), (0.05, 0.02, MILD)):
        llm.set_plan("auto", max_loss=before)
        llm.reset()
        llm.eval(tokens(60))
        llm.set_plan("auto", max_loss=after)
        assert evaluated(llm, lambda: llm.eval(tokens(11)[1:])) == list(range(60, 70)) and llm.plan == plan


def test_an_equal_prompt_under_another_promise_is_evaluated_before_sampling(llm: Any) -> None:
    prompt = tokens(100)
    next(llm.generate(prompt, temp=0))
    llm.set_plan("auto", max_loss=0.0)
    assert len(evaluated(llm, lambda: next(llm.generate(prompt, temp=0)))) >= 98 and llm.plan is None


def test_a_plan_set_by_hand_stays_until_auto_is_set_again(llm: Any) -> None:
    for plan in (MILD, None):
        llm.set_plan(plan)
        llm.eval(tokens(100))
        assert llm.plan == plan and llm.point(100) is None
        llm.reset()
    llm.set_plan("auto")
    llm.eval(tokens(100))
    assert llm.plan == STRONG


def test_auto_reads_the_file_beside_the_model_and_nothing_else(tiny: Tiny, tmp_path: Path, open_model: Open) -> None:
    model = Path(shutil.copy(tiny(), tmp_path / "m.Q4.gguf"))
    model.with_suffix(".adaskip.json").write_text("this is no profile")
    with pytest.raises(PlanFileError, match=r"m\.Q4\.adaskip-plan\.json.*`adaskip-cpp tune .*m\.Q4\.gguf`"):
        open_model(model, plan="auto")
    save_plan(plan_path(model), FOUND)
    llm = open_model(model, plan="auto", max_loss=0.02)
    llm.eval(tokens(100))
    assert llm.plan == MILD and len(llm.frontier.points) == 2
    plan = replace(SkipPlan.manual(3, [2], [0], scale=0.9), model=ModelInfo(fingerprint(model), "llama", 3))
    save_plan(plan_path(model), plan)
    llm = open_model(model, plan="auto")
    assert llm.plan == plan and llm.elided_kv == (2,)
    with pytest.raises(PlanError, match=r"max_loss chooses from a frontier, but the plan file .* has one plan"):
        open_model(model, plan="auto", max_loss=0.001)
    save_plan(plan_path(model), replace(MILD, model=ModelInfo("ab" * 32, "llama", 3)))
    with pytest.raises(ProfileMismatchError, match=r"another model.*tune"):
        open_model(model, plan="auto")


TUNED = Settings(True, repack="all", n_batch=64, n_ubatch=32, n_threads=1, n_threads_batch=2, unpack=("Q4_1", "Q5_0"))


def settings_of(path: Path, plan: Frontier | None, **arguments: Any) -> Settings:
    """The settings of a model that is opened with a frontier."""
    with closing(AdaSkipLlama(str(path), plan=plan, n_ctx=128, verbose=False, **arguments)) as llm:
        found = cost_settings(llm)
        assert llm.model_params.use_extra_bufts == bool(found.repack)
        threads = found.n_threads, found.n_threads_batch
        return Settings(found.flash_attention, found.repack, found.n_batch, found.n_ubatch, *threads, found.unpack)


@pytest.mark.parametrize("given", [{}, {"flash_attn": False, "repack": False, "n_threads": 3}, {"unpack": ()}], ids=str)
def test_arguments_win_over_found_settings(given: dict[str, Any], tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    found, without = replace(FOUND, settings=TUNED), settings_of(tiny(), None, **given)
    for machine in (None, SETTINGS):  # none, and another one
        assert settings_of(tiny(), replace(found, machine=machine), **given) == without
    monkeypatch.setattr(adaskip_cpp.engine.llama, "is_here", lambda machine: True)
    assert settings_of(tiny(), found, **given) == replace(TUNED, **given)


def test_a_promise_that_cannot_be_kept_is_refused_and_the_one_before_stays(llm: Any, open_tiny: Open) -> None:
    with pytest.raises(PlanError, match='open the model with plan="auto"'):
        open_tiny().set_plan("auto")
    wrong: list[tuple[Any, Any, str]] = [
        (None, 0.1, 'pass it with plan="auto"'),
        (MILD, 0.1, 'pass it with plan="auto"'),
        ("best", None, "unknown plan 'best'"),
        ("auto", -0.1, "a number from 0 on"),
    ]
    for plan, max_loss, why in wrong:
        for call in (open_tiny, llm.set_plan):
            with pytest.raises(PlanError, match=why):
                call(plan=plan, max_loss=max_loss)
    llm.eval(tokens(100))
    assert llm.plan == STRONG


def test_a_pickled_model_keeps_frontier_and_promise(open_tiny: Open) -> None:
    llm = open_tiny(plan=FOUND, max_loss=0.02)
    with closing(pickle.loads(pickle.dumps(llm))) as copy:
        for each in (llm, copy):
            each.eval(tokens(100))
        assert isinstance(copy.frontier, Frontier) and copy.plan == MILD
        np.testing.assert_array_equal(logits(llm), logits(copy))


@pytest.mark.parametrize("name", ["llama", "jamba"])
def test_a_truncated_model_goes_on_as_one_that_read_no_more(name: str, open_tiny: Open) -> None:
    # jamba keeps a state, which cannot give back what it has read: it reads the first ones again.
    llm, fresh = open_tiny(name), open_tiny(name)
    llm.eval(tokens(40))
    for n in (-1, 40, 50):
        llm.truncate(n)
        assert llm.n_tokens == 40
    llm.truncate(25)
    assert llm.n_tokens == 25
    llm.eval([5, 6])
    fresh.eval([*tokens(40)[:25], 5, 6])
    np.testing.assert_allclose(logits(llm), logits(fresh), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("of", ["edits", "plans"])
def test_figures_of_another_model_are_refused_also_where_no_plan_is_chosen(
    of: str, tiny: Tiny, tmp_path: Path, open_model: Open
) -> None:
    """Edited prompts have figures and no plan, so they would be moved by those of another model."""
    other, third = (ModelInfo(each * 32, "llama", 3) for each in ("ab", "cd"))
    found = frontier([], edits=edit_points([0.001], [Edits()]), model=other)
    if of == "plans":
        found = frontier([point(replace(STRONG, model=other), 0.04, {64: 1.5})])
    model = Path(shutil.copy(tiny(), tmp_path / "m.gguf"))
    save_plan(plan_path(model), found)
    for plan in (found, "auto"):
        with pytest.raises(ProfileMismatchError, match="was made for another model"):
            open_model(model, plan=plan, max_loss=1e-6)
    with pytest.raises(PlanError, match="several models"):
        save_plan(plan_path(model), frontier([point(replace(STRONG, model=other), 0.04, {64: 1.5})], model=third))
