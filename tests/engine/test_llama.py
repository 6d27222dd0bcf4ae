"""AdaSkipLlama: phases, changes of plan, graph reuse, saved states, and every refusal leaving the model usable."""

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.fixtures import Open, Tiny
from oracles.readable import evaluated, logits
from oracles.reference import ReferenceRun, relative_error
from oracles.tiny_families import N_CTX_TRAIN, tokens
from oracles.tiny_models import write_model

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.errors import AdaSkipError, ModelFileError, PlanError, ProfileMismatchError, RequestError, StateError
from adaskip_cpp.model.identity import ModelInfo

BOTH = SkipPlan.manual(3, attention=[1], ffn=[2])
DECODE_ONLY = SkipPlan.manual(3, attention=[1], ffn=[2], phase="decode")


def still_works(llm: AdaSkipLlama, open_tiny: Open) -> bool:
    """Whether the model evaluates on from its cache as one does that nothing happened to."""
    other = open_tiny(under=llm.plan)
    other.eval(llm.input_ids[: llm.n_tokens].tolist())
    for each in (llm, other):
        each.eval(tokens(5, seed=99))
    return np.array_equal(logits(llm), logits(other))


# -- phases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "n_batch"), [(1, 128), (9, 4)], ids=["one token", "one token in the last batch"])
def test_a_prompt_is_a_prompt_however_short_its_last_batch_is(n: int, n_batch: int, open_tiny: Open) -> None:
    # With a plan that skips in decode only, the whole model must read all of it.
    llm, full = (open_tiny(n_batch=n_batch, under=plan) for plan in (DECODE_ONLY, None))
    for each in (llm, full):
        next(each.generate(tokens(n), temp=0))
    np.testing.assert_array_equal(logits(llm), logits(full))


@pytest.mark.parametrize("end", ["none", "close", "throw", "drop"])
def test_what_is_evaluated_after_some_steps_of_a_generator_is_a_prompt(end: str, open_tiny: Open) -> None:
    llm = open_tiny(under=DECODE_ONLY)
    steps = llm.generate(tokens(9), temp=0)
    next(steps)
    next(steps)
    if end == "close":
        steps.close()
    elif end == "throw":
        with pytest.raises(KeyError):
            steps.throw(KeyError())
    elif end == "drop":
        del steps
    llm.eval([7])
    assert llm.counters.nodes == llm.counters.nodes_full


def test_tokens_may_be_an_array(open_tiny: Open) -> None:
    # As stock: llama_cpp.Llama takes any sequence of numbers.
    llm, other = open_tiny(), open_tiny()
    llm.eval(np.array(tokens(9), np.int32))
    llm.eval(np.array([], np.int64))
    other.eval(tokens(9))
    np.testing.assert_array_equal(logits(llm), logits(other))
    plain = list(itertools.islice(other.generate(tokens(9, seed=1), temp=0), 4))
    assert list(itertools.islice(llm.generate(np.array(tokens(9, seed=1)), temp=0), 4)) == plain


# -- plans and graphs ------------------------------------------------------------------------------------------------


def test_a_change_of_plan_builds_one_graph_and_an_equal_plan_none(open_tiny: Open) -> None:
    llm = open_tiny()
    assert llm.sublayers  # looks at a graph once, which makes the next decode build its own
    llm.eval([1])
    llm.eval([5])
    one, again, scaled = (SkipPlan.manual(3, ffn=[0], scale=scale) for scale in (1.0, 1.0, 1.5))
    for plan, n_graphs in ((one, 1), (again, 0), (scaled, 1), (None, 1)):
        llm.set_plan(plan)
        llm.reset()  # or what the plan before computed is evaluated again, in a graph of its own
        before = llm.counters.graphs_built
        for token in tokens(10):
            llm.eval([token])
        assert llm.counters.graphs_built == before + n_graphs


