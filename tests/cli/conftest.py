"""Fixtures for tests of the command line."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from oracles.frontiers import frontier, point
from oracles.profiles import tiny_profile

import adaskip_cpp.model.frontier
from adaskip_cpp import SkipPlan
from adaskip_cpp.model.identity import plan_path
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.model.settings import Settings


@pytest.fixture
def profile_path(tiny: Any, tmp_path: Path) -> Path:
    """A profile of the tiny llama model."""
    path = tmp_path / "p.json"
    tiny_profile(tiny()).save(path)
    return path


@pytest.fixture
def model(tiny: Any, tmp_path: Path) -> Path:
    """The tiny llama model in a folder of its own."""
    return Path(shutil.copy(tiny(), tmp_path / "m.gguf"))


@pytest.fixture
def tuned_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a frontier beside it: one plan that loses 0.01 nats and one that loses 0.04, from 32 tokens on."""
    monkeypatch.setattr(adaskip_cpp.model.frontier, "LEAST_CONTEXT", 32)
    mild, strong = (SkipPlan.manual(3, ffn=ffn, phase="bulk") for ffn in ([1], [1, 2]))
    lengths = {1024: 1.2, 2048: 1.3, 4096: 1.4}
    faster = {length: 2 * ratio for length, ratio in lengths.items()}
    points = [point(mild, 0.01, lengths), point(strong, 0.04, faster)]
    save_plan(plan_path(model), frontier(points, settings=Settings(flash_attn=True)))
    return model
