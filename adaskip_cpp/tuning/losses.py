"""Predicts the losses of sets of skipped sublayers and windows, to choose the sets that are worth judging.

For ``tune.py``. Start at :func:`measure`, then :func:`aim`. This module knows no model: callers pass functions for the
loss and the time of a set.

Sublayers of a kind are skipped in an *order*, the last layer first (docs/dev/method.md explains why). The loss of the
first k of an order is measured at a few depths k, separately for attentions and FFNs. Between the depths it is
interpolated. Windows are measured in groups of layers, and those that lose least come first. A set's loss is predicted
as the sum of the three. Judged sets correct the prediction of each part.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..model.skip_set import marked

Lost: TypeAlias = tuple[float, ...]  # nats per token that a set loses in each kind of answers

SHARES = (4, 8, 16)  # windows that are tried: a quarter, an eighth and a sixteenth of the prompt

_USELESS = 0.09  # nats per token: if a depth loses more than this, deeper ones are not measured

_FIRST = 3.0
"""The promise that a set needs over its predicted loss, assumed until one set is judged: a promise allows for chance.
Measured: 0.5 to 0.7 for three sets of Gemma 3, 1.9 to 3.9 for nine of SmolLM2, 2.0 to 3.5 for eight of
Qwen2.5-Coder, and 23 for a ninth."""

_WEIGHT = 0.1
"""The weight of the sets' mean factor in that of each part, in judged sets. With 0.25, a part that lost three times as
much as predicted was still trusted."""

_LEAST_LOSS = 0.002  # nats per token: below this, rounding and chance hide a predicted loss

_DEPTHS = {"attention": (1 / 2, 3 / 4, 1.0), "ffn": (1 / 4, 1 / 2, 3 / 4, 1.0)}
"""Depths at which an order is measured, as shares of its length."""

_N_GROUPS = 4  # groups of layers whose windows are measured, besides the later half, which loses little

_MEASURED_SHARE = 8
"""Windows of an eighth are measured. Those of a quarter are taken to lose half as much (measured: 0.1 to 0.6 times),
and those of a sixteenth twice as much (measured: 1.2 to 2.8 times)."""


@dataclass(frozen=True)
class Candidate:
    """A set: what the bulk of a prompt leaves out."""

    attention: tuple[int, ...] = ()  # layers whose attention is skipped
    ffn: tuple[int, ...] = ()  # layers whose FFN is skipped
    windowed: tuple[int, ...] = ()  # layers whose attention sees a window: the prompt's length divided by share
    share: int = _MEASURED_SHARE

    def skip(self, n_layer: int) -> npt.NDArray[np.bool_]:
        return marked(n_layer, self.attention, self.ffn)

    def contains(self, other: "Candidate") -> bool:
        narrower = not other.windowed or self.share >= other.share
        return narrower and all({*getattr(self, part)} >= {*getattr(other, part)} for part in _PARTS)


_PARTS = ("attention", "ffn", "windowed")
Orders: TypeAlias = Mapping[str, tuple[int, ...]]  # by part, the layers in the order in which they are left out


@dataclass(frozen=True)
class _Curve:
    """The loss of the first k layers of an order, measured at some depths k, from 0 on."""

    order: tuple[int, ...]
    depths: tuple[int, ...]
    lost: tuple[Lost, ...]

    def at(self, depth: int) -> npt.NDArray[np.float64]:
        """Interpolate, linearly up to the first depth, then in logarithms."""
        if not self.order:
            return np.zeros(1)  # of any kind of answers
        kinds = self._convex()
        if depth <= self.depths[1]:
            return np.array([np.interp(depth, self.depths, kind) for kind in kinds])
        return np.exp([np.interp(depth, self.depths, np.log(np.maximum(kind, 1e-5))) for kind in kinds])

    def _convex(self) -> npt.NDArray[np.float64]:
        """Return the losses by kind of answers, none of them above a line between two others.

        Earlier layers lose more than later ones, so the loss grows faster with depth. A loss above that line is chance:
        4 FFNs of Qwen2.5-Coder lost 0.023, and 8 lost 0.020. Then every set with 4 to 8 was expected to lose the same.
        """
        kinds: npt.NDArray[np.float64] = np.array(self.lost).T
        depths = np.array(self.depths)
        for i, k in combinations(range(len(depths)), 2):
            share = (depths[i + 1 : k] - depths[i]) / (depths[k] - depths[i])
            line = (1 - share) * kinds[:, [i]] + share * kinds[:, [k]]
            kinds[:, i + 1 : k] = np.minimum(kinds[:, i + 1 : k], line)
        return kinds


@dataclass(frozen=True)
class Sets:
    """Combinations of depths, the fastest first, for prompts of one length."""

    losses: "Losses"
    candidates: tuple[Candidate, ...]
    parts: npt.NDArray[np.float64]  # their predicted losses, [n, kinds, 3]: see Losses.parts


@dataclass(frozen=True)
class Losses:
    """The measured losses of some sets, to predict the losses of others after prompts of one length.

    Losses of skipped attentions and FFNs are ``grown`` times as large as measured. Those of windows, a share of the
    prompt, are as large after longer prompts: docs/dev/method.md.
    """

    curves: Mapping[str, _Curve]  # of skipped attentions and FFNs
    windows: Mapping[int, npt.NDArray[np.float64]]  # by layer that of a window of an eighth, the least first
    grown: float = 1.0

    def growth(self, candidate: Candidate) -> float:
        """Return the factor by which ``grown`` raises a set's predicted loss."""
        before, after = (replace(self, grown=grown).parts(candidate).sum() for grown in (1.0, self.grown))
        return float(after / before) if before > 0 else self.grown

    def parts(self, candidate: Candidate) -> npt.NDArray[np.float64]:
        """Predict the losses of a set's attentions, FFNs and windows, in nats per token.

        The result is float64 ``[kinds, 3]``, with the kinds of answers of ``Lost``. Windows of skipped attentions lose
        nothing.
        """
        windows = [self.windows[layer] for layer in {*candidate.windowed} - {*candidate.attention}]
        parts = np.broadcast_arrays(
            *(curve.at(len(getattr(candidate, name))) for name, curve in self.curves.items()),
            sum(windows, np.zeros(1)) * candidate.share / _MEASURED_SHARE,
        )
        return np.stack(parts, axis=1) * (self.grown, self.grown, 1.0)

    def sets(self, seconds: Callable[[Candidate], float]) -> Sets:
        """Return combinations of depths, in steps, that save 1% of the time. ``seconds`` predicts that of a prompt."""
        attentions, ffns = (_prefixes(self.curves[name].order, 25) for name in _DEPTHS)
        windows = [(layers, share) for share in SHARES for layers in _prefixes(tuple(self.windows), 12)[1:]]
        most, found = 0.99 * seconds(Candidate()), []

        @cache
        def of(*parts: Any) -> tuple[float, npt.NDArray[np.float64]]:
            candidate = Candidate(*parts)
            return seconds(candidate), self.parts(candidate)

        for attention, ffn, narrowed in product(attentions, ffns, [((), _MEASURED_SHARE), *windows]):
            # FFNs change neither the time nor the loss of windows. So few sets need predictions of their own.
            both, windowed, alone = of(attention, ffn), of(attention, (), *narrowed), of(attention)
            takes = round(both[0] + windowed[0] - alone[0], 9)  # so that equal times are equal, and the loss decides
            if takes < most:
                found.append((takes, Candidate(attention, ffn, *narrowed), both[1] + windowed[1] - alone[1]))
        found.sort(key=lambda each: (each[0], np.max(each[2].sum(axis=1))))
        parts = np.array([each for *_, each in found]) if found else np.empty((0, 1, len(_PARTS)))
        return Sets(self, tuple(each for _, each, _ in found), parts)


