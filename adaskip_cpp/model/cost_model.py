"""The cost model: predicts how long a phase takes with some sublayers skipped, on the machine that was measured."""

import math
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from ..errors import PlanError, ProfileFormatError
from .arrays import LayerArrays, checked, freeze
from .plan import Phase, SkipPlan
from .skip_set import SkipSet

CELLS = 256
"""Attention reads KV cells in blocks of this many, filled or not: ``llama_kv_cache::get_n_kv`` pads to it."""


@dataclass(frozen=True)
class CostSettings:
    """The machine and the settings that times were measured with; with others they are worth nothing.

    :func:`adaskip_cpp.engine.settings.cost_settings` returns those of a loaded model.

    The names are llama.cpp's; ``devices`` are those of ggml, as ``("CPU",)``, ``type_k`` and ``type_v`` types of the KV
    cache, as ``"F16"``, and ``llama_cpp_python`` is its version.
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

    def note(self, here: "CostSettings") -> str:
        """Say in one line in what these settings, of a profile's times, differ from those here; "" if in nothing."""

        def word(settings: "CostSettings", name: str) -> str:
            value = getattr(settings, name)
            return ", ".join(value) if isinstance(value, tuple) else str(value)

        names = [field.name for field in fields(self) if getattr(self, field.name) != getattr(here, field.name)]
        words = "; ".join(f"{name} {word(self, name)}, here {word(here, name)}" for name in names)
        return words and (
            f"The profile's times were measured elsewhere ({words}): a predicted speed-up may be wrong here; measure "
            "them again with `adaskip-cpp calibrate MODEL --cost-only -o PROFILE`."
        )


@dataclass(frozen=True, eq=False)
class PhaseCost(LayerArrays):
    """What a ubatch of ``n_tokens`` tokens costs, in seconds. The arrays are float64, finite, not negative, read-only.

    Attributes:
        n_tokens: tokens in the ubatch: 1 in decode.
        fixed: embedding, output head, overhead of the graph and every sublayer that cannot be skipped.
        fixed_growth: of those, per KV cell that is read.
        base: ``[n_layer, 2]``, columns attention and FFN: each sublayer without what grows with the context; 0 where it
            cannot be skipped.
        growth: ``[n_layer]``: each attention, per KV cell that it reads.

    Raises:
        ProfileFormatError: a shape or value is impossible.
    """

    n_tokens: int
    fixed: float
    fixed_growth: float
    base: npt.NDArray[np.float64]
    growth: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        shapes = {"base": (np.float64, "n_layer 2"), "growth": (np.float64, "n_layer")}
        arrays = checked(self, ProfileFormatError, "this is no part of the cost model; calibrate again", **shapes)
        times = np.array([self.fixed, self.fixed_growth, *arrays["base"].ravel(), *arrays["growth"]])
        if self.n_tokens < 1 or not np.isfinite(times).all() or (times < 0).any():
            raise ProfileFormatError("the cost model has a time that is no time; calibrate again")
        freeze(self, **arrays)

    def seconds(self, runs: npt.NDArray[np.bool_], cells: npt.NDArray[np.float64], n_cells: float) -> float:
        """Predict one ubatch, in which the sublayers ``runs`` run, bool ``[n_layer, 2]``.

        Each attention reads so many of the KV ``cells``, ``[n_layer]``, one without a window ``n_cells``.
        """
        sublayers = self.base.copy()
        sublayers[:, 0] += self.growth * cells
        return float(self.fixed + self.fixed_growth * n_cells + sublayers[runs].sum())


@dataclass(frozen=True, eq=False)
class CostModel(LayerArrays):
    """Predicted times of one model on one machine, see docs/cost-model.md.

    Attributes:
        prefill: cost of a ubatch of ``n_ubatch`` tokens of a prompt.
        decode: cost of one token.
        limit: float64 ``[n_layer]``, KV cells beyond which an attention stops growing; infinite without a window, where
            NaN, as JSON's null is read, may be given too.
        deepest: longest context that was measured, in tokens; times beyond it are extrapolated.

    Raises:
        ProfileFormatError: a shape or value is impossible.
    """

    settings: CostSettings
    prefill: PhaseCost
    decode: PhaseCost
    limit: npt.NDArray[np.float64]
    deepest: int

    def __post_init__(self) -> None:
        limit = np.array(self.limit, np.float64)
        limit[np.isnan(limit)] = np.inf
        if self.prefill.base.shape != self.decode.base.shape or limit.shape != (len(self.prefill.base),):
            raise ProfileFormatError("the cost model's phases differ in the number of layers; calibrate again")
        if not (limit > 0).all() or self.decode.n_tokens != 1:
            raise ProfileFormatError("the cost model has an impossible window or ubatch; calibrate again")
        freeze(self, limit=limit)

    def __repr__(self) -> str:
        return f"CostModel(n_layer={self.n_layer}, cpu={self.settings.cpu!r}, deepest={self.deepest})"

    def seconds(self, skip: SkipSet | npt.NDArray[np.bool_] | None, context: int, phase: Phase) -> float:
        """Predict how many seconds a whole prompt or one decoded token takes.

        A prompt is computed ``n_ubatch`` tokens at a time. The cost of its last, shorter ubatch is interpolated between
        those of one token and of a whole ubatch.

        Args:
            skip: the sublayers skipped, a set or bool ``[n_layer, 2]``; None for the full model.
            context: prefill: tokens of the prompt; decode: tokens before the one that is decoded.
            phase: ``"prefill"`` or ``"decode"``.

        Raises:
            PlanError: an argument is impossible.
        """
        if not context >= (1 if phase == "prefill" else 0):
            raise PlanError(f"the context is {context!r} tokens; give the length of the prompt, 1 or more")
        flags = skip.skip if isinstance(skip, SkipSet) else skip
        runs = np.ones((self.n_layer, 2), np.bool_) if flags is None else ~np.asarray(flags, np.bool_)
        if runs.shape != (self.n_layer, 2):
            raise PlanError(
                f"the skip set has the shape {runs.shape}, the cost model is for [{self.n_layer}, 2]; "
                "use the profile of this model"
            )
        if phase == "decode":
            return self._ubatch(runs, 1, context + 1)
        if phase != "prefill":
            raise PlanError(f"unknown phase {phase!r}; use 'prefill' or 'decode'")
        size = self.prefill.n_tokens
        ends = (min(start + size, context) for start in range(0, context, size))
        return sum(self._ubatch(runs, (end - 1) % size + 1, end) for end in ends)

    def speedup(self, plan: SkipPlan, context: int, phase: Phase) -> float:
        """Predict how many times faster than the full model a plan makes a phase.

        What an online stage adds is not known before and does not count; a schedule counts with its last set.
        """
        return self.seconds(None, context, phase) / self.seconds(plan.skipped(phase), context, phase)

    def _ubatch(self, runs: npt.NDArray[np.bool_], n_tokens: int, end: int) -> float:
        """Seconds for ``n_tokens`` tokens, the last of which is the ``end``-th of its sequence."""
        n_cells = math.ceil(end / CELLS) * CELLS
        cells = np.minimum(n_cells, self.limit)
        size = self.prefill.n_tokens
        one = 0.0 if n_tokens == size > 1 else self.decode.seconds(runs, cells, n_cells)
        if n_tokens == 1:
            return one
        whole = self.prefill.seconds(runs, cells, n_cells)
        return one + (whole - one) * (n_tokens - 1) / (size - 1)
