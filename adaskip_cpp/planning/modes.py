"""Makes a plan of the sublayers that a strategy chose, as the mode says, for strategies: ``compensated_plan``.

docs/dev/method.md explains the modes. The phase that first uses a set gives its compensation; prefill gives all maps.
"""

from collections.abc import Sequence

import numpy as np

from ..errors import BudgetError, NotSkippableError
from ..model.arrays import Flags
from ..model.mode import MODES
from ..model.plan import DEFAULT_REFIT, Bulk, OnlineStage, SkipPlan, window_size_for
from ..model.profile import ProfileData
from ..model.skip_set import SkipSet, sublayer_name
from .compensation import get_compensation
from .request import PlanRequest


def compensated_plan(
    profile: ProfileData, skip: Flags, request: PlanRequest, strategy: str, later: Sequence[tuple[int, Flags]] = ()
) -> SkipPlan:
    """Make the plan of a chosen set, bool ``[n_layer, 2]``, with a request's mode, compensation and online stage.

    In decode the sets of ``later`` follow it, each after that number of decoded tokens. A sublayer that the model
    cannot skip raises a NotSkippableError.
    """
    none, mode = SkipSet.none(len(skip)), MODES[request.mode]
    may = profile.in_bulk if mode.in_bulk else profile.skippable
    if (wrong := np.any([skip, *(each for _, each in later)], axis=0) & ~may).any():
        names = ", ".join(sublayer_name(layer, kind) for layer, kind in np.argwhere(wrong))
        raise NotSkippableError(f"this model cannot skip {names}; use another budget, or strategy 'adaskip'")
    compensation = get_compensation(request.compensation)
    if compensation.uses_maps and profile.maps is None:
        compensation = get_compensation("affine")
    online = None
    if request.online and mode.adapts and mode.in_decode and skip.any():
        threshold = np.sort(profile.similarity[profile.skippable])[-skip.sum()]
        online = OnlineStage(threshold=float(threshold), scale=compensation.online)
    statistics = profile.prefill if mode.in_prompt or compensation.uses_maps else profile.decode
    in_turn = tuple((n, compensation.skip_set(each, statistics, profile.maps)) for n, each in ((0, skip), *later))
    chosen = in_turn[0][1]
    return SkipPlan(
        chosen if mode.in_prefill else none,
        chosen if mode.in_decode else none,
        schedule=in_turn if later else (),
        online=online,
        bulk=bulk_of(profile, request, chosen),
        model=profile.model,
        strategy=strategy,
        compensation=compensation.name,
        mode=request.mode,
    )


def bulk_of(profile: ProfileData, request: PlanRequest, skip: SkipSet) -> Bulk | None:
    """Return the bulk that a request asks for, which skips ``skip``; None if its mode has no bulk."""
    if not MODES[request.mode].in_bulk:
        return None
    n, layers = request.windowed, profile.windowable
    if n > len(layers):
        raise BudgetError(f"{len(layers)} attentions can look back at a window, not {n}; ask for at most {len(layers)}")
    windowed, size = layers[len(layers) - n :], request.window_size
    size = window_size_for(request.context or 1) if size is None else size
    refit = 0 if skip.up is None else DEFAULT_REFIT
    return Bulk(skip, head=request.head, tail=request.tail, windowed=windowed, window_size=size, refit=refit)
