"""The requests that an evaluation makes of a model: read a prompt, decode given tokens behind it, or its own."""

from collections.abc import Sequence
from contextlib import closing

import llama_cpp
import numpy as np

from ..engine.generation import Generation
from ..engine.llama import AdaSkipLlama
from ..measuring.distribution import Logits, kl_divergences, losses
from ..model.plan import SkipPlan


class SharedPrompt:
    """Runs contenders on one prompt after the other; those that read it the same way share its KV.

    The last token of a prompt is always evaluated alone, whether the rest was cached or not, so that a result does not
    depend on what ran before it. A bulk ends before the prompt's tail all the same.
    """

    def __init__(self, llm: AdaSkipLlama) -> None:
        self._llm = llm
        self._cached: tuple[object, ...] = ()

    def take(self, prompt: tuple[int, ...], plan: SkipPlan | None) -> AdaSkipLlama:
        """Put a plan in force, and all of a prompt that an answer reads again into the cache, and return the model."""
        skipped = None if plan is None or plan.prefill.n_skip == 0 else plan.prefill
        bulk = None if plan is None else plan.bulk
        self._llm.set_plan(plan)
        if self._cached != (prompt, skipped, bulk):
            self._cached = ()
            self._llm.reset()
            # The whole prompt, of which `generate` evaluates the last token again, has the bulk that it is used with.
            self._llm.eval(prompt[:-1] if bulk is None else prompt)
            self._cached = prompt, skipped, bulk
        return self._llm


def forced_logits(llm: AdaSkipLlama, prompt: Sequence[int], targets: Sequence[int]) -> Logits:
    """Begin a request, decode given tokens behind its prompt, one by one, and return the logits before each.

    The logits of the first target are those of prefill, all others those of decode: float32 [len(targets), n_vocab].
    """
    rows = np.empty((len(targets), llm.n_vocab()), np.float32)
    with closing(llm.generate(prompt, temp=0.0)) as steps:
        next(steps)
    for i, row in enumerate(rows):
        if i:
            llm.eval_decode(targets[i - 1 : i])
        row[:] = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), row.shape)
    return rows


def greedy_text(llm: AdaSkipLlama, prompt: Sequence[int], max_tokens: int, *, first_line: bool = False) -> str:
    """Return a greedy continuation, up to the end of its first line of text if no more is looked at."""
    text = ""
    with closing(iter(Generation(llm, list(prompt), max_tokens=max_tokens))) as pieces:
        for piece in pieces:
            text += piece
            if first_line and "\n" in text.lstrip("\n"):
                break
    return text


def figures(
    full: Logits, logits: Logits, targets: Sequence[int]
) -> tuple[dict[str, float | None], tuple[float | None, ...]]:
    """Return means over the targets by name, and the KL divergence of each in nats, to 4 digits, for the store."""
    divergences = kl_divergences(full, logits)
    means: dict[str, float | None] = {
        "loss": float(losses(logits, targets).mean()),
        "kl": float(divergences.mean()),
        "agreement": float((full.argmax(axis=1) == logits.argmax(axis=1)).mean()),
    }
    return means, tuple(float(f"{each:.4g}") for each in divergences)
