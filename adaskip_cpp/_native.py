"""The thin cffi layer over native/adaskip.h: types in, arrays out, error codes turned into exceptions.

Nothing here knows what a plan or a profile is for; :mod:`adaskip_cpp.llama` is what people use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from cffi import FFI

from . import _library
from .errors import CompensationError, LibraryVersionError, NativeError, NotSkippableError

__all__ = ["KIND_NAMES", "Counters", "KVRun", "NativeContext", "Phase", "StatisticsBatch", "Sublayer"]

Phase: TypeAlias = Literal["prefill", "decode"]
Kind: TypeAlias = Literal["attention", "ffn"]

KIND_NAMES: tuple[Kind, Kind] = ("attention", "ffn")
_PHASES: tuple[Phase, Phase] = ("prefill", "decode")
_NO_STALE_POSITION = 2**31 - 1


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of a model, as found in its compute graph.

    Attributes:
        layer: index from 0.
        kind: "attention" or "ffn".
        skippable: whether a plan may name it.
        reason: why not, "" if it is skippable.
        nodes: graph nodes that disappear when this sublayer alone is skipped without compensation.
    """

    layer: int
    kind: Kind
    skippable: bool
    reason: str
    nodes: int


@dataclass(frozen=True)
class StatisticsBatch:
    """Per-token reductions of one ubatch, u and v being a sublayer's input and output, both with the residual.

    Attributes:
        dot, u_sq, v_sq: float32 [n_layer, 2, n_tokens]: u·v, |u|², |v|²; NaN where a sublayer was not observed.
        positions: int32 [n_tokens].
        phase: "prefill" or "decode".
    """

    dot: npt.NDArray[np.float32]
    u_sq: npt.NDArray[np.float32]
    v_sq: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int32]
    phase: Phase


@dataclass(frozen=True)
class Counters:
    """What can be counted exactly about a context.

    Attributes:
        nodes_full: nodes of the last graph as llama.cpp built it.
        nodes: nodes of the last graph as it was computed.
        graphs_built, graphs_reused: since the context was created.
        kv_bytes: size of the context's memory (KV cache, recurrent state), all devices together.
        statistics_bytes: bytes of statistics copied from the devices since the context was created.
    """

    nodes_full: int
    nodes: int
    graphs_built: int
    graphs_reused: int
    kv_bytes: int
    statistics_bytes: int


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
    # llama_cpp has opened this very file; the loader hands out the same library again.
    lib = ffi.dlopen(str(_library.path()))
    if lib.adaskip_abi_version() != lib.ADASKIP_ABI_VERSION:
        raise LibraryVersionError(
            f"{_library.path()} and {_library.header()} are of different builds; "
            "run 'pip install --force-reinstall --no-deps adaskip-cpp'."
        )
    return ffi, lib


