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

import numpy as np
import numpy.typing as npt

from ..model.plan import OnlineStage, SkipPlan
from ..model.profile import ProfileData
from ..model.skip_set import SkipSet
from .compensation import get_compensation
from .request import PlanRequest


def compensated_plan(
    profile: ProfileData, skip: npt.NDArray[np.bool_], request: PlanRequest, strategy: str
) -> SkipPlan:
    """Make the plan of a fixed skip set, bool ``[n_layer, 2]``, as a request's mode, compensation and stage say."""
    compensation = get_compensation(request.compensation)
    if request.mode == "decode":
        uses_maps = compensation.uses_maps and profile.maps is not None
        statistics = profile.prefill if uses_maps else profile.decode
        prefill, decode = SkipSet.none(profile.n_layer), compensation.skip_set(skip, statistics, profile.maps)
    else:
        prefill = decode = compensation.skip_set(skip, profile.prefill, profile.maps)
    threshold, n_skip, online = request.threshold, int(skip.sum()), None
    if threshold is None and n_skip:  # for n = 0 there is none: nothing is to be skipped
        threshold = float(np.sort(profile.similarity[profile.skippable])[-n_skip])
    if request.online and request.mode != "prefill" and threshold is not None:
        online = OnlineStage(window=request.window, threshold=threshold, scale=compensation.online)
    return SkipPlan(
        prefill,
        decode,
        online=online,
        model=profile.model,
        strategy=strategy,
        compensation="affine" if compensation.uses_maps and profile.maps is None else compensation.name,
        mode=request.mode,
    )
