"""Makes the items that quality is measured on: texts (:func:`text_items`) and questions (:func:`passkey_items`)."""

import contextlib
import os
import random
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from itertools import product
from operator import itemgetter
from typing import TypeAlias

from llama_cpp import Llama

from ..engine.generation import Generation
from ..engine.llama import AdaSkipLlama
from ..errors import DataError, RequestError
from ..files import StrPath, read_text
from . import metrics
from .corpus import MOST_PER_TOKEN, SOURCES, cut, descriptions, tokens_of

READMES = ("tqdm", "llama_cpp_python", "charset-normalizer")
"""Packages that are installed with this one and have descriptions of 10,000 tokens or more."""

SYNTHETIC = ("passkey",)  # tasks made from a text, by name: the end of a prompt asks for a number of five digits in it
_KEY_TOKENS = 20  # of an answer: enough for a chat model that repeats the sentence, with a token per digit

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
    with contextlib.closing(iter(Generation(llm, list(prompt), max_tokens=max_tokens))) as pieces:
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
        if (excess := len(prompt) - length) > 0:
            high = n - 1
        else:
            low, best = n, max(best, prompt, key=len)
        n -= excess  # exact at once if a token of filling adds one to the prompt
    return best


def passkey_items(
    llm: AdaSkipLlama, text: str, *, lengths: Sequence[int] = (1024,), depths: Sequence[float] = (0.5,), n_per: int = 4
) -> list[QuestionItem]:
    """Hide pass keys in a text, as long-context questions: ``n_per`` for each pair of ``lengths`` and ``depths``.

    A length is the most tokens of a prompt, which has at most a few less. The text must be as long as the longest one.
    A depth is the place of a key, 0 for the beginning to 1 for the end. A prompt ends as a text to continue, "The pass
    key is", so that base models can answer too. It also suits small chat models better than their template:
    SmolLM2-135M-Instruct found the pass key in 9 of 9 such prompts of 1,000 tokens and 6 of 6 of 2,000, but in its chat
    template in none of 4 of 1,000. The same arguments give the same items in every run, the first ones of every kind.
    """
    if not lengths or not depths or n_per < 1:
        raise DataError("nothing to make; ask for at least one length, depth and item")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise DataError(f"there is no depth {depth:g}; use 0 (the beginning) to 1 (the end)")
    tokens = tokens_of(llm, text)
    if len(tokens) < max(lengths):
        why = f"the text has {len(tokens)} tokens, a prompt needs {max(lengths)}"
        raise DataError(f"{why}; give a longer text or ask for shorter prompts")
    if (n_most := max(lengths) + _KEY_TOKENS) > llm.context_size:
        why = f"prompt and answer need {n_most} tokens, the context has {llm.context_size}"
        raise RequestError(f"{why}; use a larger context (ctx, --ctx) or shorter prompts")
    wrap = partial(tokens_of, llm, bos=True)
    items = []
    for index, length, depth in product(range(n_per), dict.fromkeys(lengths), dict.fromkeys(depths)):
        identity = f"passkey/{length}/{depth:g}/{index}"
        rng = random.Random(identity)  # Python hashes a text with SHA-512, the same everywhere
        while (key := str(10000 + _below(rng, 90000))) in text:
            pass
        start = _below(rng, len(tokens) - length + 1)
        write = partial(_prompt, llm, tokens[start : start + length], depth, key)
        prompt = fill(write, length, wrap)
        if prompt is None:
            least = len(wrap(write(0)))
            raise DataError(f"a prompt with a pass key has at least {least} tokens; ask for longer ones than {length}")
        items.append(QuestionItem(identity, "passkey", tuple(prompt), (key,), _KEY_TOKENS, "contains"))
    return items


def _below(rng: random.Random, n: int) -> int:
    """Return a number below n. Python promises the same figures in every release for random() only."""
    return int(rng.random() * n)


def _prompt(llm: AdaSkipLlama, tokens: list[int], depth: float, key: str, n: int) -> str:
    """Return the text of a prompt with the first n tokens, and the key at a depth of these."""
    at = round(depth * n)
    before, after = (llm.detokenize(part).decode("utf-8", "ignore") for part in (tokens[:at], tokens[at:n]))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    return f"{before}\n\n{needle}\n\n{after}\n\nThe pass key is".lstrip("\n")


def text_items(
    llm: Llama, texts: Mapping[str, str], *, n_items: int, n_tokens: int, task: str = "text", drop_short: bool = False
) -> list[TextItem]:
    """Cut texts, given by name, into items of ``n_tokens``, spread evenly over each text, without overlap.

    The texts take turns, so that the first few items come from different texts. ``drop_short`` leaves out texts that
    are too short for one item.
    """
    if n_items < 1 or n_tokens < 2:
        raise DataError(f"cannot make {n_items} items of {n_tokens} tokens; ask for at least 1 item of 2 tokens")
    n_bos, turns = len(tokens_of(llm, "", bos=True)[:1]), list[tuple[int, str]]()
    for name, text in texts.items():
        enough = n_items * (n_tokens - n_bos)
        if (n_text := len(tokens_of(llm, text[: MOST_PER_TOKEN * enough]))) < enough:
            n_text = len(tokens_of(llm, text))
        room = min(n_text // (n_tokens - n_bos), n_items)
        if room == 0 and not drop_short:
            why = f"text {name!r} has {n_text} tokens, fewer than the {n_tokens} of one item"
            raise DataError(f"{why}; ask for shorter items or give a longer text")
        turns += [(turn, name) for turn in range(room)]
    if len(turns) < n_items:
        why = f"the text gives {len(turns)} items of {n_tokens} tokens, not the {n_items} asked for"
        raise DataError(f"{why}; ask for fewer or shorter items or give more text")
    turns = sorted(turns, key=itemgetter(0))[:n_items]  # the texts of a turn stay in their order
    taken = Counter(name for _, name in turns)
    requests = {name: cut(llm, texts[name], n, n_tokens) for name, n in taken.items()}
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


def prose(name: str) -> dict[str, str]:
    """Return a text that was written for this package, by name: "story" or "lecture"."""
    return {name: resources.files(__package__).joinpath("texts").joinpath(f"{name}.txt").read_text("utf-8")}
