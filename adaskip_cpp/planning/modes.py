"""The paper's three modes: from the sublayers that a strategy chose to what each phase skips.

========  ===================  ==============================  ============
mode      prefill              decode                          online stage
========  ===================  ==============================  ============
prefill   fixed skip set       fixed skip set                  no
decode    the full model       fixed skip set                  in decode
e2e       fixed skip set       fixed skip set                  in decode
========  ===================  ==============================  ============

The paper learns the fixed skip set offline, from prefill alone, and holds it in both phases; its online threshold is
the n-th largest mean similarity of that stage. So do all modes here, with the prefill statistics of a profile. (The
authors' released code resets that threshold to 1.0 at every request, which leaves its online stage without effect; the
text is followed here.) The paper does not say which phase the compensation of a set used in decode only is measured
in: here it is the phase in which the set is first used, so that it comes from decode in mode ``decode``, and from
prefill in the other two. Linear maps are fitted on prefill alone, where there are tokens enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import PlanError
from ..model.plan import MODES, Mode, OnlineStage, SkipPlan, SkipSet
from .compensation import DEFAULT_COMPENSATION, get_compensation

if TYPE_CHECKING:
    from .profile import Profile

__all__ = ["PlanOptions", "compensated_plan"]


@dataclass(frozen=True)
class PlanOptions:
    """How a strategy turns its choice into a plan.

    Attributes:
        mode: ``"prefill"``, ``"decode"`` or ``"e2e"``.
        compensation: a name of :data:`adaskip_cpp.planning.compensation.COMPENSATIONS`. The baselines have none.
        online: whether decode has an online stage, where the mode and the strategy allow one.
        window: decoded tokens that it observes.
        threshold: smallest similarity of an FFN that it adds; None for the n-th largest of the offline stage, n being
            the number of sublayers skipped.
        attention: layers whose attention the strategy ``manual`` skips.
        ffn: layers whose FFN it skips.

    Raises:
        PlanError: the mode is unknown.
        CompensationError: the compensation is unknown.
    """

    mode: Mode = "e2e"
    compensation: str = DEFAULT_COMPENSATION
    online: bool = True
    window: int = 20
    threshold: float | None = None
    attention: Sequence[int] = ()
    ffn: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise PlanError(f"unknown mode {self.mode!r}; use one of: {', '.join(MODES)}")
        get_compensation(self.compensation)


def compensated_plan(profile: Profile, skip: npt.NDArray[np.bool_], options: PlanOptions, strategy: str) -> SkipPlan:
    """Make the plan of a fixed skip set.

    Args:
        profile: statistics of the model.
        skip: bool ``[n_layer, 2]``, the fixed skip set.
        options: mode, compensation and online stage.
        strategy: name of the strategy that chose the set.

    Raises:
        CompensationError: the profile lacks what the compensation needs.
        PlanError: the online window or threshold is impossible.
    """
    compensation = get_compensation(options.compensation)
    if options.mode == "decode":
        uses_maps = compensation.uses_maps and profile.maps is not None
        statistics = profile.prefill if uses_maps else profile.decode
        prefill, decode = SkipSet.none(profile.n_layer), compensation.skip_set(skip, statistics, profile.maps)
    else:
        prefill = decode = compensation.skip_set(skip, profile.prefill, profile.maps)
    threshold = options.threshold if options.threshold is not None else _offline_threshold(profile, int(skip.sum()))
    online = None
    if options.online and options.mode != "prefill" and threshold is not None:
        online = OnlineStage(window=options.window, threshold=threshold, scale=compensation.online)
    return SkipPlan(
        prefill,
        decode,
        online=online,
        model=profile.model,
        strategy=strategy,
        compensation="affine" if compensation.uses_maps and profile.maps is None else compensation.name,
        mode=options.mode,
    )


def _offline_threshold(profile: Profile, n_skip: int) -> float | None:
    """Return the n-th largest mean similarity of prefill; None for n = 0, which has none: nothing is to be skipped."""
    if n_skip == 0:
        return None
    similarity = profile.prefill.similarity
    return float(np.sort(similarity[~np.isnan(similarity)])[-n_skip])