def measure(
    every: Orders,
    lost: Callable[[Candidate], Lost],
    on_progress: Callable[[float], object] = lambda fraction: None,
) -> Losses:
    """Measure the losses of some sets.

    ``lost`` judges a set. It is called :func:`n_judged` times at most.
    """
    total, done = n_judged(every), 0

    def judged(candidate: Candidate) -> Lost:
        nonlocal done
        result = lost(candidate)
        done += 1
        on_progress(done / total)
        return result

    curves = {name: _curve(name, every[name], judged) for name in _DEPTHS}
    windows: dict[int, npt.NDArray[np.float64]] = {}
    for group in _groups(every["windowed"]):
        windows |= dict.fromkeys(group, np.array(judged(Candidate(windowed=tuple(sorted(group))))) / len(group))
    return Losses(curves, dict(sorted(windows.items(), key=lambda each: float(each[1].max()))))


def aim(sets: Sets, needs: Mapping[Candidate, Lost], promise: float) -> Candidate | None:
    """Return the fastest set that is expected to keep a promise; None if a judged set keeps it and is faster.

    ``needs`` has the least promises of each judged set, by kind of answers. They are infinite if it loses a pass key.
    The predicted losses of attentions, FFNs and windows each have a factor, fitted to the judged sets. A set needs at
    least as much as the sets within it. But a set that contains one that loses a key may keep the key. So only those
    with the same attentions and FFNs are left out then (docs/dev/method.md).
    """
    lost = {(each.attention, each.ffn) for each, need in needs.items() if math.isinf(max(need))}
    broken = [each for each, need in needs.items() if promise < max(need) < math.inf]
    at_most = (sets.parts * _factors(sets.losses, needs, promise)).sum(axis=2).max(axis=1) <= promise
    for candidate, is_expected in zip(sets.candidates, at_most, strict=True):
        if max(needs.get(candidate, (math.inf,))) <= promise:
            return None
        may_keep = is_expected and (candidate.attention, candidate.ffn) not in lost
        if may_keep and not any(candidate.contains(each) for each in broken):
            return candidate
    return None


