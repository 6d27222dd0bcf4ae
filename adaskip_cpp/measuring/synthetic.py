"""Makes long-context tasks from any text: pass keys and copies. Start at :func:`synthetic_items`."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

from ..engine.llama import AdaSkipLlama
from ..errors import DataError, RequestError
from .corpus import tokens_of
from .tasks import QuestionItem, fill

_KEY_TOKENS = 20  # of an answer: enough for a chat model that repeats the sentence, with a token per digit
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
) -> list[QuestionItem]:
    """Make questions about prompts of given lengths: ``n_per`` for each task, length and depth.

    A prompt ends as a text to continue, such as "The pass key is", so that base models can answer too. It also suits
    small chat models better than their template: SmolLM2-135M-Instruct found the pass key in 9 of 9 such prompts of
    1,000 tokens and 6 of 6 of 2,000, but in its chat template in none of 4 of 1,000.

    The same model, text and arguments give the same items in every run. The first items are of every kind.

    Args:
        text: hides the answers; at least as long as the longest prompt.
        lengths: most tokens of a prompt, which has at most a few less.
        depths: places of the answer in the text, 0 for the beginning to 1 for the end.
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
    wrap = partial(tokens_of, llm, bos=True)
    source = _Source(llm, tokens, text)
    items = []
    kinds = dict.fromkeys(tasks), dict.fromkeys(lengths), dict.fromkeys(depths)
    for index, task, length, depth in product(range(n_per), *kinds):
        identity = f"{task}/{length}/{depth:g}/{index}"
        # Seeded by text: Python hashes it with SHA-512, the same everywhere.
        made = _MAKE[task](source, random.Random(identity), length, depth)
        prompt = fill(made.write, length, wrap)
        if prompt is None:
            least = len(wrap(made.write(0)))
            raise DataError(f"a prompt of {task!r} has at least {least} tokens; ask for longer ones than {length}")
        items.append(QuestionItem(identity, task, tuple(prompt), (made.answer,), made.max_tokens, made.metric))
    n_most = max(lengths) + max(item.max_tokens for item in items)
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


@dataclass(frozen=True)
class _Source:
    llm: AdaSkipLlama
    tokens: Sequence[int]
    text: str

    def piece(self, start: int, n: int) -> str:
        return self.llm.detokenize(list(self.tokens[start : start + n])).decode("utf-8", "ignore") if n > 0 else ""

    def place(self, rng: random.Random, n: int) -> int:
        return _below(rng, len(self.tokens) - n + 1)

    def key(self, rng: random.Random) -> str:
        """Return a number that is not in the text."""
        while (key := str(10000 + _below(rng, 90000))) in self.text:
            pass
        return key


def _below(rng: random.Random, n: int) -> int:
    """Return a number below n. Python promises the same figures in every release for random() only."""
    return int(rng.random() * n)


def _hide(source: _Source, start: int, depth: float, needle: str) -> Callable[[int], str]:
    """Return a function that writes the text from token ``start`` on, with a sentence at a depth."""

    def write(n: int) -> str:
        at = round(depth * n)
        return f"{source.piece(start, at)}\n\n{needle}\n\n{source.piece(start + at, n - at)}".lstrip("\n")

    return write


def _passkey(source: _Source, rng: random.Random, length: int, depth: float) -> _Puzzle:
    key = source.key(rng)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    write = _hide(source, source.place(rng, length), depth, needle)
    return _Puzzle(lambda n: f"{write(n)}\n\nThe pass key is", key, _KEY_TOKENS, "contains")


def _copy(source: _Source, rng: random.Random, length: int, depth: float) -> _Puzzle:
    # The passage is taken after the filling, so that it is in one place only. Its first word may be cut, so it is
    # dropped. The next few words are given, so that a model only has to continue.
    start = source.place(rng, length + _PASSAGE)
    words = source.piece(start + length, _PASSAGE).split()[1:]
    if len(words) < 2:
        raise DataError("the text has no words to copy with spaces between them; leave out the task 'copy'")
    n_cue = min(_CUE, len(words) // 2)
    cue, rest = " ".join(words[:n_cue]), " ".join(words[n_cue:])
    write = _hide(source, start, depth, f"This is the passage to copy: {cue} {rest}")
    n_rest = len(tokens_of(source.llm, f" {rest}"))
    return _Puzzle(lambda n: f"{write(n)}\n\nThis is the passage to copy: {cue}", rest, max(n_rest, 1), "qa_f1")


_MAKE: dict[str, Callable[[_Source, random.Random, int, float], _Puzzle]] = {
    "passkey": _passkey,
    "copy": _copy,
}

TASKS = tuple(_MAKE)
"""Names of the tasks.

- ``passkey``: a sentence with a number of five digits is in the text; the prompt ends by asking for it.
- ``copy``: a passage in the text is marked; the prompt ends where its repetition begins.
"""
