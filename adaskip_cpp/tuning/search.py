"""The search for a plan that keeps a promise: bisection over ranked sublayers, then local exchange.

Nothing here knows a model. What a skip set does to the quality is a function from the set to one figure per text, its
*harm*: added loss, or the share of tokens that the full model would have chosen otherwise. What it brings is a function
from the set to the seconds of a request. Both are called as seldom as possible; what is known is not asked again.

Held to is the upper end of the 95% interval of the mean harm over the texts, not the mean.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..intervals import Interval, mean_interval
from ..model.skip_set import ranked

SkipFlags: TypeAlias = npt.NDArray[np.bool_]
"""bool ``[n_layer, 2]``, columns attention and FFN."""

Harm: TypeAlias = Callable[[SkipFlags], Sequence[float] | npt.NDArray[np.float64]]

_NEAR = 4
"""Exchange looks at so many of the sublayers next to the boundary of the ranking, on either side: one that is ranked
far beyond it hardly ever helps, and each costs an evaluation."""

_SAME = 1e-3
"""Times that differ by less than this share count as equal: they are sums of the same measured parts."""


@dataclass(frozen=True, eq=False)
class Judged:
    """A skip set, the seconds of a request under it, and its harm: the mean over the texts with its 95% interval."""

    skip: SkipFlags
    seconds: float
    harm: Interval

    def keeps(self, limit: float) -> bool:
        """Whether the harm is at most ``limit``, by the upper end of its interval; never so if it is not a number."""
        return self.harm.high <= limit


class Judge:
    """Judges skip sets, each once, by their harm on each of two texts or more and by the seconds of a request."""

    def __init__(self, n_layer: int, harm: Harm, seconds: Callable[[SkipFlags], float]) -> None:
        self.n_layer, self._harm, self.seconds = n_layer, harm, seconds
        nothing = self.first((), 0)
        self._known = {nothing.tobytes(): Judged(nothing, seconds(nothing), Interval(0.0, 0.0, 0.0, 0))}
        self.n_evaluations = 0

    def __call__(self, skip: SkipFlags) -> Judged:
        if not self.is_known(skip):
            self.n_evaluations += 1
            values = np.asarray(self._harm(skip), np.float64)
            # An infinite loss has no interval, and is as little kept as one that is not a number.
            finite = np.isfinite(values).all()
            harm = mean_interval(values) if finite else Interval(math.nan, math.nan, math.nan, len(values))
            self._known[skip.tobytes()] = Judged(skip.copy(), self.seconds(skip), harm)
        return self._known[skip.tobytes()]

    def is_known(self, skip: SkipFlags) -> bool:
        return skip.tobytes() in self._known

    def first(self, order: Sequence[int], n: int) -> SkipFlags:
        skip = np.zeros((self.n_layer, 2), np.bool_)
        skip.flat[list(order[:n])] = True
        return skip


def rank(similarity: npt.NDArray[np.float64], saved: npt.NDArray[np.float64]) -> list[int]:
    """Return the sublayers in the order in which to skip them: by the least similarity lost per second saved.

    Both are float64 ``[n_layer, 2]``: mean IO similarity, NaN where a sublayer cannot be skipped, and the seconds that
    skipping each one alone saves. Returned are indices into them, flattened, without what cannot be skipped or saves
    nothing. Ties as in the paper's ranking, which this is where all save the same: attention before FFN, then the lower
    layer.
    """
    may = ~np.isnan(similarity) & (saved > 0)
    price = np.divide(1.0 - similarity, saved, out=np.full(similarity.shape, np.inf), where=may)
    return [index for index in ranked(price) if may.flat[index]]


def fastest_within(judge: Judge, order: Sequence[int], limit: float, *, n_exchange: int = 16) -> Judged:
    """Find the set that takes the least time among those whose harm keeps within ``limit``: the empty one at worst.

    Bisection finds how many of the first in the ranking may be skipped. Exchange then adds single sublayers and swaps
    skipped with other ones, as long as that takes less time, or no more and harms less, and keeps the limit. It may use
    ``n_exchange`` evaluations.
    """
    numbers = range(len(order), -1, -1)  # none, the last of them, keeps any limit
    n = bisect.bisect_left(numbers[:-1], True, key=lambda n: judge(judge.first(order, n)).keeps(limit))
    found = judge(judge.first(order, numbers[n]))

    def better(candidate: Judged, present: Judged) -> bool:
        faster = candidate.seconds < present.seconds * (1 - _SAME)
        return candidate.keeps(limit) and (faster or candidate.harm.value < present.harm.value)

    return _exchange(judge, order, found, n_exchange, better, lambda present: present.seconds * (1 + _SAME), add=True)


def least_harm(judge: Judge, order: Sequence[int], goal: float, *, n_exchange: int = 16) -> Judged | None:
    """Find the set of the least mean harm among those under which a request takes at most ``goal`` seconds.

    The first of the ranking are taken until the time is reached, and what is then not needed is put back, the last in
    the ranking first. Exchange follows, as in :func:`fastest_within`. None if all of it does not reach the time.
    """
    n = next((n for n in range(len(order) + 1) if judge.seconds(judge.first(order, n)) <= goal), None)
    if n is None:
        return None
    skip = judge.first(order, n)
    for index in reversed(order[:n]):
        skip.flat[index] = False
        skip.flat[index] = judge.seconds(skip) > goal

    def better(candidate: Judged, present: Judged) -> bool:
        return candidate.harm.value < present.harm.value or math.isnan(present.harm.value)

    return _exchange(judge, order, judge(skip), n_exchange, better, lambda present: goal, add=False)


def back_off(judge: Judge, order: Sequence[int], skip: SkipFlags, limit: float) -> Judged:
    """Put skipped sublayers back, the last in the ranking first, until the harm keeps within ``limit``."""
    skip = skip.copy()
    chosen = [index for index in order if skip.flat[index]]
    while not (judged := judge(skip)).keeps(limit) and chosen:
        skip.flat[chosen.pop()] = False
    return judged


def _exchange(
    judge: Judge,
    order: Sequence[int],
    found: Judged,
    n_evaluations: int,
    better: Callable[[Judged, Judged], bool],
    most_seconds: Callable[[Judged], float],
    *,
    add: bool,
) -> Judged:
    """Take one move after another that is better, until none is or the evaluations are used up."""
    stop = judge.n_evaluations + n_evaluations
    while True:
        for skip in _moves(order, found.skip, add=add):
            if judge.seconds(skip) > most_seconds(found):
                continue
            if not judge.is_known(skip) and judge.n_evaluations >= stop:
                return found
            if better(candidate := judge(skip), found):
                found = candidate
                break
        else:
            return found


def _moves(order: Sequence[int], skip: SkipFlags, *, add: bool) -> Iterator[SkipFlags]:
    """Yield sets with one sublayer more or one less, then those with one swapped, near the ranking's boundary first."""
    chosen = [index for index in reversed(order) if skip.flat[index]][:_NEAR]
    others = [index for index in order if not skip.flat[index]][:_NEAR]
    pairs = itertools.product(enumerate(chosen), enumerate(others))
    swaps = sorted(pairs, key=lambda pair: pair[0][0] + pair[1][0])
    for indices in [*([index] for index in (others if add else chosen)), *([out, in_] for (_, out), (_, in_) in swaps)]:
        changed = skip.copy()
        changed.flat[indices] = ~changed.flat[indices]
        yield changed
