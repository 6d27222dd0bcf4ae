"""adaskip_cpp.tuning.hold_out: the two parts of the held-out text."""

from collections.abc import Sequence
from unittest.mock import Mock

import pytest

from adaskip_cpp.errors import DataError
from adaskip_cpp.measuring.tasks import READMES, TextItem
from adaskip_cpp.tuning import hold_out as module
from adaskip_cpp.tuning.hold_out import hold_out, unseen_texts


class Bytes:
    """A byte is a token; BOS is 256."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return [256] * add_bos + list(text)


def letters(part: Sequence[TextItem]) -> set[str]:
    return {chr(token) for item in part for token in item.tokens[1:]}


def test_descriptions_come_first_and_a_kind_that_is_missing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = unseen_texts()
    assert [*kinds[0]] == [*READMES] and [[*kinds[1]], [*kinds[3]]] == [["story"], ["lecture"]] and len(kinds) == 4
    monkeypatch.setattr(module, "python_sources", Mock(side_effect=DataError("this Python has no sources")))
    assert unseen_texts() == [kinds[0], kinds[1], kinds[3]]
    monkeypatch.setattr(module, "readmes", dict)
    assert unseen_texts() == [kinds[1], kinds[3]]


def test_texts_are_dealt_to_two_parts_and_few_texts_or_kinds_too_small_for_their_share_are_cut_in_two() -> None:
    held_out = hold_out(Bytes(), [{name: name * 300 for name in "abcdefg"}], (4, 4), 50)  # type: ignore[arg-type]
    assert (len(held_out.search), len(held_out.judge)) == (4, 4)
    assert not letters(held_out.search) & letters(held_out.judge)
    names = held_out.names()
    assert set(names["searched_on"].split(", ")) == letters(held_out.search)
    assert set(names["judged_on"].split(", ")) == letters(held_out.judge)
    held_out = hold_out(Bytes(), [{"a": "x" * 300 + "y" * 300}], (3, 3), 50)  # type: ignore[arg-type]
    assert (letters(held_out.search), letters(held_out.judge)) == ({"x"}, {"y"})
    assert held_out.names() == {"searched_on": "a (part 1 of 2)", "judged_on": "a (part 2 of 2)"}
    held_out = hold_out(Bytes(), [{"a": "x" * 300 + "y" * 300}], (0, 3), 50)  # type: ignore[arg-type]
    assert held_out.names() == {"searched_on": "", "judged_on": "a"}, "a kind that one part alone has is not cut"
    held_out = hold_out(Bytes(), [{"a": "x" * 9}, {"b": "y" * 900}], (5, 5), 50)  # type: ignore[arg-type]
    assert letters(held_out.search) == letters(held_out.judge) == {"y"} and len(held_out.judge) == 5


@pytest.mark.parametrize(("kinds", "n", "found"), [("xy", (5, 5), ["xxxyy"] * 2), ("xyz", (2, 4), ["xy", "xxyz"])])
def test_either_part_has_as_much_of_every_kind_of_text(kinds: str, n: tuple[int, int], found: list[str]) -> None:
    held_out = hold_out(Bytes(), [{each: each * 900} for each in kinds], n, 50)  # type: ignore[arg-type]
    assert ["".join(chr(item.tokens[1]) for item in part) for part in (held_out.search, held_out.judge)] == found
