"""adaskip_cpp.measuring.probes: prompts with answers that continue them, copy from them, or give a pass key."""

from typing import Any

import pytest
from oracles.fixtures import Open

from adaskip_cpp.errors import DataError
from adaskip_cpp.measuring.corpus import tokens_of
from adaskip_cpp.measuring.probes import N_CUE, passkey_lines, passkeys, probes_of

NO_LLM: Any = None


def test_at_each_cut_one_answer_continues_and_one_copies_from_a_quarter_of_the_prompt_on() -> None:
    found = probes_of(NO_LLM, "counting", range(1000), (800, 400))
    assert [(each.text, each.kind, each.n_prompt, each.n_cue) for each in found] == [
        ("counting", "continuation", 400, 1),
        ("counting", "copying", 400, N_CUE),
        ("counting", "continuation", 800, 1),
        ("counting", "copying", 800, N_CUE),
    ]
    answers = [range(400, 448), range(100, 172), range(800, 848), range(200, 272)]
    assert [each.answer for each in found] == list(map(tuple, answers))
    assert all(each.tokens is found[0].tokens for each in found)


def test_a_prompt_too_short_to_copy_from_is_continued_alone_and_a_text_too_short_for_it_is_refused() -> None:
    assert [each.kind for each in probes_of(NO_LLM, "short", range(200), (90,))] == ["continuation"]
    assert [each.kind for each in probes_of(NO_LLM, "just enough", range(200), (96,))] == ["continuation", "copying"]
    with pytest.raises(DataError, match="'short' has 447 tokens, prompts up to 400 need 448; give a longer text"):
        probes_of(NO_LLM, "short", range(447), (100, 400))


def test_pass_keys_are_hidden_at_their_depth_of_the_longest_prompt_and_asked_for_after_that(open_tiny: Open) -> None:
    llm = open_tiny()
    text = list(range(500))
    found = probes_of(llm, "hidden", text, (200, 400), key=(0, 0.25))
    assert [each.kind for each in found] == ["continuation", "copying"] * 2 + ["retrieval"] * 2
    stated = tokens_of(
        llm,
        "\n\nThe pass key is 10007. Remember it. 10007 is the pass key.\n\n"
        "The name of the ship is Ophelia. Remember it. Ophelia is the name of the ship.\n\n",
    )
    used = tokens_of(llm, "\n\nThe captain says that the ship sails at dawn.\n\n")
    assert list(found[0].tokens) == text[:100] + stated + text[100:250] + used + text[250:]
    for asked, question, word in zip(
        found[4:], ("The pass key", "The name of the ship"), ("10007", "Ophelia"), strict=True
    ):
        assert asked.n_prompt == 400 and list(asked.answer) == tokens_of(llm, f"\n\n{question} is {word}")
        assert list(asked.answer[: asked.n_cue]) == tokens_of(llm, f"\n\n{question} is")[: asked.n_cue]
        assert 1 <= asked.n_cue < len(asked.answer)


@pytest.mark.parametrize(
    ("depth", "after"),
    [(0.25, True), (0.2, True), (0.3, True), (0.0, False), (0.4, False)],
    ids=["at the copy", "reaching into the copy", "inside the copy", "far before the copy", "far after the copy"],
)
def test_a_copy_begins_after_pass_keys(depth: float, after: bool, open_tiny: Open) -> None:
    llm = open_tiny()
    n_lines = len(passkey_lines(llm, 0))
    _, copying, *_ = probes_of(llm, "hidden", range(1100), (1000,), key=(0, depth))
    begin = max(round(1000 * depth), 1) + n_lines if after else 250
    assert copying.answer == copying.tokens[begin : begin + 72]


def test_where_no_room_is_left_after_pass_keys_the_copy_has_them(open_tiny: Open) -> None:
    _, copying, *_ = probes_of(open_tiny(), "hidden", range(300), (200,), key=(0, 0.25))
    assert copying.kind == "copying" and copying.answer == copying.tokens[50 : 50 + 72]


def test_pass_keys_differ_from_text_to_text_and_from_those_before_an_edit() -> None:
    numbers, _ = zip(*map(passkeys, range(-50, 50)), strict=True)
    assert len(set(numbers)) == 100 and all(len(number) == 5 for number in numbers)
    assert all(old != new for i in range(50) for old, new in zip(passkeys(-1 - i), passkeys(i), strict=True))
