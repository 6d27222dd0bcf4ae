"""From timed ubatches to the cost of each sublayer: a robust least-squares fit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..model.arrays import Flags, Floats
from ..model.cost_model import CELLS, Computed, PhaseCost

_TOLERANCE = 0.05
"""Relative errors beyond this weigh no more than this one (Huber): something else on the machine disturbed that run."""
_ITERATIONS = 20


@dataclass(frozen=True)
class Group:
    """Sublayers that take the same time: all attention (kind 0) or all FFN (1), of ascending layers.

    ``limit`` is the number of KV cells beyond which an attention stops growing. Those that are not ``elidable`` can be
    skipped in the bulk alone, so that what keeping their K and V costs is part of the rest.
    """

    kind: int
    layers: tuple[int, ...]
    limit: float = math.inf
    elidable: bool = True


@dataclass(frozen=True)
class Sample:
    """One timed ubatch in which ``what`` was computed, behind which the cache holds ``end`` tokens.

    ``offset`` names a constant of its own that its rest may have, "" for that of the model: time is not additive far
    from the full model (what few sublayers read stays in the processor's caches), so such a sample tells how time grows
    with the context, and not how long the rest takes.
    """

    what: Computed
    end: int
    seconds: float
    offset: str = ""


def fit(
    samples: Sequence[Sample], groups: Sequence[Group], n_layer: int, n_tokens: int, *, rest_grows: bool
) -> tuple[PhaseCost, float]:
    """Fit the cost of a ubatch of ``n_tokens``; return it, and the mean absolute relative error of the samples.

    ``rest_grows``: whether sublayers that cannot be skipped may make the rest grow with the context.
    """
    cells = np.array([math.ceil(sample.end / CELLS) * CELLS for sample in samples], float)
    count = np.array([[sample.what.runs[list(g.layers), g.kind].sum() for g in groups] for sample in samples], float)
    kept = np.array([[sample.what.kept[list(g.layers)].sum() for g in groups] for sample in samples], float)
    keeps = np.array([group.kind == 0 and group.elidable for group in groups], bool)
    read = np.array([[min(each, group.limit) for group in groups] for each in cells])
    grows = np.array([group.kind == 0 for group in groups], bool)
    offsets = sorted({sample.offset for sample in samples} - {""})
    own = np.array([[sample.offset == offset for offset in offsets] for sample in samples], float)
    rest = np.stack([np.ones(len(samples)), cells * rest_grows], axis=1)
    columns = np.hstack([rest, count, count * read * grows, kept * keeps, own.reshape(len(samples), -1)])
    times = np.array([sample.seconds for sample in samples])

    free = np.arange(columns.shape[1]) >= columns.shape[1] - len(offsets)
    found, error = _solve(columns / times[:, None], free)
    base, growth, keeping = np.zeros((n_layer, 2)), np.zeros(n_layer), np.zeros(n_layer)
    each = found[2 : 2 + 3 * len(groups)].reshape(3, -1).T
    for group, (one, more, keep) in zip(groups, each, strict=True):
        layers = list(group.layers)
        base[layers, group.kind] = one
        if group.kind == 0:
            growth[layers], keeping[layers] = more, keep
    return PhaseCost(n_tokens, float(found[0]), float(found[1]), base, growth, keeping), error


def _solve(columns: Floats, free: Flags) -> tuple[Floats, float]:
    """Solve ``columns @ x = 1`` in Huber's sense, x >= 0 except where ``free``."""
    size = np.linalg.norm(columns, axis=0)
    used = size > 0
    scaled = columns / np.where(used, size, 1.0)
    weight = np.ones(len(columns))
    x = np.zeros(len(size))
    residual = weight
    for _ in range(_ITERATIONS):
        active = used.copy()
        while True:
            x = np.zeros(len(size))
            solution = np.linalg.lstsq(scaled[:, active] * weight[:, None], weight, rcond=None)[0]
            x[active] = solution
            wrong = (x < 0) & ~free
            if not wrong.any():
                break
            active[np.argmin(np.where(wrong, x, 0.0))] = False  # the least possible one is 0, the others are refitted
        residual = np.abs(scaled @ x - 1.0)
        weight = np.sqrt(np.minimum(1.0, _TOLERANCE / np.maximum(residual, 1e-12)))
    return x / np.where(used, size, 1.0), float(residual.mean())
