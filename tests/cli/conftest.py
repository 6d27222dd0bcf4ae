"""Fixtures for tests of the command line."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from oracles.frontiers import frontier, point
from oracles.tiny_families import N_EMBD

import adaskip_cpp.model.frontier
from adaskip_cpp import Profile, SkipPlan
from adaskip_cpp.cli.main import main
from adaskip_cpp.intervals import Interval
from adaskip_cpp.model.frontier import SpeedUp
from adaskip_cpp.model.identity import ModelInfo, fingerprint, plan_path
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.model.settings import Settings, Tried
from adaskip_cpp.model.statistics import PhaseStatistics

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """``run("verb", ...)``: the command's result, in this process."""

    def invoke(*args: object, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin, prog_name="adaskip-cpp")

    return invoke


@pytest.fixture
def profile_path(tiny: Any, tmp_path: Path) -> Path:
    """A profile of the tiny llama model, which ranks its last layer first: FFN 2, attention 2, FFN 1, and so on.

    In the bulk of a prompt the last layer loses nothing, so that there attention 2 comes before FFN 2.
    """
    path = tmp_path / "p.json"
    n_layer = 3
    ones = np.ones((n_layer, 2))
    similarity = np.linspace(0.5, 0.99, 2 * n_layer).reshape(n_layer, 2)
    zeros = np.zeros((n_layer, 2, N_EMBD), np.float32)
    statistics = PhaseStatistics(similarity, ones, 2 * ones, np.ones(n_layer), zeros, zeros, 10)
    model = ModelInfo(fingerprint(tiny()), "llama", n_layer)
    Profile(statistics, statistics, 1, 10, model, divergence=1 - similarity, copying=1 - similarity).save(path)
    return path


@pytest.fixture
def tuned_model(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a frontier beside it: one plan that loses 0.01 nats and one that loses 0.04, from 32 tokens on."""
    monkeypatch.setattr(adaskip_cpp.model.frontier, "LEAST_CONTEXT", 32)
    path = Path(shutil.copy(tiny(), tmp_path / "m.gguf"))
    mild, strong = (SkipPlan.manual(3, ffn=ffn, phase="bulk") for ffn in ([1], [1, 2]))
    lengths = {1024: 1.2, 2048: 1.3, 4096: 1.4}
    faster = {length: 2 * ratio for length, ratio in lengths.items()}
    found = frontier([point(mild, 0.01, lengths), point(strong, 0.04, faster)], settings=Settings(flash_attn=True),
                     tried=(Tried(Settings(), 0.01, 0.02, 0.1, 9.0, True),
                            Tried(Settings(flash_attn=True), 0.01, 0.01, 0.1, 8.0, True),
                            Tried(Settings(flash_attn=True, repack=False), *[math.inf] * 4, False)),
                     speeds=(SpeedUp("both", 2048, Interval(1.5, 1.4, 1.6, 2), (3.0, 2.0)),))  # fmt: skip
    save_plan(plan_path(path), found)
    return path
