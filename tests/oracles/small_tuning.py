"""Makes `tune` small enough for tiny models: short texts, few requests, and invented times of sublayers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.costs import cost_model
from oracles.tiny_families import N_CTX_TRAIN
from oracles.tiny_models import write_model

import adaskip_cpp.model.frontier
from adaskip_cpp.measuring import corpus
from adaskip_cpp.tuning import planned
from adaskip_cpp.tuning import tune as tuning

JUDGED_AT, ANSWER = 192, (64, 72)
"""Tokens of the prompts that plans are judged on, and of the answers that continue and that copy."""

N_TIMED = 100
"""Tokens that the timing of sublayers evaluates, and that are not counted."""

IDLE = ((1, "ffn"), (2, "ffn"))
"""Sublayers of the model that add nothing: skipping them loses nothing. Attention 1 adds what attention 2 reads."""

_WORDS = ["the", "of", "to", "an", "in", "error", "there", "other", "one", "ten"]
TEXTS = {f"text {i}": " ".join(np.random.default_rng(i).choice(_WORDS, 600).tolist()) for i in range(4)}


def write_idle_model(path: Path) -> Path:
    return write_model(path, zero=IDLE)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink the constants; every sublayer takes a second of a ubatch, and what is left of a skipped attention 0.2."""
    for name, value in {
        "_N_REQUESTS": 4,
        "_N_DECODE": 2,
        "_JUDGED_AT": JUDGED_AT,
        "_ANSWER": ANSWER,
        "_SEARCHED_AT": (128, 160),
        "LONGEST": 2 * N_CTX_TRAIN,
        "load_average": lambda: None,
        "_AIMS": ((0.001, False, JUDGED_AT, 0.97), (100.0, False, JUDGED_AT, 0.97)),  # what adds nothing, and then all
    }.items():
        monkeypatch.setattr(tuning, name, value)
    monkeypatch.setattr(adaskip_cpp.model.frontier, "LEAST_CONTEXT", 64)
    monkeypatch.setattr(corpus, "N_TOKENS", 64)
    for module in (planned, tuning):
        monkeypatch.setattr(module, "DEFAULT_REFIT", 8)

    def measure_cost(llm: Any, **_: Any) -> Any:
        llm.reset()
        llm.eval_bulk([5] * N_TIMED)
        return cost_model(0.1, [1.0] * llm.n_layer, [1.0] * llm.n_layer, size=32, kept=[0.2] * llm.n_layer)

    monkeypatch.setattr(tuning, "measure_cost", measure_cost)
