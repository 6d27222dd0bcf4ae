"""Strategies: functions that make a plan from a profile and a request. Callers start with ``make_plan``.

A new strategy is a function in :data:`STRATEGIES`, in this file alone. The baselines skip whole layers without
compensation: ``k = n // 2`` layers for a budget of ``n`` sublayers, so budgets compare between strategies.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import TypeAlias

import numpy as np

from ..errors import BudgetError, PlanError
from ..model.arrays import Flags, Floats
from ..model.mode import MODES
from ..model.plan import SkipPlan
from ..model.profile import ProfileData
from ..model.skip_set import first_ranked, marked
from .modes import compensated_plan
from .request import DEFAULT_N_SKIP, PlanRequest
from .speedup import Goal, cheapest_set, smallest_budget

Strategy: TypeAlias = Callable[[ProfileData, PlanRequest], SkipPlan]

LONGEST_GENERATION = 512  # SkipDecode's T: decoded tokens until it skips its whole budget; 512 as AdaSkip's authors
_N_DEPTHS = 5  # numbers of windowed attentions to try for a speed-up, besides 0


def baseline(choose: Callable[[int, PlanRequest], dict[int, Sequence[int]]], *, compensates: bool = False) -> Strategy:
    """Make a strategy that skips whole layers: ``choose`` takes the number of layers and a request with a budget.

    It returns the skipped layers by the number of decoded tokens from which on they are skipped, beginning with 0. For
    a speed-up, growing budgets are tried until one reaches it. With ``compensates`` a request may ask to compensate.
    """

    @wraps(choose)
    def plan(profile: ProfileData, request: PlanRequest) -> SkipPlan:
        if request.speedup is not None:
            return smallest_budget(plan, profile, request)
        chosen = choose(profile.n_layer, request).items()
        (_, first), *later = [(start, marked(profile.n_layer, layers, layers)) for start, layers in chosen]
        compensation = (compensates and request.compensation) or "none"
        request = replace(request, compensation=compensation, online=False)
        return compensated_plan(profile, first, request, choose.__name__, later)

    return plan


def make_plan(profile: ProfileData, request: PlanRequest) -> SkipPlan:
    """Make the plan of a request from the model's profile; raise as :meth:`adaskip_cpp.Profile.plan`."""
    if request.speedup is None and not (request.context is None and request.phase is None):
        raise PlanError("context and phase say where a speed-up is wanted; give speedup too, or leave them out")
    if request.strategy not in STRATEGIES:
        raise PlanError(f"unknown strategy {request.strategy!r}; use one of: {', '.join(STRATEGIES)}")
    return STRATEGIES[request.strategy](profile, request)


def adaskip(profile: ProfileData, request: PlanRequest) -> SkipPlan:
    """The sublayers of least loss (:func:`what_is_lost`), all ranked together: the paper's offline rule.

    A speed-up takes the set of :func:`adaskip_cpp.planning.speedup.cheapest_set`, and the number of windowed attentions
    for which the losses of all sublayers and windows, each measured alone, add up to the least.
    """
    lost = what_is_lost(profile, request)
    if request.speedup is not None:
        skip, request = _fastest(profile, lost, request)
    else:
        n_max = int((~np.isnan(lost)).sum())
        budget = _budget(request, n_max, f"{n_max} of this model's {2 * profile.n_layer} sublayers can be skipped")
        skip = first_ranked(lost, budget)
    return compensated_plan(profile, skip, request, "adaskip")


def _fastest(profile: ProfileData, lost: Floats, request: PlanRequest) -> tuple[Flags, PlanRequest]:
    """Choose the sublayers for a speed-up; return them, and the request with a number of windowed attentions."""
    windows, divergence = profile.windows, profile.divergence
    numbers = {request.windowed or 0}
    if request.windowed is None and MODES[request.mode].in_bulk and request.ranking == "efficiency":
        most = 0 if windows is None or divergence is None else len(windows.layers)
        numbers = {round(most * i / _N_DEPTHS) for i in range(_N_DEPTHS + 1)}
    found, refused = [], None
    for n in sorted(numbers):
        this = replace(request, windowed=n) if MODES[request.mode].in_bulk else request
        try:
            skip = cheapest_set(lost, Goal.of(profile, this), request.ranking)
        except BudgetError as error:
            refused = error
            continue
        total = 0.0 if divergence is None or windows is None else divergence[skip].sum() + windows.divergence[n]
        found.append((float(total), n, skip, this))
    if not found and refused is not None:
        raise refused  # this is the error of the most windows, which allow the largest speed-up
    _, _, skip, this = min(found, key=lambda each: each[:2])
    return skip, this


