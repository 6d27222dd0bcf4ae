"""The files that lie beside a model, ``X.adaskip.json`` and ``X.adaskip-plan.json`` beside ``X.gguf``."""

from __future__ import annotations

import os
from dataclasses import replace

from .identity import ModelInfo, fingerprint


def profile_path(model: str | os.PathLike[str]) -> str:
    """Return the name of the profile beside a model, whether it is there or not."""
    return _stem(model) + ".adaskip.json"


def plan_path(model: str | os.PathLike[str]) -> str:
    """Return the name of the plan file beside a model, whether it is there or not."""
    return _stem(model) + ".adaskip-plan.json"


def check_model(made_for: ModelInfo, model: str | os.PathLike[str], name: str) -> None:
    """Refuse a profile or plan, called ``name``, of another model file, before the model is loaded.

    Raises:
        ProfileMismatchError: it is of another model.
        ModelFileError: the model cannot be read.
    """
    found = replace(made_for, fingerprint=fingerprint(model))
    made_for.check(found, repr(name), model, f"run `adaskip-cpp tune {os.fspath(model)}`")


def _stem(model: str | os.PathLike[str]) -> str:
    path = os.fspath(model)
    return path[: -len(".gguf")] if path.lower().endswith(".gguf") else path