def n_judged(every: Orders) -> int:
    """Return the largest number of sets that :func:`measure` judges."""
    return sum(len(_depths(name, every[name])) for name in _DEPTHS) + len(_groups(every["windowed"]))


def _factors(losses: Losses, needs: Mapping[Candidate, Lost], promise: float) -> npt.NDArray[np.float64]:
    """Return the promise that each part needs over its predicted loss, float64 ``[kinds, 3]`` or ``[1, 3]``.

    They are fitted by least squares of relative errors. Each is drawn to the mean factor of whole sets, so a few judged
    sets suffice. A set that needs more than three times this promise is taken to need three times as much: losses jump
    where a set is too large, which says little about smaller ones. Qwen2.5-Coder once needed 20 times as much as
    predicted, and then sets that keep the promise were expected to break it. A lost key says less still.
    """
    if not needs:
        return np.full((1, len(_PARTS)), _FIRST)
    parts = np.array([losses.parts(each) for each in needs])
    found = np.empty(parts.shape[1:])
    for kind, need in enumerate(np.maximum(np.array([*needs.values()]).T, _LEAST_LOSS)):
        predicted = np.maximum(parts[:, kind].sum(axis=1), _LEAST_LOSS)
        need = np.minimum(need, np.maximum(np.where(np.isinf(need), 1.5, 3.0) * promise, _FIRST * predicted))
        mean = np.exp(np.log([_FIRST, *(need / predicted)]).mean())
        shares = np.vstack([parts[:, kind] / need[:, None] * mean, np.sqrt(_WEIGHT) * np.eye(len(_PARTS))])
        right = np.concatenate([np.ones(len(need)), np.full(len(_PARTS), np.sqrt(_WEIGHT))])
        found[kind] = mean * np.maximum(np.linalg.lstsq(shares, right, rcond=None)[0], 0.25)
    return found


def _depths(name: str, order: Sequence[int]) -> tuple[int, ...]:
    """Return the depths at which an order is measured."""
    return tuple(dict.fromkeys(round(share * len(order)) for share in _DEPTHS[name] if round(share * len(order))))


def _groups(order: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the first half of an order, and up to :data:`_N_GROUPS` parts of its other half."""
    n_half = (len(order) + 1) // 2
    groups = [tuple(order[:n_half]), *(tuple(part.tolist()) for part in np.array_split(order[n_half:], _N_GROUPS))]
    return [group for group in groups if group]


def _curve(name: str, order: tuple[int, ...], judged: Callable[[Candidate], Lost]) -> _Curve:
    depths, lost = _depths(name, order), list[Lost]()

    def measured(depth: int) -> Lost:
        layers: dict[str, Any] = {name: tuple(sorted(order[:depth]))}
        return judged(Candidate(**layers))

    if not depths:
        return _Curve((), (), ())
    for depth in depths:
        is_useless = bool(lost) and max(lost[-1]) > _USELESS  # assume a far larger loss of deeper sets
        lost.append(tuple(4 * each for each in lost[-1]) if is_useless else measured(depth))
    # Losses jump somewhere before the first useless depth. Halfway from the depth before it tells more than beyond it.
    useless = next((i for i, each in enumerate(lost[:-1]) if max(each) > _USELESS), None)
    if useless is not None and (middle := (depths[useless] + (0, *depths)[useless]) // 2) not in (0, *depths):
        depths = *depths[:useless], middle, *depths[useless:]
        lost.insert(useless, measured(middle))
    return _Curve(order, (0, *depths), ((0.0,) * len(lost[0]), *lost))


def _prefixes(order: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """Return the first layers of an order, sorted: none of them, and those of at most ``most`` depths up to all."""
    n = len(order)
    depths = {round(n * i / min(n, most)) for i in range(min(n, most) + 1)} if n else {0}
    return [tuple(sorted(order[:depth])) for depth in sorted(depths)]
