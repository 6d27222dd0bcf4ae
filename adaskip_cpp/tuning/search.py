"""The search for a plan that keeps a promise: over ranked sublayers by bisection or prediction, then local exchange.

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

N_PREDICTED = 5
"""Evaluations that a search by predicted harm takes at most."""

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


def rank(lost: npt.NDArray[np.float64], saved: npt.NDArray[np.float64]) -> list[int]:
    """Return the sublayers in the order in which to skip them: by the least lost per second saved.

    Both are float64 ``[n_layer, 2]``: what skipping each one loses, as one less its similarity, NaN where it cannot be
    skipped, and the seconds that skipping each one alone saves. Returned are indices into them, flattened, without what
    cannot be skipped or saves nothing. Ties as in the paper's ranking, which this is where all save the same: attention
    before FFN, then the lower layer.
    """
    may = ~np.isnan(lost) & (saved > 0)
    price = np.divide(lost, saved, out=np.full(lost.shape, np.inf), where=may)
    return [index for index in ranked(price) if may.flat[index]]


def fastest_within(
    judge: Judge,
    order: Sequence[int],
    limit: float,
    *,
    n_exchange: int = 16,
    predicted: Sequence[float] | npt.NDArray[np.float64] | None = None,
) -> Judged:
    """Find the set that takes the least time among those whose harm keeps within ``limit``: the empty one at worst.

    Bisection finds how many of the first in the ranking may be skipped; or, where the harm of so many is ``predicted``,
    for each number from 0 on, at most :data:`N_PREDICTED` evaluations do, each where the harm is then expected to reach
    the limit. Exchange then adds single sublayers and swaps skipped with other ones, as long as that takes less time,
    or no more and harms less, and keeps the limit. It may use ``n_exchange`` evaluations.
    """
    if predicted is not None:
        found = _as_predicted(judge, order, limit, np.asarray(predicted, np.float64))
    else:
        numbers = range(len(order), -1, -1)  # none, the last of them, keeps any limit
        n = bisect.bisect_left(numbers[:-1], True, key=lambda n: judge(judge.first(order, n)).keeps(limit))
        found = judge(judge.first(order, numbers[n]))

    def better(candidate: Judged, present: Judged) -> bool:
        faster = candidate.seconds < present.seconds * (1 - _SAME)
        return candidate.keeps(limit) and (faster or candidate.harm.value < present.harm.value)

    return _exchange(judge, order, found, n_exchange, better, lambda present: present.seconds * (1 + _SAME), add=True)


def _as_predicted(judge: Judge, order: Sequence[int], limit: float, predicted: npt.NDArray[np.float64]) -> Judged:
    """The most of the first in the ranking that keep the limit, as far as a few evaluations tell."""
    low, high, again, same = 0, len(order) + 1, False, 0  # the first keeps the limit, the other is too many
    factors: dict[int, float] = {}  # by how much the harm of so many differs from what was predicted
    while high - low > 1 and judge.n_evaluations < N_PREDICTED:
        known = np.array(sorted(factors.items()) or [(0, 1.0)]).T
        harm = predicted * np.interp(np.arange(len(predicted)), known[0], known[1])
        n = int(np.append(np.flatnonzero(harm > limit * (1 + 1e-9)), len(harm))[0]) - 1
        if factors and not low < n < high:
            # One more or one less at first, as the prediction says; if that is no end, it is not to be trusted.
            n = (low + high) // 2 if again else n
            again = True
        elif abs(same) > 1:  # it errs to one side
            n = (low + high) // 2
        n = min(max(n, low + 1), high - 1)
        judged = judge(judge.first(order, n))
        low, high = (n, high) if judged.keeps(limit) else (low, n)
        same = max(same, 0) + 1 if judged.keeps(limit) else min(same, 0) - 1
        if judged.harm.high > 0 and predicted[n] > 0:  # also false of NaN
            factors[n] = judged.harm.high / float(predicted[n])
        else:
            factors[n] = 0.5 if judged.keeps(limit) else 2.0
    return judge(judge.first(order, low))


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


def back_off(
    keeps: Callable[[SkipFlags], bool], order: Sequence[int], skip: SkipFlags, *, faster: bool = False
) -> SkipFlags:
    """Put skipped sublayers back, the last in the ranking first, until the rest ``keeps`` what was promised.

    That is one at a time, or twice as many each time if ``faster``. The empty set is not asked about.
    """
    skip, n = skip.copy(), 1
    chosen = [index for index in order if skip.flat[index]]
    while chosen and not keeps(skip):
        skip.flat[chosen[-n:]] = False
        del chosen[-n:]
        n *= 2 if faster else 1
    return skip


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
