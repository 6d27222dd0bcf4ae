"""The profile that lies beside a model, ``X.adaskip.json`` beside ``X.gguf``, and the tuned plan in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import PlanError, ProfileMissingError
from ..model.identity import ModelInfo, fingerprint

if TYPE_CHECKING:
    from ..model.plan import SkipPlan
    from ..planning.profile import Profile

__all__ = ["auto_plan", "check_model", "profile_path"]


def profile_path(model: str | os.PathLike[str]) -> str:
    """Return the name of the profile beside a model, whether it is there or not."""
    path = os.fspath(model)
    return (path[: -len(".gguf")] if path.lower().endswith(".gguf") else path) + ".adaskip.json"


def check_model(profile: Profile, model: str | os.PathLike[str], name: str) -> None:
    """Refuse a profile of another model.

    Args:
        profile: the profile.
        model: the model's file.
        name: what to call the profile.

    Raises:
        ProfileMismatchError: it is of another model.
        ModelFileError: the model cannot be read.
    """
    found = ModelInfo(fingerprint(model), profile.model.architecture, profile.model.n_layer)
    profile.model.check(found, repr(name), model, f"run `adaskip-cpp tune {os.fspath(model)}`")


def auto_plan(model: str | os.PathLike[str]) -> SkipPlan | None:
    """Return the tuned plan of the profile beside a model, None where tuning found that the model is best left whole.

    Raises:
        ProfileMissingError: there is no such profile.
        ProfileMismatchError: it is of another model.
        ProfileError: it cannot be read.
        PlanError: it holds no tuned plan.
    """
    from ..planning.profile import Profile

    name = profile_path(model)
    if not os.path.exists(name):
        raise ProfileMissingError(
            f"there is no profile {name!r} beside the model; run `adaskip-cpp tune {os.fspath(model)}`"
        )
    profile = Profile.load(name)
    check_model(profile, model, name)
    if profile.tuned is None:
        raise PlanError(f"{name!r} holds no tuned plan; run `adaskip-cpp tune {os.fspath(model)}`")
    return profile.tuned_plan() if profile.tuned.n_skip else None
