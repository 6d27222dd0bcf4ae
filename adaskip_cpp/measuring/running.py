"""Opens models with the user's threads and devices, to measure or use them. Start at :class:`Running`."""

import contextlib
import io
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, TypeVar

from ..engine.cores import physical_cores
from ..engine.llama import AdaSkipLlama
from ..engine.settings import is_here
from ..files import StrPath
from ..model.frontier import Frontier
from ..model.identity import model_files
from ..model.plan_file import frontier_beside
from ..model.settings import FlashAttention, Settings

_Llama = TypeVar("_Llama", bound=AdaSkipLlama)


@dataclass(frozen=True)
class Running:
    """Threads and devices of a model, for ``bench`` and ``evaluate``.

    None means the fastest setting that ``tune`` found on this machine, or a default without a plan file.

    Attributes:
        n_threads: CPU threads; None for all physical cores by default.
        gpu_layers: layers on a GPU, if llama-cpp-python was built for one; -1 for all.
        flash_attn: whether flash attention is used, as in ``Settings``; None for False by default.
    """

    n_threads: int | None = None
    gpu_layers: int = -1
    flash_attn: FlashAttention | None = None

    def given(self) -> dict[str, Any]:
        """Return the settings that are not None, by the names of ``Settings``."""
        threads = dict.fromkeys(("n_threads", "n_threads_batch"), self.n_threads)
        return {name: value for name, value in {**threads, "flash_attn": self.flash_attn}.items() if value is not None}

    def options(self, tuned: Settings | None) -> dict[str, Any]:
        """Return arguments of ``AdaSkipLlama``: the settings that were given, else ``tuned``, else defaults."""
        defaults = dict.fromkeys(("n_threads", "n_threads_batch"), physical_cores())
        return {**(tuned.to_kwargs() if tuned else defaults), **self.given(), "n_gpu_layers": self.gpu_layers}


def settings_here(frontier: Frontier | None) -> Settings | None:
    """Return a frontier's settings; None if ``tune`` did not find them on this machine."""
    return frontier.settings if frontier is not None and is_here(frontier.machine) else None


def quietly(kind: Callable[..., _Llama], path: StrPath, n_ctx: int, running: Running, **more: Any) -> _Llama:
    """Load a model of a class with a context of ``n_ctx`` tokens, without llama.cpp's warnings on stderr."""
    frontier = plan if isinstance(plan := more.get("plan"), Frontier) else frontier_beside(path)
    options = {**running.options(settings_here(frontier)), "verbose": False, **more}
    with contextlib.redirect_stderr(io.StringIO()):
        return kind(os.fspath(path), n_ctx=n_ctx, **options)


open_quietly = partial(quietly, AdaSkipLlama)


def described(llm: AdaSkipLlama) -> dict[str, str]:
    """Return words about a model and the releases that run it, for the configuration of a measurement."""
    from gguf import LlamaFileType

    try:
        weights = LlamaFileType(int(llm.metadata.get("general.file_type", ""))).name
    except ValueError:
        weights = "unknown weights"
    path, info, weights = llm.model_path, llm.model_info, weights.removeprefix("MOSTLY_").removeprefix("ALL_")
    return {
        "Model": f"{os.path.basename(path)} ({info.architecture}, {info.n_layer} layers, {weights}, "
        f"{sum(map(os.path.getsize, model_files(path))) / 1e6:,.0f} MB, fingerprint {info.fingerprint[:12]})",
        "Versions": f"adaskip-cpp {metadata.version('adaskip-cpp')}, llama-cpp-python "
        f"{metadata.version('llama-cpp-python')}, Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}",
    }
