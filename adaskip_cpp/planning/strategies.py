"""Strategies: each makes a plan from a profile, or a number of layers, and a request.

A strategy is a function registered under its name; :func:`make_plan`, the command line and the evaluation read
:data:`STRATEGIES`, so that adding one touches this file alone.

The baselines skip whole layers and compensate nothing (``v := u``). Of a budget of ``n`` sublayers they skip
``k = n // 2`` layers, the odd one being left over, so that one budget serves to compare all strategies.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import BudgetError, NotSkippableError, PlanError
from ..model.plan import SkipPlan, SkipSet, mark_layers, ranked, sublayer_name
from .modes import compensated_plan
from .request import DEFAULT_N_SKIP, PlanRequest
from .speedup import Goal, cheapest_set, smallest_budget

if TYPE_CHECKING:
    from .profile import Profile

__all__ = [
    "LONGEST_GENERATION",
    "STRATEGIES",
    "Strategy",
    "adaskip",
    "early_exit",
    "make_plan",
    "manual",
    "skip_decode",
    "strategy",
    "unified_skipping",
]

Strategy: TypeAlias = "Callable[[Profile | int, PlanRequest], SkipPlan]"
"""From a profile or a number of layers and a request to a plan."""

LONGEST_GENERATION = 512
"""SkipDecode's T, decoded tokens after which its whole budget is skipped; the authors of AdaSkip use 512."""

STRATEGIES: dict[str, Strategy] = {}


def strategy(function: Strategy) -> Strategy:
    """Register a strategy under its function's name."""
    STRATEGIES[function.__name__] = function
    return function


def baseline(function: Strategy) -> Strategy:
    """Register one that knows budgets of sublayers alone: for a speed-up it gets the smallest that reaches it."""

    @wraps(function)
    def with_speedup(source: Profile | int, request: PlanRequest) -> SkipPlan:
        return (function if request.speedup is None else partial(smallest_budget, function))(source, request)

    return strategy(with_speedup)


def make_plan(source: Profile | int, request: PlanRequest) -> SkipPlan:
    """Make the plan that is wanted.

    Args:
        source: the model's profile; its number of layers for a strategy that needs no more.
        request: what is wanted.

    Raises:
        BudgetError: ``n_skip`` is negative or more than can be skipped, or the speed-up is out of reach.
        CompensationError: the profile lacks what the compensation needs.
        PlanError: the strategy is unknown, or lacks a profile, a cost model or a context.
    """
    if request.speedup is None and not (request.context is None and request.phase is None):
        raise PlanError("context and phase say where a speed-up is wanted; give speedup too, or leave them out")
    if request.strategy not in STRATEGIES:
        raise PlanError(f"unknown strategy {request.strategy!r}; use one of: {', '.join(STRATEGIES)}")
    return STRATEGIES[request.strategy](source, request)


@strategy
def adaskip(source: Profile | int, request: PlanRequest) -> SkipPlan:
    """The paper's offline rule: all sublayers ranked together by mean IO similarity in prefill, the first n skipped.

    Ties: attention before FFN, then the lower layer first. Sublayers without a similarity are never chosen. For a
    speed-up the set is that of :func:`adaskip_cpp.planning.speedup.cheapest_set`.

    Raises:
        BudgetError: ``n_skip`` is negative or more than can be skipped, or the speed-up is out of reach.
        CompensationError: the profile lacks what the compensation needs.
        PlanError: ``source`` is no profile, or lacks a cost model.
    """
    if isinstance(source, int):
        raise PlanError("strategy 'adaskip' ranks sublayers by their similarity; give it a profile, from calibrate()")
    if request.speedup is not None:
        skip = cheapest_set(source.similarity, Goal.of(source, request), request.ranking)
    else:
        n_max = int(source.skippable.sum())
        budget = _budget(request, n_max, f"{n_max} of this model's {2 * source.n_layer} sublayers can be skipped")
        skip = np.zeros(source.similarity.shape, np.bool_)
        skip.flat[ranked(-source.similarity)[:budget]] = True
    return compensated_plan(source, skip, request, "adaskip")


@baseline
def early_exit(source: Profile | int, request: PlanRequest) -> SkipPlan:
    """Early Exit: the last k layers.

    Raises:
        BudgetError: ``n_skip`` is negative or more than the model has.
        NotSkippableError: a sublayer of these layers cannot be skipped.
    """
    n_layer = _n_layer(source)
    k = _budget(request, 2 * n_layer, f"the model has {2 * n_layer} sublayers") // 2
    return _whole_layers(source, range(n_layer - k, n_layer), request, "early_exit")


