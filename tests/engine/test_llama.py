"""AdaSkipLlama: phases, changes of plan, graph reuse, saved states, and every refusal leaving the model usable."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.bulks import TOLERANCE, chosen
from oracles.bulks import plan as bulk_plan
from oracles.expected import history_of, split
from oracles.fixtures import Open, Tiny
from oracles.readable import evaluated, logits
from oracles.reference import ReferenceRun, relative_error
from oracles.stock import EXACT, Job, run_stock
from oracles.tiny_families import N_CTX_TRAIN, N_VOCAB, tokens
from oracles.tiny_models import write_model

from adaskip_cpp import AdaSkipLlama, SkipPlan, errors
from adaskip_cpp.errors import AdaSkipError, PlanError, RequestError, StateError
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


def test_what_is_evaluated_between_and_after_the_steps_of_a_generator_is_a_prompt(open_tiny: Open) -> None:
    def fail(ids: Any, scores: Any) -> bool:
        if len(ids) > 10:
            raise LookupError
        return False

    llm = open_tiny(under=DECODE_ONLY)
    steps = llm.generate(tokens(9), temp=0, stopping_criteria=fail)
    next(steps)
    next(steps)
    llm.eval([7])
    assert llm.counters.nodes == llm.counters.nodes_full
    with pytest.raises(LookupError):
        list(steps)
    llm.eval([7])
    assert llm.counters.nodes == llm.counters.nodes_full


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


def test_what_a_window_lost_after_a_loaded_state_is_evaluated_again(open_tiny: Open, numpy_model: Open) -> None:
    # Stock reads on without the lost positions: 13% off. The reference's GELU is 9e-5 off.
    llm, run = open_tiny("gemma3"), ReferenceRun(numpy_model("gemma3"))
    llm.eval(tokens(17))
    llm.load_state(llm.save_state())
    llm.eval([40, 41, 42, 43])  # from the cache's start on, over what a window of 8 has left
    next(llm.generate([*tokens(10), 50], temp=0.0))
    assert relative_error(llm.scores[10:11], run.eval([*tokens(10), 50]).logits[-1:]) < 5e-4


def test_stale_positions_that_are_no_text_are_refused(open_tiny: Open) -> None:
    llm = open_tiny(under=BOTH)
    llm.eval(tokens(9))
    llm.input_ids[4] = -1  # how llama-cpp-python's chat handlers mark the positions of an image
    llm.set_plan(None)
    with pytest.raises(StateError, match="reset"):
        llm.eval([7])
    llm.reset()
    llm.eval(tokens(9))


@pytest.mark.parametrize(
    ("name", "n_ctx", "limit", "way_out"),
    [
        ("llama", 200, 200, "larger n_ctx"),  # llama.cpp has room for 256 tokens
        ("llama", 256, 256, "larger n_ctx"),
        # GPT-2 has an embedding for each position. ggml ends the process at a position without one.
        ("gpt2", N_CTX_TRAIN + 100, N_CTX_TRAIN, "no further positions"),
    ],
)
def test_past_the_context_nothing_is_read(name: str, n_ctx: int, limit: int, way_out: str, open_tiny: Open) -> None:
    # llama-cpp-python neither shifts the context nor keeps n_keep tokens.
    llm = open_tiny(name, n_ctx=n_ctx, under=BOTH)
    llm.eval(tokens(9))
    calls: list[Callable[[list[int]], object]] = [
        lambda prompt: llm.eval(prompt[9:]),
        lambda prompt: llm.eval_decode(prompt[9:]),
        lambda prompt: llm.logits_after(prompt[9:]),
        lambda prompt: next(llm.generate(prompt)),
        lambda prompt: llm.create_completion(prompt),
    ]
    for call in calls:
        with pytest.raises(RequestError, match=f"exceed context window of {limit}; .*{way_out}"):
            call(tokens(limit + 1))
        assert llm.n_tokens == 9 and llm.plan == BOTH
    assert evaluated(llm, lambda: llm.eval([7])) == [9]
    with pytest.raises(RequestError, match=f"{limit + 1} tokens exceed context window of {limit}"):
        list(llm.generate(tokens(limit - 6), temp=0))
    assert llm.n_tokens == limit
    letter = llm.tokenize(b"a", add_bos=False)[-1]  # whole characters, as stock generates on in search of their end
    answer = llm.create_completion(tokens(limit - 10), max_tokens=None, logit_bias={letter: 100.0})
    assert answer["usage"]["total_tokens"] == limit and answer["choices"][0]["finish_reason"] == "length"


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


def test_what_a_sink_raises_ends_the_evaluation(open_tiny: Open) -> None:
    llm = open_tiny(n_batch=8)

    def sink(batch: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), llm.collect_statistics(sink):
        llm.eval(tokens(40))
    assert llm.n_tokens == 8
    assert still_works(llm, open_tiny)


def test_asking_for_logits_while_statistics_of_all_tokens_are_collected_is_refused(open_tiny: Open) -> None:
    llm = open_tiny()
    llm.eval(tokens(9))
    with llm.collect_statistics(lambda batch: None):
        for call in (lambda: next(llm.generate(tokens(9), temp=0)), lambda: llm.logits_after([7])):
            with pytest.raises(StateError, match=r"leave collect_statistics\(\) first, or .* keep_logits=True"):
                call()
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


def test_wrong_plans_are_refused_and_the_plan_in_force_and_the_logits_stay(open_tiny: Open) -> None:
    # Jamba's layers 0 and 2 have no attention.
    plan, bulk = SkipPlan.manual(3, ffn=[1, 2]), SkipPlan.manual(3, ffn=[1], phase="bulk")
    llm = open_tiny("jamba")
    llm.set_plan(plan, readable=[bulk])
    next(llm.generate(tokens(9), temp=0))
    wrong: list[tuple[type[AdaSkipError], Any]] = [
        (PlanError, SkipPlan.manual(4, ffn=[3], phase="bulk")),
        (errors.ProfileMismatchError, replace(bulk, model=ModelInfo("0" * 64, "jamba", 3))),
        (errors.NotSkippableError, SkipPlan.manual(3, attention=[0], phase="bulk")),
        (errors.NotSkippableError, SkipPlan.manual(3, attention=[2], phase="decode")),
        (PlanError, {"attention": [1]}),
    ]
    for error, each in wrong:
        with pytest.raises(error):
            llm.set_plan(each)
        if getattr(each, "bulk", each):
            with pytest.raises(error):
                llm.set_plan(None, readable=[bulk, each])
        assert (llm.plan, llm.readable) == (plan, (bulk,))
    assert evaluated(llm, lambda: next(llm.generate(tokens(9), temp=0))) == []


@pytest.mark.parametrize("content", [None, b"GGUF", b"no model at all", "truncated"])
def test_a_broken_model_file_is_refused(content: bytes | str | None, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(tiny().read_bytes()[:-5000] if isinstance(content, str) else content)
    with pytest.raises(errors.ModelFileError):
        AdaSkipLlama(str(path), verbose=False)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(errors.ModelFileError, match="is not a regular file"):
        AdaSkipLlama(str(tmp_path / "model.gguf"), verbose=False)


@pytest.mark.parametrize(
    "options",
    [{"n_batch": -1}, {"n_ubatch": 0}, {"n_threads": 513}, {"n_threads_batch": 10**6}, {"type_k": 26}, {"type_v": 99}],
    ids=str,
)
def test_numbers_that_would_end_the_process_are_refused(options: dict[str, int], open_tiny: Open) -> None:
    with pytest.raises(RequestError, match=r"is -?\d+; use a (number from -?1 to|type of K and V)"):
        open_tiny(**options)


@pytest.mark.parametrize("what", ["missing", "a model"])
def test_a_lora_adapter_that_is_none_is_refused(what: str, tiny: Tiny, open_tiny: Open, tmp_path: Path) -> None:
    """llama_cpp.Llama takes both, and runs the model without an adapter or ends the process."""
    path = tmp_path / "no.gguf" if what == "missing" else tiny()
    with pytest.raises(errors.ModelFileError, match=r"there is no model file|cannot use .* as a LoRA adapter"):
        open_tiny(lora_path=str(path))


@pytest.mark.parametrize("wrong", [[5, -1], [N_VOCAB], [2**40], [1.7], ["a"]], ids=str)
def test_what_is_no_token_is_refused_and_the_model_goes_on(wrong: Any, open_tiny: Open) -> None:
    llm = open_tiny()
    llm.eval(tokens(9))
    for evaluate in (llm.eval, llm.eval_bulk, llm.eval_decode):
        with pytest.raises(RequestError, match=r"there is no token|give token ids"):
            evaluate(wrong)
    with pytest.raises(RequestError, match=r"there is no token|give token ids"):
        llm.detokenize(wrong)
    assert llm.n_tokens == 9 and still_works(llm, open_tiny)


def test_a_closed_model_says_so(open_tiny: Open) -> None:
    """llama.cpp would read freed memory."""
    llm = open_tiny()
    llm.eval(tokens(9))
    state, saved = llm.save_state(), llm.save_prompt()
    llm.close()
    uses = (llm.n_ctx, llm.n_vocab, llm.n_embd, llm.token_bos, llm.synchronize, llm.save_state, llm.save_prompt)
    for use in (
        *uses,
        lambda: llm.n_ctx_train,
        lambda: llm.plan,
        lambda: llm.eval(tokens(3)),
        lambda: llm.tokenize(b"the"),
        lambda: llm.detokenize([5]),
        lambda: llm.create_completion("the"),
        lambda: llm.load_state(state),
        lambda: llm.load_prompt(saved),
    ):
        with pytest.raises(errors.NativeError, match="the model is closed"):
            use()
    llm.close()


@pytest.mark.parametrize("plan", [5, [], {}], ids=str)
def test_what_is_no_plan_is_refused(plan: Any, open_tiny: Open) -> None:
    with pytest.raises(PlanError, match=r'unknown plan .*; pass "auto", a SkipPlan or None'):
        open_tiny(plan=plan)


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


N_PROMPT = 40


@pytest.fixture(params=[False, True], ids=["last logits", "all logits"])
def logits_all(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("n_batch", [128, 16, 7])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4"])
def test_logits_after_tokens_are_stocks(name: str, n_batch: int, logits_all: bool, tiny: Tiny, open_tiny: Open) -> None:
    text, options = tokens(60), {"n_batch": n_batch, "logits_all": logits_all, "exact_batches": True}
    pieces, all_rows = [text[:N_PROMPT], text[N_PROMPT:]], {"n_ctx": 128, "n_batch": n_batch, "logits_all": True}
    [expected] = run_stock([Job(str(tiny(name)), pieces, {**all_rows, **EXACT})])
    llm = open_tiny(name, **options)
    llm.eval(pieces[0])
    found = llm.logits_after(pieces[1])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected[N_PROMPT:])
    assert llm.logits_after([]).shape == (0, N_VOCAB), "after no tokens there are none"
    assert llm.n_tokens == 60 and llm.input_ids[:60].tolist() == text
    if logits_all:
        np.testing.assert_array_equal(llm.scores[:60], expected)


@pytest.mark.parametrize(
    ("size", "options"),
    [(20, {}), (1, {}), (20, {"n_batch": 7}), (20, {"n_ubatch": 3}), (20, {"swa_full": False})],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_logits_after_a_bulk_are_those_of_numpy(
    name: str, size: int, options: dict[str, Any], logits_all: bool, open_tiny: Open, numpy_model: Open
) -> None:
    of = bulk_plan(chosen((0, 0), (1, 1)), decode=chosen((2, 1), seed=1), tail=3)
    llm, expected = open_tiny(name, logits_all=logits_all, under=of, **options), history_of(numpy_model(name), of)
    for each in (llm, expected):
        each.eval(tokens(N_PROMPT))
    answer = tokens(20, seed=1)
    found = np.concatenate([llm.logits_after(piece) for piece in split(answer, size)])
    for token in answer:
        expected.decode([token])
    rows = [expected.trace(N_PROMPT + index).logits[0] for index in range(20)]
    assert relative_error(found, np.stack(rows)) < TOLERANCE[name]


def test_generation_goes_on_after_them_and_they_stay_the_callers(logits_all: bool, open_tiny: Open) -> None:
    text = tokens(60)
    llm, fresh = open_tiny(logits_all=logits_all), open_tiny(logits_all=logits_all)
    llm.eval(text[:N_PROMPT])
    found = llm.logits_after(text[N_PROMPT:])
    kept = found.copy()
    llm.eval(np.array([], np.int64))  # as for stock, any sequence of numbers will do
    expected = next(fresh.generate(np.array(text), temp=0.0))
    assert next(llm.generate(text, temp=0.0)) == expected == found[-1].argmax()
    llm.logits_after([7, 8])
    with pytest.raises(RequestError):
        llm.logits_after([-1])
    np.testing.assert_array_equal(found, kept)
    assert next(llm.generate([*text, 7, 8, 9], temp=0.0)) == next(fresh.generate([*text, 7, 8, 9], temp=0.0))
