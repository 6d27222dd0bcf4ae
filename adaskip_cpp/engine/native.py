"""The thin cffi layer over native/adaskip.h: types in, arrays out, error codes turned into exceptions.

Nothing here knows what a plan or a profile is for; :mod:`adaskip_cpp.engine.llama` is what people use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from cffi import FFI

from ..errors import (
    AdaSkipError,
    CompensationError,
    ElidedKVError,
    LibraryVersionError,
    NativeError,
    NotSkippableError,
    StateError,
)
from ..model.plan import PHASES, OnlineScale, Phase
from ..model.skip_set import KINDS, Kind
from . import library as _library

__all__ = [
    "Counters",
    "KVRun",
    "NativeContext",
    "NativeOnline",
    "NativePlan",
    "StatisticsBatch",
    "Sublayer",
    "elide_kv",
]

Activations: TypeAlias = "list[list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None]]"
_ONLINE_SCALES: tuple[OnlineScale, ...] = ("none", "paper", "median")  # in the order of enum adaskip_online_scale
_NO_STALE_POSITION = 2**31 - 1


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of a model, as found in its compute graph.

    Attributes:
        layer: index from 0.
        kind: "attention" or "ffn".
        skippable: whether a plan may name it.
        reason: why not, "" if it is skippable.
        shape: equal for sublayers of equal weights, cache and window, which take equally long; -1 if it was not found.
        window: tokens that an attention looks back at, 0 for all.
    """

    layer: int
    kind: Kind
    skippable: bool
    reason: str
    shape: int
    window: int


@dataclass(frozen=True)
class StatisticsBatch:
    """Per-token reductions of one ubatch, u and v being a sublayer's input and output, both with the residual.

    All are NaN where a sublayer or layer was not observed.

    Attributes:
        dot, u_sq, v_sq: float32 [n_layer, 2, n_tokens]: u·v, |u|², |v|².
        layer_dot: float32 [n_layer, n_tokens]: the layer's input times its output.
        sum_u, sum_v: float32 [n_layer, 2, n_embd]: sums of u and v over the tokens; None if they were not asked for.
        positions: int32 [n_tokens].
        phase: "prefill" or "decode".
        activations: [n_layer][2]: u and v, float32 [n_tokens, n_embd], None where a sublayer does not see every token;
            valid until the sink returns. None if they were not asked for.
    """

    dot: npt.NDArray[np.float32]
    u_sq: npt.NDArray[np.float32]
    v_sq: npt.NDArray[np.float32]
    layer_dot: npt.NDArray[np.float32]
    sum_u: npt.NDArray[np.float32] | None
    sum_v: npt.NDArray[np.float32] | None
    positions: npt.NDArray[np.int32]
    phase: Phase
    activations: Activations | None = None


@dataclass(frozen=True)
class Counters:
    """What can be counted exactly about a context.

    Attributes:
        nodes_full: nodes of the last graph as llama.cpp built it.
        nodes: nodes of the last graph as it was computed.
        splits: parts of it that run on one device each.
        graphs_built, graphs_reused: since the context was created.
        kv_bytes: size of the context's memory (KV cache, recurrent state), all devices together.
        statistics_bytes: bytes of statistics that the host read since the context was created.
    """

    nodes_full: int
    nodes: int
    splits: int
    graphs_built: int
    graphs_reused: int
    kv_bytes: int
    statistics_bytes: int


class NativePlan(Protocol):
    """What a plan for one phase must have.

    Attributes:
        skip: bool [n_layer, 2].
        scale: float64 [n_layer, 2], positive where skipped.
        bias: float32 [n_layer, 2, n_embd], or None.
        down: float32 [n_layer, 2, rank, n_embd], or None.
        up: float32 [n_layer, 2, n_embd, rank], or None.
    """

    @property
    def skip(self) -> npt.NDArray[np.bool_]: ...
    @property
    def scale(self) -> npt.NDArray[np.float64]: ...
    @property
    def bias(self) -> npt.NDArray[np.float32] | None: ...
    @property
    def down(self) -> npt.NDArray[np.float32] | None: ...
    @property
    def up(self) -> npt.NDArray[np.float32] | None: ...


