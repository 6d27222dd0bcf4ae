"""Measures the cost model: times ubatches with different sublayers left out, see docs/cost-model.md."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
import numpy.typing as npt

from ..errors import RequestError
from ..model.cost_model import CELLS, CostModel, PhaseCost
from ..model.cost_settings import CostSettings
from ..model.plan import Phase, SkipPlan
from .cost_fit import Group, Sample, fit
from .shapes import same_shape

if TYPE_CHECKING:
    from ..engine.llama import AdaSkipLlama

__all__ = ["CostModel", "CostSettings", "PhaseCost", "measure_cost"]

_CONTEXTS = (512, 2048, 6144)
_MAX_ROUNDS = 12
_N_DECODE = 12
"""Tokens timed per plan and round, behind one that builds the plan's graph and is not counted."""
_SUBSET = 10
"""Growth with the context is measured on one in so many attentions, so that deep contexts take a tenth of the time."""
_SLIDES = 1.3
"""Layers of one shape count as different where the slowest attention takes so many times as long as the fastest."""


def measure_cost(
    llm: AdaSkipLlama,
    *,
    contexts: Sequence[SupportsIndex] | None = None,
    seconds: float = 15.0,
    on_progress: Callable[[float], None] | None = None,
) -> CostModel:
    """Measure what each sublayer costs on this machine, with this model's settings.

    The times are of an idle machine, or those of this one while something else runs. The model's plan is set aside
    meanwhile and put back at the end, also after an error or Ctrl-C; its KV cache is dropped.

    Args:
        llm: the model.
        contexts: at how many tokens of context to time attentions; None for 512, 2048 and 6144, as far as the model's
            context and the time allow.
        seconds: time to spend. Rounds of measurements are repeated in it, 12 at most; the first one is completed in any
            case, with at most half of the time for deep contexts. A model with sliding windows takes up to as long
            again, to find the layers that have one.
        on_progress: called with the fraction of the time that has passed.

    Raises:
        RequestError: an argument is impossible, or the model's context is too small to measure in.
    """
    if not (isinstance(seconds, int | float) and math.isfinite(seconds) and seconds > 0):
        raise RequestError(f"cannot measure for {seconds!r} seconds; use a number above 0, such as 15")
    measurement = _Measurement(llm, _contexts(llm, contexts), float(seconds), on_progress)
    with _set_aside(llm):
        return measurement.run()


