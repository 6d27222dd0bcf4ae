"""Makes long-context tasks from any text: pass keys, classes by example, copies. Start at :func:`synthetic_items`."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import NamedTuple

from ..engine.llama import AdaSkipLlama
from ..errors import DataError, RequestError
from .corpus import tokens_of
from .tasks import QuestionItem, Wrap, fill

_N_KEYS = 4
_KEY_TOKENS = 20  # of an answer: enough for a chat model that repeats the sentence, with a token per digit
_NAMES = ("Alice", "Bruno", "Clara", "David", "Elena", "Felix", "Greta", "Henry")
_LABELS = ("red", "blue", "green", "yellow")
_SNIPPET = 5  # words to classify at once
_PASSAGE = 48  # tokens of a passage to copy
_CUE = 4  # words of the passage that the prompt ends with; half of its words if they are few


def synthetic_items(
    llm: AdaSkipLlama,
    text: str,
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (1024,),
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    n_per: int = 4,
    seed: int = 0,
    wrap: Wrap | None = None,
) -> list[QuestionItem]:
    """Make questions about prompts of given lengths: ``n_per`` for each task, length and depth.

    A prompt ends as a text to continue, such as "The pass key is", so that base models can answer too. It also suits
    small chat models better than their template: SmolLM2-135M-Instruct found the pass key in 9 of 9 such prompts of
    1,000 tokens and 6 of 6 of 2,000, but in its chat template in none of 4 of 1,000.

    The same model, text and arguments give the same items in every run. The first items are of every kind.

    Args:
        text: hides the answers; at least as long as the longest prompt.
        lengths: most tokens of a prompt, which has at most a few less.
        depths: places of the answer in the text, 0 for the beginning to 1 for the end. ``classify`` has no depth.
    """
    tasks = TASKS if tasks is None else tasks
    for task in tasks:
        if task not in TASKS:
            raise DataError(f"there is no task {task!r}; use {', '.join(TASKS)}")
    if not tasks or not lengths or not depths or n_per < 1:
        raise DataError("nothing to make; ask for at least one task, length, depth and item")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise DataError(f"there is no depth {depth:g}; use 0 (the beginning) to 1 (the end)")
    tokens = tokens_of(llm, text)
    if len(tokens) < max(lengths) + _PASSAGE:
        raise DataError(
            f"the text has {len(tokens)} tokens, a prompt of {max(lengths)} needs {max(lengths) + _PASSAGE}; "
            "give a longer text or ask for shorter prompts"
        )
    wrap = wrap or partial(tokens_of, llm, bos=True)
    source = _Source(llm, tokens, text)
    items = []
    for index, task, length in product(range(n_per), dict.fromkeys(tasks), dict.fromkeys(lengths)):
        for at in (None,) if task == "classify" else dict.fromkeys(depths):
            identity = f"{task}/{length}/{'any' if at is None else f'{at:g}'}/{index}/{seed}"
            # Seeded by text: Python hashes it with SHA-512, the same everywhere.
            made = _MAKE[task](source, random.Random(identity), length, at or 0.0)
            prompt = fill(made.write, length, wrap)
            if prompt is None:
                least = len(wrap(made.write(0)))
                raise DataError(f"a prompt of {task!r} has at least {least} tokens; ask for longer ones than {length}")
            scored = (made.answer,), made.max_tokens, made.metric, made.labels
            items.append(QuestionItem(identity, task, tuple(prompt), *scored, length, at, first_line=bool(made.labels)))
    n_most = max(item.length + item.max_tokens for item in items)
    if n_most > llm.context_size:
        raise RequestError(
            f"prompt and answer need {n_most} tokens, the context has {llm.context_size}; "
            "use a larger context (ctx, --ctx) or shorter prompts"
        )
    return items


class _Puzzle(NamedTuple):
    """A function that writes the prompt with n tokens of filling, and the scoring of the answer."""

    write: Callable[[int], str]
    answer: str
    max_tokens: int
    metric: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    llm: AdaSkipLlama
    tokens: Sequence[int]
    text: str

    @cached_property
    def words(self) -> list[str]:
        return [word for word in re.findall(r"[^\W\d_]{2,}", self.text) if word.lower() != word.upper()]

    def piece(self, start: int, n: int) -> str:
        return self.llm.detokenize(list(self.tokens[start : start + n])).decode("utf-8", "ignore") if n > 0 else ""

    def place(self, rng: random.Random, n: int) -> int:
        return _below(rng, len(self.tokens) - n + 1)

    def key(self, rng: random.Random, taken: Sequence[str] = ()) -> str:
        """Return a number that is neither in the text nor taken."""
        while True:
            key = str(10000 + _below(rng, 90000))
            if key not in self.text and key not in taken:
                return key


def _below(rng: random.Random, n: int) -> int:
    """Return a number below n. Python promises the same figures in every release for random() only."""
    return int(rng.random() * n)


def _draw(rng: random.Random, values: Sequence[str], n: int) -> list[str]:
    rest = list(values)
    return [rest.pop(_below(rng, len(rest))) for _ in range(n)]


def _hide(source: _Source, start: int, needles: Sequence[tuple[float, str]]) -> Callable[[int], str]:
    """Return a function that writes the text from token ``start`` on, with sentences at given depths."""

    def write(n: int) -> str:
        parts, begin = [], 0
        for depth, needle in sorted(needles):
            end = round(depth * n)
            parts += [source.piece(start + begin, end - begin), f"\n\n{needle}\n\n"]
            begin = end
        return "".join([*parts, source.piece(start + begin, n - begin)]).lstrip("\n")

    return write


def _passkey(source: _Source, rng: random.Random, length: int, depth: float, names: Sequence[str] = ("",)) -> _Puzzle:
    keys: list[str] = []
    for _ in names:
        keys.append(source.key(rng, keys))
    depths = [depth, *(rng.random() for _ in names[1:])]
    needles = [
        (depth, f"The pass key{name} is {key}. Remember it. {key} is the pass key{name}.")
        for depth, name, key in zip(depths, names, keys, strict=True)
    ]
    write = _hide(source, source.place(rng, length), needles)
    return _Puzzle(lambda n: f"{write(n)}\n\nThe pass key{names[0]} is", keys[0], _KEY_TOKENS, "contains")


def _multikey(source: _Source, rng: random.Random, length: int, depth: float) -> _Puzzle:
    return _passkey(source, rng, length, depth, [f" of {name}" for name in _draw(rng, _NAMES, _N_KEYS)])


def _copy(source: _Source, rng: random.Random, length: int, depth: float) -> _Puzzle:
    # The passage is taken after the filling, so that it is in one place only. Its first word may be cut, so it is
    # dropped. The next few words are given, so that a model only has to continue.
    start = source.place(rng, length + _PASSAGE)
    words = source.piece(start + length, _PASSAGE).split()[1:]
    if len(words) < 2:
        raise DataError("the text has no words to copy with spaces between them; leave out the task 'copy'")
    n_cue = min(_CUE, len(words) // 2)
    cue, rest = " ".join(words[:n_cue]), " ".join(words[n_cue:])
    write = _hide(source, start, [(depth, f"This is the passage to copy: {cue} {rest}")])
    n_rest = len(tokens_of(source.llm, f" {rest}"))
    return _Puzzle(lambda n: f"{write(n)}\n\nThis is the passage to copy: {cue}", rest, max(n_rest, 1), "qa_f1")


_WRITING: tuple[Callable[[Sequence[str]], str], ...] = (
    lambda words: " ".join(words).lower(),
    lambda words: " ".join(words).upper(),
    lambda words: "_".join(words).lower(),
    lambda words: " ".join(str(len(word)) for word in words),
)


def _classify(source: _Source, rng: random.Random, length: int, depth: float) -> _Puzzle:
    words = source.words
    labels = _draw(rng, _LABELS, len(_WRITING))
    if len(words) < 2 * len(_WRITING) * _SNIPPET:
        raise DataError("the text has too few words in a script with upper case; leave out the task 'classify'")
    n_examples = length // _SNIPPET + len(_WRITING)  # more than fit into the prompt
    kinds: list[int] = []
    while len(kinds) < n_examples:  # all ways of writing equally often
        kinds += map(int, _draw(rng, "0123", len(_WRITING)))
    start, asked = _below(rng, len(words)), _below(rng, len(_WRITING))

    def snippet(index: int, n: int, kind: int) -> str:
        begin = start + index * _SNIPPET
        return _WRITING[kind]([words[i % len(words)] for i in range(begin, begin + n)])

    def write(n: int) -> str:
        n += len(_WRITING) * _SNIPPET  # each way of writing is shown at least once
        examples = [
            f"Text: {snippet(i, min(_SNIPPET, n - i * _SNIPPET), kinds[i])}\nLabel: {labels[kinds[i]]}\n\n"
            for i in range(-(-n // _SNIPPET))
        ]
        return f"{''.join(examples)}Text: {snippet(n_examples, _SNIPPET, asked)}\nLabel:"

    return _Puzzle(write, labels[asked], 4, "classification", tuple(labels))


_MAKE: dict[str, Callable[[_Source, random.Random, int, float], _Puzzle]] = {
    "passkey": _passkey,
    "multikey": _multikey,
    "classify": _classify,
    "copy": _copy,
}

TASKS = tuple(_MAKE)
"""Names of the tasks.

- ``passkey``: a sentence with a number of five digits is in the text; the prompt ends by asking for it.
- ``multikey``: the same with four keys, each with a name; the prompt asks for one, and the others are anywhere.
- ``classify``: words of the text are written in four ways (lower case, upper case, joined by ``_``, as their numbers of
  letters), each with a label. The labels are drawn anew for each item, so that only the examples explain them.
- ``copy``: a passage in the text is marked; the prompt ends where its repetition begins.
"""