_ffi, _lib = _open()


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
        self._error: BaseException | None = None
        self.n_layer: int = self._check(_lib.adaskip_n_layer(self._ctx))

    def _check(self, code: int) -> int:
        if code >= 0:
            return code
        message = _ffi.string(_lib.adaskip_last_error()).decode("utf-8", "replace")
        if code == _lib.ADASKIP_ERROR_NOT_SKIPPABLE:
            raise NotSkippableError(f"{message}; leave it out of the plan ('adaskip-cpp inspect' lists what can be).")
        if code == _lib.ADASKIP_ERROR_COMPENSATION:
            raise CompensationError(f"{message}; give a positive number, or 1 for no compensation.")
        raise NativeError(f"{message}; this is a bug in adaskip-cpp, please report it with the model's name.")

    def sublayers(self) -> tuple[Sublayer, ...]:
        """All sublayers, layer by layer, attention before FFN."""
        n = 2 * self.n_layer
        rows = _ffi.new("struct adaskip_sublayer[]", n)
        self._check(_lib.adaskip_sublayers(self._ctx, rows, n))
        return tuple(
            Sublayer(
                row.layer, KIND_NAMES[row.kind], bool(row.skippable), _ffi.string(row.reason).decode(), row.n_nodes
            )
            for row in rows
        )

    def _plan(self, skip: npt.NDArray[np.bool_] | None, scale: npt.NDArray[np.float64] | None) -> tuple[Any, Any]:
        if skip is None or scale is None:
            return _ffi.NULL, None
        flags = np.ascontiguousarray(skip, dtype=np.uint8)
        scales = np.ascontiguousarray(scale, dtype=np.float32)
        plan = _ffi.new("struct adaskip_plan *")
        plan.n_layer = len(flags)
        plan.skip = _ffi.from_buffer("uint8_t[]", flags)
        plan.scale = _ffi.from_buffer("float[]", scales)
        return plan, (flags, scales)

    def check_plan(self, skip: npt.NDArray[np.bool_], scale: npt.NDArray[np.float64]) -> None:
        """Raises what :meth:`set_plan` would, and changes nothing."""
        plan, _owner = self._plan(skip, scale)
        self._check(_lib.adaskip_check_plan(self._ctx, plan))

    def set_plan(
        self, phase: Phase, skip: npt.NDArray[np.bool_] | None, scale: npt.NDArray[np.float64] | None = None
    ) -> None:
        """Sets what to skip in a phase: ``skip`` bool and ``scale`` float64, both [n_layer, 2]; None clears it."""
        plan, _owner = self._plan(skip, scale)
        self._check(_lib.adaskip_set_plan(self._ctx, _PHASES.index(phase), plan))

    def set_phase(self, phase: Phase) -> None:
        """Says what the tokens of the next ``llama_decode`` calls are."""
        self._check(_lib.adaskip_set_phase(self._ctx, _PHASES.index(phase)))

    def counters(self) -> Counters:
        """The counters of this context."""
        c = _ffi.new("struct adaskip_counters *")
        self._check(_lib.adaskip_get_counters(self._ctx, c))
        return Counters(
            c.n_nodes_full, c.n_nodes, c.n_graphs_built, c.n_graphs_reused, c.n_bytes_kv, c.n_bytes_statistics
        )

    def start_statistics(self, sink: Callable[[StatisticsBatch], None], *, keep_logits: bool = False) -> None:
        """Hands the statistics of every ubatch to ``sink``, until :meth:`stop_statistics`.

        With ``keep_logits`` the logits are bit-identical to those without statistics, and the last layer's FFN is
        observed for output tokens only; else every token is observed and no logits are computed. What ``sink`` raises
        is kept for :meth:`raise_pending`, since it cannot pass through C.
        """

        def keep(kind: Any, value: BaseException, traceback: Any) -> None:
            if self._error is None:
                self._error = value

        def deliver(statistics: Any, user_data: Any) -> None:
            if self._error is not None:
                return
            n_layer, n_tokens = statistics.n_layer, statistics.n_tokens
            values = np.frombuffer(_ffi.buffer(statistics.values, n_layer * 2 * 3 * n_tokens * 4), np.float32)
            values = values.reshape(n_layer, 2, 3, n_tokens).copy()
            positions = np.frombuffer(_ffi.buffer(statistics.positions, n_tokens * 4), np.int32).copy()
            sink(
                StatisticsBatch(values[:, :, 0], values[:, :, 1], values[:, :, 2], positions, _PHASES[statistics.phase])
            )

        mode = _lib.ADASKIP_STATISTICS_OUTPUTS if keep_logits else _lib.ADASKIP_STATISTICS_TOKENS
        callback = _ffi.callback("adaskip_statistics_callback", deliver, onerror=keep)
        self._check(_lib.adaskip_set_statistics(self._ctx, mode, callback, _ffi.NULL))
        self._callback = callback
        self._error = None

    def stop_statistics(self) -> None:
        """Takes the statistics out of the next graph."""
        self._check(_lib.adaskip_set_statistics(self._ctx, _lib.ADASKIP_STATISTICS_OFF, _ffi.NULL, _ffi.NULL))
        self._callback = None

    @property
    def collects_statistics(self) -> bool:
        """Whether a sink is set."""
        return self._callback is not None

    def raise_pending(self) -> None:
        """Raises what the sink raised during the last ``llama_decode``."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def kv_valid(self, phase: Phase, n: int, seq_id: int = 0) -> int:
        """How many of the first ``n`` positions the plan of this phase may read: n, or the first one that lacks KV."""
        position = _ffi.new("int32_t *", _NO_STALE_POSITION)
        self._check(_lib.adaskip_kv_first_stale(self._ctx, seq_id, _PHASES.index(phase), position))
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
