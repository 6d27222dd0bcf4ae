"""Text that calibration did not see, in parts: to search by, to confirm what was found, and to report what it costs.

A search is kind to its own text, and so is whoever puts sublayers back until a text keeps a promise. So what a plan is
reported to cost is measured on a third part, which decided nothing.
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
    """Text in parts, of which no item is in two; ``report`` is () where there is too little for a third part."""

    search: tuple[TextItem, ...]
    confirm: tuple[TextItem, ...]
    report: tuple[TextItem, ...] = ()

    def names(self) -> dict[str, str]:
        parts = {"searched_on": self.search, "confirmed_on": self.confirm, "reported_on": self.report or self.confirm}
        return {
            word: ", ".join(sorted({"/".join(item.id.split("/")[1:-2]) for item in part}))
            for word, part in parts.items()
        }


def hold_out(tokenizer: "Llama", texts: Mapping[str, str], n_texts: int, n_tokens: int) -> HeldOut:
    """Cut texts, by name, into three parts of ``n_texts`` items each, or into two where there is too little for three.

    Raises:
        DataError: there is too little text for two parts, or a number is too small.
    """
    if n_texts < 2 or n_tokens < 4:
        raise DataError(f"cannot judge by {n_texts} texts of {n_tokens} tokens; use at least 2 texts of 4 tokens")

    def items(n_parts: int) -> HeldOut:
        parts = _parts(texts, n_parts)
        cut = (text_items(tokenizer, part, n_items=n_texts, n_tokens=n_tokens, drop_short=True) for part in parts)
        return HeldOut(*map(tuple, cut))

    with suppress(DataError):
        return items(3)
    try:
        return items(2)
    except DataError as error:
        raise DataError(f"of either half of the held-out text: {error}") from error


def hold_out_kinds(tokenizer: "Llama", kinds: Sequence[Mapping[str, str]], n_texts: int, n_tokens: int) -> HeldOut:
    """As :func:`hold_out`, each part of several kinds of text in equal shares, or of all together if one is too small.

    Raises:
        DataError: as :func:`hold_out`.
    """
    n_each = [len(range(i, n_texts, len(kinds))) for i in range(len(kinds))]
    if min(n_each) >= 2:
        with suppress(DataError):
            held = [hold_out(tokenizer, kind, n, n_tokens) for kind, n in zip(kinds, n_each, strict=True)]
            if all(each.report for each in held):
                parts = zip(*((each.search, each.confirm, each.report) for each in held), strict=True)
                return HeldOut(*(sum(part, ()) for part in parts))
    return hold_out(tokenizer, {name: text for kind in kinds for name, text in kind.items()}, n_texts, n_tokens)


def _parts(texts: Mapping[str, str], n: int) -> list[dict[str, str]]:
    """Deal texts out whole where there are two or more for each part, else cut each of them."""
    parts: list[dict[str, str]] = [{} for _ in range(n)]
    if len(texts) >= 2 * n:
        for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
            min(parts, key=lambda part: sum(map(len, part.values())))[name] = texts[name]
    else:
        for name, text in texts.items():
            for i, part in enumerate(parts):
                part[f"{name}, part {i + 1} of {n}"] = text[i * len(text) // n : (i + 1) * len(text) // n]
    return parts
