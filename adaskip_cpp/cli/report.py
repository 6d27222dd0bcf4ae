"""What a request skipped, how fast it was and what memory it saved, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.generation import Timing
    from ..engine.llama import AdaSkipLlama

__all__ = ["KVMemory", "kv_memory", "layer_list", "megabytes", "skipped_counts", "skipped_lines", "speed_lines"]


@dataclass(frozen=True)
class KVMemory:
    """KV memory of a loaded model.

    Attributes:
        n_bytes: bytes allocated.
        n_bytes_full: bytes with KV for every layer; None where the layers' shares differ.
        n_elided: layers without KV.
    """

    n_bytes: int
    n_bytes_full: int | None
    n_elided: int

    def __str__(self) -> str:
        if self.n_elided == 0:
            return megabytes(self.n_bytes)
        without = f"none for {self.n_elided} layer{'s' if self.n_elided > 1 else ''}"
        if self.n_bytes_full is None:
            return f"{megabytes(self.n_bytes)}, {without}"
        saved = self.n_bytes_full - self.n_bytes
        return (
            f"{megabytes(self.n_bytes)} of {megabytes(self.n_bytes_full)}, {without}: "
            f"{megabytes(saved)} ({saved / self.n_bytes_full:.0%}) saved"
        )


def kv_memory(llm: AdaSkipLlama) -> KVMemory:
    """Return how much KV memory a model has, and how much it would have without a plan."""
    import llama_cpp

    n_elided = len(llm.elided_kv)
    n_kept = llm.n_layer - n_elided
    architecture = llm.metadata.get("general.architecture", "")
    heads = llm.metadata.get(f"{architecture}.attention.head_count_kv", "1")
    # With a sliding window, a recurrent state or heads that differ by layer, the layers' shares are not equal.
    alike = llama_cpp.llama_model_n_swa(llm.model) == 0 and heads.isdigit()
    alike = alike and not llm.has_state
    full = llm.kv_bytes // n_kept * llm.n_layer if alike and n_kept else None
    return KVMemory(llm.kv_bytes, full, n_elided)


def megabytes(n_bytes: float) -> str:
    """``1.5 MB``, decimal; kB below one."""
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:,.0f} kB"
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e8 else f"{n_bytes / 1e6:,.0f} MB"


def layer_list(layers: tuple[int, ...]) -> str:
    """``1, 5-7``, or ``none``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = (f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return ", ".join(words) or "none"


def speed_lines(timing: Timing) -> list[str]:
    """How long the prompt and the decoding took, a line each."""
    cached = timing.n_prompt - timing.n_evaluated
    lines = [
        f"prompt:  {timing.n_evaluated:,} tokens in {timing.first_token_s:.2f} s, "
        f"{timing.prompt_tokens_per_s:,.0f} tokens/s" + (f" ({cached:,} cached)" if cached else "")
    ]
    if timing.token_s is not None:
        lines.append(
            f"decode:  {timing.n_generated - 1:,} tokens in {timing.decode_s:.2f} s, {1 / timing.token_s:,.1f} tokens/s"
        )
    return lines


def skipped_counts(llm: AdaSkipLlama, n_decoded: int) -> tuple[int, int, int]:
    """Sublayers skipped in the last request.

    Args:
        llm: the model.
        n_decoded: tokens that the request decoded.

    Returns:
        In prefill, in decode by the plan, and FFNs that the online stage added to those.
    """
    if llm.plan is None:
        return 0, 0, 0
    learned = llm.online
    return llm.plan.prefill.n_skip, llm.plan.decode_after(n_decoded).n_skip, len(learned.ffn) if learned else 0


def skipped_lines(llm: AdaSkipLlama, n_decoded: int) -> list[str]:
    """What the last request skipped in each phase, a line each."""
    plan = llm.plan
    if plan is None:
        return []
    prefill, decode, added = skipped_counts(llm, n_decoded)
    n_sublayers = 2 * plan.n_layer
    now = plan.decode_after(n_decoded)
    lines = [
        f"skipped: {prefill} of {n_sublayers} sublayers in prefill "
        f"({len(plan.prefill.attention)} attention, {len(plan.prefill.ffn)} FFN)",
        f"         {decode + added} of {n_sublayers} in decode "
        f"({len(now.attention)} attention, {len(now.ffn)} FFN" + (f", {added} FFN added online)" if added else ")"),
    ]
    learned = llm.online
    if learned is not None:
        lines.append(
            f"online:  FFN of layers {layer_list(learned.ffn)} added"
            if learned.ffn
            else f"online:  no FFN added: none as similar as {learned.threshold:.4f}"
            if learned.n_tokens >= learned.window
            else f"online:  no FFN added: {learned.n_tokens} of {learned.window} tokens observed"
        )
    return lines
