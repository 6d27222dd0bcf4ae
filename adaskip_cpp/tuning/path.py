"""Finds the path of a frontier: for each of several losses the fastest set of what is skipped and windowed.

Nothing here knows a model: what a set loses and how long it takes are functions. Start at :func:`measure`.

Sublayers of a kind are skipped in an *order*, the last layer first: docs/dev/method.md says why. What the first k of an
order lose together is measured at a few depths k, for attentions, FFNs and windows apart. Between them it is
interpolated, and the losses of the three kinds add up: that predicts a set's loss well enough to find good ones, which
are then judged as sets.

Skipped sublayers are measured after short prompts, which cost little. Windows are measured after longer ones, as they
need something to leave out. One set of skipped sublayers is measured after both, and tells how the two compare.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..model.skip_set import marked

Lost: TypeAlias = tuple[float, float]
"""Nats per token that a set loses in continuations and in copies."""

LEVELS = tuple(0.006 * 1.2**i for i in range(18))
"""Losses for which the path has a set each, in nats per token."""

SHARES = (8, 4)
"""Windows that are tried: an eighth and a quarter of the prompt."""

_FIRST = 2.0
"""What a set needs to be promised, as a multiple of its level, until one is judged: copies from far back lose more than
those of the shorter prompts that sets are searched by, and a promise allows for chance. Measured: 1.2 to 3.8."""

_DEPTHS = {"attention": (1 / 4, 1 / 2, 3 / 4, 1.0), "ffn": (1 / 4, 1 / 2, 3 / 4, 1.0), "windowed": (1 / 2, 1.0)}
"""Depths at which an order is measured, as shares of its length."""


@dataclass(frozen=True)
class Candidate:
    """What the bulk of a prompt leaves out.

    Attributes:
        attention, ffn: layers whose attention and whose FFN is skipped.
        windowed: layers whose attention looks back at a window of the prompt's length divided by ``share``.
        level: the loss that a path has it for, 0 of no path.
    """

    attention: tuple[int, ...] = ()
    ffn: tuple[int, ...] = ()
    windowed: tuple[int, ...] = ()
    share: int = SHARES[0]
    level: float = field(default=0.0, compare=False, repr=False)

    def skip(self, n_layer: int) -> npt.NDArray[np.bool_]:
        return marked(n_layer, self.attention, self.ffn)


Orders: TypeAlias = Mapping[str, tuple[int, ...]]
"""Layers by what is done to them, ``"attention"``, ``"ffn"`` or ``"windowed"``, in the order in which it is done."""

_PARTS = ("attention", "ffn", "windowed")
_Part: TypeAlias = tuple[str, int]
"""What a curve is of: the name of a part, and of windows their share."""

_CURVES: tuple[_Part, ...] = (("attention", 0), ("ffn", 0), *(("windowed", share) for share in SHARES))


_Grid: TypeAlias = list[tuple[Candidate, npt.NDArray[np.float64], float]]
"""Sets, what they lose after long prompts in both kinds of answers, and the seconds of a prompt."""


@dataclass(frozen=True)
class _Curve:
    """What the first k of an order lose, measured at some k."""

    order: tuple[int, ...]
    depths: tuple[int, ...]
    lost: tuple[Lost, ...]

    def at(self, depth: int) -> npt.NDArray[np.float64]:
        """Interpolate, from the first depth on in logarithms: what is lost grows by a factor per layer."""
        if depth <= self.depths[1]:
            return np.array(self.lost[1]) * (depth / self.depths[1])
        logs = np.log(np.maximum(np.maximum.accumulate(self.lost), 1e-5))
        return np.exp([np.interp(depth, self.depths, kind) for kind in logs.T])


@dataclass(frozen=True)
class Losses:
    """What was measured of some sets, to predict what others lose.

    Attributes:
        curves: by what is done to layers, of several depths.
        factor: how many times as much skipped sublayers lose after long prompts, and together, as curves say; in
            continuations and in copies.
    """

    curves: Mapping[_Part, _Curve]
    factor: npt.NDArray[np.float64]

    def of(self, candidate: Candidate) -> npt.NDArray[np.float64]:
        """Return what a set loses after long prompts, float64 ``[2]``."""
        lost = {name: self.curves[part].at(len(getattr(candidate, name))) for name, part in _parts(candidate.share)}
        return np.asarray(self.factor * (lost["attention"] + lost["ffn"]) + lost["windowed"])

    def grid(self, shares: Sequence[int], seconds: Callable[[Candidate], float]) -> _Grid:
        """Return every combination of depths that is worth a look, with its predicted loss and seconds."""
        steps = {
            part: _steps(len(curve.order), 4 if part[0] == "windowed" else 25) for part, curve in self.curves.items()
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
    """Measure what some sets lose.

    Args:
        lost: judges a set after short prompts, or where its second argument is true after long ones. It is asked
            :func:`n_judged` times at most.
        seconds: predicts the time of a prompt.
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
    if (one := _fastest(losses.grid((), seconds), middle, seconds(Candidate()))) is None:
        return losses
    return replace(losses, factor=np.clip(judged(one, True) / np.maximum(losses.of(one), 1e-6), 0.5, 4.0))


