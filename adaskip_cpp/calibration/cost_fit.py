"""Fits the cost of each sublayer to timed ubatches, by robust least squares, for ``cost.py``: ``fit``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..model.arrays import Flags, Floats
from ..model.cost_model import Computed, PhaseCost
from ..model.plan import CELLS

_TOLERANCE = 0.05  # Huber's limit for relative errors: larger ones come from other work on the machine
_ITERATIONS = 20


@dataclass(frozen=True)
class Group:
    """Sublayers that take the same time, all attention or all FFN."""

    kind: int  # 0 attention, 1 FFN
    layers: tuple[int, ...]  # ascending
    limit: float = math.inf  # KV cells beyond which an attention's time stops growing
    elidable: bool = True  # else the bulk alone can skip them, and their kept K and V cost the same in every plan


@dataclass(frozen=True)
class Sample:
    """One timed ubatch."""

    what: Computed
    end: int  # tokens in the cache after it
    seconds: float
    # Samples of one name share a constant besides the model's. If few sublayers run, their data stay in the processor's
    # caches, and times do not add up: such samples show growth alone.
    offset: str = ""


def fit(
    samples: Sequence[Sample], groups: Sequence[Group], n_layer: int, n_tokens: int, *, rest_grows: bool
) -> tuple[PhaseCost, float]:
    """Fit the cost of a ubatch of ``n_tokens``; return it, and the mean absolute relative error of the samples."""
    cells = np.array([math.ceil(sample.end / CELLS) * CELLS for sample in samples], float)
    count = np.array([[sample.what.runs[list(g.layers), g.kind].sum() for g in groups] for sample in samples], float)
    kept = np.array([[sample.what.kept[list(g.layers)].sum() for g in groups] for sample in samples], float)
    keeps = np.array([group.kind == 0 and group.elidable for group in groups], bool)
    read = np.array([[min(each, group.limit) for group in groups] for each in cells])
    grows = np.array([group.kind == 0 for group in groups], bool)
    offsets = sorted({sample.offset for sample in samples} - {""})
    own = np.array([[sample.offset == offset for offset in offsets] for sample in samples], float)
    rest = np.stack([np.ones(len(samples)), cells * rest_grows], axis=1)  # what cannot be skipped; it may grow
    maps = np.array([[sample.what.n_maps] for sample in samples], float)
    columns = np.hstack([rest, maps, count, count * read * grows, kept * keeps, own.reshape(len(samples), -1)])
    times = np.array([sample.seconds for sample in samples])
    free = np.arange(columns.shape[1]) >= columns.shape[1] - len(offsets)
    found, error = _solve(columns / times[:, None], free)
    base, growth, keeping = np.zeros((n_layer, 2)), np.zeros(n_layer), np.zeros(n_layer)
    for group, (one, more, keep) in zip(groups, found[3 : 3 + 3 * len(groups)].reshape(3, -1).T, strict=True):
        layers = list(group.layers)
        base[layers, group.kind] = one
        if group.kind == 0:
            growth[layers], keeping[layers] = more, keep
    return PhaseCost(n_tokens, float(found[0]), float(found[1]), base, growth, keeping, float(found[2])), error


def _solve(columns: Floats, free: Flags) -> tuple[Floats, float]:
    """Solve ``columns @ x = 1`` in Huber's sense, x >= 0 except where ``free``."""
    size = np.linalg.norm(columns, axis=0)
    used = size > 0
    scaled = columns / np.where(used, size, 1.0)
    weight = np.ones(len(columns))
    for _ in range(_ITERATIONS):
        active = used.copy()
        while True:
            x = np.zeros(len(size))
            x[active] = np.linalg.lstsq(scaled[:, active] * weight[:, None], weight, rcond=None)[0]
            wrong = (x < 0) & ~free
            if not wrong.any():
                break
            active[np.argmin(np.where(wrong, x, 0.0))] = False  # the most negative becomes 0, the others fit again
        residual = np.abs(scaled @ x - 1.0)
        weight = np.sqrt(np.minimum(1.0, _TOLERANCE / np.maximum(residual, 1e-12)))
    return x / np.where(used, size, 1.0), float(residual.mean())
