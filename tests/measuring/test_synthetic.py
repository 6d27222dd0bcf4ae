"""Pass keys in a text: length, depth and answers; and that a small model can find them."""

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.questions import ByteLlama, text_of

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.errors import DataError, RequestError
from adaskip_cpp.measuring import corpus
from adaskip_cpp.measuring.tasks import greedy_text, passkey_items

TEXT = " ".join(f"{word}{i}" for i in range(1500) for word in ("lorem", "ipsum", "dolor"))


LLM: Any = ByteLlama(n_ctx=8192)


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("length", [1201, 3000])
def test_a_key_stands_once_where_it_was_asked_to_and_is_asked_for_at_the_end(length: int, depth: float) -> None:
    for item in passkey_items(LLM, TEXT, lengths=[length], depths=[depth], n_per=2):
        assert length - 3 <= len(item.prompt) <= length
        text, key = text_of(item), item.answers[0]
        assert re.findall(r"\b\d{5}\b", text) == [key, key] and f"The pass key is {key}." in text
        ends = text.index(key), len(text)
        before, whole = (sum(map(len, re.findall(r"(?:lorem|ipsum|dolor)\d+ ", text[:end]))) for end in ends)
        assert before / whole == pytest.approx(depth, abs=0.03)
        assert text.endswith("\n\nThe pass key is")
        assert item.score(f" {key}.") == 1.0 and item.score(" 1234") == 0.0


def test_a_key_is_a_number_that_the_text_does_not_have() -> None:
    text = " ".join(str(number) for number in range(10_000, 12_000))
    for item in passkey_items(LLM, text, lengths=[2000], n_per=20, depths=[0.5]):
        assert item.answers[0] not in text


def test_keys_and_ids_are_the_same_in_every_run_however_many_items_there_are() -> None:
    few = passkey_items(LLM, TEXT, lengths=[1500], depths=[0.5, 1], n_per=2)
    assert few[0].answers == ("90024",)
    assert [item.id for item in few] == [f"passkey/1500/{each}" for each in ("0.5/0", "1/0", "0.5/1", "1/1")]
    many = passkey_items(LLM, TEXT, lengths=[1500, 2000], depths=[0.1, 0.5, 1], n_per=3)
    assert {item.id: item for item in few}.items() <= {item.id: item for item in many}.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "at least one length"),
        ({"n_per": 0}, "at least one length"),
        ({"depths": [1.5]}, r"no depth 1.5; use 0 .* to 1"),
        ({"depths": [float("nan")]}, "no depth nan"),
        ({"lengths": [10]}, "a pass key has at least 78 tokens; ask for longer ones than 10"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        passkey_items(LLM, TEXT, **options)


def test_a_text_and_a_context_just_long_enough_will_do() -> None:
    text = TEXT[:1500]
    assert len(passkey_items(LLM, text, lengths=[1500], depths=[0.5], n_per=1)) == 1
    with pytest.raises(DataError, match="the text has 1499 tokens, a prompt needs 1500; give a longer text"):
        passkey_items(LLM, text[:-1], lengths=[1500])
    with pytest.raises(RequestError, match=r"need 1520 tokens, the context has 1519; use a larger context"):
        passkey_items(ByteLlama(n_ctx=1519), TEXT, lengths=[1500])
    passkey_items(ByteLlama(n_ctx=1520), TEXT, lengths=[1500])


@pytest.mark.model
@pytest.mark.slow
def test_with_a_real_tokenizer_lengths_are_met_and_a_small_model_can_find_keys(smollm2_path: Path) -> None:
    text, scores = corpus.SEPARATOR.join(corpus.held_out().values())[:20_000], []
    with closing(AdaSkipLlama(str(smollm2_path), n_ctx=1088, verbose=False)) as llm:
        for length in (300, 1000):
            for item in passkey_items(llm, text, lengths=[length], depths=[0, 0.5, 1], n_per=1):
                assert length - 16 <= len(item.prompt) <= length
        for item in passkey_items(llm, text, lengths=[200], depths=[0.2, 0.8], n_per=2):
            llm.reset()
            scores.append(item.score(greedy_text(llm, item.prompt, item.max_tokens)))
    assert np.mean(scores) >= 0.7
