"""What a measurement of quality is made on: items of text, questions with answers, and the texts they come from."""

import contextlib
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple, TypeAlias

from llama_cpp import Llama

from ..engine.generation import Generation
from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from ..files import StrPath, read_text
from . import metrics
from .corpus import SOURCES, cut, tokens_of

Wrap: TypeAlias = Callable[[str], Sequence[int]]  # turns a prompt into tokens, as by a model's chat template


@dataclass(frozen=True)
class TextItem:
    """A piece of text: for loss, KL divergence, agreement and continuations.

    Its id names it among all items of a measurement, its task is the kind of text; BOS is among its tokens.
    """

    id: str
    task: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class QuestionItem:
    """A prompt whose answer can be scored.

    Attributes:
        id: names the item among all others of a measurement.
        task: the kind of question: a dataset of LongBench or L-Eval, ``"passkey"``, ...
        answers: right answers; the best match counts.
        metric: a name in :data:`adaskip_cpp.measuring.metrics.METRICS`.
        all_classes: names that a classification chooses from.
        length: how long the prompt is: tokens asked for (synthetic tasks), words as published (LongBench).
        depth: where in the prompt the answer lies, 0 for its beginning to 1 for its end; None if not in one place.
        first_line: the score looks at the answer's first line only, blank ones before it left out, so that generation
            may stop behind it.
    """

    id: str
    task: str
    prompt: tuple[int, ...]
    answers: tuple[str, ...]
    max_tokens: int
    metric: str
    all_classes: tuple[str, ...] = ()
    length: int = 0
    depth: float | None = None
    first_line: bool = False

    def score(self, prediction: str) -> float:
        if self.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        return metrics.score(self.metric, prediction, self.answers, self.all_classes)


def greedy_text(llm: AdaSkipLlama, prompt: Sequence[int], max_tokens: int, *, first_line: bool = False) -> str:
    """Return a greedy continuation, up to the end of its first line of text if no more is looked at."""
    text = ""
    with closing(iter(Generation(llm, list(prompt), max_tokens=max_tokens))) as pieces:
        for piece in pieces:
            text += piece
            if first_line and "\n" in text.lstrip("\n"):
                break
    return text


def fill(write: Callable[[int], str], length: int, wrap: Wrap) -> Sequence[int] | None:
    """Return a prompt of ``length`` tokens, or a few less; None if it is longer without any filling.

    ``write`` makes the text of a prompt with about so many tokens of filling.
    """
    best = wrap(write(0))
    if len(best) > length:
        return None
    low, high, n = 0, length, length - len(best)
    while low < high and len(best) < length:
        if not low < n <= high:
            n = (low + high + 1) // 2
        prompt = wrap(write(n))
        excess = len(prompt) - length
        if excess > 0:
            high = n - 1
        else:
            low, best = n, max(best, prompt, key=len)
        n -= excess  # right at once where a token of filling adds one to the prompt
    return best


class Asked(NamedTuple):
    """A question of a task file: the item without its prompt, the prompt's text, and whether a chat template fits."""

    item: QuestionItem
    text: str
    chat: bool = True


def text_items(
    tokenizer: Llama,
    texts: Mapping[str, str],
    *,
    n_items: int,
    n_tokens: int,
    task: str = "text",
    drop_short: bool = False,
) -> list[TextItem]:
    """Cut texts, given by name, into items of so many tokens that do not overlap, spread evenly over each text.

    The items are dealt out over the texts in turn, so that the first few of them come from as many texts. Texts that
    are too short for one item are left out if ``drop_short``.
    """
    if n_items < 1 or n_tokens < 2:
        raise DataError(f"cannot make {n_items} items of {n_tokens} tokens; ask for at least 1 item of 2 tokens")
    n_bos = len(tokens_of(tokenizer, "", bos=True)[:1])
    turns: list[tuple[int, str]] = []
    for name, text in texts.items():
        n_text = len(tokens_of(tokenizer, text))
        room = n_text // (n_tokens - n_bos)
        if room == 0 and not drop_short:
            raise DataError(
                f"text {name!r} has {n_text} tokens, fewer than the {n_tokens} of one item; "
                "ask for shorter items or give a longer text"
            )
        turns += [(turn, name) for turn in range(room)]
    if len(turns) < n_items:
        raise DataError(
            f"the text gives {len(turns)} items of {n_tokens} tokens, not the {n_items} asked for; "
            "ask for fewer or shorter items or give more text"
        )
    turns = sorted(turns, key=itemgetter(0))[:n_items]  # the texts of a turn stay in their order
    taken = Counter(name for _, name in turns)
    requests = {name: cut(tokenizer, texts[name], n, n_tokens) for name, n in taken.items()}
    return [TextItem(f"{task}/{name}/{n_tokens}/{i}", task, tuple(requests[name][i])) for i, name in turns]


def read_texts(files: Iterable[StrPath]) -> dict[str, str]:
    """Read UTF-8 text files, by name, or by their whole path where several are of one name."""
    paths = [os.fspath(file) for file in files]
    n_of = Counter(map(os.path.basename, paths))
    texts = {}
    for path in paths:
        name, text = os.path.basename(path), read_text(path)
        if not text.strip():
            raise DataError(f"{path!r} is empty; give a text of at least a few hundred words")
        texts[name if n_of[name] == 1 else path] = text
    return texts


def python_sources() -> dict[str, str]:
    """Return those of :data:`adaskip_cpp.measuring.corpus.SOURCES` that this Python has, by module.

    They differ a little from one Python release to the next.
    """
    folder = sysconfig.get_path("stdlib")
    sources = {}
    for name in SOURCES.split():
        with contextlib.suppress(DataError):
            if (text := read_text(os.path.join(folder, f"{name}.py"))).strip():
                sources[name] = text
    if not sources:
        raise DataError(f"this Python has no sources in {folder!r}; give text of your own (text_files, --text FILE)")
    return sources
