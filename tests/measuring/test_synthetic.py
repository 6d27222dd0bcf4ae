"""Pass keys in a text: length, depth and answers; and that a small model can find them."""

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.questions import ByteLlama, text_of

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.errors import DataError, RequestError
from adaskip_cpp.measuring import corpus
from adaskip_cpp.measuring.synthetic import passkey_items
from adaskip_cpp.measuring.tasks import greedy_text

TEXT = " ".join(f"{word}{i}" for i in range(1500) for word in ("lorem", "ipsum", "dolor"))


@pytest.fixture
def llm() -> Any:
    return ByteLlama(n_ctx=8192)


@pytest.mark.parametrize("length", [1200, 1201, 3000])
def test_a_prompt_is_as_long_as_asked_for_or_a_little_less(llm: Any, length: int) -> None:
    items = passkey_items(llm, TEXT, lengths=[length], depths=[0, 0.37, 1], n_per=2)
    assert len(items) == 6
    assert all(length - 3 <= len(item.prompt) <= length for item in items)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_answer_lies_where_it_was_asked_to(llm: Any, depth: float) -> None:
    for item in passkey_items(llm, TEXT, lengths=[3000], depths=[depth], n_per=2):
        text = text_of(item)
        place = text.index(item.answers[0])
        filling = sum(len(word) + 1 for word in re.findall(r"(?:lorem|ipsum|dolor)\d+", text))
        before = sum(len(word) + 1 for word in re.findall(r"(?:lorem|ipsum|dolor)\d+", text[:place]))
        assert before / filling == pytest.approx(depth, abs=0.03)


def test_a_passkey_stands_once_in_the_text_and_is_asked_for_at_the_end(llm: Any) -> None:
    for item in passkey_items(llm, TEXT, lengths=[2000], n_per=3):
        text, key = text_of(item), item.answers[0]
        assert re.findall(r"\b\d{5}\b", text) == [key, key]
        assert f"The pass key is {key}." in text
        assert text.endswith("\n\nThe pass key is")
        assert item.score(f" {key}.") == 1.0 and item.score(" 1234") == 0.0


def test_a_key_is_a_number_that_the_text_does_not_have(llm: Any) -> None:
    text = " ".join(str(number) for number in range(10_000, 12_000))
    for item in passkey_items(llm, text, lengths=[2000], n_per=20, depths=[0.5]):
        assert item.answers[0] not in text


# --- ids --------------------------------------------------------------------------------------------------------------


def test_a_key_is_the_same_in_every_run_and_ids_tell_task_length_depth_and_index(llm: Any) -> None:
    (item,) = passkey_items(llm, TEXT, lengths=[1500], depths=[0.5], n_per=1)
    assert item.answers == ("90024",)
    ids = [item.id for item in passkey_items(llm, TEXT, lengths=[1500], depths=[0.25, 1], n_per=2)]
    assert ids == ["passkey/1500/0.25/0", "passkey/1500/1/0", "passkey/1500/0.25/1", "passkey/1500/1/1"]


def test_more_items_leave_those_that_there_were_as_they_are(llm: Any) -> None:
    few = passkey_items(llm, TEXT, lengths=[1500], depths=[0.5], n_per=1)
    many = passkey_items(llm, TEXT, lengths=[1500, 2000], depths=[0.1, 0.5], n_per=3)
    assert {item.id: item for item in few}.items() <= {item.id: item for item in many}.items()


# --- what cannot be made ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "at least one length"),
        ({"depths": []}, "at least one length"),
        ({"n_per": 0}, "at least one length"),
        ({"depths": [1.5]}, r"no depth 1.5; use 0 .* to 1"),
        ({"depths": [float("nan")]}, "no depth nan"),
        ({"lengths": [10]}, "a pass key has at least 78 tokens; ask for longer ones than 10"),
        ({"lengths": [0]}, "ask for longer ones than 0"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(llm: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        passkey_items(llm, TEXT, **options)


def test_a_text_and_a_context_just_long_enough_will_do(llm: Any) -> None:
    text = TEXT[:1500]
    assert len(passkey_items(llm, text, lengths=[1500], depths=[0.5], n_per=1)) == 1
    with pytest.raises(DataError, match="the text has 1499 tokens, a prompt needs 1500; give a longer text"):
        passkey_items(llm, text[:-1], lengths=[1500])
    with pytest.raises(RequestError, match=r"need 1520 tokens, the context has 1519; use a larger context"):
        passkey_items(ByteLlama(n_ctx=1519), TEXT, lengths=[1500])
    passkey_items(ByteLlama(n_ctx=1520), TEXT, lengths=[1500])


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[AdaSkipLlama]:
    with closing(AdaSkipLlama(str(smollm2_path), n_ctx=1088, verbose=False)) as llm:
        yield llm


@pytest.fixture(scope="module")
def smollm2_text() -> str:
    return corpus.SEPARATOR.join(corpus.held_out().values())[:20_000]


@pytest.mark.model
def test_with_a_real_tokenizer_lengths_are_met_too(smollm2: AdaSkipLlama, smollm2_text: str) -> None:
    for length in (300, 1000):
        for item in passkey_items(smollm2, smollm2_text, lengths=[length], depths=[0, 0.5, 1], n_per=1):
            assert length - 16 <= len(item.prompt) <= length


@pytest.mark.model
@pytest.mark.slow
def test_a_small_model_can_find_them(smollm2: AdaSkipLlama, smollm2_text: str) -> None:
    items = passkey_items(smollm2, smollm2_text, lengths=[200], depths=[0.2, 0.8], n_per=2)
    scores = []
    for item in items:
        scores.append(item.score(greedy_text(smollm2, item.prompt, item.max_tokens)))
        smollm2.reset()
    assert np.mean(scores) >= 0.7
