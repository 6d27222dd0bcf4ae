"""Provides text that calibration did not see, in two parts: one to search plans with, one to judge them.

A search favours its own text. So the loss of a plan is measured on text that had no part in choosing it. Plans lose
less on kinds of text that calibration has read (docs/dev/results.md). So the judge has prose too, a story and a
lecture: what keeps copies of descriptions and sources can lose those of prose (docs/dev/method.md).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from llama_cpp import Llama

from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from ..measuring.probes import Probe, probes_of
from ..measuring.tasks import TextItem, prose, python_sources, readmes, text_items


@dataclass(frozen=True)
class HeldOut:
    """Two parts of text. They share no item and, if there are enough texts, no text."""

    search: tuple[TextItem, ...]
    judge: tuple[TextItem, ...]

    def names(self) -> dict[str, str]:
        """Return the names of the texts of each part, as words for people."""
        parts = {"searched_on": self.search, "judged_on": self.judge}
        return {
            word: ", ".join(sorted({"/".join(item.id.split("/")[1:-2]) for item in part}))
            for word, part in parts.items()
        }


def unseen_texts() -> list[dict[str, str]]:
    """Return, for each kind of text that this Python has, the texts by name that calibration leaves out."""
    kinds = []
    for kind in (readmes, partial(prose, "story"), python_sources, partial(prose, "lecture")):
        with suppress(DataError):
            kinds.append(kind())
    return [kind for kind in kinds if kind]


def hold_out(tokenizer: Llama, kinds: Sequence[Mapping[str, str]], n_texts: tuple[int, int], n_tokens: int) -> HeldOut:
    """Cut items of ``n_tokens``, so many for the search and for the judge, of each kind of text in turn.

    ``kinds`` has texts by name, for each kind. If a kind is too small for its share, all kinds are put together. Raises
    DataError if there is too little text.
    """
    n_each = [tuple(len(range(i, n, len(kinds))) for n in n_texts) for i in range(len(kinds))]
    with suppress(DataError):
        held = [_two_parts(tokenizer, kind, n, n_tokens) for kind, n in zip(kinds, n_each, strict=True)]
        return HeldOut(*(sum(parts, ()) for parts in zip(*held, strict=True)))
    together = {name: text for kind in kinds for name, text in kind.items()}
    try:
        return HeldOut(*_two_parts(tokenizer, together, n_texts, n_tokens))
    except DataError as error:
        least = 2 * max(n_texts) * n_tokens
        what = f"{least:,} tokens in all, in texts of {n_tokens:,} tokens or more"
        raise DataError(f"there is too little text to judge plans on; give at least {what} (texts, --text)") from error


def _two_parts(
    tokenizer: Llama, texts: Mapping[str, str], n_texts: tuple[int, ...], n_tokens: int
) -> list[tuple[TextItem, ...]]:
    parts = _halves(texts) if all(n_texts) else [texts for _ in n_texts]
    return [
        tuple(text_items(tokenizer, part, n_items=n, n_tokens=n_tokens, drop_short=True)) if n else ()
        for part, n in zip(parts, n_texts, strict=True)
    ]


def _halves(texts: Mapping[str, str]) -> list[dict[str, str]]:
    """Deal whole texts to two parts if there are four or more texts, else cut each text in two."""
    parts: list[dict[str, str]] = [{}, {}]
    if len(texts) >= 4:
        for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
            min(parts, key=lambda part: sum(map(len, part.values())))[name] = texts[name]
    else:
        for name, text in texts.items():
            for i, part in enumerate(parts):
                part[f"{name} (part {i + 1} of 2)"] = text[i * len(text) // 2 : (i + 1) * len(text) // 2]
    return parts


def text_probes(
    llm: AdaSkipLlama, items: Sequence[TextItem], cuts: Sequence[int], n_answer: tuple[int, int]
) -> list[Probe]:
    """Return probes of texts with pass keys, after prompts of ``cuts`` tokens.

    ``n_answer`` counts the tokens to continue and to copy.
    """
    (n_continued, n_copied), found = n_answer, list[Probe]()
    for i, item in enumerate(items):
        key = i, (i + 0.5) / len(items)
        found += probes_of(llm, item.id, item.tokens, cuts, n_continued=n_continued, n_copied=n_copied, key=key)
    return found