@baseline
def skip_decode(source: Profile | int, request: PlanRequest) -> SkipPlan:
    """SkipDecode: layers 1 to m, where m grows by ``min(k, ceil(t / T * (k - 1)) + 1)`` to k.

    t is the number of tokens decoded so far in the request, T is :data:`LONGEST_GENERATION`. In mode ``prefill`` m is k
    throughout, as in the paper's prefill experiments. In mode ``e2e`` a prompt is read at t = 0, with m = 1: were it
    read with m = k, decode could not begin with fewer layers, as their attentions would have no KV of the prompt.

    Raises:
        BudgetError: ``n_skip`` is negative or more than layers 1 to ``n_layer - 1`` have.
        NotSkippableError: a sublayer of these layers cannot be skipped.
    """
    n_layer = _n_layer(source)
    limit = 2 * (n_layer - 1)
    k = _budget(request, limit, f"SkipDecode never skips layer 0, which leaves {limit} sublayers") // 2
    if request.mode == "prefill" or k == 0:
        return _whole_layers(source, range(1, k + 1), request, "skip_decode")
    starts: dict[int, int] = {}
    for t in range(LONGEST_GENERATION + 1):
        m = min(k, -(-t * (k - 1) // LONGEST_GENERATION) + 1)
        starts.setdefault(m, t)
    sets = [(t, _layer_set(source, range(1, m + 1))) for m, t in starts.items()]
    decode = sets[0][1]
    prefill = decode if request.mode == "e2e" else SkipSet.none(n_layer)
    schedule = tuple(sets) if len(sets) > 1 else ()
    return _baseline(source, prefill, decode, request, "skip_decode", schedule)


@baseline
def unified_skipping(source: Profile | int, request: PlanRequest) -> SkipPlan:
    """Unified Skipping: layers i with ``i mod (n_layer // k) == 1``, which can be a few more than k.

    The rule is degenerate where ``n_layer // k`` is 1, that is for more than half of the layers: no i has a remainder
    of 1. Such a budget is refused.

    Raises:
        BudgetError: ``n_skip`` is negative or more than half of the model's layers.
        NotSkippableError: a sublayer of these layers cannot be skipped.
    """
    n_layer = _n_layer(source)
    limit = 2 * (n_layer // 2)
    reason = f"Unified Skipping is defined for at most half of the {n_layer} layers, {limit} sublayers"
    # The layer that an odd budget leaves over is no reason to refuse it.
    k = _budget(request, limit + 1, reason) // 2
    step = n_layer // k if k else n_layer + 1
    return _whole_layers(source, [i for i in range(n_layer) if k and i % step == 1], request, "unified_skipping")


@strategy
def manual(source: Profile | int, request: PlanRequest) -> SkipPlan:
    """The sublayers listed in the request, compensated from the profile; not at all if there is only ``n_layer``.

    They are skipped as the mode says, without an online stage unless it has a threshold.

    Raises:
        BudgetError: ``n_skip`` is given and is not the number of sublayers listed.
        SublayerRangeError: a layer does not exist.
        NotSkippableError: a sublayer cannot be skipped.
        CompensationError: the profile lacks what the compensation needs.
    """
    n_layer = _n_layer(source)
    skip = np.zeros((n_layer, 2), np.bool_)
    mark_layers(skip, 0, request.attention)
    mark_layers(skip, 1, request.ffn)
    if request.n_skip not in (None, skip.sum()):
        raise BudgetError(
            f"{skip.sum()} sublayers are listed, not {request.n_skip}; leave n_skip out with strategy 'manual'"
        )
    _check_skippable(source, skip)
    if isinstance(source, int):
        return _uncompensated(source, skip, request, "manual")
    plan = compensated_plan(source, skip, request, "manual")
    return plan if request.threshold is not None else replace(plan, online=None)


def _n_layer(source: Profile | int) -> int:
    n_layer = source if isinstance(source, int) else source.n_layer
    if n_layer < 1:
        raise PlanError(f"the number of layers is {n_layer}; pass the model's, llm.n_layer")
    return n_layer


def _budget(request: PlanRequest, n_max: int, reason: str) -> int:
    """Return the number of sublayers to skip, from 0 to ``n_max``."""
    try:
        budget = operator.index(DEFAULT_N_SKIP if request.n_skip is None else request.n_skip)
    except TypeError:
        raise BudgetError(f"n_skip is {request.n_skip!r}; use a whole number from 0 to {n_max}") from None
    if not 0 <= budget <= n_max:
        raise BudgetError(f"cannot skip {budget} sublayers: {reason}; use a number from 0 to {n_max}")
    return budget


def _check_skippable(source: Profile | int, skip: npt.NDArray[np.bool_]) -> None:
    if isinstance(source, int):
        return
    names = [sublayer_name(layer, kind) for layer, kind in np.argwhere(skip & ~source.skippable)]
    if names:
        raise NotSkippableError(
            f"this model cannot skip {', '.join(names)}; choose another budget or strategy 'adaskip', "
            "which leaves them out"
        )


def _layer_set(source: Profile | int, layers: Iterable[int]) -> SkipSet:
    skip = np.zeros((_n_layer(source), 2), np.bool_)
    skip[list(layers)] = True
    _check_skippable(source, skip)
    return SkipSet(skip, np.ones(skip.shape))


def _whole_layers(source: Profile | int, layers: Iterable[int], request: PlanRequest, name: str) -> SkipPlan:
    """Skip these layers as the mode says."""
    return _uncompensated(source, _layer_set(source, layers).skip, request, name)


def _uncompensated(source: Profile | int, skip: npt.NDArray[np.bool_], request: PlanRequest, name: str) -> SkipPlan:
    chosen = SkipSet(skip, np.ones(skip.shape))
    prefill = SkipSet.none(chosen.n_layer) if request.mode == "decode" else chosen
    return _baseline(source, prefill, chosen, request, name)


def _baseline(
    source: Profile | int,
    prefill: SkipSet,
    decode: SkipSet,
    request: PlanRequest,
    name: str,
    schedule: tuple[tuple[int, SkipSet], ...] = (),
) -> SkipPlan:
    return SkipPlan(
        prefill,
        decode,
        schedule=schedule,
        model=None if isinstance(source, int) else source.model,
        strategy=name,
        compensation="none",
        mode=request.mode,
    )
