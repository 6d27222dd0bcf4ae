"""Plans with a bulk, and the phases of what a call evaluates."""

from collections.abc import Callable
from typing import Any

import numpy as np
from oracles.skip_sets import PARTS, filled, only
from oracles.tiny_families import N_LAYER

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.skip_set import SkipSet

NOTHING = SkipSet.none(N_LAYER)
TOLERANCE = {"llama": 1e-5, "gemma3": 1e-3, "gptneox-parallel": 1e-3}


def chosen(*sublayers: tuple[int, int], seed: int = 0, bias: bool = True) -> SkipSet:
    """A set of these sublayers, each with a scale, a linear map and a vector."""
    skip = only(*sublayers)
    scale = np.random.default_rng(seed).uniform(0.7, 1.3, skip.shape)
    return filled(skip, seed, scale, parts=PARTS if bias else PARTS[1:])


def plan(bulk: SkipSet, prefill: SkipSet = NOTHING, decode: SkipSet | None = None, **more: Any) -> SkipPlan:
    return SkipPlan(prefill, decode or prefill, bulk=Bulk(bulk, **{"head": 4, "tail": 8, **more}))


def phases(llm: Any, call: Callable[[], Any]) -> dict[str, list[int]]:
    """The positions that a call evaluates, by phase."""
    seen: dict[str, list[int]] = {}

    def sink(batch: Any) -> None:
        seen.setdefault(batch.phase, []).extend(batch.positions.tolist())

    with llm.collect_statistics(sink, keep_logits=True):
        call()
    return seen
