"""Options of llama.cpp that change speed and rounding alone, for ``tune`` and the frontier: ``Settings``."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What changes the speed of the whole model and, but for rounding, nothing else. The names are AdaSkipLlama's.

    Attributes:
        flash_attn: attention in one operation, without the matrix of weights in memory.
        repack: keep weights on the CPU in a layout of llama.cpp's own, where it has products for that.
        n_batch, n_ubatch: tokens handed to llama.cpp at once, and those that it computes at once.
        n_threads, n_threads_batch: threads for answers and for prompts; None for ``llama_cpp.Llama``'s default.
    """

    flash_attn: bool = False
    repack: bool = True
    n_batch: int = 512
    n_ubatch: int = 512
    n_threads: int | None = None
    n_threads_batch: int | None = None

    def to_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments for AdaSkipLlama, without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Tried:
    """Settings that were timed, as the mean of their rounds. Times are infinite where the model cannot run with them.

    Attributes:
        settings: all of them, the one that this trial is about included.
        prompt_short_s, prompt_long_s: seconds per token at the beginning and at the end of a prompt of ``context``
            tokens.
        token_s: seconds per token of an answer to it.
        request_s: seconds for the whole request.
        chosen: whether they replaced the best settings before them; the first ones count as chosen.
    """

    settings: Settings
    prompt_short_s: float
    prompt_long_s: float
    token_s: float
    request_s: float
    chosen: bool
