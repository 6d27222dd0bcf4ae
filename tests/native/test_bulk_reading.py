"""Who reads what a bulk left: its own plan and later turns; nobody who wants a prompt's own logits."""

import itertools
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LlamaRAMCache
from oracles.bulks import NOTHING, chosen, phases, plan
from oracles.fixtures import Open
from oracles.readable import evaluated
from oracles.skip_sets import same
from oracles.tiny_families import N_LAYER, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.skip_set import SkipSet

BULK, OTHER = chosen((0, 0), (1, 1)), chosen((0, 0), (1, 1), seed=1)
TEXT = "the other of the other in an hour on the other of the other in an hour"
READ = {"max_tokens": 3, "temperature": 0.0, "echo": True, "logprobs": 2}


def in_bulk(llm: Any, call: Callable[[], Any]) -> list[int]:
    return phases(llm, call).get("bulk", [])


def test_batches_of_a_bulk_end_with_blocks_of_kv_cells(open_tiny: Open) -> None:
    """Each attention would otherwise read a block of 256 cells more in every batch."""
    ends: list[int] = []
    llm = open_tiny(under=plan(BULK), n_ctx=2048, n_batch=512, n_ubatch=512)
    llm.on_batch = ends.append
    prompt = tokens(2000)
    for n, expected in ((1100, [0, 4, 512, 1024, 1092, 1100]), (2000, [1100, 1536, 1992, 2000])):
        ends.clear()
        next(llm.generate(prompt[:n], temp=0))
        assert list(dict.fromkeys(ends)) == expected


def told(llm: Any, text: str = TEXT, **options: Any) -> Any:
    return llm.create_completion(text, **{**READ, **options})["choices"]


@pytest.mark.parametrize("has_cache", [False, True])
@pytest.mark.parametrize("prefill", [NOTHING, chosen((2, 1))], ids=["the whole model", "a prefill set"])
def test_a_prompts_log_probabilities_are_those_of_the_prefill_set_after_its_bulk_and_beside_a_cache_too(
    prefill: SkipSet, has_cache: bool, open_tiny: Open
) -> None:
    llm, alone = open_tiny(under=plan(BULK, prefill)), open_tiny(under=same(prefill))
    llm.set_cache(LlamaRAMCache() if has_cache else None)
    assert in_bulk(llm, lambda: llm.create_completion(TEXT, max_tokens=3, temperature=0.0))
    for text in (TEXT, TEXT if has_cache else TEXT[:40]):  # the cache holds what the first of these saved, too
        if has_cache:
            llm.reset()
        assert told(llm, text) == told(alone, text)
        alone.reset()  # else it reads again what it computed, and a last token by itself differs by rounding


def test_a_streamed_completion_reads_its_prompt_until_it_ends_or_is_left(open_tiny: Open) -> None:
    llm, whole = open_tiny(under=plan(BULK)), open_tiny()

    def streamed(each: Any) -> Any:
        return [step["choices"] for step in each.create_completion(TEXT, **READ, stream=True)]

    assert not in_bulk(llm, lambda: streamed(llm))
    assert streamed(llm) == streamed(whole)
    steps = llm.create_completion(TEXT, **READ, stream=True)
    next(steps)
    llm.reset()
    assert in_bulk(llm, lambda: llm.eval(list(range(3, 43)))), "what comes between two steps is no part of it"
    steps.close()


def test_who_asks_for_one_of_both_gets_a_bulk_also_after_a_reading_that_failed(open_tiny: Open) -> None:
    llm = open_tiny(under=plan(BULK))

    def fail(*_: Any) -> Any:
        raise LookupError

    with pytest.raises(LookupError):
        told(llm, stopping_criteria=llama_cpp.StoppingCriteriaList([fail]))
    for options in ({"echo": False}, {"logprobs": None}):
        llm.reset()
        assert in_bulk(llm, lambda options=options: told(llm, **options)), options


def test_embeddings_have_no_bulk(open_tiny: Open) -> None:
    llm, whole = (open_tiny(embedding=True) for _ in range(2))
    llm.set_plan(plan(BULK))
    assert llm.embed(TEXT) == whole.embed(TEXT)
    assert not in_bulk(llm, lambda: llm.eval(tokens(50)))


