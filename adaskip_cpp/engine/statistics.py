"""Statistics of sublayers, as native code hands them over ubatch by ubatch, for ``calibrate``: ``StatisticsBatch``."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..model.arrays import Vectors
from ..model.plan import PHASES, Phase
from .binding import ffi

Activations: TypeAlias = Sequence[Sequence[tuple[Vectors, Vectors] | None]]


@dataclass(frozen=True)
class StatisticsBatch:
    """Statistics of one ubatch.

    ``u`` and ``v`` are a sublayer's input and output, both with the residual. Columns are attention and FFN. Values are
    NaN for sublayers that were not observed.

    Attributes:
        dot: float32 ``[n_layer, 2, n_tokens]``: u·v.
        u_sq: float32 ``[n_layer, 2, n_tokens]``: ``|u|²``.
        v_sq: float32 ``[n_layer, 2, n_tokens]``: ``|v|²``.
        layer_dot: float32 ``[n_layer, n_tokens]``: product of a layer's input and output.
        sum_u: float32 ``[n_layer, 2, n_embd]``: sum of u over the tokens; ``[n_layer, 2, 0]`` if maps are fitted again.
        sum_v: float32 ``[n_layer, 2, n_embd]``: sum of v over the tokens.
        positions: int32 ``[n_tokens]``: positions of the tokens.
        phase: phase of the tokens.
        activations: for each layer and kind u and v, float32 ``[n_tokens, n_embd]``, or None if the sublayer does not
            see every token. The arrays are valid until the sink returns. None if ``activations`` is False.
    """

    dot: Vectors
    u_sq: Vectors
    v_sq: Vectors
    layer_dot: Vectors
    sum_u: Vectors
    sum_v: Vectors
    positions: npt.NDArray[np.int32]
    phase: Phase
    activations: Activations | None = None


StatisticsSink: TypeAlias = Callable[[StatisticsBatch], None]


def batch_of(statistics: Any) -> StatisticsBatch:
    """Copy an ``adaskip_statistics``, except the activations."""
    n_layer, n_tokens, n_embd = statistics.n_layer, statistics.n_tokens, statistics.n_embd
    dot, u_sq, v_sq = np.moveaxis(_array(statistics.values, n_layer, 2, 3, n_tokens).copy(), 2, 0)
    sums = np.empty((n_layer, 2, 2, 0), np.float32)
    if statistics.sums:
        sums = _array(statistics.sums, n_layer, 2, 2, n_embd).copy()
    sum_u, sum_v = np.moveaxis(sums, 2, 0)
    layer_dot = _array(statistics.layer_dot, n_layer, n_tokens).copy()
    positions = np.frombuffer(ffi.buffer(statistics.positions, n_tokens * 4), np.int32).copy()

    def pair(i: int) -> tuple[Vectors, Vectors] | None:
        u, v = statistics.activations[i], statistics.activations[i + 1]
        return (_array(u, n_tokens, n_embd), _array(v, n_tokens, n_embd)) if u and v else None

    activations = [[pair(4 * i), pair(4 * i + 2)] for i in range(n_layer)] if statistics.activations else None
    return StatisticsBatch(dot, u_sq, v_sq, layer_dot, sum_u, sum_v, positions, PHASES[statistics.phase], activations)


def _array(address: Any, *shape: int) -> Vectors:
    return np.frombuffer(ffi.buffer(address, math.prod(shape) * 4), np.float32).reshape(shape)
