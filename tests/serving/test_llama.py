"""The model of a server: answers, what they use of earlier prompts, and log-probabilities."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.fixtures import Open, Tiny
from oracles.served import BULK_PLAN, FRONTIER, edited_frontier, frontier_of
from oracles.tiny_families import tokens
from oracles.tiny_models import with_metadata

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.engine.settings import cost_settings
from adaskip_cpp.measuring.running import Running, quietly
from adaskip_cpp.model.frontier import Frontier
from adaskip_cpp.model.settings import Settings
from adaskip_cpp.serving.answer import explained
from adaskip_cpp.serving.body import read_body
from adaskip_cpp.serving.llama import ServedLlama
from adaskip_cpp.serving.plans import Plans
from adaskip_cpp.serving.prefix_cache import PrefixCache
from adaskip_cpp.serving.request import Gone, ServedRequest

CAREFUL, FAST = (point.plan for point in FRONTIER.points)
# KV is F32, so that the rounding of other batches cannot decide.
OPTIONS: Any = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "flash_attn": False}
LONG: Any = {**OPTIONS, "n_ctx": 2048}


@pytest.fixture
def open_served(tiny: Tiny) -> Iterator[Open]:
    """``open_served(family, plan or frontier, folder)``: a model as the server has it, closed after the test."""
    with ExitStack() as opened:

        def open_(
            family: str | Path = "llama",
            plan: Any = BULK_PLAN,
            folder: Path | None = None,
            n_ctx: int = 1024,
            **options: Any,
        ) -> ServedLlama:
            own, frontier = (None, plan) if isinstance(plan, Frontier) else (plan, None)
            plans, cache = Plans(own, frontier, 0.07, n_ctx), PrefixCache(10**8, folder)
            options = {"plan": frontier, "plans": plans, "cache": cache, "n_ctx": n_ctx, "verbose": False, **options}
            path = family if isinstance(family, Path) else tiny(family)
            return opened.enter_context(closing(ServedLlama(str(path), **options)))

        yield open_


@pytest.fixture
def served(open_served: Open) -> ServedLlama:
    return open_served(**OPTIONS)  # type: ignore[no-any-return]


@pytest.fixture
def alone(open_tiny: Open) -> Open:
    return lambda family="llama", **options: open_tiny(family, **{"logits_all": False, **OPTIONS, **options})


def tokens_of(llm: AdaSkipLlama, prompt: list[int], n: int = 6) -> list[int]:
    with closing(llm.generate(prompt, temp=0)) as steps:
        return list(islice(steps, n))


def run(llm: ServedLlama, prompt: list[int], wish: Any = "auto", n: int = 6, **more: Any) -> tuple[list[int], Any]:
    llm.request = request = ServedRequest(wish=wish, **more)
    return tokens_of(llm, prompt, n), request


def complete(llm: ServedLlama, prompt: str, **body: Any) -> tuple[Any, ServedRequest]:
    request = read_body("/v1/completions", json.dumps({"prompt": prompt, "temperature": 0, **body}).encode())
    return llm.answer(request), request


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4", "mamba", "jamba", "lfm2"])
def test_answers_are_those_of_a_model_by_itself(name: str, open_served: Open, alone: Open) -> None:
    """Three conversations under two plans, alternating and growing: each against an AdaSkipLlama of its own."""
    llm = alone(name)
    ffn = [each.layer for each in llm.sublayers if each.kind == "ffn" and each.in_bulk][1:]
    plan = SkipPlan.manual(llm.n_layer, ffn=ffn, phase="bulk")
    served = open_served(name, plan, **OPTIONS)
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


def test_a_chat_over_two_plans_and_a_restart_is_read_once(open_served: Open, alone: Open, tmp_path: Path) -> None:
    talk = tokens(1700)
    first = open_served("llama", FRONTIER, tmp_path, **LONG)
    _, fast = run(first, talk[:900])
    assert fast.choice.plan is FAST and fast.n_skipping > 0
    first.close()
    again = open_served("llama", frontier_of(3), tmp_path, **LONG)  # equal figures, as from a plan file
    expected, careful = run(again, talk)
    longer = FRONTIER.points[0].plan_for(2048)
    assert careful.choice.plan == longer != CAREFUL and careful.n_reused >= 899
    _, back = run(again, talk[:1000])
    assert back.choice.plan == FAST and back.n_reused >= 999, "nor where it goes back"
    llm = alone(**LONG)
    llm.set_plan(FAST, readable=[longer])
    llm.eval(talk[:900])
    llm.set_plan(longer, readable=[FAST])
    assert expected == tokens_of(llm, talk)


def test_edits_are_used_as_promised_and_documents_put_together(open_served: Open, tmp_path: Path) -> None:
    """Documents only if asked for. From states in memory and on disk, of the same owner alone."""
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
    assert promised.reuse == "edits" and promised.n_moved == 0, "another order loses too much"
    assert promised.n_read == len(prompt) - len(head) - len(documents[2])
    _, edited = run(again, [*prompt[:300], *tokens(9, 7), *prompt[300:]])
    assert edited.n_moved > 400 and edited.n_read < 200
    for order, wish in (([1, 2, 0], "auto"), ([2, 0, 1], "none")):
        together = [token for each in order for token in documents[each]]
        _, request = run(again, [*head, *together, *tokens(9, 8)], wish, reuse="edits")
        assert request.reuse == "edits" and request.n_moved > 450 and request.n_read < 200


@pytest.mark.parametrize(("wish", "plan"), [({"max_loss": 0.05}, CAREFUL), ("none", None)], ids=["tighter", "none"])
def test_what_breaks_the_promise_is_read_again(wish: Any, plan: Any, open_served: Open, alone: Open) -> None:
    served, prompt = open_served("llama", FRONTIER, **LONG), tokens(900)
    expected = tokens_of(alone(plan=plan, **LONG), prompt)
    assert run(served, prompt)[1].n_skipping > 0
    for reuses in (False, True):
        answer, request = run(served, prompt, wish, reuses=reuses)
        assert answer == expected and request.choice.plan is plan
        assert request.n_reused < 100 and (request.n_skipping > 0) == (plan is not None)
    assert run(served, prompt)[1].n_read == 1, "what keeps the tighter promise keeps the other"


def test_it_is_opened_with_the_settings_that_were_found_on_this_machine(open_served: Open, open_tiny: Open) -> None:
    found = Settings(flash_attn=True, repack=False, n_batch=96, n_ubatch=64)
    frontier = frontier_of(3, settings=found, machine=cost_settings(open_tiny()))
    served = quietly(open_served, "llama", 1024, Running(n_threads=1), plan=frontier)
    used = cost_settings(served)
    assert (used.flash_attention, used.repack, used.n_batch, used.n_ubatch) == (True, False, 96, 64)


def test_a_prompt_that_a_saved_one_began_is_kept_too(served: ServedLlama) -> None:
    """A saved state is loaded for its first tokens. The others that it has do not count as kept."""
    long, other = tokens(400, 1), tokens(300, 2)
    branch = long[:150] + tokens(200, 3)[1:]
    for prompt in (long, other, branch, other):
        run(served, prompt)
    assert run(served, branch)[1].n_read == 1


def test_a_memory_that_cannot_go_back_is_replaced_by_a_saved_state(open_served: Open) -> None:
    """A recurrent model cannot forget its last tokens, so the tokens before them are no use."""
    served = open_served("mamba", None, **OPTIONS)
    text = tokens(700, 1)
    run(served, text[:300], n=1)
    run(served, tokens(300, 2), n=1)
    run(served, text, n=1)
    changed = [*text[:600], *tokens(50, 3)[1:]]
    assert run(served, changed, n=1)[1].n_read <= len(changed) - 299


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
    _, request = complete(served, "the " * 100, max_tokens=1, echo=True, logprobs=1)
    assert request.reread_because == "logprobs"


def test_an_answer_tells_that_its_prompt_was_lost(served: ServedLlama, open_served: Open) -> None:
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
    recurrent = open_served("mamba", None, **OPTIONS)
    run(recurrent, tokens(300))
    assert run(recurrent, tokens(300)[:200])[1].reread_because == "memory"


def test_a_request_that_nobody_waits_for_ends_at_the_next_batch(served: ServedLlama) -> None:
    served.request = ServedRequest()
    steps = served.generate(tokens(100), temp=0)
    next(steps)
    served.request.is_left = True
    with pytest.raises(Gone):
        next(steps)
    with pytest.raises(Gone):
        run(served, tokens(900, 5), is_left=True)
    assert served.n_tokens < 200
    answer, _ = run(served, tokens(300, 6))
    assert len(answer) == 6


def test_an_answer_ends_after_the_last_byte_of_a_character_or_with_the_context(served: ServedLlama) -> None:
    """Stock goes on beyond ``max_tokens`` until the character is whole, and fails where there is no room."""
    half = next(token for token in range(served.n_vocab()) if served.detokenize([token]) == b"\xe3")
    for most, n_expected in ((2000, served.context_size + 1 - 4), (2, 5)):
        answer, request = complete(served, "the", max_tokens=most, logit_bias={half: 100})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert request.n_generated == n_expected, "the last token needs no room, and a character has four bytes at most"
    letter = served.tokenize(b"x", add_bos=False)[-1]
    answer, _ = complete(served, "the", max_tokens=2, logit_bias={letter: 50, half: 49.9}, frequency_penalty=0.05)
    (choice,) = answer["choices"]
    assert choice["text"] == "x" and choice["finish_reason"] == "length", "stock forgets what came before it"


FIVE: Any = {"max_tokens": 5, "temperature": 0.0, "logprobs": 3, "echo": True, "logit_bias": {2: -100.0}}


def test_logprobs_are_those_of_the_stock_library(served: ServedLlama, alone: Open) -> None:
    """Against llama-cpp-python with ``logits_all``: of a prompt and its answer; it tells none of the first token."""
    expected = alone(logits_all=True).create_completion("the to of an re", **FIVE)
    found, _ = complete(served, "the to of an re", **FIVE)
    ours, theirs = (each["choices"][0]["logprobs"] for each in (found, expected))
    assert found["choices"][0]["text"] == expected["choices"][0]["text"] and ours["tokens"] == theirs["tokens"]
    np.testing.assert_allclose(ours["token_logprobs"][1:], theirs["token_logprobs"][1:], atol=1e-4)
    assert theirs["token_logprobs"][0] is None and ours["token_logprobs"][0] < 0, "BOS is before it"
    assert len(served.scores) == served.n_batch, "no row per position"
    nothing, request = complete(served, "the to", max_tokens=0, echo=True, logprobs=1)
    (choice,) = nothing["choices"]
    assert choice["text"] == "the to" and len(choice["logprobs"]["tokens"]) == request.n_prompt - 1, "0 is no token"


def test_a_piece_of_a_stream_has_the_logprobs_of_its_own_text(served: ServedLlama) -> None:
    """A text that may begin a stop sequence is held back, and so are its log-probabilities."""
    whole = complete(served, "the to of an re", **FIVE)[0]["choices"][0]["logprobs"]["tokens"]
    chunks, _ = complete(served, "the to of an re", **FIVE, stream=True, stop=[whole[-4] + "~"])
    choices = [chunk["choices"][0] for chunk in chunks]
    told = [each["logprobs"]["tokens"] if each["logprobs"] else [] for each in choices]
    assert "".join(told[0]) == f" {choices[0]['text']}"  # the echoed prompt
    assert ["".join(tokens) for tokens in told[1:]] == [each["text"] for each in choices[1:]]
    assert [token for tokens in told for token in tokens] == whole


def test_a_template_that_refuses_messages_is_the_clients_mistake(
    served_model: Path, open_served: Open, tmp_path: Path
) -> None:
    """llama-cpp-python's ``raise_exception`` raises a ValueError, and a filter a TypeError: none is jinja's own."""
    fails = "{{ raise_exception('no such role') }}", "{% for each in messages[0].content | items %}{% endfor %}"
    for number, template in enumerate(fails):
        path = with_metadata(served_model, tmp_path / f"{number}.gguf", **{"tokenizer.chat_template": template})
        llm = open_served(path, None, **OPTIONS)
        asked = {"messages": [{"role": "user", "content": "a"}]}
        with pytest.raises((ValueError, TypeError)) as refused:
            llm.answer(read_body("/v1/chat/completions", json.dumps(asked).encode()))
        status, message, _ = explained(refused.value, logs_text=False)
        assert status == 400 and "the model's chat template refuses these messages" in message


def test_a_suffix_is_asked_for_with_the_models_own_tokens(
    served_model: Path, open_served: Open, tmp_path: Path
) -> None:
    """llama-cpp-python takes token 0 for all three."""
    marks = {f"tokenizer.ggml.{name}_token_id": id for name, id in (("fim_pre", 11), ("fim_suf", 12), ("fim_mid", 13))}
    llm = open_served(with_metadata(served_model, tmp_path / "fim.gguf", **marks), None, **OPTIONS)
    before, after = (llm.tokenize(text.encode(), add_bos=False) for text in ("the to", " of a"))
    complete(llm, "the to", suffix=" of a", max_tokens=1)
    expected = [llm.token_bos(), 11, *before, 12, *after, 13]
    assert llm.input_ids[: len(expected)].tolist() == expected
    complete(llm, "the to", suffix="", max_tokens=1)
    assert llm.input_ids[: len(before) + 1].tolist() == [llm.token_bos(), *before], "an empty one asks for nothing"


def test_a_seed_is_of_one_request(served: ServedLlama) -> None:
    def text(**body: Any) -> str:
        answer, _ = complete(served, "the to", temperature=2, max_tokens=20, **body)
        return str(answer["choices"][0]["text"])

    assert text(seed=1) == text(seed=1)
    assert len({(text(seed=1), text())[1] for _ in range(3)}) > 1, "another client's seed decides nothing"


def test_tokens_of_a_prompt_that_was_not_read_are_not_reused() -> None:
    assert ServedRequest(n_prompt=100).n_reused == 0
    assert ServedRequest(n_prompt=100, first=1.0).n_reused == 100
