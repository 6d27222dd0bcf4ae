"""The machine and the settings that a cost model was measured with."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["CostSettings"]


@dataclass(frozen=True)
class CostSettings:
    """The machine and the settings that times were measured with; with others they are worth nothing.

    :func:`adaskip_cpp.engine.settings.cost_settings` returns those of a loaded model.

    Attributes:
        cpu: name of the processor.
        devices: names of ggml's devices, as ``("CPU",)``.
        n_gpu_layers: layers offloaded to them.
        n_threads, n_threads_batch: CPU threads in decode and in prefill.
        n_batch, n_ubatch: tokens in a batch, and in what is computed at once.
        flash_attention: whether attention is computed as one operation.
        type_k, type_v: ggml types of the KV cache, as ``"F16"``.
        swa_full: whether sliding-window layers have KV for the whole context.
        llama_cpp_python: its version.
    """

    cpu: str
    devices: tuple[str, ...]
    n_gpu_layers: int
    n_threads: int
    n_threads_batch: int
    n_batch: int
    n_ubatch: int
    flash_attention: bool
    type_k: str
    type_v: str
    swa_full: bool
    llama_cpp_python: str

    def note(self, here: CostSettings) -> str:
        """Say in one line in what these settings, of a profile's times, differ from those here; "" if in nothing."""
        names = [field.name for field in fields(self) if getattr(self, field.name) != getattr(here, field.name)]
        if not names:
            return ""
        words = "; ".join(f"{name} {_word(getattr(self, name))}, here {_word(getattr(here, name))}" for name in names)
        return (
            f"The profile's times were measured elsewhere ({words}): a predicted speed-up may be wrong here; measure "
            "them again with `adaskip-cpp calibrate MODEL --cost-only -o PROFILE`."
        )


def _word(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
