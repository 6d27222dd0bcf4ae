"""Finds the paths of a frontier: the fastest set of skipped sublayers and windows for each of several losses.

For ``tune.py``. Start at :func:`measure`, then :func:`find_path`. This module knows no model: callers pass functions
for the loss and the time of a set.

Sublayers of a kind are skipped in an *order*, the last layer first (docs/dev/method.md explains why). The loss of the
first k of an order is measured at a few depths k, separately for attentions, FFNs and windows. Between the depths it is
interpolated, and a set's loss is predicted as the sum of the three. This is good enough to find sets to judge.

Skipped sublayers are measured after short prompts, which cost little. Windows are measured after longer prompts, where
they leave something out. One set of skipped sublayers is measured after both, to compare the two lengths.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..model.skip_set import marked

Lost: TypeAlias = tuple[float, float]  # nats per token that a set loses in continuations and in copies

LEVELS = tuple(0.006 * 1.1**i for i in range(34))  # nats per token: the path has a set for each of these losses
SHARES = (8, 4)  # windows that are tried: an eighth and a quarter of the prompt

_FIRST = 2.0
"""The least promise that a set keeps over its level, assumed until one set is judged. Copies from far back lose more
than copies in the search's shorter prompts, and a promise allows for chance. Measured: 1.2 to 3.8."""

_DEPTHS = {"attention": (1 / 4, 1 / 2, 3 / 4, 1.0), "ffn": (1 / 4, 1 / 2, 3 / 4, 1.0), "windowed": (1 / 2, 1.0)}
"""Depths at which an order is measured, as shares of its length."""


@dataclass(frozen=True)
class Candidate:
    """A set: what the bulk of a prompt leaves out."""

    attention: tuple[int, ...] = ()  # layers whose attention is skipped
    ffn: tuple[int, ...] = ()  # layers whose FFN is skipped
    windowed: tuple[int, ...] = ()  # layers whose attention sees a window: the prompt's length divided by share
    share: int = SHARES[0]
    level: float = field(default=0.0, compare=False, repr=False)  # the loss that a path has this set for, else 0

    def skip(self, n_layer: int) -> npt.NDArray[np.bool_]:
        return marked(n_layer, self.attention, self.ffn)


_PARTS = ("attention", "ffn", "windowed")
Orders: TypeAlias = Mapping[str, tuple[int, ...]]  # by part, the layers in the order in which they are left out

_Part: TypeAlias = tuple[str, int]  # one curve each: the name of a part, and for windows their share, else 0
_CURVES: tuple[_Part, ...] = (("attention", 0), ("ffn", 0), *(("windowed", share) for share in SHARES))

_Grid: TypeAlias = list[tuple[Candidate, npt.NDArray[np.float64], float]]
"""Sets, their losses after long prompts in both kinds of answers, and the seconds of a prompt."""


@dataclass(frozen=True)
class _Curve:
    """The loss of the first k layers of an order, measured at some depths k."""

    order: tuple[int, ...]
    depths: tuple[int, ...]
    lost: tuple[Lost, ...]

    def at(self, depth: int) -> npt.NDArray[np.float64]:
        """Interpolate: linearly up to the first depth, then in logarithms, as each layer multiplies the loss."""
        if depth <= self.depths[1]:
            return np.array(self.lost[1]) * (depth / self.depths[1])
        logs = np.log(np.maximum(np.maximum.accumulate(self.lost), 1e-5))
        return np.exp([np.interp(depth, self.depths, kind) for kind in logs.T])


@dataclass(frozen=True)
class Losses:
    """The measured losses of some sets, to predict the losses of others.

    ``factor`` is float64 ``[2]``, for continuations and copies: the loss of skipped sublayers together, after a long
    prompt, over the sum of their curves.
    """

    curves: Mapping[_Part, _Curve]
    factor: npt.NDArray[np.float64]

    def of(self, candidate: Candidate) -> npt.NDArray[np.float64]:
        """Predict the loss of a set after long prompts, float64 ``[2]``."""
        lost = {name: self.curves[part].at(len(getattr(candidate, name))) for name, part in _parts(candidate.share)}
        return np.asarray(self.factor * (lost["attention"] + lost["ffn"]) + lost["windowed"])

    def grid(self, seconds: Callable[[Candidate], float], shares: Sequence[int] = SHARES) -> _Grid:
        """Return combinations of depths, in steps, each with its predicted loss and seconds."""
        steps = {
            part: _steps(len(curve.order), 8 if part[0] == "windowed" else 25) for part, curve in self.curves.items()
        }
        windows = [(SHARES[0], 0), *((share, depth) for share in shares for depth in steps["windowed", share] if depth)]
        found = []
        for attention, ffn, (share, windowed) in product(steps["attention", 0], steps["ffn", 0], windows):
            depths = {"attention": attention, "ffn": ffn, "windowed": windowed}
            layers: dict[str, Any] = {
                name: tuple(sorted(self.curves[part].order[: depths[name]])) for name, part in _parts(share)
            }
            candidate = Candidate(**layers, share=share)
            found.append((candidate, self.of(candidate), seconds(candidate)))
        return found


