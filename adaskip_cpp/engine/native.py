"""Calls native/adaskip.h through cffi for ``llama.py``: plain data in and out, error codes as exceptions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from .. import errors
from ..model.arrays import Flags, Floats, Vectors
from ..model.plan import PHASES, OnlineScale, Phase, SkipPlan
from ..model.skip_set import KINDS, Kind, SkipSet
from .binding import ffi, last_error, lib
from .statistics import StatisticsSink, batch_of

_ONLINE_SCALES: tuple[OnlineScale, ...] = ("none", "paper", "median")  # in the order of enum adaskip_online_scale
_WAYS_OUT = {
    "NOT_SKIPPABLE": (errors.NotSkippableError, "leave it out of the plan ('adaskip-cpp inspect' lists what can be)."),
    "COMPENSATION": (errors.PlanError, "give finite numbers, and scales above 0 (1 for no compensation)."),
    "KV_ELIDED": (errors.PlanError, "open the model without plan=, then set_plan() takes any plan."),
    "KV_STALE": (errors.StateError, "evaluate the tokens from there on again, or call reset()."),
    "MEMORY": (errors.NativeError, "free memory, or use a smaller n_ctx, n_ubatch or rank of maps, or repack=True."),
    "SAMPLER": (errors.RequestError, "change the grammar, or settings such as temperature and repeat_penalty."),
    "SEQUENCES": (errors.PlanError, "leave it out of the plan, or open the model without embedding=True."),
}


@dataclass(frozen=True)
class Sublayer:
    """A sublayer of a model, as found in its compute graph.

    Attributes:
        layer: the layer, counted from 0.
        kind: ``"attention"`` or ``"ffn"``.
        skippable: whether every phase can skip it.
        in_bulk: whether the bulk of a prompt can skip it.
        reason: the reason if it is not skippable, else "".
        shape: a number that sublayers of equal weights, cache and window share; -1 if it was not found.
        window: tokens that the model's own attention sees; 0 for all.
        windowable: whether its layer may be in ``Bulk.windowed``. A window of the model itself can only become smaller.
    """

    layer: int
    kind: Kind
    skippable: bool
    in_bulk: bool
    reason: str
    shape: int
    window: int
    windowable: bool


@dataclass(frozen=True)
class Counters:
    """Exact counts of a context since it was created.

    Attributes:
        nodes_full: nodes of the last graph, as llama.cpp built it.
        nodes: nodes of the last graph, as it was computed.
        splits: parts of the last graph, each on one device.
        graphs_built: graphs that were built.
        graphs_reused: evaluations that used the graph before.
        kv_bytes: bytes of KV cache and recurrent state, on all devices.
        statistics_bytes: bytes of statistics that the host has read.
    """

    nodes_full: int
    nodes: int
    splits: int
    graphs_built: int
    graphs_reused: int
    kv_bytes: int
    statistics_bytes: int


@dataclass(frozen=True)
class OnlineResult:
    """The result of the online stage in one request. Values are NaN for FFNs that were not observed.

    Attributes:
        n_tokens: tokens that the stage has observed, at most its window.
        similarity: float64 ``[n_layer]``: mean IO similarity of each FFN over these tokens.
        norm_ratio: float64 ``[n_layer]``: ``||V||_F / ||U||_F`` of each FFN over these tokens.
        scale: float64 ``[n_layer]``: compensation of each FFN, if it is skipped.
        ffn: layers whose FFN is skipped from now on; () until all tokens are observed.
    """

    n_tokens: int
    similarity: Floats
    norm_ratio: Floats
    scale: Floats
    ffn: tuple[int, ...]


@contextmanager
def elide_kv(skipped: Flags | None) -> Iterator[None]:
    """Contexts created inside have no KV for the attentions in ``skipped``, bool [n_layer]; None changes nothing."""
    if skipped is not None:
        flags = np.ascontiguousarray(skipped, dtype=np.uint8)
        lib.adaskip_elide_kv(ffi.from_buffer("uint8_t[]", flags), len(flags))
    try:
        yield
    finally:
        lib.adaskip_elide_kv(ffi.NULL, 0)


class NativeContext:
    """Our side of the ``llama_context`` at ``address``, which must outlive it. Raises ``_WAYS_OUT`` or NativeError."""

    def __init__(self, address: int) -> None:
        self._ctx = ffi.cast("struct llama_context *", address)
        self.callback: Any = None  # of statistics; None if none are collected
        self.drops_logits = False  # whether statistics are collected without computing logits
        self._error: BaseException | None = None
        self.n_layer: int = self._check(lib.adaskip_n_layer(self._ctx))
        self.n_layer_kv: int = self._check(lib.adaskip_n_layer_kv(self._ctx))  # up to the last that has KV of its own
        self.n_positions: int = self._check(lib.adaskip_n_positions(self._ctx))  # that were learned; 0 for any number

    def _check(self, code: int) -> int:
        if code >= 0:
            return code
        message = last_error()
        for name, (error, way_out) in _WAYS_OUT.items():
            if code == getattr(lib, f"ADASKIP_ERROR_{name}"):
                raise error(f"{message}; {way_out}")
        raise errors.NativeError(f"{message}; this is a bug in adaskip-cpp, please report it with the model's name.")

    def raise_failure(self, error: RuntimeError) -> NoReturn:
        """Raise the reason why a call of llama.cpp failed with ``error``: ours if there is one, else ``error``."""
        try:
            self._check(lib.adaskip_take_failure(self._ctx))
        except errors.AdaSkipError as ours:
            raise ours from error
        way_out = "check that n_ctx and memory are enough, or open with verbose=True to see more"
        raise errors.NativeError(f"llama.cpp failed: {error}; {way_out}.") from error

    def sublayers(self) -> tuple[Sublayer, ...]:
        rows = ffi.new("struct adaskip_sublayer[]", 2 * self.n_layer)
        self._check(lib.adaskip_sublayers(self._ctx, rows, len(rows)))

        def read(row: Any) -> Sublayer:
            may, reason = (bool(row.skippable), bool(row.in_bulk)), ffi.string(row.reason).decode()
            return Sublayer(row.layer, KINDS[row.kind], *may, reason, row.shape, row.window, bool(row.windowable))

        return tuple(map(read, rows))

    def set_plan(self, plan: SkipPlan | None, tag: int, readable: Sequence[int] = ()) -> None:
        """Put a plan in force, or nothing on an error; :meth:`plan_tag` returns its tag.

        ``readable`` has ids of other plans' bulk sets (:meth:`bulk_set_ids`): positions computed under them may be read
        too. Tags are above 0; only the whole model (None) without ``readable`` has tag 0.
        """
        target = ffi.new("struct adaskip_plan *")
        _owners = [] if plan is None else _fill_plan(target, plan)
        ids = ffi.new("uint64_t[]", list(readable))
        target.tag, target.readable, target.n_readable = tag, ids, len(ids)
        is_whole = plan is None and not readable
        self._check(lib.adaskip_set_plan(self._ctx, ffi.NULL if is_whole else target))

    def bulk_set_ids(self, plans: Sequence[SkipPlan]) -> list[int]:
        """Check bulk sets and windows of plans; return their ids, 0 if nothing is skipped. Equal ones share an id."""
        targets, found = ffi.new("struct adaskip_plan[]", len(plans)), ffi.new("uint64_t[]", len(plans))
        _owners = [_fill_bulk(target, plan) for target, plan in zip(targets, plans, strict=True)]
        self._check(lib.adaskip_bulk_set_ids(self._ctx, targets, found, len(plans)))
        return list(found)

    def refit(self, layer: int, kind: int, up: Vectors) -> None:
        self._check(lib.adaskip_refit(self._ctx, layer, kind, ffi.from_buffer("float[]", up), up.size))

    def plan_tag(self) -> int:
        tag = ffi.new("uint64_t *")
        self._check(lib.adaskip_get_plan_tag(self._ctx, tag))
        return int(tag[0])

    def online(self) -> OnlineResult:
        similarity, norm_ratio, scale = learned = np.empty((3, self.n_layer))
        added = np.zeros(self.n_layer, np.uint8)
        state = ffi.new("struct adaskip_online_state *")
        state.similarity, state.norm_ratio, state.scale = (ffi.from_buffer("double[]", row) for row in learned)
        state.added = ffi.from_buffer("uint8_t[]", added)
        self._check(lib.adaskip_get_online(self._ctx, state))
        return OnlineResult(state.n_tokens, similarity, norm_ratio, scale, tuple(np.flatnonzero(added).tolist()))

    def begin_request(self) -> None:
        self._check(lib.adaskip_begin_request(self._ctx))

    def elided_kv(self) -> tuple[int, ...]:
        elided = np.zeros(self.n_layer, np.uint8)
        self._check(lib.adaskip_get_elided_kv(self._ctx, ffi.from_buffer("uint8_t[]", elided), self.n_layer))
        return tuple(np.flatnonzero(elided).tolist())

    def set_phase(self, phase: Phase, *, narrow: bool = False) -> None:
        """Set the phase of the next tokens. With ``narrow``, a bulk skips nothing and has its windows alone."""
        self._check(lib.adaskip_set_phase(self._ctx, lib.ADASKIP_PHASE_NARROW if narrow else PHASES.index(phase)))

    def counters(self) -> Counters:
        c = ffi.new("struct adaskip_counters *")
        self._check(lib.adaskip_get_counters(self._ctx, c))
        graphs = c.n_graphs_built, c.n_graphs_reused
        return Counters(c.n_nodes_full, c.n_nodes, c.n_splits, *graphs, c.n_bytes_kv, c.n_bytes_statistics)

    def start_statistics(
        self, sink: StatisticsSink, *, keep_logits: bool, activations: bool, of_bulk: bool = False
    ) -> None:
        """Pass each ubatch's statistics to ``sink``; :meth:`raise_pending` raises its errors. Flags: see adaskip.h."""

        def keep(kind: Any, value: BaseException, traceback: Any) -> None:
            if self._error is None:
                self._error = value

        def deliver(statistics: Any, user_data: Any) -> None:
            if self._error is None:
                sink(batch_of(statistics))

        wanted = {"ON": True, "VECTORS": not of_bulk, "ALL_TOKENS": not keep_logits, "ACTIVATIONS": activations}
        wanted["OF_BULK"] = of_bulk
        flags = sum(getattr(lib, f"ADASKIP_STATISTICS_{name}") for name, on in wanted.items() if on)
        callback = ffi.callback("adaskip_statistics_callback", deliver, onerror=keep)
        self._check(lib.adaskip_set_statistics(self._ctx, flags, callback, ffi.NULL))
        self.callback, self._error, self.drops_logits = callback, None, not keep_logits

    def stop_statistics(self) -> None:
        self._check(lib.adaskip_set_statistics(self._ctx, 0, ffi.NULL, ffi.NULL))
        self.callback, self.drops_logits = None, False

    def raise_pending(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def kv_valid(self, phase: Phase, n: int) -> int:
        """Return how many of the first ``n`` positions this phase may read: n, or the first one that it may not."""
        position = ffi.new("int32_t *")
        self._check(lib.adaskip_kv_first_stale(self._ctx, 0, PHASES.index(phase), position))
        return min(n, int(position[0]))

    @property
    def can_move(self) -> bool:
        return bool(self._check(lib.adaskip_can_move(self._ctx)))

    def set_flash_least(self, n: int) -> None:
        self._check(lib.adaskip_set_flash_least(self._ctx, n))

    def unpackable(self) -> dict[str, int]:
        from gguf import GGMLQuantizationType

        found = ffi.new("int64_t[]", lib.ADASKIP_N_TYPES)
        self._check(lib.adaskip_unpackable(self._ctx, found, len(found)))
        return {GGMLQuantizationType(type_id).name: n for type_id, n in enumerate(found) if n}

    def repackable(self) -> int:
        found = ffi.new("int64_t *")
        self._check(lib.adaskip_repackable(self._ctx, found))
        return int(found[0])

    def repack(self) -> None:
        self._check(lib.adaskip_repack(self._ctx))

    def set_unpacked(self, types: int) -> None:
        self._check(lib.adaskip_set_unpacked(self._ctx, types))

    def set_most_moves(self, n: int) -> None:
        self._check(lib.adaskip_set_most_moves(self._ctx, n))

    def set_aside(self, n_kept: int, runs: Sequence[tuple[int, int, int, int]]) -> None:
        """Take runs (place, new place, length, counted moves) out of sequence 0; forget the rest from ``n_kept`` on."""
        self._check(lib.adaskip_set_aside(self._ctx, 0, n_kept, ffi.new("struct adaskip_run[]", list(runs)), len(runs)))

    def take_back(self, end: int) -> None:
        self._check(lib.adaskip_take_back(self._ctx, 0, end))


def _fill_plan(target: Any, plan: SkipPlan) -> list[Any]:
    """Point an adaskip_plan at the sets of ``plan``; return the objects that must live as long."""
    prefill, decode = ffi.new("struct adaskip_set *"), ffi.new("struct adaskip_step[]", len(plan.decode_sets))
    owners = [prefill, decode, _fill(prefill, plan.prefill), _fill_bulk(target, plan)]
    for step, (start, skip_set) in zip(decode, plan.decode_sets, strict=True):
        step.start = start
        owners.append(_fill(step.set, skip_set))
    target.prefill, target.decode, target.n_decode = prefill, decode, len(decode)
    if plan.online is not None:
        target.online = online = ffi.new("struct adaskip_online_params *")
        online.window, online.threshold = plan.online.window, plan.online.threshold
        online.scale = _ONLINE_SCALES.index(plan.online.scale)
        owners.append(online)
    return owners


def _fill_bulk(target: Any, plan: SkipPlan) -> list[Any]:
    """Point an adaskip_plan at the bulk set of ``plan`` and its windows; return as :func:`_fill_plan`."""
    if plan.bulk is None:
        return []
    target.bulk = bulk = ffi.new("struct adaskip_set *")
    owners = [bulk, _fill(bulk, plan.bulk.skip)]
    target.refits = plan.bulk.refit > 0
    if plan.bulk.windowed:
        windowed = np.isin(np.arange(plan.n_layer), plan.bulk.windowed).astype(np.uint8)
        target.windowed, target.window = ffi.from_buffer("uint8_t[]", windowed), plan.bulk.window_size
        target.n_sinks = plan.bulk.head
        owners.append(windowed)
    return owners


def _fill(target: Any, skip_set: SkipSet) -> list[npt.NDArray[Any]]:
    """Point an adaskip_set at the arrays of ``skip_set``; return them, as they must live as long."""
    target.n_layer, target.n_embd = len(skip_set.skip), skip_set.n_embd or 0
    target.n_rank = 0 if skip_set.down is None else skip_set.down.shape[2]
    owners: list[npt.NDArray[Any]] = [np.ascontiguousarray(skip_set.skip, np.uint8)]
    target.skip = ffi.from_buffer("uint8_t[]", owners[0])
    for name in ("scale", "bias", "down", "up"):
        if (values := getattr(skip_set, name)) is not None:
            owners.append(np.ascontiguousarray(values, np.float32))
            setattr(target, name, ffi.from_buffer("float[]", owners[-1]))
    return owners