def test_who_decodes_on_the_context_without_us_has_no_bulk(open_tiny: Open) -> None:
    llm = open_tiny(under=plan(BULK))
    llm.eval_bulk(tokens(40))
    llm._batch.set_batch(batch=tokens(40), n_past=40, logits_all=True)
    seen = phases(llm, lambda: llama_cpp.llama_decode(llm.ctx, llm._batch.batch))
    assert seen == {"prefill": list(range(40, 80))}


AFTER: dict[str, tuple[SkipPlan | None, list[int]]] = {
    "the same": (plan(BULK), []),
    "other sets and another head and tail": (plan(BULK, chosen((0, 0)), OTHER, head=0, tail=1), [39]),
    "another bulk set": (plan(OTHER), [*range(4, 40)]),
    "no bulk set": (SkipPlan(NOTHING, BULK), [*range(4, 40)]),
    "the same set in prefill": (SkipPlan(BULK, BULK), [*range(4, 40)]),
    "the whole model": (None, [*range(4, 40)]),
}


@pytest.mark.parametrize("after", AFTER)
def test_a_bulk_is_read_by_plans_with_this_very_bulk_set(after: str, open_tiny: Open) -> None:
    llm, (of, expected) = open_tiny(under=plan(BULK)), AFTER[after]
    next(llm.generate(tokens(40), temp=0.0))
    llm.set_plan(of)
    assert evaluated(llm, lambda: next(llm.generate(tokens(40), temp=0.0))) == expected


def test_a_prompt_has_a_bulk_its_answer_none_and_a_chats_next_turns_evaluate_what_is_new(open_tiny: Open) -> None:
    # The token that was generated last is not evaluated yet.
    llm = open_tiny(under=plan(BULK, decode=chosen((1, 1), (2, 1))))
    talk = tokens(40)
    answer: list[int] = []
    seen = phases(llm, lambda: answer.extend(itertools.islice(llm.generate(talk, temp=0.0), 4)))
    assert seen == {"bulk": list(range(4, 32)), "prefill": [*range(4), *range(32, 40)], "decode": [40, 41, 42]}
    talk += [*answer, 7, 8]
    answer.clear()
    seen = phases(llm, lambda: answer.extend(itertools.islice(llm.generate(talk, temp=0.0), 4)))
    assert seen == {"prefill": [43, 44, 45], "decode": [46, 47, 48]}
    talk += [*answer, *tokens(20, seed=1)]
    assert phases(llm, lambda: next(llm.generate(talk, temp=0.0))) == {
        "bulk": list(range(49, 62)),
        "prefill": list(range(62, 70)),
    }


PREFILL, ONE, TWO = (
    SkipPlan.manual(N_LAYER, ffn=[1]),
    *(plan(SkipPlan.manual(N_LAYER, [1], ffn).prefill) for ffn in ([1], [0, 1])),
)


@pytest.mark.parametrize("name", ["gemma3", "jamba", "lfm2"])
@pytest.mark.parametrize(("of", "after"), [(PREFILL, None), (TWO, None), (TWO, ONE)], ids=["prefill", "bulk", "bulks"])
def test_sliding_windows_and_recurrent_states_follow_the_rule(
    name: str, of: SkipPlan, after: SkipPlan | None, open_tiny: Open
) -> None:
    llm, fresh = open_tiny(name, under=of, swa_full=False), open_tiny(name, under=after, swa_full=False)
    assert bool(in_bulk(llm, lambda: llm.eval(tokens(60)))) == (of.bulk is not None)
    assert evaluated(llm, lambda: llm.eval([7])) == [60], "what its own plan computed"
    llm.set_plan(after)
    llm.eval([8])
    fresh.eval([*tokens(60), 7, 8])
    np.testing.assert_array_equal(llm.scores[61], fresh.scores[61])


def test_a_prompt_with_an_image_runs_whole(open_tiny: Open) -> None:
    """Several tokens of an image may have one position, and a window counts cells."""
    llm = open_tiny(under=plan(BULK))
    llm.eval(tokens(9))
    assert in_bulk(llm, lambda: llm.eval(tokens(50, seed=1)))
    llm.input_ids[3] = -7  # as llama-cpp-python records an image
    assert not in_bulk(llm, lambda: llm.eval(tokens(50, seed=2)))
