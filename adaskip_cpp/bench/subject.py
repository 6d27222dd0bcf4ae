"""What must be known of a model before it is measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..measuring.cores import BUSY, load_average

if TYPE_CHECKING:
    from ..engine.llama import AdaSkipLlama

__all__ = ["DEFAULT_CONTEXTS", "configuration", "fit_contexts"]

DEFAULT_CONTEXTS = (512, 2048, 8192)


def configuration(llm: AdaSkipLlama) -> dict[str, Any]:
    """Return what the times depend on and a loaded model tells, as plain JSON values."""
    from gguf import LlamaFileType

    file_type = llm.metadata.get("general.file_type", "")
    try:
        quantisation = LlamaFileType(int(file_type)).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        quantisation = "unknown"
    load = load_average()
    return {
        "model": llm.metadata.get("general.name") or os.path.basename(llm.model_path),
        "file": os.path.basename(llm.model_path),
        "architecture": llm.model_info.architecture,
        "fingerprint": llm.model_info.fingerprint,
        "n_layer": llm.n_layer,
        "file_bytes": os.path.getsize(llm.model_path),
        "quantisation": quantisation,
        "adaskip_cpp": metadata.version("adaskip-cpp"),
        "llama_cpp_python": metadata.version("llama-cpp-python"),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "load_average": round(load, 2),
        "busy": load > BUSY,
    }


def fit_contexts(asked: Sequence[int] | None, n_ctx_train: int, n_decode: int) -> tuple[tuple[int, ...], str]:
    """Return the contexts to measure, ascending, and a line that says what was changed, "" if nothing.

    Args:
        asked: tokens of the prompts; None for :data:`DEFAULT_CONTEXTS` as far as the model allows.
        n_ctx_train: the model's context, 0 if it has none.
        n_decode: tokens that must fit in behind the prompt.

    Raises:
        DataError: a context asked for is beyond the model's, or leaves no room at all.
    """
    wanted = sorted(set(DEFAULT_CONTEXTS if asked is None else asked))
    limit = n_ctx_train - n_decode if n_ctx_train else wanted[-1]
    if wanted[0] < 1 or limit < 1:
        raise DataError(
            f"no prompt of {wanted[0]} tokens with {n_decode} decoded behind it fits into the model's context of "
            f"{n_ctx_train:,}; use --contexts of 1 or more and fewer --decode-tokens"
        )
    if asked is not None and n_ctx_train and wanted[-1] > n_ctx_train:
        raise DataError(
            f"a context of {wanted[-1]:,} tokens is beyond the model's {n_ctx_train:,}; use smaller --contexts"
        )
    fitting = sorted({min(context, limit) for context in wanted})
    if fitting == wanted:
        return tuple(fitting), ""
    listed = ", ".join(f"{context:,}" for context in fitting)
    return tuple(fitting), (
        f"Contexts are {listed}: the model's {n_ctx_train:,} tokens also hold the {n_decode} that are decoded."
    )
