"""Strategies: functions that make a plan from a profile and a request. Callers start with ``make_plan``.

A new strategy is a function in :data:`STRATEGIES`, in this file alone. It chooses sublayers for ``compensated_plan``.
The baselines skip whole layers without compensation: ``k = n // 2`` layers for a budget of ``n`` sublayers, so budgets
compare between strategies.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps

import numpy as np

from ..errors import BudgetError, NotSkippableError, PlanError
from ..model.arrays import Flags, Floats
from ..model.plan import DEFAULT_REFIT, Bulk, ModeName, OnlineStage, SkipPlan, window_size_for
from ..model.profile import ProfileData
from ..model.skip_set import SkipSet, late_layers, marked, ranked, sublayer_name
from .compensation import COMPENSATIONS
from .modes import MODES
from .request import DEFAULT_N_SKIP, PlanRequest
from .speedup import Strategy, smallest_budget

LONGEST_GENERATION = 512  # SkipDecode's T: decoded tokens until it skips its whole budget; 512 as AdaSkip's authors


def baseline(choose: Callable[[int, PlanRequest], dict[int, Sequence[int]]]) -> Strategy:
    """Make a strategy that skips whole layers: ``choose`` takes the number of layers and a request with a budget.

    It returns the skipped layers by the number of decoded tokens from which on they are skipped, beginning with 0.
    """

    @wraps(choose)
    def plan(profile: ProfileData, request: PlanRequest) -> SkipPlan:
        chosen = choose(profile.n_layer, request).items()
        (_, first), *later = [(start, marked(profile.n_layer, layers, layers)) for start, layers in chosen]
        request = replace(request, compensation="none", online=False)
        return compensated_plan(profile, first, request, choose.__name__, later)

    return plan


def make_plan(profile: ProfileData, request: PlanRequest) -> SkipPlan:
    """Make the plan of a request from the model's profile; raise as :meth:`adaskip_cpp.Profile.plan`."""
    if request.speedup is None and request.context is not None:
        raise PlanError("context is the length of prompts that a speed-up is for; give speedup too, or leave it out")
    if request.strategy not in STRATEGIES:
        raise PlanError(f"unknown strategy {request.strategy!r}; use one of: {', '.join(STRATEGIES)}")
    if request.speedup is not None:
        request = smallest_budget(STRATEGIES[request.strategy], profile, request, request.speedup)
    return STRATEGIES[request.strategy](profile, request)


def compensated_plan(
    profile: ProfileData, skip: Flags, request: PlanRequest, strategy: str, later: Sequence[tuple[int, Flags]] = ()
) -> SkipPlan:
    """Make the plan of a chosen set, bool ``[n_layer, 2]``, with a request's mode, compensation and online stage.

    The phase that first uses a set gives its compensation; prefill gives all maps. In decode the sets of ``later``
    follow it, each after that number of decoded tokens. A NotSkippableError names what the model cannot skip.
    """
    none, mode = SkipSet.none(len(skip)), MODES[request.mode]
    may = profile.in_bulk if mode.in_bulk else profile.skippable
    if (wrong := np.any([skip, *(each for _, each in later)], axis=0) & ~may).any():
        names = ", ".join(sublayer_name(layer, kind) for layer, kind in np.argwhere(wrong))
        raise NotSkippableError(f"this model cannot skip {names}; use another budget, or strategy 'adaskip'")
    name = request.compensation
    if profile.maps is None and COMPENSATIONS[name].uses_maps:
        name = "affine"
    compensation, online, bulk = COMPENSATIONS[name], None, None
    if request.online and mode.adapts and skip.any():
        threshold = np.sort(profile.similarity[profile.skippable])[-skip.sum()]
        online = OnlineStage(threshold=float(threshold), scale=compensation.online)
    statistics = profile.prefill if mode.in_bulk or mode.in_prefill or compensation.uses_maps else profile.decode
    in_turn = tuple((n, compensation.skip_set(each, statistics, profile.maps)) for n, each in ((0, skip), *later))
    chosen = in_turn[0][1]
    if mode.in_bulk:
        n, most = request.windowed, len(profile.windowable)
        if n > most:
            raise BudgetError(f"{most} attentions can look back at a window, not {n}; ask for at most {most}")
        size = window_size_for(request.context or 1) if request.window_size is None else request.window_size
        windowed, refit = profile.windowable[most - n :], 0 if chosen.up is None else DEFAULT_REFIT
        bulk = Bulk(chosen, head=request.head, tail=request.tail, windowed=windowed, window_size=size, refit=refit)
    return SkipPlan(
        chosen if mode.in_prefill else none,
        chosen if mode.in_decode else none,
        schedule=in_turn if later else (),
        online=online,
        bulk=bulk,
        model=profile.model,
        strategy=strategy,
        compensation=name,
        mode=request.mode,
    )


def adaskip(profile: ProfileData, request: PlanRequest) -> SkipPlan:
    """The sublayers of the first ranks (:func:`ranking`), as many as the budget."""
    values = ranking(profile, request.mode)
    n_max = int((~np.isnan(values)).sum())
    budget = _budget(request, n_max, f"{n_max} of this model's {2 * profile.n_layer} sublayers can be skipped")
    skip = np.zeros(values.shape, np.bool_)
    skip.flat[ranked(values)[:budget]] = True
    return compensated_plan(profile, skip, request, "adaskip")


def ranking(profile: ProfileData, mode: ModeName) -> Floats:
    """Return the values by which a mode ranks sublayers, float64 ``[n_layer, 2]``: the smallest is skipped first.

    In the paper's modes it is 1 - similarity. In mode ``"prompt"`` it is the number of layers above, because only their
    K and V depend on what the bulk skips. NaN marks sublayers that the mode cannot skip, and for ``"prompt"`` those of
    the first layers, which have no maps (:func:`adaskip_cpp.model.skip_set.late_layers`).
    """
    if not MODES[mode].in_bulk:
        return np.where(profile.skippable, 1.0 - profile.similarity, np.nan)
    n_layer = profile.n_layer
    layers = np.arange(n_layer)[:, None]
    return np.where(profile.in_bulk & (layers >= late_layers(n_layer).start), n_layer - 1.0 - layers, np.nan)


@baseline
def early_exit(n_layer: int, request: PlanRequest) -> dict[int, Sequence[int]]:
    """Early Exit: the last k layers. In mode ``"prompt"`` this is the rule of POP (arXiv 2602.03295)."""
    k = _budget(request, 2 * n_layer, f"the model has {2 * n_layer} sublayers") // 2
    return {0: range(n_layer - k, n_layer)}


@baseline
def skip_decode(n_layer: int, request: PlanRequest) -> dict[int, Sequence[int]]:
    """SkipDecode: layers 1 to ``m = min(k, ceil(t / T * (k - 1)) + 1)``.

    t is the number of tokens decoded so far in the request, T is :data:`LONGEST_GENERATION`. In the modes ``prefill``
    and ``prompt``, m is always k. Mode ``e2e`` reads a prompt with m = 1: after m = k, decode with m = 1 would lack KV.
    """
    limit = 2 * (n_layer - 1)
    k = _budget(request, limit, f"SkipDecode never skips layer 0, which leaves {limit} sublayers") // 2
    if not MODES[request.mode].adapts or k == 0:
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
    each.__name__: each for each in (adaskip, early_exit, skip_decode, unified_skipping, manual)
}
