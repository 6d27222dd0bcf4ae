"""adaskip_cpp.measuring.probes: prompts with answers that continue them, copy from them, or give a pass key."""

from typing import Any

import pytest
from oracles.fixtures import Open

from adaskip_cpp.errors import DataError
from adaskip_cpp.measuring.corpus import tokens_of
from adaskip_cpp.measuring.probes import N_CUE, passkeys, probes_of

NO_LLM: Any = None


def test_at_each_cut_one_answer_continues_and_one_copies_from_a_quarter_or_half_of_the_prompt_on() -> None:
    found = probes_of(NO_LLM, "counting", range(1000), (800, 400))
    assert [(each.text, each.kind, each.n_prompt, each.n_cue) for each in found] == [
        ("counting", "continuation", 400, 1),
        ("counting", "copying", 400, N_CUE),
        ("counting", "continuation", 800, 1),
        ("counting", "copying", 800, N_CUE),
    ]
    answers = [range(400, 448), range(100, 172), range(800, 848), range(400, 472)]
    assert [each.answer for each in found] == list(map(tuple, answers))
    assert all(each.tokens is found[0].tokens for each in found)


def test_a_prompt_too_short_to_copy_from_is_continued_alone_and_a_text_too_short_for_it_is_refused() -> None:
    assert [each.kind for each in probes_of(NO_LLM, "short", range(200), (90,))] == ["continuation"]
    assert [each.kind for each in probes_of(NO_LLM, "just enough", range(200), (96,))] == ["continuation", "copying"]
    with pytest.raises(DataError, match="'short' has 447 tokens, prompts up to 400 need 448; give a longer text"):
        probes_of(NO_LLM, "short", range(447), (100, 400))


STATED = [
    "\n\nThe pass key is 10007. Remember it. 10007 is the pass key.\n\n"
    "The name of the ship is Ophelia. Remember it. Ophelia is the name of the ship.\n\n",
    "\n\nThe number of the train is 17926. Remember it. 17926 is the number of the train.\n\n"
    "The name of the harbour is Endeavour. Remember it. Endeavour is the name of the harbour.\n\n",
    "\n\nThe code of the door is 25845. Remember it. 25845 is the code of the door.\n\n"
    "The name of the captain is Kestrel. Remember it. Kestrel is the name of the captain.\n\n",
]
LATER = "\n\nThe captain says that the ship sails at dawn.\n\n"
ASKED = {
    "The pass key": "10007",
    "The name of the ship": "Ophelia",
    "The number of the train": "17926",
    "The name of the harbour": "Endeavour",
    "The code of the door": "25845",
    "The name of the captain": "Kestrel",
}
TEXT = range(10_000, 14_000)  # no such tokens stand in the lines


@pytest.mark.parametrize(
    ("depth", "depths"), [(0.25, (0.25, 0.583, 0.917)), (0.5, (0.5, 0.833, 0.167)), (1.0, (0.0, 0.333, 0.667))]
)
def test_pass_keys_are_hidden_at_three_places_of_the_longest_prompt_and_each_is_asked_for_after_it(
    depth: float, depths: tuple[float, ...], open_tiny: Open
) -> None:
    llm = open_tiny()
    found = probes_of(llm, "hidden", TEXT, (1000, 2000), key=(0, depth))
    whole = list(found[0].tokens)
    assert [token for token in whole if token in TEXT] == list(TEXT)
    lines = [tokens_of(llm, line) for line in (*STATED, LATER)]
    free = 2000 - sum(map(len, lines))
    begins = [next(i for i in range(2000) if whole[i : i + len(line)] == line) for line in lines]
    before = [sum(token in TEXT for token in whole[:begin]) for begin in begins]
    assert before == pytest.approx([*(each * free for each in depths), (before[0] + free) / 2], abs=1)
    assert [each.kind for each in found] == ["continuation", "copying"] * 2 + ["retrieval"] * 6
    for asked, (question, word) in zip(found[4:], ASKED.items(), strict=True):
        assert asked.n_prompt == 2000 and list(asked.answer) == tokens_of(llm, f"\n\n{question} is {word}")
        assert list(asked.answer[: asked.n_cue]) == tokens_of(llm, f"\n\n{question} is")[: asked.n_cue]
        assert 1 <= asked.n_cue < len(asked.answer)


@pytest.mark.parametrize("cut", [1000, 2000])
@pytest.mark.parametrize("depth", [i / 24 for i in range(24)])
def test_a_copy_has_no_pass_key(depth: float, cut: int, open_tiny: Open) -> None:
    """After the pass keys of one place, those of another one may follow."""
    _, copying, *_ = probes_of(open_tiny(), "hidden", TEXT, (cut,), key=(0, depth))
    begin = copying.tokens.index(copying.answer[0])
    assert copying.answer == copying.tokens[begin : begin + 72] and {*copying.answer} <= {*TEXT}
    assert begin == cut // 4 or (begin > cut // 4 and copying.tokens[begin - 1] not in TEXT), (
        "it begins after pass keys"
    )


def test_where_no_room_is_left_after_pass_keys_the_copy_has_them(open_tiny: Open) -> None:
    _, copying, *_ = probes_of(open_tiny(), "hidden", TEXT, (200,), key=(0, 0.25))
    assert copying.kind == "copying" and copying.answer == copying.tokens[50 : 50 + 72]


def test_pass_keys_differ_from_text_to_text_and_from_those_before_an_edit() -> None:
    numbers, names = zip(*(pair for i in range(-50, 50) for pair in passkeys(i)), strict=True)
    assert len(set(numbers)) == 300 and all(len(number) == 5 for number in numbers)
    assert all(len({*names[i : i + 3]}) == 3 for i in range(0, 300, 3)), "of one prompt"
    for i in range(50):
        for old, new in zip(passkeys(-1 - i), passkeys(i), strict=True):
            assert old[0] != new[0] and old[1] != new[1]
