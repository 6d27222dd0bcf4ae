"""The build backend: scikit-build-core's, told which release of llama-cpp-python is built for.

Where that release is not installed, the build requires it; the wheel requires it in any case, and no other. An sdist is
of no release, so building one requires none.
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
    """What scikit-build-core requires, and the release where it is not installed."""
    return [*build.get_requires_for_build_wheel(config_settings), *_requirements()]


def get_requires_for_build_editable(config_settings: dict[str, list[str] | str] | None = None) -> list[str]:
    """As for a wheel."""
    return [*build.get_requires_for_build_editable(config_settings), *_requirements()]


def dynamic_metadata(settings: _Settings, project: _Settings) -> dict[str, Any]:
    """What scikit-build-core adds to the lists of pyproject.toml's [project]."""
    version = _release().version
    return {
        "dependencies": [f"llama-cpp-python=={version}"],
        "optional-dependencies": {"serve": [f"llama-cpp-python[server]=={version}"]},
    }


def dynamic_wheel(settings: _Settings) -> dict[str, bool]:
    """Says in an sdist's metadata that those of its wheels may differ."""
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
