"""Options of llama.cpp that change speed and rounding alone, for ``tune`` and the frontier: ``Settings``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from .arrays import Count

FlashAttention: TypeAlias = bool | Literal["prompts"]
Repack: TypeAlias = bool | Literal["all"]
MOST_THREADS = 512  # GGML_MAX_N_THREADS: with more, ggml ends the process
Threads: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=MOST_THREADS)]


@dataclass(frozen=True)
class Settings:
    """Arguments of ``AdaSkipLlama`` that change only speed and rounding.

    Attributes:
        flash_attn: whether flash attention is used. ``"prompts"``: only where many tokens are computed at once.
        repack: whether llama.cpp may keep weights on the CPU in its own layout. ``"all"``: products also read copies of
            Q5_0 weights (``native/adaskip-repack.h``).
        n_batch: tokens that llama.cpp is given at once.
        n_ubatch: tokens that llama.cpp computes at once.
        n_threads: threads for answers; None for the default of ``llama_cpp.Llama``.
        n_threads_batch: threads for prompts; None for the default of ``llama_cpp.Llama``.
        unpack: types of weights, such as ``"Q4_1"``, that prompts read as F32 (``native/adaskip-unpack.h``).
    """

    flash_attn: FlashAttention = False
    repack: Repack = True
    n_batch: Count = 512
    n_ubatch: Count = 512
    n_threads: Threads | None = None
    n_threads_batch: Threads | None = None
    unpack: tuple[str, ...] = ()

    def to_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments for ``AdaSkipLlama``, without those that are None."""
        return {name: value for name, value in vars(self).items() if value is not None}


def in_words(values: Mapping[str, Any]) -> str:
    """Return values of settings by name in one line."""
    return ", ".join(f"{name} {'+'.join(each) if isinstance(each, tuple) else each}" for name, each in values.items())


@dataclass(frozen=True)
class Tried:
    """Settings that ``tune`` timed. Times are means of several rounds, and infinite if the model cannot run.

    Attributes:
        settings: all settings of this trial.
        prompt_short_s: seconds per token at the beginning of a prompt.
        prompt_long_s: seconds per token at its end, after ``context`` tokens.
        token_s: seconds per token of the answer to that prompt.
        request_s: seconds of the whole request.
        chosen: whether they were faster than the best settings before; True for the first ones.
    """

    settings: Settings
    prompt_short_s: float
    prompt_long_s: float
    token_s: float
    request_s: float
    chosen: bool
