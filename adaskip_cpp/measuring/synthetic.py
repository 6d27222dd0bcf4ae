"""Hides pass keys in any text, as a long-context task. Start at :func:`passkey_items`."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

from ..engine.llama import AdaSkipLlama
from ..errors import DataError, RequestError
from .corpus import tokens_of
from .tasks import QuestionItem, fill

TASKS = ("passkey",)
"""Names of the tasks. ``passkey``: a number of five digits is in the text; the prompt ends by asking for it."""

_KEY_TOKENS = 20  # of an answer: enough for a chat model that repeats the sentence, with a token per digit


def passkey_items(
    llm: AdaSkipLlama,
    text: str,
    *,
    lengths: Sequence[int] = (1024,),
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    n_per: int = 4,
) -> list[QuestionItem]:
    """Make questions about prompts of given lengths: ``n_per`` for each length and depth.

    A prompt ends as a text to continue, "The pass key is", so that base models can answer too. It also suits small chat
    models better than their template: SmolLM2-135M-Instruct found the pass key in 9 of 9 such prompts of 1,000 tokens
    and 6 of 6 of 2,000, but in its chat template in none of 4 of 1,000.

    The same model, text and arguments give the same items in every run. The first items are of every kind.

    Args:
        text: hides the keys; at least as long as the longest prompt.
        lengths: most tokens of a prompt, which has at most a few less.
        depths: places of the keys in the text, 0 for the beginning to 1 for the end.
    """
    if not lengths or not depths or n_per < 1:
        raise DataError("nothing to make; ask for at least one length, depth and item")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise DataError(f"there is no depth {depth:g}; use 0 (the beginning) to 1 (the end)")
    tokens = tokens_of(llm, text)
    if len(tokens) < max(lengths):
        raise DataError(
            f"the text has {len(tokens)} tokens, a prompt needs {max(lengths)}; "
            "give a longer text or ask for shorter prompts"
        )
    if (n_most := max(lengths) + _KEY_TOKENS) > llm.context_size:
        raise RequestError(
            f"prompt and answer need {n_most} tokens, the context has {llm.context_size}; "
            "use a larger context (ctx, --ctx) or shorter prompts"
        )
    wrap = partial(tokens_of, llm, bos=True)
    items = []
    for index, length, depth in product(range(n_per), dict.fromkeys(lengths), dict.fromkeys(depths)):
        identity = f"passkey/{length}/{depth:g}/{index}"
        # Seeded by text: Python hashes it with SHA-512, the same everywhere.
        rng = random.Random(identity)
        key = _key(rng, text)
        start = _below(rng, len(tokens) - length + 1)
        write = _writer(llm, tokens[start : start + length], depth, key)
        prompt = fill(write, length, wrap)
        if prompt is None:
            least = len(wrap(write(0)))
            raise DataError(f"a prompt with a pass key has at least {least} tokens; ask for longer ones than {length}")
        items.append(QuestionItem(identity, "passkey", tuple(prompt), (key,), _KEY_TOKENS, "contains"))
    return items


def _below(rng: random.Random, n: int) -> int:
    """Return a number below n. Python promises the same figures in every release for random() only."""
    return int(rng.random() * n)


def _key(rng: random.Random, text: str) -> str:
    """Return a number that is not in the text."""
    while (key := str(10000 + _below(rng, 90000))) in text:
        pass
    return key


def _writer(llm: AdaSkipLlama, tokens: Sequence[int], depth: float, key: str) -> Callable[[int], str]:
    """Return a function that writes a prompt with the first n tokens, and the key at a depth of these."""
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."

    def piece(begin: int, end: int) -> str:
        return llm.detokenize(list(tokens[begin:end])).decode("utf-8", "ignore")

    def write(n: int) -> str:
        at = round(depth * n)
        return f"{piece(0, at)}\n\n{needle}\n\n{piece(at, n)}\n\nThe pass key is".lstrip("\n")

    return write