class _Measurement:
    """The rounds of one measurement, all in the prefill phase: what a token costs depends on its plan alone."""

    def __init__(
        self, llm: AdaSkipLlama, contexts: tuple[int, ...], seconds: float, on_progress: Callable[[float], None] | None
    ) -> None:
        self.llm = llm
        self.seconds = seconds
        self.groups = [Group(kind, layers) for kind, layers in same_shape(llm)]
        self.samples: dict[Phase, list[Sample]] = {"prefill": [], "decode": []}
        self.deepest = 0
        self._on_progress = on_progress
        self._size = llm.context_size
        self._n_decode = max(min(_N_DECODE, self._size // (2 * len(self._mixed()) + 2) - 1), 1)
        self._reserve = (self._n_decode + 1) * max(len(self._mixed()), len(contexts) + 1)
        self.n_tokens = min(int(llm.context_params.n_ubatch), llm.n_batch, self._size - self._reserve)
        if self.n_tokens < 1:
            raise RequestError(
                f"a context of {self._size} tokens is too small to time {len(self._mixed())} plans in; "
                f"load the model with n_ctx={max(4 * self._reserve, 2 * CELLS)} or more"
            )
        self._contexts = contexts
        rng = np.random.default_rng(0)
        self._tokens: list[int] = rng.integers(0, llm.n_vocab(), size=self.n_tokens).tolist()
        self._start = perf_counter()

    def run(self) -> CostModel:
        """Measure and fit."""
        self._prepare(self._nothing(True))
        self._eval(self._tokens)  # pages in the weights, fills caches, wakes up threads; not counted
        self._eval(self._tokens[:1])
        window = _window(self.llm)
        if window:
            self._split_sliding(window)
        self.samples = {"prefill": [], "decode": []}
        self.deepest = 0
        self._start = perf_counter()
        n_rounds, elapsed = 0, 0.0
        while n_rounds == 0 or (n_rounds < _MAX_ROUNDS and elapsed * (n_rounds + 1) / n_rounds <= self.seconds):
            self._round()
            n_rounds, elapsed = n_rounds + 1, perf_counter() - self._start
        limits = [math.inf]
        if window:
            limits.append(self._window_cells(window))  # not so with swa_full: then the fit decides
        return min((self._fit(limit) for limit in limits), key=lambda fitted: fitted[1])[0]

    def _fit(self, limit: float) -> tuple[CostModel, float]:
        groups = [replace(group, limit=limit if group in self._sliding else math.inf) for group in self.groups]
        n_layer, grows = self.llm.n_layer, not all(sublayer.skippable for sublayer in self.llm.sublayers)
        prefill, error = fit(
            self.samples["prefill"], self._prefill_groups(groups), n_layer, self.n_tokens, rest_grows=grows
        )
        decode, error_decode = fit(self.samples["decode"], groups, n_layer, 1, rest_grows=grows)
        limits = np.full(n_layer, math.inf)
        for group in groups:
            if group.kind == 0:
                limits[list(group.layers)] = group.limit
        return CostModel(CostSettings.of(self.llm), prefill, decode, limits, self.deepest), error + error_decode

    # -- one round: every plan once, so that a slow moment of the machine hits all alike ----------------------------

    def _round(self) -> None:
        self._prepare(self._nothing(True))
        self._ubatch()
        for runs in self._mixed():
            self._decode(runs)
        for group in self._prefill_groups():
            if group.kind == 1:
                self._prepare(self._only(group, group.layers))
                self._ubatch()
        # Where some sublayers cannot be skipped the rest has to be followed into the depth.
        depth = 1 if all(sublayer.skippable for sublayer in self.llm.sublayers) else len(self._contexts)
        self._deepen(self._nothing(False), self._contexts[:depth], None)
        for index, group in enumerate(self.groups):
            if group.kind == 0:
                step = math.ceil(len(group.layers) / math.ceil(len(group.layers) / _SUBSET))
                runs = self._only(group, group.layers[::step])
                self._deepen(runs, self._contexts, f"subset of {index}")

    def _deepen(self, runs: npt.NDArray[np.bool_], contexts: Sequence[int], offset: str | None) -> None:
        """Time ubatch after ubatch; with an ``offset`` also, at each context, tokens for which all FFNs run as well."""
        n_deep = sum(group.kind == 0 for group in self.groups)
        end = perf_counter() + self.seconds / (2 * max(n_deep, 1))
        self._prepare(runs)
        remaining = list(contexts)
        while remaining and self._has_room(1):
            self._ubatch()
            is_last = perf_counter() > end or not self._has_room(2)
            if self.llm.n_tokens >= remaining[0] or is_last:
                remaining = [] if is_last else [context for context in remaining if context > self.llm.n_tokens]
                if offset is not None:
                    with_ffn = runs.copy()
                    with_ffn[:, 1] = True
                    self._decode(with_ffn, offset)
                    self._set_plan(runs)

    def _has_room(self, n_ubatches: int) -> bool:
        """Whether so many ubatches, with tokens decoded behind each, still fit into the context."""
        needed = n_ubatches * (self.n_tokens + self._n_decode + 1)
        return self.llm.n_tokens + needed <= self._size

    def _prefill_groups(self, groups: Sequence[Group] | None = None) -> list[Group]:
        """The groups in prefill, where llama.cpp runs the last layer's FFN for output tokens only: hardly any."""
        last = self.llm.n_layer - 1
        result = []
        for group in self.groups if groups is None else groups:
            if group.kind == 1 and last in group.layers and len(group.layers) > 1:
                result += [replace(group, layers=group.layers[:-1]), replace(group, layers=(last,))]
            else:
                result.append(group)
        return result

    def _mixed(self) -> list[npt.NDArray[np.bool_]]:
        """The full model, half of each group left out, and halves of several: where real plans are.

        In this order one cache serves all: no plan runs an attention that an earlier one left out.
        """
        attention = [group for group in self.groups if group.kind == 0]
        ffn = [group for group in self.groups if group.kind == 1]
        result = []
        runs = self._nothing(True)
        for step in range(len(attention) + 1):
            if step > 0:
                runs = runs.copy()
                runs[list(attention[step - 1].layers[::2]), 0] = False
            result.append(runs)
            if step in (0, len(attention)):
                for group in ffn:
                    halved = runs.copy()
                    halved[list(group.layers[::2]), 1] = False
                    result.append(halved)
        return result

    # -- sliding windows --------------------------------------------------------------------------------------------

    _sliding: tuple[Group, ...] = ()

    def _split_sliding(self, window: int) -> None:
        """Find the layers with a window: which ones these are is known inside llama.cpp only, but they are faster."""
        depth = 2 * self._window_cells(window)
        if depth + self.n_tokens > self._size:
            return  # in such a context a window saves little
        self._prepare(self._nothing(False))
        rest = min(self._eval(self._tokens) for _ in range(3))
        groups: list[Group] = []
        sliding: list[Group] = []
        for group in self.groups:
            times = self._alone(group, depth, rest) if group.kind == 0 and len(group.layers) > 1 else np.ones(1)
            slow = times > math.sqrt(times.min() * times.max())
            if times.max() < _SLIDES * times.min():
                groups.append(group)
            else:
                halves = [Group(0, tuple(np.array(group.layers)[which].tolist())) for which in (slow, ~slow)]
                groups += halves
                sliding.append(halves[1])
        self.groups, self._sliding = groups, tuple(sliding)

    def _alone(self, group: Group, depth: int, rest: float) -> npt.NDArray[np.float64]:
        """Seconds of each attention of a group for a ubatch behind ``depth``; all the same where it would take long."""
        start = perf_counter()
        times: list[float] = []
        for layer in group.layers:
            self._prepare(self._only(group, (layer,)))
            while self.llm.n_tokens < depth - self.n_tokens:
                self._eval(self._tokens)
            times.append(max(min(self._eval(self._tokens) for _ in range(2)) - rest, 1e-9))
            if (perf_counter() - start) * len(group.layers) > self.seconds * len(times):
                return np.ones(1)
        return np.array(times)

    def _window_cells(self, window: int) -> int:
        """KV cells of a layer with a window, as ``llama_kv_cache_iswa`` sizes its cache."""
        return math.ceil((window + self.n_tokens) / CELLS) * CELLS

    # -- the model --------------------------------------------------------------------------------------------------

    def _nothing(self, runs: bool) -> npt.NDArray[np.bool_]:
        """All sublayers that can be skipped run, or none of them; the others always do."""
        flags = np.ones((self.llm.n_layer, 2), np.bool_)
        for group in self.groups:
            flags[list(group.layers), group.kind] = runs
        return flags

    def _only(self, group: Group, layers: Sequence[int]) -> npt.NDArray[np.bool_]:
        flags = self._nothing(False)
        flags[list(layers), group.kind] = True
        return flags

    def _set_plan(self, runs: npt.NDArray[np.bool_]) -> None:
        self._runs = runs
        attention, ffn = (np.flatnonzero(~runs[:, kind]).tolist() for kind in (0, 1))
        self.llm.set_plan(SkipPlan.manual(self.llm.n_layer, attention, ffn))

    def _prepare(self, runs: npt.NDArray[np.bool_]) -> None:
        self.llm.reset()
        self._set_plan(runs)

    def _ubatch(self) -> None:
        time = self._eval(self._tokens)
        self.samples["prefill"].append(Sample(self._runs, self.llm.n_tokens, time))

    def _decode(self, runs: npt.NDArray[np.bool_], offset: str = "") -> None:
        self._set_plan(runs)
        self._eval(self._tokens[:1])
        for _ in range(self._n_decode):
            time = self._eval(self._tokens[:1])
            self.samples["decode"].append(Sample(runs, self.llm.n_tokens, time, offset))

    def _eval(self, tokens: list[int]) -> float:
        start = perf_counter()
        self.llm.eval(tokens)
        _synchronize(self.llm)
        end = perf_counter()
        self.deepest = max(self.deepest, self.llm.n_tokens)
        if self._on_progress is not None:
            self._on_progress(min((end - self._start) / self.seconds, 1.0))
        return end - start


def _contexts(llm: AdaSkipLlama, contexts: Sequence[SupportsIndex] | None) -> tuple[int, ...]:
    if contexts is None:
        return _CONTEXTS
    size = llm.context_size
    try:
        wanted = sorted({operator.index(context) for context in contexts})
    except TypeError as error:
        raise RequestError(f"contexts is {contexts!r}; give numbers of tokens, such as (512, 2048)") from error
    if not wanted or not 1 <= wanted[0] <= wanted[-1] <= size:
        raise RequestError(
            f"cannot measure at contexts of {wanted} tokens; use at least one, from 1 to the model's {size}, or load "
            "the model with a larger n_ctx"
        )
    return tuple(wanted)


@contextmanager
def _set_aside(llm: AdaSkipLlama) -> Iterator[None]:
    """Put the plan back whatever happens, and leave no KV behind."""
    plan = llm.plan
    try:
        yield
    finally:
        llm.reset()
        llm.set_plan(plan)


def _window(llm: AdaSkipLlama) -> int:
    """Tokens in the sliding window of the layers that have one, 0 if none has."""
    import llama_cpp

    return int(llama_cpp.llama_model_n_swa(llm.model))


def _synchronize(llm: AdaSkipLlama) -> None:
    """Wait for the devices: ``llama_decode`` returns before a GPU has finished."""
    import llama_cpp

    llama_cpp.llama_synchronize(llm.ctx)
