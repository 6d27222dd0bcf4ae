"""The model of a server: answers, what they use of earlier prompts, and log-probabilities."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.fixtures import Open, Tiny
from oracles.served import BULK_PLAN, FRONTIER, edited_frontier, frontier_of
from oracles.tiny_families import tokens

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.engine.settings import cost_settings
from adaskip_cpp.measuring.running import Running, quietly
from adaskip_cpp.model.frontier import Frontier
from adaskip_cpp.model.settings import Settings
from adaskip_cpp.serving.body import read_body
from adaskip_cpp.serving.llama import ServedLlama
from adaskip_cpp.serving.plans import Plans
from adaskip_cpp.serving.prefix_cache import PrefixCache
from adaskip_cpp.serving.request import Gone, ServedRequest

CAREFUL, FAST = (point.plan for point in FRONTIER.points)
OPTIONS: Any = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "verbose": False}
"""KV is F32, so that the rounding of other batches cannot decide."""


@pytest.fixture
def open_served(tiny: Tiny) -> Iterator[Open]:
    """``open_served(family, plan or frontier, folder)``: a model as the server has it, closed after the test."""
    opened = []

    def open_(
        family: str = "llama", plan: Any = BULK_PLAN, folder: Path | None = None, options: Any = OPTIONS, **more: Any
    ) -> ServedLlama:
        own, frontier = (None, plan) if isinstance(plan, Frontier) else (plan, None)
        kwargs = {**options, **more}
        plans, cache = Plans(own, frontier, 0.07, kwargs["n_ctx"]), PrefixCache(10**8, folder)
        opened.append(ServedLlama(str(tiny(family)), plan=frontier, plans=plans, cache=cache, **kwargs))
        return opened[-1]

    yield open_
    for llm in opened:
        llm.close()


@pytest.fixture
def served(open_served: Open) -> ServedLlama:
    return open_served()  # type: ignore[no-any-return]


@pytest.fixture
def alone(tiny: Tiny) -> Iterator[Open]:
    """``alone(family, **options)``: the same model without a server, closed after the test."""
    with ExitStack() as opened:
        yield lambda family="llama", **options: opened.enter_context(
            closing(AdaSkipLlama(str(tiny(family)), **{**OPTIONS, **options}))
        )


def tokens_of(llm: AdaSkipLlama, prompt: list[int], n: int = 6) -> list[int]:
    with closing(llm.generate(prompt, temp=0)) as steps:
        return list(islice(steps, n))


def run(llm: ServedLlama, prompt: list[int], wish: Any = "auto", n: int = 6, **more: Any) -> tuple[list[int], Any]:
    llm.request = request = ServedRequest(wish=wish, **more)
    return tokens_of(llm, prompt, n), request


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4", "mamba", "jamba", "lfm2"])
def test_answers_are_those_of_a_model_by_itself(name: str, open_served: Open, alone: Open) -> None:
    """Three conversations under two plans, alternating and growing: each as if it had the model for itself.

    Against three of AdaSkipLlama, one each. With sliding windows, and with states that stand for all tokens so far.
    """
    llm = alone(name)
    ffn = [each.layer for each in llm.sublayers if each.kind == "ffn" and each.in_bulk][1:]
    plan = SkipPlan.manual(llm.n_layer, ffn=ffn, phase="bulk")
    served = open_served(name, plan)
    talks = {seed: tokens(400, seed) for seed in (1, 2, 3)}
    wishes = {1: "auto", 2: "none", 3: "auto"}
    others = {seed: alone(name, plan=plan if wish == "auto" else None) for seed, wish in wishes.items()}
    n_read = []
    for turn in range(3):
        for seed, talk in talks.items():
            answer, request = run(served, talk, wishes[seed])
            assert answer == tokens_of(others[seed], talk)
            n_read.append(request.n_read)
            talk += answer + tokens(20, 10 * turn + seed)[1:]
    assert min(n_read[:3]) >= 399 and max(n_read[3:]) < 50, "all but the last few tokens are known"


def test_what_a_plan_skipped_is_never_read_without_it(served: ServedLlama) -> None:
    prompt = tokens(500)
    _, first = run(served, prompt)
    _, second = run(served, prompt, "none")
    assert first.n_skipping > 0 and second.n_read >= 500 - 4
    _, third = run(served, prompt)
    assert third.n_read == 1, "what the whole model read serves any plan"


LONG: Any = {"n_ctx": 2048}


def test_a_chat_that_grows_over_a_change_of_plan_reads_nothing_again(open_served: Open) -> None:
    served = open_served("llama", FRONTIER, **LONG)
    talk = tokens(900)
    answer, first = run(served, talk)
    assert first.choice.plan is FAST and first.n_skipping > 0
    talk += answer + tokens(300, 2)[1:]
    _, second = run(served, talk)
    assert second.choice.plan is CAREFUL and second.n_reused >= 900 + len(answer) - 1
    _, third = run(served, talk[:1000])
    assert third.choice.plan is FAST and third.n_reused >= 999, "nor where it goes back"


def test_what_was_read_under_another_plan_of_the_frontier_outlasts_a_restart(
    open_served: Open, alone: Open, tmp_path: Path
) -> None:
    talk = tokens(1200)
    first = open_served("llama", FRONTIER, tmp_path, **LONG)
    run(first, talk[:900])
    first.close()
    # Of equal figures, as another process reads them from a plan file.
    again = open_served("llama", frontier_of(3), tmp_path, **LONG)
    expected, request = run(again, talk)
    assert request.choice.plan == CAREFUL and request.n_reused >= 899
    again.close()
    # The same answer as that of one model that read all of it.
    llm = alone(**LONG)
    llm.set_plan(FAST, readable=[CAREFUL])
    llm.eval(talk[:900])
    llm.set_plan(CAREFUL, readable=[FAST])
    assert expected == tokens_of(llm, talk)


def test_edits_are_used_again_as_far_as_the_promise_allows(open_served: Open) -> None:
    """Of 0.07 nats small edits may take 0.035, and the plan has the rest."""
    served = open_served("llama", edited_frontier(0.03, 0.2), **LONG)
    a, b, line = tokens(400), tokens(500, 1)[1:], tokens(9, 2)[1:]
    _, first = run(served, a + b)
    assert first.choice.plan is CAREFUL and first.reuse == "edits", "0.06 and 0.03 would be too much"
    _, second = run(served, a[:300] + line + a[300:] + b)
    assert second.n_moved > 400 and second.n_read < 200
    _, third = run(served, a[:1] + b + a[1:])
    assert third.n_moved == 0 and third.n_read > 890, "another order loses too much"
    _, fourth = run(served, a[:1] + line + b + a[1:], {"max_loss": 0.05})
    assert fourth.reuse == "prefix" and fourth.n_read > 890 and fourth.choice.plan is CAREFUL
    _, fifth = run(served, a[:1] + b + a[1:], "none")
    assert fifth.reuse == "prefix" and fifth.n_read > 890, "the whole model reads nothing that was moved"


def test_documents_that_others_asked_about_are_put_together(open_served: Open, tmp_path: Path) -> None:
    """From states in memory and on disk, of the same owner alone, and only if asked for: no promise covers it."""
    head, documents = tokens(80), [tokens(300, seed)[1:] for seed in (1, 2, 3)]
    prompt = [*head, *documents[2], *documents[0], *documents[1]]
    served = open_served("llama", edited_frontier(0.01, 0.02), tmp_path, **LONG)
    for each in documents:
        run(served, [*head, *each])
    served.close()
    again = open_served("llama", edited_frontier(0.01, 0.02), tmp_path, **LONG)
    _, other = run(again, prompt, salt="another", reuse="edits")
    assert other.n_read == len(prompt) and other.n_moved == 0
    _, promised = run(again, prompt)
    assert promised.reuse == "edits" and promised.n_moved == 0
    assert promised.n_read == len(prompt) - len(head) - len(documents[2])
    _, request = run(again, [*head, *documents[1], *documents[2], *documents[0], *tokens(9, 8)], reuse="edits")
    assert request.n_moved > 500 and request.n_read < 200


def test_a_tighter_promise_reads_again_what_was_read_under_a_plan_that_does_not_keep_it(
    open_served: Open, alone: Open
) -> None:
    served, prompt = open_served("llama", FRONTIER, **LONG), tokens(900)
    run(served, prompt)
    answer, tighter = run(served, prompt, {"max_loss": 0.05})
    assert tighter.choice.plan is CAREFUL and tighter.n_skipping > 0 and tighter.n_reused < 100
    assert answer == tokens_of(alone(plan=CAREFUL, **LONG), prompt)
    assert run(served, prompt)[1].n_read == 1, "what keeps the tighter promise keeps the other"


def test_after_plans_the_whole_model_is_itself_bit_for_bit(open_served: Open, alone: Open) -> None:
    served, prompt = open_served("llama", FRONTIER, **LONG), tokens(900)
    for wish in ("auto", {"max_loss": 0.05}, {"speedup": 1.4}):
        run(served, prompt, wish)
    logits = []
    _, request = run(served, prompt, "none", 1, reuses=False)
    llm = alone(**LONG)
    tokens_of(llm, prompt, 1)
    for each in (served, llm):
        logits.append(np.ctypeslib.as_array(each._ctx.get_logits_ith(-1), (each.n_vocab(),)).copy())
    np.testing.assert_array_equal(*logits)
    assert run(served, prompt, "none")[1].n_skipping == 0 == request.n_skipping


def test_it_is_opened_with_the_settings_that_were_found_on_this_machine(open_served: Open, open_tiny: Open) -> None:
    machine, found = cost_settings(open_tiny()), Settings(flash_attn=True, repack=False, n_batch=96, n_ubatch=64)
    opened = []
    for each in (machine, replace(machine, cpu="another")):
        frontier = frontier_of(3, settings=found, machine=each)
        served = quietly(partial(open_served, options={}), "llama", 1024, Running(n_threads=1), plan=frontier)
        opened.append(cost_settings(served))
    assert [(each.flash_attention, each.repack, each.n_batch, each.n_ubatch) for each in opened] == [
        (True, False, 96, 64),
        (False, True, 512, 512),
    ]


def test_a_prompt_that_shall_be_read_anew_is_and_leaves_the_others(served: ServedLlama) -> None:
    talk, other = tokens(300, 1), tokens(300, 2)
    run(served, talk)
    for _ in range(2):
        assert run(served, other, n=1, reuses=False)[1].n_read == 300
    assert run(served, talk)[1].n_read == 1
    assert run(served, other)[1].n_read >= 299, "nor is it read on"
    run(served, talk)
    assert run(served, other)[1].n_read == 1, "what is read in the ordinary way is kept again"
    assert {tuple(each.tokens[:300]) for each in served.prefix_cache.entries} == {tuple(talk), tuple(other)}


def test_what_others_wrote_is_not_told(served: ServedLlama) -> None:
    """Not even as a count of tokens that need not be read: of what is in memory, and of what the cache has."""

    def ask(prompt: list[int], **whose: str) -> int:
        return int(run(served, prompt, n=1, **whose)[1].n_reused)

    talk, other = tokens(300, 1), tokens(300, 2)
    assert ask(talk, salt="a") == 0 == ask(talk, salt="b") == ask(talk) == ask(talk, owner="a")
    ask(other)  # so that the cache has it
    assert ask(talk, owner="b") == 0 == ask(talk, salt="c") == ask(talk, owner="a", salt="a")
    assert [ask(talk, **whose) for whose in ({"salt": "a"}, {"owner": "a"}, {"salt": "b"}, {})] == [299] * 4


def test_an_answer_tells_why_its_prompt_was_read(served: ServedLlama) -> None:
    talk, other = tokens(300, 1), tokens(300, 2)
    for prompt, more, because in (
        (talk, {}, "new"),
        (talk, {}, None),
        (talk[:200] + other[1:100], {}, "text"),
        (talk[:24] + other[1:100], {}, "text"),
        (other, {}, "new"),  # but for its first token, which all have
        (talk, {"wish": "none"}, "plan"),
        (other, {"reuses": False}, "cache_prompt"),
        (talk, {"salt": "of another"}, "new"),  # that it is there for others is not told
    ):
        request = run(served, prompt, **more)[1]
        assert request.reread_because == because == request.summary["reread_because"]
    served.request = ServedRequest()
    served.create_completion("the " * 100, max_tokens=1, echo=True, logprobs=1)
    assert served.request.reread_because == "logprobs"


def test_an_answer_tells_that_its_prompt_was_forgotten(served: ServedLlama) -> None:
    run(served, tokens(300, 1))
    run(served, tokens(300, 2))
    (kept,) = served.prefix_cache.entries
    served.prefix_cache.most = kept.n_bytes + 10
    run(served, tokens(300, 3))
    assert run(served, tokens(300, 1))[1].reread_because == "evicted"
    served.prefix_cache.most = 10  # too small for any state
    for seed in (4, 5):
        run(served, tokens(300, seed))
    assert run(served, tokens(300, 4))[1].reread_because == "evicted"
    served.prefix_cache.most = 10
    run(served, tokens(300, 4))
    assert run(served, tokens(300, 1))[1].reread_because == "evicted", "it did not fit at all"


def test_a_recurrent_state_cannot_go_back(open_served: Open) -> None:
    served = open_served("mamba", None)
    run(served, tokens(300))
    assert run(served, tokens(300)[:200])[1].reread_because == "memory"


def test_the_progress_of_a_prompt_is_told_batch_by_batch(served: ServedLlama) -> None:
    """Under a plan with a bulk, which cuts a prompt in three; and of one of which a part was known."""

    def ask(prompt: list[int]) -> list[tuple[int, int, int]]:
        told = []
        request = served.request = ServedRequest(
            on_step=lambda: told.append((request.n_prompt, request.n_cached, request.n_done, request.n_generated))
        )
        with closing(served.generate(prompt, temp=0)) as steps:
            next(steps)
            next(steps)
        assert [each[3] for each in told[-2:]] == [0, 1], "then the answer token by token"
        return list(dict.fromkeys(each[:3] for each in told if each[1] is not None and not each[3]))

    talk = tokens(900)
    first = ask(talk)
    done = [each[2] for each in first]
    assert done[0] == 0 and done[-1] == 900 and done == sorted(set(done)) and len(done) >= 4
    assert {each[:2] for each in first} == {(900, 0)}
    assert ask(talk[:500] + tokens(100, 2)[1:])[0] == (599, 500, 500)


def test_a_request_that_nobody_waits_for_ends_at_the_next_batch(served: ServedLlama) -> None:
    request = ServedRequest()
    served.request = request
    steps = served.generate(tokens(100), temp=0)
    next(steps)
    request.is_left = True
    with pytest.raises(Gone):
        next(steps)
    served.request = ServedRequest()
    served.request.is_left = True
    with pytest.raises(Gone):
        next(served.generate(tokens(900, 5), temp=0))
    assert served.n_tokens < 200
    answer, _ = run(served, tokens(300, 6))
    assert len(answer) == 6


def test_an_answer_that_ends_within_a_character_ends_after_its_last_byte_or_where_the_context_is_full(
    served: ServedLlama,
) -> None:
    """Stock goes on beyond ``max_tokens`` until the character is whole, and fails where there is no room."""
    half = next(token for token in range(served.n_vocab()) if served.detokenize([token]) == b"\xe3")
    body = {"prompt": "the", "temperature": 0, "logit_bias": {half: 100}}
    for most, n_expected in ((2000, served.context_size + 1 - 4), (2, 5)):
        request = read_body("/v1/completions", json.dumps({**body, "max_tokens": most}).encode())
        (choice,) = served.answer(request)["choices"]
        assert choice["finish_reason"] == "length"
        assert request.n_generated == n_expected, "the last token needs no room, and a character has four bytes at most"
    letter = served.tokenize(b"x", add_bos=False)[-1]
    biased = {"logit_bias": {letter: 50, half: 49.9}, "frequency_penalty": 0.05, "max_tokens": 2}
    (choice,) = served.answer(read_body("/v1/completions", json.dumps({**body, **biased}).encode()))["choices"]
    assert choice["text"] == "x" and choice["finish_reason"] == "length", "stock forgets what came before it"


def test_what_follows_a_schema_is_json_whatever_the_model_prefers(served: ServedLlama) -> None:
    """Stock lets line breaks into texts, as they are."""
    (line_break,) = (token for token in range(served.n_vocab()) if served.detokenize([token]) == b"\n")
    form = {"type": "json_object", "schema": {"type": "string", "maxLength": 3}}
    body = {"messages": [{"role": "user", "content": "a"}], "response_format": form, "max_tokens": 20}
    body |= {"logit_bias": {line_break: 100}, "temperature": 0}
    (choice,) = served.answer(read_body("/v1/chat/completions", json.dumps(body).encode()))["choices"]
    assert choice["finish_reason"] == "stop" and json.loads(choice["message"]["content"]) is not None


def test_logprobs_are_those_of_the_stock_library(served: ServedLlama, tiny: Tiny) -> None:
    """Against llama-cpp-python with ``logits_all``: of a prompt and its answer; it tells none of the first token."""
    options = {"max_tokens": 5, "temperature": 0.0, "logprobs": 3, "echo": True, "logit_bias": {2: -100.0}}
    stock = AdaSkipLlama(str(tiny()), logits_all=True, **OPTIONS)
    expected: Any = stock.create_completion("the to of an re", **options)  # type: ignore[arg-type]
    served.request = ServedRequest()
    found: Any = served.create_completion("the to of an re", **options)  # type: ignore[arg-type]
    ours, theirs = (each["choices"][0]["logprobs"] for each in (found, expected))
    assert found["choices"][0]["text"] == expected["choices"][0]["text"] and ours["tokens"] == theirs["tokens"]
    np.testing.assert_allclose(ours["token_logprobs"][1:], theirs["token_logprobs"][1:], atol=1e-4)
    assert theirs["token_logprobs"][0] is None and ours["token_logprobs"][0] < 0, "BOS is before it"
    streamed = ServedRequest(wish="none")
    served.request = streamed
    chunks: Any = list(served.create_completion("the to of an re", **options, stream=True))  # type: ignore[arg-type]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [token for part in parts for token in part["tokens"]] == ours["tokens"]
    assert len(served.scores) == served.n_batch, "no row per position"
    stock.close()


def test_a_piece_of_a_stream_has_the_logprobs_of_its_own_text(served: ServedLlama) -> None:
    """A text that may begin a stop sequence is held back, and so are its log-probabilities."""
    options = {"max_tokens": 5, "temperature": 0.0, "logprobs": 1, "logit_bias": {2: -100.0}}
    served.request = ServedRequest()
    answer: Any = served.create_completion("the to of an re", **options)  # type: ignore[arg-type]
    texts = answer["choices"][0]["logprobs"]["tokens"]
    options |= {"stream": True, "stop": [texts[1] + "~"]}
    served.request = ServedRequest()
    chunks: Any = list(served.create_completion("the to of an re", **options))  # type: ignore[arg-type]
    choices = [chunk["choices"][0] for chunk in chunks]
    told = ["".join(each["logprobs"]["tokens"]) if each["logprobs"] else "" for each in choices]
    assert told == [each["text"] for each in choices] and "".join(told) == "".join(texts)


def test_nothing_is_generated_where_nothing_is_wanted(served: ServedLlama) -> None:
    """Stock takes 0 as no limit."""
    served.request = ServedRequest()
    answer: Any = served.create_completion("the to", max_tokens=0, echo=True, logprobs=1)
    assert answer["choices"][0]["text"] == "the to"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"] - 1
