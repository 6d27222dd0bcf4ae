"""Skip sets and plans of the tiny models."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from oracles.tiny_families import N_EMBD, N_LAYER

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.skip_set import SkipSet

PARTS = ("bias", "down", "up")


def filled(
    skip: npt.NDArray[np.bool_], seed: int = 0, scale: Any = 1.0, rank: int = 2, parts: Sequence[str] = PARTS
) -> SkipSet:
    """A set with vectors about as large as the residual stream and maps that add about half of it, or one of both."""
    rng, n_layer = np.random.default_rng(seed), len(skip)
    values = {
        "bias": rng.normal(0, 0.5, (n_layer, 2, N_EMBD)).astype(np.float32),
        "down": (rng.normal(size=(n_layer, 2, rank, N_EMBD)) / np.sqrt(N_EMBD)).astype(np.float32),
        "up": (0.5 * rng.normal(size=(n_layer, 2, N_EMBD, rank)) / np.sqrt(rank)).astype(np.float32),
    }
    return SkipSet(skip, np.broadcast_to(scale, skip.shape), **{name: values[name] for name in parts})


Layers = tuple[int, ...]


def skip_set(
    attention: Layers = (), ffn: Layers = (), scale: float = 1.0, seed: int = -1, n_layer: int = N_LAYER
) -> SkipSet:
    """With a seed: vectors and maps."""
    plain = SkipPlan.manual(n_layer, attention, ffn, scale).prefill
    return plain if seed < 0 else filled(plain.skip, seed, plain.scale)


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
