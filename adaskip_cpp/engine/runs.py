"""Finds the runs of tokens that a prompt shares with the one in memory and with saved ones: ``find_runs``."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..model.edits import SAME, WIDE
from ..model.identity import ModelInfo

Tokens: TypeAlias = npt.NDArray[np.int32]

_MULTIPLIER = 0x9E3779B97F4A7C15
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)
_MOST_TRIED = 8  # places of a repeated text


class Run(NamedTuple):
    """``n`` tokens at ``start`` in memory and at ``to`` in the prompt. Their move counts as ``n_moves`` moves."""

    start: int
    to: int
    n: int
    n_moves: int = 1


class Saved(NamedTuple):
    """A saved prompt.

    Attributes:
        tokens: int32 ``[n_tokens]``: its token ids.
        take: returns the saved state of sequence 0; None if it is gone.
        model: the model that read it; others refuse it.
        elided_kv: layers without KV in that model.
    """

    tokens: Tokens
    take: Callable[[], bytearray | None]
    model: ModelInfo
    elided_kv: tuple[int, ...]


def n_common(a: Tokens, b: Tokens) -> int:
    """Return the number of equal tokens at the beginning of both."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n


def find_runs(cached: Tokens, prompt: Tokens, *, first: int, end: int, least: int) -> list[Run]:
    """Return the runs that the prompt shares with the tokens in memory, in the order of the prompt.

    The search compares ``cached[first:]`` with ``prompt[first:end]``, both int32. A run has at least ``least`` tokens,
    and a cached token is in one run at most.
    """
    cached, prompt = cached[first:], prompt[first:end]
    if min(len(cached), len(prompt)) < least:
        return []
    known, wanted = _hashes(cached, least), _hashes(prompt, least)
    order = np.argsort(known, kind="stable")
    low, high = (np.searchsorted(known[order], wanted, side) for side in ("left", "right"))
    is_free, begins = np.ones(len(cached), bool), np.ones(len(known), bool)  # tokens, and places of a further run
    runs: list[Run] = []
    at = shift = 0
    for to in np.flatnonzero(low < high).tolist():
        if to < at:
            continue
        places = order[low[to] : high[to]]
        if not (places := places[begins[places]]).size:
            continue
        nearest = places[np.argsort(abs(places - (to - shift)), kind="stable")[:_MOST_TRIED]]
        lengths = [n_common(np.where(is_free[each:], cached[each:], -1), prompt[to:]) for each in nearest]
        n = max(lengths)
        if n >= least:
            start = int(nearest[lengths.index(n)])
            # Tokens before the middle of the run: those that both texts have there, and those of either text.
            both = first + sum(each.n for each in runs if each.start < first + start) + n // 2
            either = 2 * first + start + to + n - both
            runs.append(Run(first + start, first + to, n, 1 if both >= SAME * either else WIDE))
            is_free[start : start + n] = begins[max(start - least + 1, 0) : start + n] = False
            at, shift = to + n, to - start
    return runs


def beside(runs: Iterable[Run], taken: Sequence[Run], *, least: int, mend: int) -> list[Run]:
    """Return the parts of runs whose places in the prompt are not taken, each of at least ``least`` tokens.

    A part that begins inside its run loses ``mend`` tokens: they are read, so that its K is turned before it is saved.
    """
    parts = []
    for run in runs:
        at, end = run.to, run.to + run.n
        for each in sorted([*(each for each in taken if each.n), Run(0, end, 0)], key=lambda each: each.to):
            begin = at if at == run.to else at + mend
            n = min(each.to, end) - begin
            if n >= least:
                parts.append(Run(run.start + begin - run.to, begin, n, run.n_moves))
            at = max(at, each.to + each.n)
    return parts


def _hashes(tokens: Tokens, n: int) -> npt.NDArray[np.uint64]:
    """Return a hash of every ``n`` consecutive tokens; equal tokens have equal hashes."""
    powers, inverse = (np.cumprod(np.full(len(tokens), each, np.uint64)) for each in (_MULTIPLIER, _INVERSE))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(tokens.astype(np.uint64) * powers)])
    hashes: npt.NDArray[np.uint64] = (sums[n:] - sums[:-n]) * inverse[: len(tokens) - n + 1]
    return hashes