def find_path(
    losses: Losses, seconds: Callable[[Candidate], float], shares: Sequence[int], *, levels: Sequence[float] = LEVELS
) -> list[Candidate]:
    """Return the sets of a path, each containing the one before it, one for each level of loss that brings anything.

    Args:
        seconds: predicts the time of a prompt.
        shares: of windows; none for a path without windows.
    """
    grid, whole, path = losses.grid(shares, seconds), seconds(Candidate()), list[Candidate]()
    for level in levels:
        found = _fastest([each for each in grid if not path or _contains(each[0], path[-1])], level, whole)
        if found is not None and (not path or found != path[-1]):
            path.append(replace(found, level=level))
    return path


def aim(path: Sequence[Candidate], needs: Mapping[Candidate, float], promise: float) -> Candidate | None:
    """Return which set of a path to judge next for a promise, None where those that are judged tell enough.

    That is the fastest that is expected to keep it. What a set needs to be promised is its level times a factor, which
    is known of judged sets and interpolated between them; :data:`_FIRST` before any is judged.

    Args:
        path: sets of ascending levels.
        needs: of the sets that are judged, of this path or of another: the least promise that each keeps, infinite for
            none.
    """

    known = sorted((math.log(each.level), math.log(max(need, 1e-9) / each.level))
                   for each, need in needs.items() if math.isfinite(need))  # fmt: skip
    levels, factors = zip(*known or [(0.0, math.log(_FIRST))], strict=True)

    def expected(candidate: Candidate) -> float:
        if candidate in needs:
            return needs[candidate]
        if any(math.isinf(need) and _contains(candidate, each) for each, need in needs.items()):
            return math.inf
        return candidate.level * math.exp(np.interp(math.log(candidate.level), levels, factors))

    kept = [candidate for candidate in path if expected(candidate) <= promise]
    if kept and kept[-1] not in needs:
        return kept[-1]
    return path[0] if not kept and path and path[0] not in needs else None


def n_judged(every: Orders) -> int:
    """Return the number of sets that :func:`measure` has judged at most."""
    return 1 + sum(len(_depths(part, every[part[0]])) for part in _CURVES)


def _depths(part: _Part, order: Sequence[int]) -> tuple[int, ...]:
    """Return the depths that an order is measured at; windows of other sizes than the first only as a whole."""
    shares = _DEPTHS[part[0]][-1 if part[1] in SHARES[1:] else 0 :]
    return tuple(dict.fromkeys(round(share * len(order)) for share in shares if round(share * len(order))))


def _curve(part: _Part, order: tuple[int, ...], judged: Callable[[Candidate, bool], Lost]) -> _Curve:
    (name, share), depths, lost = part, _depths(part, order), list[Lost]()
    if not depths:
        return _Curve((), (0, 1), ((0.0, 0.0), (0.0, 0.0)))
    for depth in depths:
        if lost and max(lost[-1]) > LEVELS[-1]:  # deeper ones are of no use: take it that they lose much more
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
    """The fastest set that is predicted to lose no more than ``level`` in both kinds; None where none saves time."""
    kept = [each for each in grid if each[1].max() <= level and each[2] < 0.99 * whole]
    return min(kept, key=lambda each: (each[2], each[1].max()), default=(None,))[0]


def _contains(larger: Candidate, smaller: Candidate) -> bool:
    narrower = not smaller.windowed or larger.share >= smaller.share
    return narrower and all({*getattr(larger, part)} >= {*getattr(smaller, part)} for part in _PARTS)
