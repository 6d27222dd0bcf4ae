"""Grammars that would end or block the process: each is refused, and the model can be used afterwards."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from llama_cpp import LlamaGrammar
from oracles.fixtures import Open
from oracles.grammars import BOTH, CHAIN, FORK, WAYS, rules

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.errors import RequestError

MOST_SECONDS = 10  # far more than any takes; without bounds most never end
LONG_NAME = "n" * 400_000

UNREADABLE = {
    "root ::= ((": "unexpected end|expecting",
    "root ::= other": "Undefined rule",
    "other ::= [a-z]": "no rule is named root",
    'root ::= root "a" | "b"': "begins with itself",
    "root ::= \ud800": "expecting",
    "root ::= " + "[" * 1_000_000: "unexpected end",
    "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000: "nested",
    # Where a comment has quotes, what follows it is no text in quotes.
    'root ::= "a" # "\n' + "b ::= " + "(" * 100_000 + '"a"' + ")" * 100_000: "nested",
    CHAIN: "too long a chain",
    FORK: "too many ways",
    BOTH: "too many ways",
    'root ::= "a"{5,2}': "maximum below its minimum",
    'root ::= "' + "a" * 500_000 + '"{2000}': "too many ways",
    "root ::= " + LONG_NAME + "\n" + LONG_NAME + " ::= " + '"a"* ' * 5000: "too many ways",
}

UNUSABLE = {
    "root ::= <[4294967295]>": "allows no token",
    r"root ::= [^\x00-\UFFFFFFFF]": "allows no token",
    'root ::= "a" ' + r"[^\x00-\UFFFFFFFF]": "allows no token",
    WAYS: "too many ways",
    "root ::= [" + "ab" * 2_000_000 + "]": "too many ways",
    "root ::= " + "[a-z]? " * 100_000: "too many ways",
}


@pytest.fixture
def llm(open_model: Callable[..., Any], tiny: Callable[..., Path]) -> AdaSkipLlama:
    opened: AdaSkipLlama = open_model(tiny())
    return opened


def complete(llm: AdaSkipLlama, grammar: str | None = None, **options: Any) -> str:
    given = {} if grammar is None else {"grammar": LlamaGrammar.from_string(grammar)}
    answer: Any = llm.create_completion("the", max_tokens=6, seed=1, **given, **options)
    return str(answer["choices"][0]["text"])


def refused(llm: AdaSkipLlama, reason: str, grammar: str, **options: Any) -> str:
    """The message of the error, after which the model answers as before."""
    expected, begin = complete(llm), time.monotonic()
    with pytest.raises(RequestError, match=reason) as caught:
        complete(llm, grammar, **options)
    assert time.monotonic() - begin < MOST_SECONDS
    assert complete(llm) == expected
    return str(caught.value)


@pytest.mark.parametrize("grammar", UNREADABLE, ids=lambda text: text[:30])
def test_what_cannot_be_read_is_refused(llm: AdaSkipLlama, grammar: str, capfd: pytest.CaptureFixture[str]) -> None:
    message = refused(llm, UNREADABLE[grammar], grammar)
    assert len(message) < 400 and "grammars/README.md" in message
    assert "root" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("grammar", UNUSABLE, ids=lambda text: text[:30])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_ends_or_blocks_an_answer_is_refused_there(llm: AdaSkipLlama, grammar: str, temperature: float) -> None:
    refused(llm, UNUSABLE[grammar], grammar, temperature=temperature)


def test_a_token_is_sampled_by_a_grammar_without_generate_too(llm: AdaSkipLlama) -> None:
    llm.eval(llm.tokenize(b"the"))
    with pytest.raises(RequestError, match="allows no token"):
        llm.sample(grammar=LlamaGrammar.from_string("root ::= <[4294967295]>"))
    llm._sampler = None
    token = llm.sample(grammar=LlamaGrammar.from_string('root ::= "a"'))
    assert llm.detokenize([token]) == b"a"


def test_the_library_makes_no_sampler_of_what_cannot_be_read(llm: AdaSkipLlama) -> None:
    for grammar in (CHAIN, FORK, "root ::= (("):
        assert not llama_cpp.llama_sampler_init_grammar(llm._model.vocab, grammar.encode(), b"root")


def test_what_is_within_the_bounds_is_sampled_by(llm: AdaSkipLlama) -> None:
    assert complete(llm, 'root ::= "a"{3}') == "aaa"
    assert complete(llm, "root ::= " + "(" * 900 + '"a"' + ")" * 900) == "a"
    assert complete(llm, rules(900, "NEXT")) == "a"
    assert complete(llm, "root ::= [a]{0,2000}", logit_bias={2: -100}) == "aaaaaa"
    assert complete(llm, "root ::= " + '"a"? ' * 100, logit_bias={2: -100}) == "aaaaaa"
    assert complete(llm, "") == complete(llm), "an empty one is none"


def test_work_is_counted_only_where_an_exception_can_be_reported(open_tiny: Open) -> None:
    """A chain of one's own calls ``llama_sampler_apply``, where one would end the process."""
    llm = open_tiny()
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 8000)))
    sampler = llama_cpp.llama_sampler_init_grammar(llm._model.vocab, f"root ::= [{letters}]+".encode(), b"root")
    n = llm.n_vocab()
    data = (llama_cpp.llama_token_data * n)(*((id, 0.0, 0.0) for id in range(n)))
    tokens = llama_cpp.llama_token_data_array(data, n, -1, False)
    for _ in range(600):  # some 2 million characters each
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(tokens))
    llama_cpp.llama_sampler_reset(sampler)
    llama_cpp.llama_sampler_free(sampler)
