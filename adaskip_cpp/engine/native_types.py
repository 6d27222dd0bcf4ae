"""What the calls of ``native`` return: sublayers, counters, statistics, and what the online stage learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..model.plan import Phase
from ..model.skip_set import Kind

Activations: TypeAlias = "list[list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None]]"


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of a model, as found in its compute graph.

    Attributes:
        in_bulk: whether it can be skipped in the bulk of a prompt, where an attention's K and V are kept.
        reason: why other phases cannot skip it, "" if it is skippable.
        shape: equal for sublayers of equal weights, cache and window, which take equally long; -1 if it was not found.
        window: tokens that an attention looks back at, 0 for all.
        windowable: whether it may be in :attr:`adaskip_cpp.model.plan.Bulk.windowed`.
    """

    layer: int
    kind: Kind
    skippable: bool
    in_bulk: bool
    reason: str
    shape: int
    window: int
    windowable: bool


@dataclass(frozen=True)
class StatisticsBatch:
    """Per-token reductions of one ubatch, u and v being a sublayer's input and output, both with the residual.

    All are NaN where a sublayer or layer was not observed.

    Attributes:
        dot, u_sq, v_sq: float32 [n_layer, 2, n_tokens]: u·v, |u|², |v|².
        layer_dot: float32 [n_layer, n_tokens]: the layer's input times its output.
        sum_u, sum_v: float32 [n_layer, 2, n_embd]: sums of u and v over the tokens; None if they were not asked for.
        positions: int32 [n_tokens].
        activations: [n_layer][2]: u and v, float32 [n_tokens, n_embd], None where a sublayer does not see every token;
            valid until the sink returns. None if they were not asked for.
    """

    dot: npt.NDArray[np.float32]
    u_sq: npt.NDArray[np.float32]
    v_sq: npt.NDArray[np.float32]
    layer_dot: npt.NDArray[np.float32]
    sum_u: npt.NDArray[np.float32] | None
    sum_v: npt.NDArray[np.float32] | None
    positions: npt.NDArray[np.int32]
    phase: Phase
    activations: Activations | None = None


StatisticsSink: TypeAlias = Callable[[StatisticsBatch], None]


@dataclass(frozen=True)
class Counters:
    """What can be counted exactly about a context, since it was created.

    Attributes:
        nodes_full, nodes: of the last graph as llama.cpp built it, and as it was computed.
        splits: parts of it that run on one device each.
        kv_bytes: size of the context's memory (KV cache, recurrent state), all devices together.
        statistics_bytes: read by the host.
    """

    nodes_full: int
    nodes: int
    splits: int
    graphs_built: int
    graphs_reused: int
    kv_bytes: int
    statistics_bytes: int


@dataclass(frozen=True)
class OnlineResult:
    """What the online stage learned in one request. The arrays are float64 [n_layer], NaN where not observed.

    Attributes:
        window: tokens that it observes.
        n_tokens: that it has observed.
        similarity: mean IO similarity of each FFN over them.
        norm_ratio: ||V||_F / ||U||_F over them.
        scale: what stands in for each FFN if it is added.
        threshold: FFNs of at least this similarity are skipped.
        ffn: layers whose FFN was added to the decode set, () while the window is not full.
    """

    window: int
    n_tokens: int
    similarity: npt.NDArray[np.float64]
    norm_ratio: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]
    threshold: float
    ffn: tuple[int, ...]
