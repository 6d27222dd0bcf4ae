"""Predicts the losses of sets of skipped sublayers and windows, to choose the sets that are worth judging.

For ``tune.py``. Start at :func:`measure`, then :func:`aim`. This module knows no model: callers pass functions for the
loss and the time of a set.

Attentions, FFNs and windows are measured in small groups of layers. Of attentions and FFNs it is what the group adds to
the loss of a *base*, the later half of the layers that may be skipped. A set's loss is predicted as the sum of its
layers' losses, and judged sets correct these. Sets have the layers that lose least for the time they save.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, product
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..model.skip_set import marked

Lost: TypeAlias = tuple[float, ...]  # nats per token that a set loses in each kind of answers

SHARES = (4, 8, 16)  # windows that are tried: a quarter, an eighth and a sixteenth of the prompt

_FIRST = 2.0
"""The promise that a set needs over its predicted loss, assumed until a set is judged. A promise allows for chance.
Measured for the first sets of Gemma 3, Qwen2.5-Coder and SmolLM2: 1.1, 1.6 and 2.2, with the larger loss of each."""

_WEIGHT = 0.1
"""The weight of the sets' mean factor in that of each part, and of a part's in that of each layer, in judged sets. With
0.25, a part that lost three times as much as predicted was still trusted."""

_LEAST_LOSS = 0.002  # nats per token: below this, rounding and chance hide a predicted loss

_GROUPS = {"attention": (1, 2, 4), "ffn": (3, 4, 4), "windowed": (1, 1, 2, 2), "sliding": (0, 1, 1, 1)}
"""Groups of layers that are measured together, in each quarter of a part's layers, the last layers first. There are
more where single layers often lose far more than their neighbours. Those of no group run: docs/dev/method.md. Layers
with a sliding window of their own are no part, but have groups of their own: smaller windows lose little there."""

PART_OF = {"sliding": "windowed"}  # the part that these layers belong to

_N_BASE = 2  # quarters of attentions and FFNs in the base

_USELESS = 0.2  # nats per token: if the base loses more, every second group is taken

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


@dataclass(frozen=True)
class Need:
    """The smallest promises that a judged set keeps; infinite if it loses a pass key."""

    by_divergence: Lost  # in each kind of answers, NaN if it was not measured: what losses of parts predict
    most: float  # of all, and of mean added losses, which they do not predict

    def times(self, factor: float) -> "Need":
        return Need(tuple(factor * each for each in self.by_divergence), factor * self.most)


_PARTS = ("attention", "ffn", "windowed")
_Group: TypeAlias = tuple[str, tuple[int, ...]]  # a part and its layers
_At: TypeAlias = tuple[str, int]  # a part and a layer
Layers: TypeAlias = Mapping[str, tuple[int, ...]]  # by part or "sliding", those that may be left out, the last first


@dataclass(frozen=True)
class Sets:
    """Combinations of sublayers, the fastest first, for prompts of one length."""

    candidates: tuple[Candidate, ...]
    lost: npt.NDArray[np.float64]  # their predicted losses, [n, kinds]


@dataclass(frozen=True)
class Losses:
    """The measured losses of layers, to predict those of sets after prompts of one length.

    Losses of skipped attentions and FFNs are ``grown`` times as large as measured. Those of windows, a share of the
    prompt, are as large after longer prompts: docs/dev/method.md.
    """

    lost: Mapping[str, Mapping[int, npt.NDArray[np.float64]]]  # by part and layer; of windows, those of an eighth
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
        found = self.of_layers(candidate)
        parts = (sum((lost for (part, _), lost in found.items() if part == name), np.zeros(1)) for name in _PARTS)
        return np.stack(np.broadcast_arrays(*parts), axis=1)

    def of_layers(self, candidate: Candidate) -> dict[_At, npt.NDArray[np.float64]]:
        """Predict the losses of each layer that a set skips or gives a window, ``[kinds]`` each."""
        layers = {*candidate.attention}, {*candidate.ffn}, {*candidate.windowed} - {*candidate.attention}
        factors = self.grown, self.grown, candidate.share / _MEASURED_SHARE
        parts = zip(_PARTS, layers, factors, strict=True)
        return {(name, layer): factor * self.lost[name][layer] for name, of, factor in parts for layer in of}

    def sets(self, seconds: Callable[[Candidate], float]) -> Sets:
        """Return combinations that save 1% of the time. ``seconds`` predicts that of a prompt.

        Of each part they have the first layers of an order, in steps: those that lose least for the time they save.
        """
        whole = seconds(Candidate())

        def order(name: str) -> tuple[int, ...]:
            def price(layer: int) -> float:
                alone: dict[str, Any] = {name: (layer,)}
                saved = max(whole - seconds(Candidate(**alone)), 1e-9 * whole)
                return round(float(self.lost[name][layer].mean()) / saved, 9)  # so that equal prices are equal

            return tuple(sorted(self.lost[name], key=price))

        attentions, ffns, narrowed = (
            _firsts(order(name), most) for name, most in zip(_PARTS, (25, 25, 12), strict=True)
        )
        windows = [((), _MEASURED_SHARE), *product(narrowed[1:], SHARES)]
        found = []

        @cache
        def of(*parts: Any) -> tuple[float, npt.NDArray[np.float64]]:
            candidate = Candidate(*parts)
            return seconds(candidate), self.parts(candidate).sum(axis=1)

        for attention, ffn, windowed in product(attentions, ffns, windows):
            # FFNs change neither the time nor the loss of windows. So few sets need predictions of their own.
            both, narrow, alone = of(attention, ffn), of(attention, (), *windowed), of(attention)
            takes = round(both[0] + narrow[0] - alone[0], 9)  # so that equal times are equal, and the loss decides
            if takes < 0.99 * whole:
                found.append((takes, Candidate(attention, ffn, *windowed), both[1] + narrow[1] - alone[1]))
        found.sort(key=lambda each: (each[0], np.max(each[2])))
        lost = np.array([each for *_, each in found]) if found else np.empty((0, 1))
        return Sets(tuple(each for _, each, _ in found), lost)


def measure(
    layers: Layers,
    lost: Callable[[Candidate], Lost],
    on_progress: Callable[[float], object] = lambda fraction: None,
) -> Losses:
    """Measure the losses of groups of layers. The layers of a group are taken to lose equally.

    A group's loss is the difference between the base with it and without it. A group that loses more than all others
    together leaves the base. Windows have no base. ``lost`` judges a set: each group's, and the base's. If the base
    loses too much, fewer of its groups are taken.
    """
    quarters = {name: _quarters(name, of) for name, of in layers.items()}
    skipped = [*chain(*quarters["ffn"], *quarters["attention"])]
    windows = [*chain(*quarters["windowed"], *quarters.get("sliding", ()))]
    total, done = len(skipped) + len(windows) + 1, 0

    def judged(groups: Sequence[_Group]) -> npt.NDArray[np.float64]:
        nonlocal done
        if not groups:
            return np.zeros(1)  # of any kind of answers
        parts: dict[str, Any] = dict.fromkeys(_PARTS, ())
        for name, of in groups:
            parts[name] = tuple(sorted((*parts[name], *of)))
        result = np.array(lost(Candidate(**parts)))
        done += 1
        on_progress(min(done / total, 1.0))
        return result

    base = [*chain(*quarters["ffn"][:_N_BASE], *quarters["attention"][:_N_BASE])]
    while (at_base := judged(base)).max() > _USELESS:
        base = base[:-1:2]
    found: dict[str, dict[int, npt.NDArray[np.float64]]] = {name: {} for name in _PARTS}
    for group in skipped:
        if group in base:
            others = [other for other in base if other != group]
            without = judged(others)
            added = at_base - without
            if added.max() > without.max():
                base, at_base = others, without
        else:
            added = judged([*base, group]) - at_base
        name, of = group
        found[name] |= dict.fromkeys(of, np.maximum(added, 0.0) / len(of))
    together = sum((found[name][layer] for name, of in base for layer in of), np.zeros(1))
    for name, of in base:  # their losses add up to that of the base
        for layer in of:
            found[name][layer] = found[name][layer] * at_base / np.maximum(together, 1e-9)
    for group in windows:
        found["windowed"] |= dict.fromkeys(group[1], judged([group]) / len(group[1]))
    return Losses(found)


def aim(
    losses: Losses, seconds: Callable[[Candidate], float], needs: Mapping[Candidate, Need], promise: float
) -> Candidate | None:
    """Return the fastest set that is expected to keep a promise; None if a judged set keeps it and is faster.

    ``seconds`` predicts the time of a prompt. ``needs`` are those of the judged sets. They correct the losses, and so
    which layers lose least. A set needs at least as much as the sets within it. But a set that contains one that loses
    a key may keep the key. Mean added losses are not predicted either. So if one of the two breaks the promise, only
    sets with the same attentions and FFNs are left out (docs/dev/method.md).
    """
    sets = _corrected(losses, needs, promise).sets(seconds)
    broken = [each for each, need in needs.items() if promise < max(need.by_divergence) < math.inf]
    lost = {(each.attention, each.ffn) for each, need in needs.items() if need.most > promise and each not in broken}
    for candidate, is_expected in zip(sets.candidates, sets.lost.max(axis=1) <= promise, strict=True):
        if candidate in needs and needs[candidate].most <= promise:
            return None
        may_keep = is_expected and (candidate.attention, candidate.ffn) not in lost
        if may_keep and not any(candidate.contains(each) for each in broken):
            return candidate
    return None


def _corrected(losses: Losses, needs: Mapping[Candidate, Need], promise: float) -> Losses:
    """Return the promises that layers are expected to need: their losses times factors.

    Each part has a factor, and each layer another one that is added to it, in each kind of answers. They are fitted by
    least squares of relative errors. Each part is drawn to the mean factor of whole sets, and each layer to its part.
    So a few judged sets suffice. A set that needs more than three times this promise is taken to need three times as
    much: losses jump where a set is too large, which says little about smaller ones. Qwen2.5-Coder once needed 20 times
    as much as predicted, and then sets that keep the promise were expected to break it. A lost key says less still, and
    nothing of continuations and copies.
    """
    ats = [(name, layer) for name in _PARTS for layer in losses.lost[name]]
    is_of = np.array([[part == name for part, _ in ats] for name in _PARTS], float)  # [3, n]
    needed = np.maximum(np.array([need.by_divergence for need in needs.values()]).T, _LEAST_LOSS)
    factors = np.full((max(len(needed), 1), len(ats)), _FIRST)
    found = [losses.of_layers(each) for each in needs]
    for kind, each_need in enumerate(needed):
        known = ~np.isnan(each_need)
        layers = np.array([[each[at][kind] if at in each else 0.0 for at in ats] for each in found])[known]  # [sets, n]
        predicted = np.maximum(layers.sum(axis=1), _LEAST_LOSS)
        need = each_need[known]
        need = np.minimum(need, np.maximum(np.where(np.isinf(need), 1.5, 3.0) * promise, _FIRST * predicted))
        mean = np.exp(np.log([_FIRST, *(need / predicted)]).mean())
        terms, expected = np.hstack([layers @ is_of.T, layers]), np.repeat([1.0, 0.0], is_of.shape)
        rows = np.vstack([terms / need[:, None] * mean, np.sqrt(_WEIGHT) * np.eye(len(expected))])
        fitted = np.linalg.lstsq(rows, np.concatenate([np.ones(len(need)), np.sqrt(_WEIGHT) * expected]), rcond=None)[0]
        factors[kind] = mean * np.maximum(fitted[: len(_PARTS)] @ is_of + fitted[len(_PARTS) :], 0.25)
    lost = {name: dict[int, npt.NDArray[np.float64]]() for name in _PARTS}
    for (name, layer), factor in zip(ats, factors.T, strict=True):
        lost[name][layer] = losses.lost[name][layer] * factor
    return replace(losses, lost=lost)


def _quarters(name: str, layers: Sequence[int]) -> list[list[_Group]]:
    """Return the groups in which the layers of ``Layers`` are measured, by quarter, the last layers first.

    The last ones are smaller, so that the base has at most half of the layers. If there are fewer than four layers,
    each is a quarter.
    """
    split = np.array_split(np.array(layers[::-1], int), max(min(4, len(layers)), 1))
    quarters = zip([quarter[::-1] for quarter in split[::-1]], _GROUPS[name], strict=False)
    part = PART_OF.get(name, name)
    return [
        [(part, tuple(of.tolist())) for of in (np.array_split(quarter, n) if n else ()) if of.size]
        for quarter, n in quarters
    ]


def _firsts(order: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """Return the first layers of an order, sorted: none of them, and those of at most ``most`` numbers up to all."""
    n = len(order)
    numbers = {round(n * i / min(n, most)) for i in range(min(n, most) + 1)} if n else {0}
    return [tuple(sorted(order[:number])) for number in sorted(numbers)]