def measure(
    every: Orders,
    lost: Callable[[Candidate, bool], Lost],
    seconds: Callable[[Candidate], float],
    *,
    on_progress: Callable[[float], object] = lambda fraction: None,
) -> Losses:
    """Measure the losses of some sets. ``seconds`` predicts the time of a prompt with a set.

    ``lost`` judges a set, after long prompts if its second argument is true, else after short ones. It is called
    :func:`n_judged` times at most.
    """
    total, done = n_judged(every), 0

    def judged(candidate: Candidate, long: bool) -> Lost:
        nonlocal done
        result = lost(candidate, long)
        done += 1
        on_progress(done / total)
        return result

    losses = Losses({part: _curve(part, every[part[0]], judged) for part in _CURVES}, np.ones(2))
    middle = LEVELS[len(LEVELS) // 2]
    if (one := _fastest(losses.grid(seconds, shares=()), middle, seconds(Candidate()))) is None:
        return losses
    return replace(losses, factor=np.clip(judged(one, True) / np.maximum(losses.of(one), 1e-6), 0.5, 4.0))


def find_path(
    losses: Losses, seconds: Callable[[Candidate], float], *, levels: Sequence[float] = LEVELS
) -> list[Candidate]:
    """Return the sets of a path: the fastest for each level of loss that saves more time than the level before.

    ``seconds`` predicts the time of a prompt with a set. A set need not contain the one before: eight FFNs may lose
    less than twelve attentions and save more.
    """
    grid, whole, path = losses.grid(seconds), seconds(Candidate()), list[Candidate]()
    for level in levels:
        found = _fastest(grid, level, whole)
        if found is not None and (not path or found != path[-1]):
            path.append(replace(found, level=level))
    return path


def aim(path: Sequence[Candidate], needs: Mapping[Candidate, float], promise: float) -> Candidate | None:
    """Return the set of a path to judge next for a promise; None if the judged sets suffice.

    This is the fastest set that is expected to keep the promise. The least promise of a set is its level times a
    factor, and at least that of the sets within it. The factor is known for judged sets, and interpolated between those
    that contain the set or are within it. If there are none, it is the least of all judged sets. Before any is judged,
    it is :data:`_FIRST`. The levels of ``path`` ascend. ``needs`` has the least promise of each judged set; it is
    infinite for a set that keeps none.
    """
    known = [
        (math.log(each.level), math.log(max(need, 1e-9) / each.level), each)
        for each, need in sorted(needs.items(), key=lambda item: item[0].level)
        if math.isfinite(need)
    ]
    least = min((factor for _, factor, _ in known), default=math.log(_FIRST))

    def expected(candidate: Candidate) -> float:
        if candidate in needs:
            return needs[candidate]
        at_least = max((need for each, need in needs.items() if _contains(candidate, each)), default=0.0)
        near = [(at, by) for at, by, each in known if _contains(candidate, each) or _contains(each, candidate)]
        levels, factors = zip(*near or [(0.0, least)], strict=True)
        return max(at_least, candidate.level * math.exp(np.interp(math.log(candidate.level), levels, factors)))

    kept = [candidate for candidate in path if expected(candidate) <= promise]
    if kept and kept[-1] not in needs:
        return kept[-1]
    return path[0] if not kept and path and path[0] not in needs else None


def n_judged(every: Orders) -> int:
    """Return the largest number of sets that :func:`measure` judges."""
    return 1 + sum(len(_depths(part, every[part[0]])) for part in _CURVES)


def _depths(part: _Part, order: Sequence[int]) -> tuple[int, ...]:
    """Return the depths at which an order is measured: for shares of windows after the first, the whole order only."""
    shares = _DEPTHS[part[0]][-1 if part[1] in SHARES[1:] else 0 :]
    return tuple(dict.fromkeys(round(share * len(order)) for share in shares if round(share * len(order))))


def _curve(part: _Part, order: tuple[int, ...], judged: Callable[[Candidate, bool], Lost]) -> _Curve:
    (name, share), depths, lost = part, _depths(part, order), list[Lost]()
    if not depths:
        return _Curve((), (0, 1), ((0.0, 0.0), (0.0, 0.0)))
    for depth in depths:
        if lost and max(lost[-1]) > LEVELS[-1]:  # deeper sets are useless: assume a far larger loss
            lost.append((4 * lost[-1][0], 4 * lost[-1][1]))
        else:
            layers: dict[str, Any] = {name: tuple(sorted(order[:depth]))}
            lost.append(judged(Candidate(**layers, share=share or SHARES[0]), name == "windowed"))
    return _Curve(order, (0, *depths), ((0.0, 0.0), *lost))


def _parts(share: int) -> list[tuple[str, _Part]]:
    return [(name, (name, share if name == "windowed" else 0)) for name in _PARTS]


def _steps(n: int, most: int) -> list[int]:
    return sorted({round(n * i / min(n, most)) for i in range(min(n, most) + 1)}) if n else [0]


def _fastest(grid: _Grid, level: float, whole: float) -> Candidate | None:
    """Return the fastest set with a predicted loss up to ``level`` in both kinds; None if none saves 1% of the time."""
    kept = [each for each in grid if each[1].max() <= level and each[2] < 0.99 * whole]
    return min(kept, key=lambda each: (each[2], each[1].max()), default=(None,))[0]


def _contains(larger: Candidate, smaller: Candidate) -> bool:
    narrower = not smaller.windowed or larger.share >= smaller.share
    return narrower and all({*getattr(larger, part)} >= {*getattr(smaller, part)} for part in _PARTS)
