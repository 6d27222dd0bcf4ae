"""Hypothesis strategies: skip sets and plans in every form that there is, for models of the tests' tiny size."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from oracles.skip_sets import filled
from oracles.tiny_families import N_LAYER

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.plan import Bulk, OnlineStage
from adaskip_cpp.model.skip_set import SkipSet

NOTHING = SkipPlan(SkipSet.none(N_LAYER), SkipSet.none(N_LAYER))


@st.composite
def skip_sets(draw: st.DrawFn, attention: Collection[int] = ()) -> SkipSet:
    """A set that skips these attentions and any other sublayers, with compensations of each kind."""
    skip = np.array(draw(st.lists(st.booleans(), min_size=2 * N_LAYER, max_size=2 * N_LAYER))).reshape(N_LAYER, 2)
    skip[list(attention), 0] = True
    seed = draw(st.integers(0, 2**16))
    scale = np.random.default_rng(seed).uniform(0.7, 1.4, skip.shape) if draw(st.booleans()) else 1.0
    parts = ["bias"] * draw(st.booleans()) + ["down", "up"] * draw(st.booleans())
    return filled(skip, seed, scale, parts=parts)


@st.composite
def plans(
    draw: st.DrawFn, thresholds: Sequence[float], attention: Collection[int] = (), windowable: Sequence[int] = ()
) -> SkipPlan:
    """Plans in every form: each set skips every attention of the one before.

    The attentions of ``attention`` are always skipped; they have no KV that a bulk could keep, so there is none then.
    Those of ``windowable`` may look back at a window in the bulk. Without ``thresholds`` there is no online stage and
    no schedule.
    """
    plan = draw(_without_bulk(thresholds, attention))
    if attention or not draw(st.booleans()):
        return plan
    bulk = draw(skip_sets(plan.prefill.attention))
    windowed = tuple(layer for layer in windowable if draw(st.booleans()))
    around = {"head": draw(st.integers(0, 4)), "tail": draw(st.integers(1, 6)), "window_size": draw(st.integers(1, 9))}
    around["refit"] = draw(st.sampled_from([0, 2]))
    return replace(plan, bulk=Bulk(bulk, windowed=windowed, **around))


@st.composite
def _without_bulk(draw: st.DrawFn, thresholds: Sequence[float], attention: Collection[int]) -> SkipPlan:
    forms = ["nothing"] * (not attention) + ["same", "growing"] + ["decode only"] * (not attention)
    form = draw(st.sampled_from(forms + ["schedule", "online"] * bool(thresholds)))
    if form == "nothing":
        return NOTHING
    prefill = draw(skip_sets(attention)) if form != "decode only" else NOTHING.prefill
    decode = prefill if form == "same" else draw(skip_sets(prefill.attention))
    if form == "online":
        window, threshold = draw(st.integers(1, 4)), draw(st.sampled_from(thresholds))
        stage = OnlineStage(window, threshold, draw(st.sampled_from(["none", "paper", "median"])))
        return SkipPlan(prefill, decode, online=stage)
    if form == "schedule":
        later = draw(skip_sets(decode.attention))
        return SkipPlan(prefill, decode, schedule=((0, decode), (draw(st.integers(1, 4)), later)))
    return SkipPlan(prefill, decode)