def what_is_lost(profile: ProfileData, request: PlanRequest) -> Floats:
    """Return the loss from skipping each sublayer, float64 ``[n_layer, 2]``, NaN if it cannot be skipped.

    It is 1 - similarity. In mode ``"prompt"`` with ranking ``"efficiency"`` it is the divergence that
    :mod:`adaskip_cpp.calibration.divergence` measured, times the number of layers above.
    """
    if not MODES[request.mode].in_bulk:
        return np.where(profile.skippable, 1.0 - profile.similarity, np.nan)
    if request.ranking == "similarity":
        return 1.0 - profile.similarity
    if (lost := profile.lost) is None:
        raise PlanError(
            "the profile has no losses from skipping in a prompt's bulk; calibrate again, on 4 requests or more, or "
            "use mode='e2e' or ranking='similarity'"
        )
    # An error passes through the layers above. If they are many, a sublayer's cost measured alone is far from its cost
    # inside a set. At 1.4 times the speed SmolLM2's divergence is 0.034 with this factor, 0.058 without.
    return lost * np.arange(profile.n_layer)[::-1, None]


@baseline
def early_exit(n_layer: int, request: PlanRequest) -> dict[int, Sequence[int]]:
    """Early Exit: the last k layers."""
    return _last(n_layer, request)


@partial(baseline, compensates=True)
def suffix(n_layer: int, request: PlanRequest) -> dict[int, Sequence[int]]:
    """The rule of POP (arXiv 2602.03295): as ``early_exit``, but a request may ask for a compensation."""
    return _last(n_layer, request)


@baseline
def skip_decode(n_layer: int, request: PlanRequest) -> dict[int, Sequence[int]]:
    """SkipDecode: layers 1 to ``m = min(k, ceil(t / T * (k - 1)) + 1)``.

    t is the number of tokens decoded so far in the request, T is :data:`LONGEST_GENERATION`. In the modes ``prefill``
    and ``prompt``, m is always k. Mode ``e2e`` reads a prompt with m = 1: after m = k, decode with m = 1 would lack KV.
    """
    limit = 2 * (n_layer - 1)
    k = _budget(request, limit, f"SkipDecode never skips layer 0, which leaves {limit} sublayers") // 2
    if not (MODES[request.mode].in_decode and MODES[request.mode].adapts) or k == 0:
        return {0: range(1, k + 1)}
    starts: dict[int, int] = {}
    for t in range(LONGEST_GENERATION + 1):
        starts.setdefault(min(k, -(-t * (k - 1) // LONGEST_GENERATION) + 1), t)
    return {t: range(1, m + 1) for m, t in starts.items()}


@baseline
def unified_skipping(n_layer: int, request: PlanRequest) -> dict[int, Sequence[int]]:
    """Unified Skipping: layers i with ``i mod (n_layer // k) == 1``, which can be a few more than k."""
    # For k above half of the layers, n_layer // k is 1, and no i has that remainder.
    limit = 2 * (n_layer // 2)
    reason = f"Unified Skipping is defined for at most half of the {n_layer} layers, {limit} sublayers"
    # An odd budget has one sublayer left over, which is no reason to refuse it.
    k = _budget(request, limit + 1, reason) // 2
    return {0: [i for i in range(n_layer) if k and i % (n_layer // k) == 1]}


def manual(profile: ProfileData, request: PlanRequest) -> SkipPlan:
    """The sublayers that the request lists, in the phases of its mode, without an online stage."""
    skip = marked(profile.n_layer, request.attention, request.ffn)
    if request.n_skip not in (None, skip.sum()):
        raise BudgetError(f"{skip.sum()} sublayers are listed, not {request.n_skip}; leave n_skip out")
    return compensated_plan(profile, skip, replace(request, online=False), "manual")


def _last(n_layer: int, request: PlanRequest) -> dict[int, Sequence[int]]:
    k = _budget(request, 2 * n_layer, f"the model has {2 * n_layer} sublayers") // 2
    return {0: range(n_layer - k, n_layer)}


def _budget(request: PlanRequest, n_max: int, reason: str) -> int:
    """Return the number of sublayers to skip, from 0 to ``n_max``."""
    try:
        budget = operator.index(DEFAULT_N_SKIP if request.n_skip is None else request.n_skip)
    except TypeError:
        raise BudgetError(f"n_skip is {request.n_skip!r}; use a whole number from 0 to {n_max}") from None
    if not 0 <= budget <= n_max:
        raise BudgetError(f"cannot skip {budget} sublayers: {reason}; use a number from 0 to {n_max}")
    return budget


STRATEGIES: dict[str, Strategy] = {
    each.__name__: each for each in (adaskip, early_exit, suffix, skip_decode, unified_skipping, manual)
}
