"""Times one request on any ``llama_cpp.Llama``, stock or ours. Start at :func:`time_request`.

This module imports nothing of the package. So a process that times stock llama-cpp-python can load it by its path,
without our libllama.
"""

import gc
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

N_SETTLE = 2  # uncounted first tokens of decode: one builds the phase's graph, one reuses it with cold caches


@dataclass(frozen=True)
class RequestTime:
    """Seconds from the call to the first token, with nothing in the cache, and from each token to the next."""

    first_token_s: float
    token_s: tuple[float, ...]

    def per_token_s(self, n_settle: int = N_SETTLE) -> float:
        """Return the median seconds of the tokens after the first ``n_settle``, else of the last token, else NaN."""
        settled = self.token_s[min(n_settle, len(self.token_s) - 1) :]
        return statistics.median(settled) if settled else math.nan


@dataclass(frozen=True)
class SecondsByDepth:
    """A line: seconds per token at depth 0, and their growth with each token of depth."""

    start: float
    growth: float

    def at(self, depth: float) -> float:
        return self.start + self.growth * depth

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]], growth: float) -> "SecondsByDepth":
        """Return the line through the first and last of points (depth, seconds); through one point with ``growth``."""
        (depth, seconds), (deeper, longer) = points[0], points[-1]
        if deeper > depth:
            growth = max((longer - seconds) / (deeper - depth), 0.0)
        return cls(max((seconds + longer - growth * (depth + deeper)) / 2, 0.0), growth)


def time_request(llm: Any, prompt: Sequence[int], n_decode: int) -> RequestTime:
    """Time a prompt and the ``n_decode`` tokens after the first one, chosen greedily, also after the end of the text.

    The model's cache is emptied first. Sampling reads the logits, so a GPU has finished whenever the clock is read.
    """
    llm.reset()
    collects = gc.isenabled()
    gc.disable()  # a collection would land on one token of one contender
    try:
        steps = llm.generate(list(prompt), temp=0.0)
        ticks = [perf_counter()]
        for _ in range(1 + n_decode):
            next(steps)
            ticks.append(perf_counter())
        steps.close()
    finally:
        if collects:
            gc.enable()
    first_token_s, *token_s = (after - before for before, after in itertools.pairwise(ticks))
    return RequestTime(first_token_s, tuple(token_s))


def in_turn(n: int, n_round: int) -> list[int]:
    """Return the order of ``n`` contenders in a round, reversed in odd rounds, so that drift affects all alike."""
    return list(range(n))[:: -1 if n_round % 2 else 1]
