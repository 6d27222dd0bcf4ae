"""Measures a cost model, for ``calibrate`` and ``tune``: ``measure_cost``. docs/dev/cost-model.md explains it."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter

import numpy as np

from ..engine.llama import AdaSkipLlama
from ..engine.settings import cost_settings
from ..errors import RequestError
from ..model.arrays import Flags
from ..model.cost_model import Computed, CostModel
from ..model.plan import CELLS, Bulk, Phase, SkipPlan
from ..model.skip_set import KINDS, SkipSet, marked
from .cost_fit import Group, Sample, fit

_LEAST_ROUNDS, _MAX_ROUNDS = 3, 12  # one round alone would take a busy moment of the machine for a slow sublayer
_N_DECODE = 12  # tokens timed per plan and round, after an untimed one that builds the plan's graph
_SUBSET = 10  # growth with the context is measured on one attention in 10, so deep contexts take a tenth of the time


def measure_cost(
    llm: AdaSkipLlama,
    *,
    contexts: Sequence[int] = (512, 2048, 6144),
    seconds: float = 15.0,
    rank: int = 0,
    on_progress: Callable[[float], object] = lambda fraction: None,
) -> CostModel:
    """Measure the time of each sublayer on this machine, which should be idle, with this model's settings.

    3 to 12 rounds take ``seconds``, at most half of them on deep contexts. Attentions are timed at ``contexts``, in
    tokens, ascending, as far as the model's context allows: the first and the last, and those between if there is time.
    Between them the cache is filled with tokens that only have K and V. If a sublayer cannot be skipped, all tokens are
    read, as long as there is time. Linear maps of ``rank`` are timed too; 0 for none. At the end the plan is as before,
    and the KV cache empty, also after an error or Ctrl-C. Raises RequestError if the context is too small.
    """
    with set_aside(llm):
        return _Measurement(llm, contexts, seconds, rank, on_progress).run()


class _Measurement:
    """The rounds that time ubatches without outputs, and tokens. With ``kept``, skipped attentions keep K and V."""

    def __init__(
        self, llm: AdaSkipLlama, contexts: Sequence[int], seconds: float, rank: int, progress: Callable[[float], object]
    ) -> None:
        self.llm, self.contexts, self.seconds, self.rank, self.on_progress = llm, contexts, seconds, rank, progress
        self.groups, self._size = _groups(llm), llm.context_size
        self._rest_grows = not can_fill(llm)  # then time the rest at all contexts
        self.samples: dict[Phase, list[Sample]] = {"prefill": [], "decode": []}
        n_mixed = len(self._mixed())
        self._n_decode = max(min(_N_DECODE, self._size // (2 * n_mixed + 2) - 1), 1)
        reserve = (self._n_decode + 1) * max(n_mixed, len(contexts) + 1)
        self.n_tokens = min(int(llm.context_params.n_ubatch), llm.n_batch, self._size - reserve)
        if self.n_tokens < 1:
            n_ctx = max(4 * reserve, 2 * CELLS)
            raise RequestError(f"a context of {self._size} tokens is too small; use n_ctx={n_ctx} or more")
        self._tokens: list[int] = np.random.default_rng(0).integers(0, llm.n_vocab(), size=self.n_tokens).tolist()
        self._start = perf_counter()

    def run(self) -> CostModel:
        self._prepare(self._all(True))
        self._eval("prefill", counts=False)  # loads the weights, fills caches, starts threads
        self._eval("decode", counts=False)
        self._start = perf_counter()
        for n_rounds in range(1, _MAX_ROUNDS + 1):
            self._round()
            if n_rounds >= _LEAST_ROUNDS and (perf_counter() - self._start) * (n_rounds + 1) / n_rounds > self.seconds:
                break
        fits = [self._fit(self.groups)]
        if self.llm.context_params.swa_full:  # windows have all cells then, and some backends compute masked ones too
            fits.append(self._fit([replace(group, limit=math.inf) for group in self.groups]))
        return min(fits, key=lambda fitted: fitted[1])[0]

    def _fit(self, groups: Sequence[Group]) -> tuple[CostModel, float]:
        n_layer, in_decode = self.llm.n_layer, [group for group in groups if group.elidable]
        rest_grows = self._rest_grows or len(in_decode) < len(groups)
        prefill, error = fit(self.samples["prefill"], groups, n_layer, self.n_tokens, rest_grows=self._rest_grows)
        decode, error_decode = fit(self.samples["decode"], in_decode, n_layer, 1, rest_grows=rest_grows)
        limits = np.full(n_layer, math.inf)
        for group in groups:
            if group.kind == 0:
                limits[list(group.layers)] = group.limit
        deepest = max(sample.end for samples in self.samples.values() for sample in samples)
        model = CostModel(cost_settings(self.llm), prefill, decode, limits, self.llm.n_layer_kv, deepest)
        return model, error + error_decode

    def _round(self) -> None:
        """Time every plan once, so that a slow moment of the machine affects all alike."""
        everything = self._all(True)
        self._prepare(everything)
        self._eval("prefill")
        for runs in self._mixed():
            self._set_plan(everything, runs)
            self._decode()
        for group in self.groups:
            if group.kind == 1 and self._inner(group):
                # They only run if K and V of later layers are stored.
                self._prepare(self._only(group, group.layers, kept=True), kept=True)
                self._eval("prefill")
        for maps in (False, True)[: 1 + (self.rank > 0)]:
            self._prepare(self._all(False, kept=True), kept=True, maps=maps)
            self._eval("prefill")
        for group in self.groups:
            if group.kind == 0 and group.elidable:  # compared with the subsets below, this gives the cost of K and V
                self._prepare(self._only(group, group.layers))
                self._eval("prefill")
        rest = self._all(False)
        rest[self.llm.n_layer_kv - 1, 0] = True  # its K and V make everything that cannot be skipped run
        self._prepare(rest)
        self._deeper(self.contexts if self._rest_grows else self.contexts[:1], None)
        for index, group in enumerate(self.groups):
            if group.kind == 0:
                layers = self._inner(group) or group.layers
                some = layers[:: math.ceil(len(layers) / math.ceil(len(layers) / _SUBSET))]
                # K and V of the others are kept, because sublayers after the last K and V do not run.
                decode = self._only(group, some) | np.array([False, True]) if group.elidable else None
                self._prepare(self._only(group, some, kept=True), decode, kept=True)
                self._deeper(self.contexts, f"subset of {index}" if group.elidable else None)

    def _deeper(self, contexts: Sequence[int], offset: str | None) -> None:
        """Time the ubatch before each context; with an ``offset``, time tokens at each context too.

        If the cache cannot be filled, time ubatch after ubatch up to the last context.
        """
        end = perf_counter() + self.seconds / (2 * max(sum(group.kind == 0 for group in self.groups), 1))
        remaining = list(contexts)
        while remaining and self._has_room(1):
            n_missing = min(remaining[0], self._size - self._n_decode - 1) - self.n_tokens - self.llm.n_tokens
            if n_missing > 0 and not self._rest_grows:
                fill(self.llm, (self._tokens * math.ceil(n_missing / self.n_tokens))[:n_missing])
            self._eval("prefill")
            deeper = [context for context in remaining if context > self.llm.n_tokens] if self._has_room(2) else []
            if perf_counter() > end:
                deeper = [] if self._rest_grows else deeper[-1:]  # a filled cache gives the last context in any case
            if self.llm.n_tokens >= remaining[0] or not deeper:
                remaining = deeper
                if offset is not None:
                    self._decode(offset)

    def _has_room(self, n_ubatches: int) -> bool:
        return self.llm.n_tokens + n_ubatches * (self.n_tokens + self._n_decode + 1) <= self._size

    def _inner(self, group: Group) -> tuple[int, ...]:
        """Return the layers of a group whose sublayers run in ubatches without outputs."""
        return tuple(layer for layer in group.layers if layer < self.llm.n_layer_kv - 1)

    def _mixed(self) -> list[Flags]:
        """Return the whole model and halves of groups, in an order in which no skipped attention runs later."""

        def halved(runs: Flags, group: Group) -> Flags:
            fewer: Flags = runs.copy()
            fewer[list(group.layers[::2]), group.kind] = False
            return fewer

        attention, ffn = ([each for each in self.groups if each.elidable and each.kind == kind] for kind in (0, 1))
        result = list(itertools.accumulate(attention, halved, initial=self._all(True)))
        result += [halved(runs, group) for runs in result[:: max(len(attention), 1)] for group in ffn]
        return sorted(result, key=lambda runs: -int(runs[:, 0].sum()))

    def _all(self, runs: bool, *, kept: bool = False) -> Flags:
        """Return flags: the sublayers that can be skipped run as ``runs`` says, all others run."""
        flags = np.ones((self.llm.n_layer, 2), np.bool_)
        for group in self.groups:
            flags[list(group.layers), group.kind] = runs or not (group.elidable or kept)
        return flags

    def _only(self, group: Group, layers: Sequence[int], *, kept: bool = False) -> Flags:
        flags = self._all(False, kept=kept or not group.elidable)
        flags[list(layers), group.kind] = True
        return flags

    def _prepare(self, prefill: Flags, decode: Flags | None = None, *, kept: bool = False, maps: bool = False) -> None:
        """Empty the cache and set a plan; decode is by default as prefill, or with K and V kept the whole model."""
        self.llm.reset()
        as_prefill = self._all(True) if kept else prefill
        self._set_plan(prefill, as_prefill if decode is None else decode, kept=kept, maps=maps)

    def _set_plan(self, prefill: Flags, decode: Flags, *, kept: bool = False, maps: bool = False) -> None:
        none = np.zeros(self.llm.n_layer, np.bool_)
        # The map of an FFN stands for its whole layer. Those after the last K and V are not computed.
        mapped = np.flatnonzero(~prefill[: self.llm.n_layer_kv - 1, 1] & maps)
        left = Computed(prefill, ~prefill[:, 0] if kept else none, n_maps=len(mapped)).unread(self.llm.n_layer_kv)
        self._what: dict[Phase, Computed] = {"prefill": left, "decode": Computed(decode, none)}
        of_prompt, of_decode = (SkipSet(~runs, np.ones(runs.shape)) for runs in (prefill, decode))
        if mapped.size:
            down = np.zeros((self.llm.n_layer, 2, self.rank, self.llm.n_embd()), np.float32)
            down[mapped, 1] = 1e-3
            of_prompt = replace(of_prompt, down=down, up=np.ascontiguousarray(down.swapaxes(2, 3)))
        # Prefill, which does not run, gets the decode set: else the next ubatch would read cached tokens again.
        plan = SkipPlan(of_decode, of_decode, bulk=Bulk(of_prompt)) if kept else SkipPlan(of_prompt, of_decode)
        self.llm.set_plan(plan)

    def _decode(self, offset: str = "") -> None:
        for i in range(self._n_decode + 1):
            self._eval("decode", offset, counts=i > 0)

    def _eval(self, phase: Phase, offset: str = "", *, counts: bool = True) -> None:
        evaluate, n_tokens = (self.llm.eval_decode, 1) if phase == "decode" else (self.llm.eval_bulk, self.n_tokens)
        start = perf_counter()
        evaluate(self._tokens[:n_tokens])
        self.llm.synchronize()  # llama_decode returns before a GPU has finished
        end = perf_counter()
        if counts:
            self.samples[phase].append(Sample(self._what[phase], self.llm.n_tokens, end - start, offset))
        self.on_progress(min((end - self._start) / self.seconds, 1.0))


def _groups(llm: AdaSkipLlama) -> list[Group]:
    shapes: defaultdict[tuple[int, int, int, bool], list[int]] = defaultdict(list)
    for each in llm.sublayers:
        if each.in_bulk:
            shapes[KINDS.index(each.kind), each.shape, each.window, each.skippable].append(each.layer)
    n_ubatch, groups = min(int(llm.context_params.n_ubatch), llm.n_batch), []
    for (kind, _, window, elidable), layers in sorted(shapes.items()):
        cells = math.ceil((window + n_ubatch) / CELLS) * CELLS  # as llama_kv_cache_iswa sizes the cache of a window
        limit = cells if window and cells < llm.context_size else math.inf
        groups.append(Group(kind, tuple(layers), limit, elidable))
    return groups


def can_fill(llm: AdaSkipLlama) -> bool:
    """Return whether the bulk of a prompt can skip every sublayer, as :func:`fill` does."""
    return all(row.in_bulk for row in llm.sublayers)


def fill(llm: AdaSkipLlama, tokens: Sequence[int]) -> None:
    """Put K and V of tokens into the cache at little cost, to time what follows. The plan in force may read them."""
    plan, none = llm.plan, SkipSet.none(llm.n_layer)
    skip = marked(llm.n_layer, *([row.layer for row in llm.sublayers if row.kind == kind] for kind in KINDS))
    filling = replace(plan or SkipPlan(none, none), bulk=Bulk(SkipSet(skip, np.ones(skip.shape))))
    llm.set_plan(filling, readable=() if plan is None else (plan,))
    llm.eval_bulk(tokens)
    llm.set_plan(plan, readable=(filling,))


@contextmanager
def set_aside(llm: AdaSkipLlama) -> Iterator[None]:
    """Take the draft model off; put it and the plan back at the end, also after an error, and drop the KV cache."""
    plan, readable, max_loss, draft_model = llm.plan, llm.readable, llm.max_loss, llm.draft_model
    llm.draft_model = None
    try:
        yield
    finally:
        llm.draft_model = draft_model
        llm.reset()
        if max_loss is None:
            llm.set_plan(plan, readable=readable)
        else:
            llm.set_plan("auto", max_loss=max_loss)
