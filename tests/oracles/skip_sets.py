"""Skip sets and plans of the tiny models."""

from typing import Any

import numpy as np
from oracles.tiny_families import N_EMBD, N_LAYER

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.skip_set import SkipSet

__all__ = ["arguments", "only", "same", "skip_set"]


def skip_set(
    attention: tuple[int, ...] = (),
    ffn: tuple[int, ...] = (),
    scale: float = 1.0,
    seed: int = -1,
    n_layer: int = N_LAYER,
) -> SkipSet:
    """With a seed: vectors and maps of rank 2."""
    plain = SkipPlan.manual(n_layer, attention, ffn, scale).prefill
    if seed < 0:
        return plain
    rng = np.random.default_rng(seed)
    bias, down, up = (
        rng.normal(0, 0.1, (n_layer, 2, *shape)).astype(np.float32) for shape in ((N_EMBD,), (2, N_EMBD), (N_EMBD, 2))
    )
    return SkipSet(plain.skip, plain.scale, bias, down, up)


def only(*sublayers: tuple[int, int], n_layer: int = N_LAYER) -> Any:
    """These sublayers, as the array of a set."""
    skip = np.zeros((n_layer, 2), np.bool_)
    for layer, kind in sublayers:
        skip[layer, kind] = True
    return skip


def same(chosen: SkipSet, **more: Any) -> SkipPlan:
    """The set in every phase."""
    return SkipPlan(chosen, chosen, **more)


def arguments(chosen: SkipSet | None) -> tuple[Any, ...]:
    """A set as ``ReferenceRun.eval`` takes it."""
    return () if chosen is None else (chosen.skip, chosen.scale, chosen.bias, chosen.down, chosen.up)
