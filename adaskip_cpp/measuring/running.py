"""Opens models that are run alike, for whatever is measured or used: :class:`Running` says how."""

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..engine.llama import AdaSkipLlama
from .cores import physical_cores

_Llama = TypeVar("_Llama", bound=AdaSkipLlama)


@dataclass(frozen=True)
class Running:
    """How a model is run.

    Attributes:
        n_threads: CPU threads; all physical cores by default.
        gpu_layers: layers on a GPU, if llama-cpp-python was built for one; -1 for all.
        flash_attn: whether attention is computed as one operation.
        rpc_servers: those that :func:`adaskip_cpp.add_rpc_server` was called with.
    """

    n_threads: int = field(default_factory=physical_cores)
    gpu_layers: int = -1
    flash_attn: bool = False
    rpc_servers: tuple[str, ...] = ()


def open_quietly(path: str | os.PathLike[str], n_ctx: int, running: Running, **more: Any) -> AdaSkipLlama:
    """Load a model with a context of ``n_ctx`` tokens, without llama.cpp's warnings on stderr."""
    return quietly(AdaSkipLlama, path, n_ctx, running, **more)


def quietly(
    kind: Callable[..., _Llama], path: str | os.PathLike[str], n_ctx: int, running: Running, **more: Any
) -> _Llama:
    """Load a model of some class as :func:`open_quietly` does."""
    n = running.n_threads
    settings = {"n_gpu_layers": running.gpu_layers, "flash_attn": running.flash_attn, "verbose": False, **more}
    with contextlib.redirect_stderr(io.StringIO()):
        return kind(os.fspath(path), n_ctx=n_ctx, n_threads=n, n_threads_batch=n, **settings)
