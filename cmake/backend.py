"""The build backend: scikit-build-core's, with the release of llama-cpp-python that releases.py chooses.

If that release is not installed, the build requires it. The wheel always requires exactly that release. An sdist
belongs to no release, so its build requires none.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import releases
from scikit_build_core import build
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "dynamic_metadata",
    "dynamic_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_Settings = Mapping[str, Any]


def get_requires_for_build_wheel(config_settings: dict[str, list[str] | str] | None = None) -> list[str]:
    """scikit-build-core's requirements, and the release if it is not installed."""
    return [*build.get_requires_for_build_wheel(config_settings), *_requirements()]


def get_requires_for_build_editable(config_settings: dict[str, list[str] | str] | None = None) -> list[str]:
    """As for a wheel."""
    return [*build.get_requires_for_build_editable(config_settings), *_requirements()]


def dynamic_metadata(settings: _Settings, project: _Settings) -> dict[str, Any]:
    """The dependencies that scikit-build-core adds to pyproject.toml's [project]."""
    version = _release().version
    return {
        "dependencies": [f"llama-cpp-python=={version}"],
        "optional-dependencies": {"serve": [f"llama-cpp-python[server]=={version}"]},
    }


def dynamic_wheel(settings: _Settings) -> dict[str, bool]:
    """Declares in an sdist's metadata that the dependencies of its wheels may differ."""
    return {"dependencies": True, "optional-dependencies": True}


def _requirements() -> list[str]:
    version = _release().version
    there = version in [found.version for found in releases.installed()]
    return [] if there else [f"llama-cpp-python=={version}"]


def _release() -> releases.Release:
    try:
        return releases.choose(releases.read_table(), releases.installed())
    except releases.ReleaseError as error:
        sys.exit(f"adaskip-cpp: {error}")
