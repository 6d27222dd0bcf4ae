"""Makes the items that quality is measured on: texts (start at :func:`text_items`) and questions (``QuestionItem``)."""

import contextlib
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TypeAlias

from llama_cpp import Llama

from ..engine.generation import Generation
from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from ..files import StrPath, read_text
from . import metrics
from .corpus import SOURCES, cut, descriptions, tokens_of

READMES = ("tqdm", "llama_cpp_python", "charset-normalizer")
"""Packages that are installed with this one and have descriptions of 10,000 tokens or more."""

Wrap: TypeAlias = Callable[[str], Sequence[int]]  # turns a prompt into tokens, as by a model's chat template


@dataclass(frozen=True)
class TextItem:
    """A piece of text: for loss, KL divergence, agreement and continuations."""

    id: str  # unique among all items of a measurement
    task: str  # the kind of text
    tokens: tuple[int, ...]  # with BOS


@dataclass(frozen=True)
class QuestionItem:
    """A prompt whose answer can be scored."""

    id: str  # unique among all items of a measurement
    task: str  # the kind of question: a dataset of LongBench or L-Eval, "passkey", ...
    prompt: tuple[int, ...]
    answers: tuple[str, ...]  # right answers; the best match counts
    max_tokens: int
    metric: str  # a name in metrics.METRICS
    all_classes: tuple[str, ...] = ()  # names that a classification chooses from
    first_line: bool = False  # only the first line that is not blank is scored, so generation may stop after it

    def score(self, prediction: str) -> float:
        if self.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        return metrics.score(self.metric, prediction, self.answers, self.all_classes)


def greedy_text(llm: AdaSkipLlama, prompt: Sequence[int], max_tokens: int, *, first_line: bool = False) -> str:
    """Return a greedy continuation; with ``first_line``, up to the end of its first line that is not blank."""
    text = ""
    with closing(iter(Generation(llm, list(prompt), max_tokens=max_tokens))) as pieces:
        for piece in pieces:
            text += piece
            if first_line and "\n" in text.lstrip("\n"):
                break
    return text


def fill(write: Callable[[int], str], length: int, wrap: Wrap) -> Sequence[int] | None:
    """Return a prompt of ``length`` tokens, or a few less; None if it is longer even without filling.

    ``write`` returns the text of a prompt with about so many tokens of filling.
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
        n -= excess  # exact at once if a token of filling adds one to the prompt
    return best


class Asked(NamedTuple):
    """A question of a task file: the item without its prompt, the prompt's text, and whether to use a chat template."""

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
    """Cut texts, given by name, into items of ``n_tokens``, spread evenly over each text, without overlap.

    The texts take turns, so that the first few items come from different texts. ``drop_short`` leaves out texts that
    are too short for one item.
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
    """Read UTF-8 text files, by name, or by path if several have the same name."""
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
    """Return the :data:`SOURCES` that this Python has, by module. They differ a little between Python's releases."""
    folder = sysconfig.get_path("stdlib")
    sources = {}
    for name in SOURCES.split():
        with contextlib.suppress(DataError):
            if (text := read_text(os.path.join(folder, f"{name}.py"))).strip():
                sources[name] = text
    if not sources:
        raise DataError(f"this Python has no sources in {folder!r}; give text of your own (text_files, --text FILE)")
    return sources


def readmes() -> dict[str, str]:
    """Return the descriptions of :data:`READMES`, by package. {} if there are none."""
    return descriptions(READMES)


def licences() -> dict[str, str]:
    """Return the licences that come with numpy and Python: legal prose. {} if there are none."""
    files = {"numpy": list[Path](), "Python": [Path(sysconfig.get_path("stdlib"), "LICENSE.txt")]}
    with contextlib.suppress(metadata.PackageNotFoundError):
        paths = metadata.files("numpy") or ()
        files["numpy"] = sorted(Path(str(path.locate())) for path in paths if path.name.startswith("LICENSE"))
    found = {}
    for name, each in files.items():
        with contextlib.suppress(DataError):
            if text := "\n\n".join(map(read_text, each)):
                found[name] = text
    return found
