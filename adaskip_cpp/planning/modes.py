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

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ..errors import NotSkippableError
from ..model.plan import OnlineStage, SkipPlan
from ..model.profile import ProfileData
from ..model.skip_set import SkipSet, sublayer_name
from .compensation import get_compensation
from .request import PlanRequest


def compensated_plan(
    source: ProfileData | int,
    skip: npt.NDArray[np.bool_],
    request: PlanRequest,
    strategy: str,
    later: Iterable[tuple[int, npt.NDArray[np.bool_]]] = (),
) -> SkipPlan:
    """Make the plan of a fixed skip set, bool ``[n_layer, 2]``, as a request's mode, compensation and stage say.

    In decode ``later`` sets follow it, each from so many decoded tokens on. Of a number of layers, without a profile,
    nothing is compensated.
    """
    skips = ((0, skip), *later)
    profile, threshold, online = None if isinstance(source, int) else source, request.threshold, None
    if profile is None:
        compensation = get_compensation("none")
        sets = tuple((start, SkipSet(each, np.ones(each.shape))) for start, each in skips)
    else:
        for _, each in skips:
            _check_skippable(profile, each)
        compensation = get_compensation(request.compensation)
        if compensation.uses_maps and profile.maps is None:
            compensation = get_compensation("affine")
        from_decode = request.mode == "decode" and not compensation.uses_maps
        statistics = profile.decode if from_decode else profile.prefill
        sets = tuple((start, compensation.skip_set(each, statistics, profile.maps)) for start, each in skips)
        if threshold is None and skip.any():
            threshold = float(np.sort(profile.similarity[profile.skippable])[-skip.sum()])
        if request.online and request.mode != "prefill" and threshold is not None:
            online = OnlineStage(window=request.window, threshold=threshold, scale=compensation.online)
    return SkipPlan(
        SkipSet.none(len(skip)) if request.mode == "decode" else sets[0][1],
        sets[0][1],
        schedule=sets if len(sets) > 1 else (),
        online=online,
        model=None if profile is None else profile.model,
        strategy=strategy,
        compensation=compensation.name,
        mode=request.mode,
    )


def _check_skippable(profile: ProfileData, skip: npt.NDArray[np.bool_]) -> None:
    if not profile.skippable[skip].all():
        names = ", ".join(sublayer_name(layer, kind) for layer, kind in np.argwhere(skip & ~profile.skippable))
        raise NotSkippableError(
            f"this model cannot skip {names}; choose another budget or strategy 'adaskip', which leaves them out"
        )
