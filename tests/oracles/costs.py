"""Cost models by hand."""

import math
from typing import Any

import numpy as np

from adaskip_cpp.model.cost_model import CostModel, CostSettings, PhaseCost

SETTINGS = CostSettings("a CPU", ("CPU",), 0, 2, 4, 512, 512, True, "F16", "Q8_0", True, "0.3.36")


def cost_model(fixed: float, attention: list[float], ffn: list[float], size: int = 512, **changes: Any) -> CostModel:
    """A model whose decode costs a hundredth of a ubatch, and whose attention does not grow."""
    n_layer = len(attention)
    base = np.array([attention, ffn], float).T
    growth, kept = (np.array(changes.pop(name, np.zeros(n_layer)), float) for name in ("growth", "kept"))
    prefill = PhaseCost(size, fixed, 0.0, base, growth, kept)
    decode = PhaseCost(1, fixed / 100, 0.0, base / 100, growth / 100, np.zeros(n_layer))
    limit, n_layer_kv = changes.pop("limit", np.full(n_layer, math.inf)), changes.pop("n_layer_kv", n_layer)
    return CostModel(SETTINGS, prefill, decode, limit, n_layer_kv, 4096)