def test_what_decode_may_read_but_prefill_may_not_is_evaluated_again_too(open_tiny: Open) -> None:
    # The prompt lacks layer 1, which the new prefill set runs and the new decode set does not; what was generated lacks
    # layer 0 as well, which both run. Reading it again as prefill must begin with the prompt.
    sets = [SkipPlan.manual(3, attention=layers).prefill for layers in ((), (1,), (0, 1))]
    llm, full = open_tiny(), open_tiny()
    llm.set_plan(SkipPlan(sets[1], sets[2]))
    steps = llm.generate(tokens(9), temp=0)
    answer = [next(steps) for _ in range(4)]
    llm.set_plan(SkipPlan(sets[0], sets[1]))
    next(steps)
    full.eval([*tokens(9), *answer[:3]])
    full.set_plan(SkipPlan(sets[1], sets[1]))
    full.eval(answer[3:])
    np.testing.assert_allclose(logits(llm), logits(full), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", [None, SkipPlan.manual(3, attention=[0], ffn=[1])], ids=["no plan", "plan"])
def test_what_a_window_has_left_and_lost_after_a_loaded_state_is_evaluated_again(
    plan: SkipPlan | None, open_tiny: Open, numpy_model: Open
) -> None:
    # Stock reads on without the lost positions: 13% off. The reference's GELU is 9e-5 off.
    llm, run = open_tiny("gemma3", under=plan), ReferenceRun(numpy_model("gemma3"))
    llm.eval(tokens(17))
    llm.load_state(llm.save_state())
    llm.eval([40, 41, 42, 43])  # from the cache's start on, over what a window of 8 has left
    next(llm.generate([*tokens(10), 50], temp=0.0))
    skip = None if plan is None else plan.prefill.skip
    assert relative_error(llm.scores[10:11], run.eval([*tokens(10), 50], skip).logits[-1:]) < 5e-4


def test_stale_positions_that_are_no_text_are_refused(open_tiny: Open) -> None:
    llm = open_tiny(under=BOTH)
    llm.eval(tokens(9))
    llm.input_ids[4] = -1  # how llama-cpp-python's chat handlers mark the positions of an image
    llm.set_plan(None)
    with pytest.raises(StateError, match="reset"):
        llm.eval([7])
    llm.reset()
    llm.eval(tokens(9))


# -- a full context --------------------------------------------------------------------------------------------------


def test_a_model_has_no_more_positions_than_it_learned(open_tiny: Open) -> None:
    """GPT-2 has an embedding for each position. ggml ends the process at a position without one."""
    llm = open_tiny("gpt2", n_ctx=N_CTX_TRAIN + 100, logits_all=False)
    llm.eval(tokens(N_CTX_TRAIN))
    for n in (1, 50):
        with pytest.raises(
            RequestError, match=rf"{N_CTX_TRAIN + n} tokens exceed .* of {N_CTX_TRAIN}; .*no further pos"
        ):
            llm.eval([5] * n)
    assert llm.n_tokens == N_CTX_TRAIN
    with pytest.raises(RequestError, match=f"context window of {N_CTX_TRAIN}"):
        next(llm.generate(tokens(N_CTX_TRAIN + 1), temp=0))
    answer = llm.create_completion(tokens(N_CTX_TRAIN - 4), max_tokens=50, logit_bias={2: -100})
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == N_CTX_TRAIN


@pytest.mark.parametrize("plan", [None, BOTH, DECODE_ONLY], ids=["no plan", "both", "decode only"])
def test_past_the_context_an_answer_is_refused_and_the_model_goes_on(plan: SkipPlan | None, open_tiny: Open) -> None:
    # llama-cpp-python neither shifts the context nor keeps n_keep tokens.
    llm = open_tiny(n_ctx=256, under=plan)
    with pytest.raises(RequestError, match="257 tokens exceed context window of 256"):
        for _ in llm.generate(tokens(250), temp=0):
            pass
    assert llm.n_tokens == 256
    llm.reset()
    llm.eval(tokens(9))
    assert still_works(llm, open_tiny)


@pytest.mark.parametrize("n_ctx", [200, 256])  # llama.cpp has room for 256 tokens in both
def test_a_prompt_longer_than_the_context_is_refused_and_nothing_changes(n_ctx: int, open_tiny: Open) -> None:
    llm = open_tiny(n_ctx=n_ctx, under=BOTH)
    llm.eval(tokens(9))
    calls: list[Callable[[list[int]], object]] = [
        lambda prompt: llm.eval(prompt[9:]),
        lambda prompt: llm.eval_decode(prompt[9:]),
        lambda prompt: next(llm.generate(prompt)),
        lambda prompt: llm.create_completion(prompt),
    ]
    for call in calls:
        with pytest.raises(RequestError, match=rf"exceed context window of {n_ctx}; .*n_ctx"):
            call(tokens(n_ctx + 1))
        assert llm.n_tokens == 9 and llm.plan == BOTH
    assert still_works(llm, open_tiny)


def test_an_answer_ends_where_the_context_does(open_tiny: Open) -> None:
    # llama.cpp has room for 256 tokens.
    llm = open_tiny(n_ctx=200)
    answer = llm.create_completion(tokens(190), max_tokens=None, temperature=0, logit_bias={"2": -100.0})
    assert answer["usage"]["total_tokens"] == 200 and answer["choices"][0]["finish_reason"] == "length"
    assert llm.n_tokens <= 200


@pytest.mark.parametrize("plan", [BOTH, DECODE_ONLY], ids=["both", "decode only"])
def test_positions_dropped_by_hand_leave_the_record_right(plan: SkipPlan, open_tiny: Open) -> None:
    # As a user's own n_keep does it: cut back to the first tokens and go on from there.
    llm, other = open_tiny(under=plan), open_tiny(under=plan)
    list(itertools.islice(llm.generate(tokens(9), temp=0), 6))
    llm.n_tokens = 4
    llm.set_plan(None)
    other.set_plan(None)
    llm.eval(tokens(12)[4:])
    other.eval(tokens(12))
    np.testing.assert_allclose(logits(llm), logits(other), rtol=1e-4, atol=1e-5)


# -- saved states ----------------------------------------------------------------------------------------------------


def test_a_saved_state_goes_on_under_its_plan_and_brings_its_holes_along(open_tiny: Open) -> None:
    saver, loader, full = open_tiny(under=BOTH), open_tiny(), open_tiny()
    saver.eval(tokens(9))
    state = pickle.loads(pickle.dumps(saver.save_state()))
    loader.eval(tokens(9))  # full KV everywhere, until the state replaces it
    loader.load_state(state)
    loader.eval([7])
    full.eval([*tokens(9), 7])
    np.testing.assert_allclose(logits(loader), logits(full), rtol=1e-4, atol=1e-5)
    loader.load_state(state)
    loader.set_plan(BOTH)
    assert evaluated(loader, lambda: loader.eval([7])) == [9]
    saver.eval([7])
    np.testing.assert_array_equal(logits(loader), logits(saver))


@pytest.mark.parametrize("difference", ["model", "n_ctx", "damaged"])
def test_a_foreign_state_is_refused(difference: str, tiny: Tiny, open_model: Open, open_tiny: Open) -> None:
    path, n_ctx = tiny(seed=int(difference == "model")), 256 if difference == "n_ctx" else 128
    source = open_model(path, n_ctx=n_ctx)
    source.eval(tokens(9))
    state = source.save_state()
    if difference == "damaged":
        state.llama_state = bytes(len(state.llama_state))
    llm = open_tiny()
    llm.eval(tokens(9, seed=3))
    with pytest.raises(StateError):
        llm.load_state(state)
    assert still_works(llm, open_tiny)


# -- statistics ------------------------------------------------------------------------------------------------------


def test_what_a_sink_raises_ends_the_evaluation(open_tiny: Open) -> None:
    llm = open_tiny(n_batch=8)
    seen = []

    def sink(batch: Any) -> None:
        seen.append(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), llm.collect_statistics(sink):
        llm.eval(tokens(40))
    assert len(seen) == 1 and llm.n_tokens == 8
    assert still_works(llm, open_tiny)


def test_generating_while_statistics_are_collected_is_refused(open_tiny: Open) -> None:
    llm = open_tiny()
    with llm.collect_statistics(lambda batch: None):
        with pytest.raises(StateError):
            next(llm.generate(tokens(9), temp=0))
        with pytest.raises(StateError), llm.collect_statistics(lambda batch: None):
            pass
    assert still_works(llm, open_tiny)


def test_a_prompt_evaluated_for_statistics_is_evaluated_again_before_sampling(open_tiny: Open) -> None:
    # No logits were computed for it; stock would sample from those of the prompt before.
    llm, fresh = open_tiny(), open_tiny()
    llm.eval(tokens(9, seed=4))
    llm.reset()
    with llm.collect_statistics(lambda batch: None):
        llm.eval(tokens(9))
    fresh.eval(tokens(9))
    assert next(llm.generate(tokens(9), temp=0)) == int(np.argmax(logits(fresh)))


# -- refusals --------------------------------------------------------------------------------------------------------

ELSEWHERE = ModelInfo("0" * 64, "llama", 3)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (SkipPlan.manual(4, ffn=[3]), PlanError),
        (SkipPlan(BOTH.prefill, BOTH.decode, model=ELSEWHERE), ProfileMismatchError),
        ({"attention": [1]}, PlanError),
    ],
    ids=["4 layers", "another model", "no plan"],
)
def test_a_wrong_plan_is_refused_and_the_plan_in_force_stays(
    wrong: Any, error: type[AdaSkipError], open_tiny: Open
) -> None:
    llm = open_tiny(under=BOTH)
    llm.eval(tokens(9))
    with pytest.raises(error):
        llm.set_plan(wrong)
    assert llm.plan == BOTH and still_works(llm, open_tiny)


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"GGUF" + bytes(100), b"no model at all", "truncated"])
def test_a_broken_model_file_is_refused(content: bytes | str | None, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(tiny().read_bytes()[:-5000] if isinstance(content, str) else content)
    with pytest.raises(ModelFileError):
        AdaSkipLlama(str(path), verbose=False)


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon"])
@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_plans_of_one_size_do_not_share_memory_layouts(kind: str, name: str, tmp_path: Path, open_model: Open) -> None:
    # ggml keeps its allocation plan while a graph has as many nodes and leaves as the one before, which is the case for
    # these plans: each runs one sublayer, a different one. The oracle is a model that has seen no other plan.
    path = write_model(tmp_path / "model.gguf", name, n_layer=8)
    llm = open_model(path)
    others = {"attention": [], "ffn": range(8), kind: range(8)}
    for layer in (*range(8), 3, 0, 7):
        plan = SkipPlan.manual(8, **{**others, kind: [each for each in range(8) if each != layer]})
        fresh = open_model(path)
        for each in (llm, fresh):
            each.set_plan(plan)
            each.reset()
            each.eval(tokens(20))
            each.eval([7])
        np.testing.assert_array_equal(logits(llm), logits(fresh))