@dataclass(frozen=True)
class NativeOnline:
    """What the online stage has learned in this request.

    Attributes:
        n_tokens: tokens observed so far.
        done: whether the FFNs were chosen.
        similarity, norm_ratio, scale: float64 [n_layer], NaN where an FFN was not observed; the scale is what stands in
            for an FFN that is added.
        ffn: layers whose FFN was added.
    """

    n_tokens: int
    done: bool
    similarity: npt.NDArray[np.float64]
    norm_ratio: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]
    ffn: tuple[int, ...]


@dataclass(frozen=True)
class KVRun:
    """Positions from ``start`` to the start of the next run, and the attentions that did not run for them."""

    start: int
    skipped: tuple[int, ...]


def _declarations(header: str) -> str:
    """The C declarations of adaskip.h: all of it but what only the C++ compiler and the preprocessor read."""
    header = re.sub(r"^#ifdef __cplusplus$.*?^#endif$", "", header, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^#(?!define ADASKIP_ABI_VERSION).*$", "", header, flags=re.MULTILINE)


def _open() -> tuple[FFI, Any]:
    ffi = FFI()
    ffi.cdef(_declarations(_library.header().read_text(encoding="utf-8")))
    ffi.cdef("size_t ggml_tensor_overhead(void);")
    # llama_cpp has opened this very file; the loader hands out the same library again.
    lib = ffi.dlopen(str(_library.path()))
    _check_build(lib)
    return ffi, lib


def _check_build(lib: Any) -> None:
    """Refuses a libllama that is not of this header, or that runs on a ggml with other structures than its own."""
    if lib.adaskip_abi_version() != lib.ADASKIP_ABI_VERSION:
        raise LibraryVersionError(
            f"{_library.path()} and {_library.header()} are of different builds; "
            "run 'pip install --force-reinstall --no-deps adaskip-cpp'."
        )
    if lib.ggml_tensor_overhead() != lib.adaskip_ggml_tensor_overhead():
        version = _library.build_info().llama_cpp_python
        raise LibraryVersionError(
            f"the ggml in this process has tensors of {lib.ggml_tensor_overhead()} bytes, {_library.path()} was built "
            f"for {lib.adaskip_ggml_tensor_overhead()}; run 'pip install --force-reinstall --no-deps "
            f"llama-cpp-python=={version} adaskip-cpp', and see that LD_LIBRARY_PATH names no other ggml."
        )


_ffi, _lib = _open()


@contextmanager
def elide_kv(skipped: npt.NDArray[np.bool_] | None) -> Iterator[None]:
    """Contexts created inside have no KV for the attentions in ``skipped``, bool [n_layer]; None changes nothing."""
    if skipped is not None:
        flags = np.ascontiguousarray(skipped, dtype=np.uint8)
        _lib.adaskip_elide_kv(_ffi.from_buffer("uint8_t[]", flags), len(flags))
    try:
        yield
    finally:
        _lib.adaskip_elide_kv(_ffi.NULL, 0)


class NativeContext:
    """adaskip's side of one ``llama_context``.

    Args:
        address: of the ``llama_context``, which must outlive this object.

    Raises:
        NotSkippableError, CompensationError, NativeError: from every method, for the codes of adaskip.h.
    """

    def __init__(self, address: int) -> None:
        self._ctx = _ffi.cast("struct llama_context *", address)
        self._callback: Any = None
        self._drops_logits = False
        self._error: BaseException | None = None
        self.n_layer: int = self._check(_lib.adaskip_n_layer(self._ctx))

    def _check(self, code: int) -> int:
        if code >= 0:
            return code
        message = _ffi.string(_lib.adaskip_last_error()).decode("utf-8", "replace")
        if code == _lib.ADASKIP_ERROR_NOT_SKIPPABLE:
            raise NotSkippableError(f"{message}; leave it out of the plan ('adaskip-cpp inspect' lists what can be).")
        if code == _lib.ADASKIP_ERROR_COMPENSATION:
            raise CompensationError(f"{message}; give finite numbers, and scales above 0 (1 for no compensation).")
        if code == _lib.ADASKIP_ERROR_KV_ELIDED:
            raise ElidedKVError(f"{message}; open the model without plan=, then set_plan() takes any plan.")
        if code == _lib.ADASKIP_ERROR_KV_STALE:
            raise StateError(f"{message}; evaluate the tokens from there on again, or call reset().")
        if code == _lib.ADASKIP_ERROR_MEMORY:
            raise NativeError(f"{message}; free memory, or use a smaller n_ctx, n_ubatch or rank of the maps.")
        raise NativeError(f"{message}; this is a bug in adaskip-cpp, please report it with the model's name.")

    def raise_failure(self, error: RuntimeError) -> NoReturn:
        """Raises why the ``llama_decode`` that ended in ``error`` failed: our reason, or that llama.cpp has one."""
        try:
            self._check(_lib.adaskip_take_failure(self._ctx))
        except AdaSkipError as ours:
            raise ours from error
        raise NativeError(
            f"llama.cpp failed: {error}; check that the tokens fit into n_ctx and into memory, or open the model with "
            "verbose=True to see llama.cpp's own messages."
        ) from error

    def sublayers(self) -> tuple[Sublayer, ...]:
        """All sublayers, layer by layer, attention before FFN."""
        n = 2 * self.n_layer
        rows = _ffi.new("struct adaskip_sublayer[]", n)
        self._check(_lib.adaskip_sublayers(self._ctx, rows, n))
        return tuple(
            Sublayer(
                row.layer, KINDS[row.kind], bool(row.skippable), _ffi.string(row.reason).decode(), row.shape, row.window
            )
            for row in rows
        )

    def _fill(self, target: Any, plan: NativePlan) -> list[Any]:
        """Point an adaskip_plan at the arrays of ``plan``; returns what must live as long."""
        skip = np.ascontiguousarray(plan.skip, dtype=np.uint8)
        scale = np.ascontiguousarray(plan.scale, dtype=np.float32)
        target.n_layer = len(skip)
        target.skip = _ffi.from_buffer("uint8_t[]", skip)
        target.scale = _ffi.from_buffer("float[]", scale)
        owner = [skip, scale]
        for name in ("bias", "down", "up"):
            values = getattr(plan, name)
            if values is not None:
                owner.append(np.ascontiguousarray(values, dtype=np.float32))
                setattr(target, name, _ffi.from_buffer("float[]", owner[-1]))
        if plan.bias is not None:
            target.n_embd = plan.bias.shape[2]
        if plan.down is not None:
            target.n_rank, target.n_embd = plan.down.shape[2:]
        return owner

    def check_plan(self, plan: NativePlan | None) -> None:
        """Raises what :meth:`set_plan` would, and changes nothing."""
        target = _ffi.NULL if plan is None else _ffi.new("struct adaskip_plan *")
        _owner = plan and self._fill(target, plan)
        self._check(_lib.adaskip_check_plan(self._ctx, target))

    def set_plan(self, phase: Phase, plan: NativePlan | None) -> None:
        """Sets what to skip in a phase; None clears it."""
        target = _ffi.NULL if plan is None else _ffi.new("struct adaskip_plan *")
        _owner = plan and self._fill(target, plan)
        self._check(_lib.adaskip_set_plan(self._ctx, PHASES.index(phase), target))

    def set_decode_schedule(self, schedule: Sequence[tuple[int, NativePlan]]) -> None:
        """Sets what to skip in decode by the tokens decoded so far in the request: (first token, plan), ascending."""
        plans = _ffi.new("struct adaskip_plan[]", len(schedule))
        _owner = [self._fill(target, plan) for target, (_, plan) in zip(plans, schedule, strict=True)]
        starts = _ffi.new("int32_t[]", [start for start, _ in schedule])
        self._check(_lib.adaskip_set_decode_schedule(self._ctx, starts, plans, len(schedule)))

    def set_online(self, window: int, threshold: float, scale: OnlineScale) -> None:
        """Turns the online stage on for the requests to come."""
        params = _ffi.new("struct adaskip_online_params *")
        params.window, params.threshold, params.scale = window, threshold, _ONLINE_SCALES.index(scale)
        self._check(_lib.adaskip_set_online(self._ctx, params))

    def clear_online(self) -> None:
        """Turns the online stage off."""
        self._check(_lib.adaskip_set_online(self._ctx, _ffi.NULL))

    def online(self) -> NativeOnline:
        """What the online stage has learned in this request."""
        similarity, norm_ratio, scale = np.empty((3, self.n_layer))
        added = np.zeros(self.n_layer, np.uint8)
        state = _ffi.new("struct adaskip_online_state *")
        state.similarity = _ffi.from_buffer("double[]", similarity)
        state.norm_ratio = _ffi.from_buffer("double[]", norm_ratio)
        state.scale = _ffi.from_buffer("double[]", scale)
        state.added = _ffi.from_buffer("uint8_t[]", added)
        self._check(_lib.adaskip_get_online(self._ctx, state))
        ffn = tuple(int(layer) for layer in np.flatnonzero(added))
        return NativeOnline(state.n_tokens, bool(state.done), similarity, norm_ratio, scale, ffn)

    def begin_request(self) -> None:
        """No token of the next request is decoded yet; its online stage starts from the plans that were set."""
        self._check(_lib.adaskip_begin_request(self._ctx))

    def elided_kv(self) -> tuple[int, ...]:
        """Layers whose attention has no KV in this context."""
        elided = np.zeros(self.n_layer, np.uint8)
        self._check(_lib.adaskip_get_elided_kv(self._ctx, _ffi.from_buffer("uint8_t[]", elided), self.n_layer))
        return tuple(int(layer) for layer in np.flatnonzero(elided))

    def set_phase(self, phase: Phase) -> None:
        """Says what the tokens of the next ``llama_decode`` calls are."""
        self._check(_lib.adaskip_set_phase(self._ctx, PHASES.index(phase)))

    def counters(self) -> Counters:
        """The counters of this context."""
        c = _ffi.new("struct adaskip_counters *")
        self._check(_lib.adaskip_get_counters(self._ctx, c))
        return Counters(
            c.n_nodes_full,
            c.n_nodes,
            c.n_splits,
            c.n_graphs_built,
            c.n_graphs_reused,
            c.n_bytes_kv,
            c.n_bytes_statistics,
        )

    def start_statistics(
        self,
        sink: Callable[[StatisticsBatch], None],
        *,
        keep_logits: bool = False,
        vectors: bool = False,
        activations: bool = False,
    ) -> None:
        """Hands the statistics of every ubatch to ``sink``, until :meth:`stop_statistics`.

        With ``keep_logits`` the logits are bit-identical to those without statistics, and what llama.cpp runs on output
        tokens only is observed for those; else every token is observed and no logits are computed. What ``sink``
        raises is kept for :meth:`raise_pending`, since it cannot pass through C.
        """

        def keep(kind: Any, value: BaseException, traceback: Any) -> None:
            if self._error is None:
                self._error = value

        def array(address: Any, *shape: int) -> npt.NDArray[np.float32]:
            buffer = _ffi.buffer(address, math.prod(shape) * 4)
            return np.array(np.frombuffer(buffer, np.float32)).reshape(shape)

        def rows(address: Any, n_tokens: int, n_embd: int) -> npt.NDArray[np.float32]:
            return np.frombuffer(_ffi.buffer(address, n_tokens * n_embd * 4), np.float32).reshape(n_tokens, n_embd)

        def pairs(addresses: Any, n_layer: int, *shape: int) -> Activations:
            at = [addresses[i] for i in range(4 * n_layer)]
            return [
                [
                    (rows(at[i], *shape), rows(at[i + 1], *shape)) if at[i] and at[i + 1] else None
                    for i in (4 * il, 4 * il + 2)
                ]
                for il in range(n_layer)
            ]

        def deliver(statistics: Any, user_data: Any) -> None:
            if self._error is not None:
                return
            n_layer, n_tokens, n_embd = statistics.n_layer, statistics.n_tokens, statistics.n_embd
            values = array(statistics.values, n_layer, 2, 3, n_tokens)
            sums = array(statistics.sums, n_layer, 2, 2, n_embd) if statistics.sums else None
            batch = StatisticsBatch(
                dot=values[:, :, 0],
                u_sq=values[:, :, 1],
                v_sq=values[:, :, 2],
                layer_dot=array(statistics.layer_dot, n_layer, n_tokens),
                sum_u=None if sums is None else sums[:, :, 0],
                sum_v=None if sums is None else sums[:, :, 1],
                positions=np.frombuffer(_ffi.buffer(statistics.positions, n_tokens * 4), np.int32).copy(),
                phase=PHASES[statistics.phase],
                activations=pairs(statistics.activations, n_layer, n_tokens, n_embd)
                if statistics.activations
                else None,
            )
            sink(batch)

        flags = _lib.ADASKIP_STATISTICS_ON
        flags |= 0 if keep_logits else _lib.ADASKIP_STATISTICS_ALL_TOKENS
        flags |= _lib.ADASKIP_STATISTICS_VECTORS if vectors else 0
        flags |= _lib.ADASKIP_STATISTICS_ACTIVATIONS if activations else 0
        callback = _ffi.callback("adaskip_statistics_callback", deliver, onerror=keep)
        self._check(_lib.adaskip_set_statistics(self._ctx, flags, callback, _ffi.NULL))
        self._callback = callback
        self._drops_logits = not keep_logits
        self._error = None

    def stop_statistics(self) -> None:
        """Takes the statistics out of the next graph."""
        self._check(_lib.adaskip_set_statistics(self._ctx, 0, _ffi.NULL, _ffi.NULL))
        self._callback = None
        self._drops_logits = False

    @property
    def collects_statistics(self) -> bool:
        """Whether a sink is set."""
        return self._callback is not None

    @property
    def drops_logits(self) -> bool:
        """Whether the statistics in force leave the output head out."""
        return self._drops_logits

    def raise_pending(self) -> None:
        """Raises what the sink raised during the last ``llama_decode``."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def kv_valid(self, phase: Phase, n: int, seq_id: int = 0) -> int:
        """How many of the first ``n`` positions the plan of this phase may read: n, or the first one that lacks KV."""
        position = _ffi.new("int32_t *", _NO_STALE_POSITION)
        self._check(_lib.adaskip_kv_first_stale(self._ctx, seq_id, PHASES.index(phase), position))
        return min(n, int(position[0]))

    def kv_runs(self, seq_id: int = 0) -> tuple[KVRun, ...]:
        """The record of which attentions did not run, for :meth:`set_kv_runs`."""
        n = self._check(_lib.adaskip_kv_get_runs(self._ctx, seq_id, _ffi.NULL, _ffi.NULL, 0))
        starts = np.zeros(n, np.int32)
        skipped = np.zeros((n, self.n_layer), np.uint8)
        self._check(
            _lib.adaskip_kv_get_runs(
                self._ctx, seq_id, _ffi.from_buffer("int32_t[]", starts), _ffi.from_buffer("uint8_t[]", skipped), n
            )
        )
        return tuple(
            KVRun(int(start), tuple(int(i) for i in np.flatnonzero(row)))
            for start, row in zip(starts, skipped, strict=True)
        )

    def set_kv_runs(self, runs: tuple[KVRun, ...], seq_id: int = 0) -> None:
        """Replaces the record; () says that every attention ran for every position."""
        starts = np.array([run.start for run in runs], np.int32)
        skipped = np.zeros((len(runs), self.n_layer), np.uint8)
        for row, run in zip(skipped, runs, strict=True):
            row[list(run.skipped)] = 1
        self._check(
            _lib.adaskip_kv_set_runs(
                self._ctx,
                seq_id,
                _ffi.from_buffer("int32_t[]", starts),
                _ffi.from_buffer("uint8_t[]", skipped),
                len(runs),
            )
        )
