"""Chooses a skip set for a speed-up: the sublayers that cost the least similarity per second saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import BudgetError, PlanError
from ..model.cost_model import CostModel

__all__ = ["choose", "seconds_saved"]


def seconds_saved(cost: CostModel, context: int, phase: Literal["prefill", "decode"]) -> npt.NDArray[np.float64]:
    """Return the predicted seconds that skipping each sublayer alone saves, float64 ``[n_layer, 2]``.

    Raises:
        PlanError: ``context`` or ``phase`` is impossible.
    """
    full = cost.seconds(None, context, phase)
    saved = np.zeros((cost.n_layer, 2))
    for where in np.ndindex(*saved.shape):
        skip = np.zeros(saved.shape, np.bool_)
        skip[where] = True
        saved[where] = max(full - cost.seconds(skip, context, phase), 0.0)
    return saved


def choose(
    similarity: npt.NDArray[np.float64],
    cost: CostModel,
    speedup: float,
    context: int,
    phase: Literal["prefill", "decode"],
    ranking: Literal["efficiency", "similarity"] = "efficiency",
    skippable: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.bool_]:
    """Choose the sublayers to skip so that a phase is predicted to take ``1 / speedup`` of the full model's time.

    Args:
        similarity: mean IO similarity, float64 ``[n_layer, 2]``, NaN where a sublayer cannot be skipped.
        cost: the cost model.
        speedup: 1 or more.
        context: prefill: tokens of the prompt; decode: tokens before the one that is decoded.
        phase: the phase to speed up.
        ranking: ``"efficiency"`` takes sublayers by the least ``(1 - similarity) / seconds saved``, and then puts back
            those that are not needed after all, the greatest loss first; ``"similarity"`` takes them by the paper's
            ranking until the time is reached.
        skippable: bool ``[n_layer, 2]``, the sublayers that may be skipped; None for all that have a similarity.

    Returns:
        bool ``[n_layer, 2]``.

    Raises:
        BudgetError: the speed-up is no number from 1 on, or more than can be reached.
        PlanError: another argument is impossible.
    """
    if isinstance(speedup, bool) or not isinstance(speedup, int | float) or not 1 <= speedup < math.inf:
        raise BudgetError(f"the speed-up is {speedup!r}; use a number from 1 on, such as 1.25")
    if ranking not in ("efficiency", "similarity"):
        raise PlanError(f"unknown ranking {ranking!r}; use 'efficiency' or 'similarity'")
    similarity = np.asarray(similarity, np.float64)
    may = ~np.isnan(similarity) if skippable is None else np.asarray(skippable, np.bool_) & ~np.isnan(similarity)
    if similarity.shape != (cost.n_layer, 2) or may.shape != similarity.shape:
        raise PlanError(
            f"similarity has the shape {similarity.shape}, the cost model is for [{cost.n_layer}, 2]; "
            "use the profile of this model"
        )
    full = cost.seconds(None, context, phase)
    goal = full / speedup
    least = cost.seconds(may, context, phase)
    if least > goal:
        reachable = math.floor(full / least * 100) / 100
        raise BudgetError(
            f"{phase} cannot be {speedup:g} times faster at {context} tokens: with all {may.sum()} sublayers skipped "
            f"that can be skipped it is predicted to take {least:.4g} s instead of {full:.4g} s, {reachable:.2f} times "
            f"faster, and {speedup:g} times would take {goal:.4g} s; ask for at most {reachable:.2f}"
        )
    lost = 1.0 - similarity

    def reached(skip: npt.NDArray[np.bool_]) -> bool:
        return cost.seconds(skip, context, phase) <= goal

    if ranking == "efficiency":
        return _cover(lost, seconds_saved(cost, context, phase), may, reached)
    layer, kind = np.indices(lost.shape)
    # lexsort's last key is the first criterion; ties as in the paper: attention first, then the lower layer.
    order = np.lexsort((layer.ravel(), kind.ravel(), lost.ravel()))
    skip = np.zeros(lost.shape, np.bool_)
    for index in order[may.ravel()[order]]:
        if reached(skip):
            break
        skip.flat[index] = True
    return skip


def _cover(
    lost: npt.NDArray[np.float64],
    saved: npt.NDArray[np.float64],
    may: npt.NDArray[np.bool_],
    reached: Callable[[npt.NDArray[np.bool_]], bool],
) -> npt.NDArray[np.bool_]:
    """Choose a set that reaches the goal and loses little: the greedy rule of covering knapsacks.

    Sublayers are taken by the least lost per second saved. Before each of them, the set could also be completed by any
    single one that reaches the goal, and the best of all such sets is kept. At last what is not needed after all is put
    back, the greatest loss first.
    """
    price = np.divide(lost, saved, out=np.full(lost.shape, np.inf), where=may & (saved > 0))
    best: npt.NDArray[np.bool_] | None = None

    def offer(candidate: npt.NDArray[np.bool_]) -> None:
        nonlocal best
        if reached(candidate) and (best is None or lost[candidate].sum() < lost[best].sum()):
            best = candidate.copy()

    skip = np.zeros(lost.shape, np.bool_)
    for index in [None, *np.argsort(price, axis=None, kind="stable").tolist()]:
        if index is not None:
            if not may.flat[index]:
                continue
            skip.flat[index] = True
        offer(skip)
        if reached(skip):
            break
        for other in sorted(np.flatnonzero(may & ~skip), key=lambda each: lost.flat[each]):
            completed = skip.copy()
            completed.flat[other] = True
            if reached(completed):
                offer(completed)
                break
    assert best is not None  # all together reach it, which the caller has checked
    for index in sorted(np.flatnonzero(best), key=lambda each: -lost.flat[each]):
        best.flat[index] = False
        best.flat[index] = not reached(best)
    return best
