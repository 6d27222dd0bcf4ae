"""Cuts text that calibration did not see into two parts: to search by, and to judge what was found.

A search is kind to its own text. So what a plan is said to lose is measured on text that had no part in choosing it.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DataError
from ..measuring.tasks import TextItem, text_items

if TYPE_CHECKING:
    from llama_cpp import Llama


@dataclass(frozen=True)
class HeldOut:
    """Two parts of text that have no item and, where there are enough texts, no text in common."""

    search: tuple[TextItem, ...]
    judge: tuple[TextItem, ...]

    def names(self) -> dict[str, str]:
        """Return the names of the texts of each part, for people."""
        parts = {"searched_on": self.search, "judged_on": self.judge}
        return {
            word: ", ".join(sorted({"/".join(item.id.split("/")[1:-2]) for item in part}))
            for word, part in parts.items()
        }


def hold_out(tokenizer: "Llama", kinds: Sequence[Mapping[str, str]], n_texts: int, n_tokens: int) -> HeldOut:
    """Cut ``n_texts`` items of ``n_tokens`` for either part, of each kind of text in equal shares.

    Where a kind is too small for its share, all kinds together are cut.

    Args:
        kinds: texts by name, of each kind.

    Raises:
        DataError: there is too little text, or a number is too small.
    """
    if n_texts < 2 or n_tokens < 4:
        raise DataError(f"cannot judge by {n_texts} texts of {n_tokens} tokens; use at least 2 texts of 4 tokens")
    n_each = [len(range(i, n_texts, len(kinds))) for i in range(len(kinds))]
    with suppress(DataError):
        held = [_two_parts(tokenizer, kind, n, n_tokens) for kind, n in zip(kinds, n_each, strict=True) if n]
        return HeldOut(*(sum(parts, ()) for parts in zip(*((each.search, each.judge) for each in held), strict=True)))
    together = {name: text for kind in kinds for name, text in kind.items()}
    try:
        return _two_parts(tokenizer, together, n_texts, n_tokens)
    except DataError as error:
        raise DataError(f"of either half of the held-out text: {error}") from error


def _two_parts(tokenizer: "Llama", texts: Mapping[str, str], n_texts: int, n_tokens: int) -> HeldOut:
    parts = (
        text_items(tokenizer, part, n_items=n_texts, n_tokens=n_tokens, drop_short=True) for part in _halves(texts)
    )
    return HeldOut(*map(tuple, parts))


def _halves(texts: Mapping[str, str]) -> list[dict[str, str]]:
    """Deal texts out whole where there are four or more, else cut each of them."""
    parts: list[dict[str, str]] = [{}, {}]
    if len(texts) >= 4:
        for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
            min(parts, key=lambda part: sum(map(len, part.values())))[name] = texts[name]
    else:
        for name, text in texts.items():
            for i, part in enumerate(parts):
                part[f"{name}, part {i + 1} of 2"] = text[i * len(text) // 2 : (i + 1) * len(text) // 2]
    return parts
