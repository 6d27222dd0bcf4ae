"""Predicts how long a phase takes with some sublayers skipped, on a measured machine: start with ``CostModel``."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..errors import PlanError, ProfileError
from .arrays import Count, Flags, Floats, LayerArrays, checked, freeze
from .plan import CELLS, PHASES, Bulk, Phase, SkipPlan
from .settings import FlashAttention, Repack
from .skip_set import SkipSet, marked

_MOST_SECONDS = 1e9  # no time is longer, so sums and ratios of times are finite


@dataclass(frozen=True)
class CostSettings:
    """The machine and the settings with which times were measured. With others, these times do not hold.

    ``Settings`` describes the fields that both have; its ``flash_attn`` is ``flash_attention`` here.

    Attributes:
        cpu: name of the CPU.
        devices: names of ggml's devices, such as ``("CPU",)``.
        n_gpu_layers: layers on a GPU; -1 for all.
        type_k: type of K in the cache, such as ``"F16"``.
        type_v: type of V in the cache.
        swa_full: whether the cache holds all tokens of sliding windows.
        llama_cpp_python: release of llama-cpp-python.
        n_cores: physical cores that the process could use.
    """

    cpu: str
    devices: tuple[str, ...]
    n_gpu_layers: int
    n_threads: int
    n_threads_batch: int
    n_batch: Count
    n_ubatch: int
    flash_attention: FlashAttention
    type_k: str
    type_v: str
    swa_full: bool
    llama_cpp_python: str
    repack: Repack = True  # missing in older profiles, which were measured with it
    unpack: tuple[str, ...] = ()  # missing in older profiles, which were measured without it
    n_cores: int = 0  # missing in older profiles

    @property
    def words(self) -> str:
        """All values but the release, in one line of words."""
        threads = " and ".join(map(str, sorted({self.n_threads, self.n_threads_batch})))
        layers = {-1: "all", 0: "no"}.get(self.n_gpu_layers, self.n_gpu_layers)
        devices = ", ".join(each for each in self.devices if each not in ("CPU", self.cpu))
        offloaded = f", {layers} layers offloaded to: {devices}" if devices else ""
        flash = "in prompts alone" if self.flash_attention == "prompts" else "on" if self.flash_attention else "off"
        repacked = {True: "repacked", "all": "repacked, Q5_0 too"}.get(self.repack, "as in the file")
        unpacked = f", {' and '.join(self.unpack)} unpacked" if self.unpack else ""
        return (
            f"{self.cpu}, {threads} thread{'' if threads == '1' else 's'}{offloaded}, batches of {self.n_batch}, "
            f"ubatches of {self.n_ubatch}, KV in {self.type_k} and {self.type_v}, flash attention "
            f"{flash}, weights {repacked}{unpacked}"
        )


@dataclass(frozen=True, eq=False)
class PhaseCost(LayerArrays):
    """Seconds of a ubatch. The arrays are float64, finite, not negative, read-only; else a ProfileError."""

    n_tokens: Count  # 1 in decode
    fixed: float  # embedding, overhead of the graph, sublayers that cannot be skipped; in decode the output head too
    fixed_growth: float  # what ``fixed`` grows by per KV cell that is read
    base: Floats  # [n_layer, 2], attention and FFN: each sublayer without growth; 0 if it cannot be skipped
    growth: Floats  # [n_layer]: what each attention grows by per KV cell that it reads
    kept: Floats  # [n_layer]: norm, projections and stores of K and V that a skipped attention keeps; 0 in decode
    each_map: float = 0.0  # one linear map that stands in for a layer; 0 in decode, and if it was not measured

    def __post_init__(self) -> None:
        shapes = {"base": (np.float64, "n_layer 2"), **dict.fromkeys(("growth", "kept"), (np.float64, "n_layer"))}
        arrays = checked(self, ProfileError, "the cost model is damaged; calibrate again", shapes)
        times = np.hstack([self.fixed, self.fixed_growth, self.each_map, *(each.ravel() for each in arrays.values())])
        if not ((times >= 0) & (times < _MOST_SECONDS)).all():
            raise ProfileError("the cost model has an impossible time; calibrate again")
        freeze(self, **arrays)

    def seconds(self, what: "Computed", cells: Floats, n_cells: Floats) -> Floats:
        """Predict seconds, [n]. Attentions read ``cells`` KV cells, [n, n_layer]; without windows ``n_cells``, [n]."""
        grows = np.where(what.runs[:, 0], self.growth, 0.0)
        computed = self.base[what.runs].sum() + self.kept[what.kept].sum() + self.each_map * what.n_maps
        return np.asarray(self.fixed + self.fixed_growth * n_cells + cells @ grows + computed)


@dataclass(frozen=True)
class Computed:
    """What a ubatch computes."""

    runs: Flags  # bool [n_layer, 2]: the sublayers that run
    kept: Flags  # bool [n_layer]: the skipped attentions whose K and V are kept
    limit: Floats | None = None  # float64 [n_layer]: most KV cells per attention; None for the model's own limits
    n_maps: int = 0  # linear maps that stand in for layers

    def unread(self, n_layer_kv: int) -> "Computed":
        """Return the part that runs if no output is read: it ends at the last K and V that are stored."""
        runs, kept = self.runs.copy(), self.kept.copy()
        kept[n_layer_kv:] = False
        stored = np.flatnonzero((runs[:, 0] | kept)[:n_layer_kv])
        last = int(stored[-1]) if stored.size else 0
        kept[last] |= stored.size > 0
        runs[last:] = False
        return Computed(runs, kept, self.limit, self.n_maps)


@dataclass(frozen=True, eq=False)
class CostModel(LayerArrays):
    """Predicted times of one model on one machine. An impossible shape or value raises a ProfileError.

    Attributes:
        settings: machine and settings of the measurement.
        prefill: cost of a ubatch of ``n_ubatch`` tokens of a prompt whose outputs are not read.
        decode: cost of one token.
        limit: float64 ``[n_layer]``: KV cells from which an attention takes no longer; infinite or NaN for no window.
        n_layer_kv: number of layers up to the last one with KV of its own. The layers above it compute nothing in a
            ubatch without outputs.
        deepest: longest context that was measured, in tokens. Times beyond it are extrapolated.
    """

    settings: CostSettings
    prefill: PhaseCost
    decode: PhaseCost
    limit: Floats
    n_layer_kv: Count
    deepest: int

    def __post_init__(self) -> None:
        limit = np.array(self.limit, np.float64)
        limit[np.isnan(limit)] = np.inf
        if self.prefill.base.shape != self.decode.base.shape or limit.shape != (len(self.prefill.base),):
            raise ProfileError("the cost model's phases differ in the number of layers; calibrate again")
        if not (self.decode.n_tokens == 1 and self.n_layer_kv <= len(limit) and (limit > 0).all()):
            raise ProfileError("the cost model has an impossible window, batch or layer; calibrate again")
        freeze(self, limit=limit)

    def __repr__(self) -> str:
        return f"CostModel(n_layer={self.n_layer}, cpu={self.settings.cpu!r}, deepest={self.deepest})"

    def seconds(
        self, skip: SkipPlan | SkipSet | Flags | None, context: int, phase: Phase, *, around: Bulk | None = None
    ) -> float:
        """Predict the seconds of a whole prompt or of one decoded token. An impossible argument raises a PlanError.

        Args:
            skip: the skipped sublayers: a set, bool ``[n_layer, 2]``, or None for the whole model. Or a plan, which has
                its own bulk. Its online stage is left out, and its schedule counts with the last set.
            context: tokens of the prompt, or tokens before the decoded one.
            phase: ``"prefill"`` for a prompt that skips them everywhere, ``"bulk"`` for a prompt that skips them in its
                bulk, ``"decode"`` for a token.
            around: for phase ``"bulk"``: head, tail, windows and fits; None for the defaults. Its set is ignored. With
                fits, a map stands in for each layer of which a sublayer is skipped.
        """
        if not context >= (0 if phase == "decode" else 1):
            raise PlanError(f"the context is {context!r} tokens; give the length of the prompt, 1 or more")
        if phase not in PHASES:
            raise PlanError(f"unknown phase {phase!r}; use one of: {', '.join(PHASES)}")
        if phase == "decode":
            runs = self._runs(skip.skipped("decode") if isinstance(skip, SkipPlan) else skip)
            return self._read(Computed(runs, np.zeros(self.n_layer, np.bool_)), context, context + 1)
        if isinstance(skip, SkipPlan):
            return self._prompt(self._runs(skip.prefill), self._runs(skip.skipped("bulk")), skip.bulk, context)
        if phase == "prefill":
            return self._prompt(self._runs(skip), self._runs(skip), None, context)
        around = around or Bulk(SkipSet.none(self.n_layer))
        return self._prompt(self._runs(None), self._runs(skip), around, context)

    def speedup(self, plan: SkipPlan, context: int, phase: Phase) -> float:
        """Predict how many times as fast as the whole model a plan is. The arguments are those of ``seconds``."""
        return self.seconds(None, context, phase) / self.seconds(plan, context, phase)

    def seconds_saved(self, context: int, phase: Phase) -> Floats:
        """Predict the seconds that skipping each sublayer alone saves, float64 ``[n_layer, 2]``."""
        alone = np.eye(2 * self.n_layer, dtype=np.bool_).reshape(-1, self.n_layer, 2)
        seconds = [self.seconds(skip, context, phase) for skip in alone]
        return np.maximum(self.seconds(None, context, phase) - np.reshape(seconds, (-1, 2)), 0.0)

    def _runs(self, skip: SkipSet | Flags | None) -> Flags:
        flags, shape = skip.skip if isinstance(skip, SkipSet) else skip, [self.n_layer, 2]
        runs = np.ones(shape, np.bool_) if flags is None else ~np.asarray(flags, np.bool_)
        if [*runs.shape] != shape:
            raise PlanError(f"the skip set has the shape {runs.shape}, not {shape}; use the profile of this model")
        return runs

    def _in_bulk(self, runs: Flags, bulk: Bulk) -> Computed:
        blocks = np.ceil((bulk.head + bulk.window_size - 1 + self.prefill.n_tokens) / CELLS)
        narrow = marked(self.n_layer, bulk.windowed, ())[:, 0]
        limit = np.where(narrow, np.minimum(self.limit, blocks * CELLS), self.limit)
        n_maps = int((~runs[: self.n_layer_kv - 1]).any(axis=1).sum()) if bulk.refit else 0
        return Computed(runs, ~runs[:, 0], limit, n_maps)

    def _prompt(self, runs: Flags, in_bulk: Flags, bulk: Bulk | None, context: int) -> float:
        """Predict the seconds of a prompt; its bulk runs ``in_bulk``, the rest ``runs``."""
        whole, seconds, start = Computed(runs, np.zeros(self.n_layer, np.bool_)), 0.0, 0
        begin, end = bulk.span(0, context) if bulk else (0, 0)
        if bulk and end:
            seconds = self._unread(whole, 0, begin)
            narrow = replace(whole, limit=self._in_bulk(in_bulk, bulk).limit) if bulk.narrows else whole
            for at, stop, is_whole in bulk.pieces(begin, end, is_fitted=False):
                first = at + bulk.first_batch(at, stop - at, self.prefill.n_tokens)
                for piece in ((at, stop),) if is_whole else ((at, first), (first, stop)):
                    what = self._in_bulk(in_bulk, bulk) if not is_whole else narrow if at > bulk.head else whole
                    seconds += self._unread(what, *piece)
            start = context - bulk.last
            seconds += self._unread(narrow, end, start)
        if self.n_layer_kv < self.n_layer:  # AdaSkipLlama then computes the last token by itself
            seconds += self._unread(whole, start, context - 1)
            start = context - 1
        last, _ = self._cut(start, context)[-1]
        return seconds + self._unread(whole, start, last) + self._read(whole, last, context)

    def _cut(self, start: int, end: int) -> list[tuple[int, int]]:
        """Cut positions into batches of ``n_batch``, and these into ubatches; return begin and end of each ubatch."""
        size, piece = self.prefill.n_tokens, self.settings.n_batch
        pieces = [(begin, min(begin + piece, end)) for begin in range(start, end, piece)]
        return [(at, min(at + size, stop)) for begin, stop in pieces for at in range(begin, stop, size)]

    def _unread(self, what: Computed, start: int, end: int) -> float:
        """Predict the seconds of positions without outputs."""
        cut = np.array(self._cut(start, end)).reshape(-1, 2)
        cells, left = self._cells(cut[:, 1], what.limit), what.unread(self.n_layer_kv)
        one, whole = self.decode.seconds(left, *cells), self.prefill.seconds(left, *cells)
        return float(self._between(one, whole, cut[:, 1] - cut[:, 0]).sum())

    def _read(self, what: Computed, start: int, end: int) -> float:
        """Predict the seconds of a ubatch whose last token has an output, and alone runs last FFN and output head."""
        cells = self._cells(np.array([end]))
        one = self.decode.seconds(what, *cells)
        runs = what.runs.copy()
        runs[-1, 1] = False
        whole = self.prefill.seconds(Computed(runs, what.kept), *cells)
        whole += self.decode.fixed + self.decode.base[-1, 1] * what.runs[-1, 1]
        return float(self._between(one, whole, np.array([end - start]))[0])

    def _cells(self, ends: npt.NDArray[np.int_], limit: Floats | None = None) -> tuple[Floats, Floats]:
        """Return the KV cells that each attention reads, and one without a window, in ubatches that end at ``ends``."""
        n_cells = np.ceil(ends / CELLS) * CELLS
        return np.minimum(n_cells[:, None], self.limit if limit is None else limit), n_cells

    def _between(self, one: Floats, whole: Floats, n_tokens: npt.NDArray[np.int_]) -> Floats:
        """Interpolate the seconds of ubatches of ``n_tokens`` between those of one token and of a whole ubatch."""
        return one + (whole - one) * (n_tokens - 1) / max(self.prefill.n_tokens - 1, 1)
