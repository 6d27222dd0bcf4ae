"""Which sublayers to skip in which phase, and with what compensation."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from ..errors import CompensationError, PlanError, SublayerRangeError
from .identity import ModelInfo

__all__ = [
    "KINDS",
    "KIND_NAMES",
    "MODES",
    "PHASES",
    "Kind",
    "Mode",
    "OnlineScale",
    "OnlineStage",
    "Phase",
    "SkipPlan",
    "SkipSet",
    "mark_layers",
    "ranked",
    "sublayer_name",
]

Kind: TypeAlias = Literal["attention", "ffn"]
KINDS: tuple[Kind, Kind] = ("attention", "ffn")
"""The kinds of sublayer, in the order of the columns of every ``[n_layer, 2]`` array."""

KIND_NAMES = ("attention", "FFN")
"""What people call them, in that order."""

Phase: TypeAlias = Literal["prefill", "decode"]
PHASES: tuple[Phase, Phase] = ("prefill", "decode")

Mode: TypeAlias = Literal["prefill", "decode", "e2e"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""The paper's three modes, see :mod:`adaskip_cpp.planning.modes`."""

OnlineScale: TypeAlias = Literal["none", "paper", "median"]


def sublayer_name(layer: int, kind: int) -> str:
    """Name a sublayer for a message: ``attention of layer 3``."""
    return f"{KIND_NAMES[kind]} of layer {layer}"


@dataclass(frozen=True, eq=False)
class SkipSet:
    """The sublayers skipped in one phase: ``v := s * u + b + up (down u)`` stands in for each.

    Attributes:
        skip: bool ``[n_layer, 2]``, columns attention and FFN; read-only.
        scale: float64 ``[n_layer, 2]``, the scale ``s`` where skipped, 1.0 elsewhere; read-only.
        bias: float32 ``[n_layer, 2, n_embd]``, the vector ``b`` where skipped, 0 elsewhere; read-only. None for none.
        down: float32 ``[n_layer, 2, rank, n_embd]``, likewise; None for no map of low rank.
        up: float32 ``[n_layer, 2, n_embd, rank]``, likewise.

    Raises:
        PlanError: the arrays' shapes are not those above.
        CompensationError: a skipped sublayer's scale is not finite or not positive, or its bias or map not finite.
    """

    skip: npt.NDArray[np.bool_]
    scale: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float32] | None = None
    down: npt.NDArray[np.float32] | None = None
    up: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        skip = np.array(self.skip, dtype=np.bool_)
        scale = np.array(self.scale, dtype=np.float64)
        bias, down, up = (
            None if array is None else np.array(array, dtype=np.float32) for array in (self.bias, self.down, self.up)
        )
        if skip.ndim != 2 or skip.shape[0] < 1 or skip.shape[1] != 2 or scale.shape != skip.shape:
            raise PlanError(
                f"skip flags and compensation need the shape [n_layer, 2], not {skip.shape} and {scale.shape}; "
                "give one row per layer, columns attention and FFN"
            )
        if bias is not None and (bias.ndim != 3 or bias.shape[:2] != skip.shape or bias.shape[2] < 1):
            raise PlanError(
                f"the bias needs the shape [{skip.shape[0]}, 2, n_embd], not {bias.shape}; give one vector per sublayer"
            )
        if down is not None or up is not None:
            _check_map(skip, bias, down, up)
        for layer, kind in np.argwhere(skip):
            if not (np.isfinite(scale[layer, kind]) and scale[layer, kind] > 0):
                raise CompensationError(
                    f"the compensation of {sublayer_name(layer, kind)} is {scale[layer, kind]}; "
                    'use a finite number above 0, or compensation="none"'
                )
            if bias is not None and not np.isfinite(bias[layer, kind]).all():
                raise CompensationError(
                    f"the bias of {sublayer_name(layer, kind)} is not finite; "
                    'calibrate again, or use compensation="median"'
                )
            if not all(array is None or np.isfinite(array[layer, kind]).all() for array in (down, up)):
                raise CompensationError(
                    f"the linear map of {sublayer_name(layer, kind)} is not finite; "
                    'calibrate again, or use compensation="affine"'
                )
        scale[~skip] = 1.0
        arrays = {"skip": skip, "scale": scale, "bias": bias, "down": down, "up": up}
        for name, array in arrays.items():
            if array is not None:
                if name in ("bias", "down", "up"):
                    array[~skip] = 0.0
                array.flags.writeable = False
            object.__setattr__(self, name, array)

    @classmethod
    def none(cls, n_layer: int) -> SkipSet:
        """Skip nothing in a model of ``n_layer`` layers."""
        return cls(np.zeros((n_layer, 2), np.bool_), np.ones((n_layer, 2)))

    @property
    def n_layer(self) -> int:
        """Number of layers of the model."""
        return int(self.skip.shape[0])

    @property
    def n_skip(self) -> int:
        """Number of sublayers skipped."""
        return int(self.skip.sum())

    @property
    def attention(self) -> tuple[int, ...]:
        """Layers whose attention is skipped, ascending."""
        return tuple(int(layer) for layer in np.flatnonzero(self.skip[:, 0]))

    @property
    def ffn(self) -> tuple[int, ...]:
        """Layers whose FFN is skipped, ascending."""
        return tuple(int(layer) for layer in np.flatnonzero(self.skip[:, 1]))

    @property
    def n_embd(self) -> int | None:
        """Length of the vectors; None without vectors."""
        arrays = [array for array in (self.bias, self.down) if array is not None]
        return int(arrays[0].shape[-1]) if arrays else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SkipSet):
            return NotImplemented
        mine, theirs = (
            [getattr(each, name) for name in ("skip", "scale", "bias", "down", "up")] for each in (self, other)
        )
        return all(
            a is b if a is None or b is None else np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)
        )

    def __hash__(self) -> int:
        return hash((self.skip.shape, self.skip.tobytes(), self.scale.tobytes()))

    def __repr__(self) -> str:
        return f"SkipSet(n_layer={self.n_layer}, attention={self.attention}, ffn={self.ffn})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the skipped sublayers of each kind, the scale of each and the norm of its bias."""

        def row(layer: int, kind: int) -> dict[str, Any]:
            norm = 0.0 if self.bias is None else float(np.linalg.norm(self.bias[layer, kind].astype(np.float64)))
            result = {"layer": layer, "scale": float(self.scale[layer, kind]), "bias_norm": norm}
            return result if self.down is None else {**result, "rank": int(self.down.shape[2])}

        return {
            name: [row(layer, kind) for layer in layers]
            for kind, (name, layers) in enumerate((("attention", self.attention), ("ffn", self.ffn)))
        }


def _check_map(
    skip: npt.NDArray[np.bool_],
    bias: npt.NDArray[np.float32] | None,
    down: npt.NDArray[np.float32] | None,
    up: npt.NDArray[np.float32] | None,
) -> None:
    fits = down is not None and up is not None and down.ndim == up.ndim == 4 and down.shape[:2] == skip.shape
    if fits and down is not None and up is not None:
        fits = up.shape == (*skip.shape, down.shape[3], down.shape[2]) and min(down.shape) > 0
        fits = fits and (bias is None or bias.shape[2] == down.shape[3])
    if not fits:
        raise PlanError(
            f"linear maps need the shapes [{skip.shape[0]}, 2, rank, n_embd] and [{skip.shape[0]}, 2, n_embd, rank], "
            f"not {getattr(down, 'shape', None)} and {getattr(up, 'shape', None)}; give both, one map per sublayer"
        )


@dataclass(frozen=True)
class OnlineStage:
    """Online importance learning: which FFNs a request adds to the decode set, from its first decoded tokens.

    The first ``window`` decoded tokens of a request run under the decode set alone, and every FFN outside it is
    observed. Then each whose mean IO similarity is at least ``threshold`` is skipped for the rest of the request.

    Attributes:
        window: tokens that are observed; the authors use 20.
        threshold: smallest mean IO similarity of an FFN that is added.
        scale: what stands in for an added FFN, measured in the window: ``"paper"`` is the ratio of Frobenius norms,
            ``"median"`` the median over its tokens of ``|v| / |u|``, ``"none"`` is 1.

    Raises:
        PlanError: the window is not a whole number above 0, the threshold is not finite, or the scale is unknown.
    """

    window: int = 20
    threshold: float = 1.0
    scale: OnlineScale = "paper"

    def __post_init__(self) -> None:
        try:
            window = operator.index(self.window)
        except TypeError:
            window = 0
        if not 1 <= window < 2**31:
            raise PlanError(f"the online window is {self.window!r}; use a whole number of tokens from 1 on")
        try:
            threshold = float(self.threshold)
        except (TypeError, ValueError):
            threshold = float("nan")
        if not np.isfinite(threshold):
            raise PlanError(f"the online threshold is {self.threshold!r}; use a similarity, a number of at most 1")
        if self.scale not in get_args(OnlineScale):
            raise PlanError(f"unknown online scale {self.scale!r}; use one of: {', '.join(get_args(OnlineScale))}")
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "threshold", threshold)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"window": self.window, "threshold": self.threshold, "scale": self.scale}


@dataclass(frozen=True)
class SkipPlan:
    """What to skip in each phase.

    Attributes:
        prefill: the set skipped while a prompt is read.
        decode: the set skipped while tokens are generated, from the first one on. It skips every attention that
            ``prefill`` skips: that attention wrote no KV for the prompt, so decode must not read it.
        schedule: decode sets by tokens decoded so far in the request, ``((0, decode), (t1, set1), ...)``, each holding
            from its number on; () if ``decode`` holds throughout. A set skips every attention of the one before it.
        online: the online stage of decode, or None. Excludes a schedule.
        model: the model that the plan was made for, or None for a plan made by hand, which fits any model of as many
            layers.
        strategy: name of the strategy that chose the sublayers, ``"manual"`` for a plan made by hand.
        compensation: name of the compensation, ``"manual"`` if given by hand.
        mode: ``"prefill"``, ``"decode"`` or ``"e2e"``, see :mod:`adaskip_cpp.planning.modes`;
            ``"manual"`` for a plan made by hand.

    Raises:
        PlanError: the sets disagree on the number of layers, an attention runs whose KV would have holes, the schedule
            is malformed or meets an online stage, or the mode is unknown.
    """

    prefill: SkipSet
    decode: SkipSet
    _: KW_ONLY
    schedule: tuple[tuple[int, SkipSet], ...] = ()
    online: OnlineStage | None = None
    model: ModelInfo | None = None
    strategy: str = "manual"
    compensation: str = "manual"
    mode: Mode | Literal["manual"] = "manual"

    def __post_init__(self) -> None:
        if self.prefill.n_layer != self.decode.n_layer:
            raise PlanError(
                f"prefill is for {self.prefill.n_layer} layers but decode for {self.decode.n_layer}; "
                "build both for the same model"
            )
        if self.model is not None and self.model.n_layer != self.n_layer:
            raise PlanError(
                f"the plan is for {self.n_layer} layers but its model has {self.model.n_layer}; "
                "build the plan from this model's profile"
            )
        if self.mode not in (*MODES, "manual"):
            raise PlanError(f"unknown mode {self.mode!r}; use one of: {', '.join(MODES)}")
        holes = sorted(set(self.prefill.attention) - set(self.decode.attention))
        if holes:
            raise PlanError(
                f"prefill skips the attention of layers {holes}, which decode runs: it would read KV that was never "
                "written; skip them in decode too"
            )
        if self.schedule:
            self._check_schedule()

    def _check_schedule(self) -> None:
        starts = [start for start, _ in self.schedule]
        sets = [each for _, each in self.schedule]
        if self.online is not None:
            raise PlanError("a plan has a decode schedule or an online stage, not both; leave one out")
        if starts[0] != 0 or sets[0] != self.decode:
            raise PlanError("the schedule does not begin with (0, decode); give the decode set first")
        if any(b <= a for a, b in itertools.pairwise(starts)):
            raise PlanError(f"the schedule's token counts {starts} do not ascend; sort its sets by token count")
        for (_, earlier), (start, later) in itertools.pairwise(self.schedule):
            if later.n_layer != self.n_layer:
                raise PlanError(
                    f"the schedule's set at {start} tokens is for {later.n_layer} layers, not {self.n_layer}; "
                    "build all sets for the same model"
                )
            holes = sorted(set(earlier.attention) - set(later.attention))
            if holes:
                raise PlanError(
                    f"the schedule's set at {start} tokens runs the attention of layers {holes}, which the set before "
                    "it skips: it would read KV that was never written; let the sets grow only"
                )

    @classmethod
    def manual(
        cls,
        n_layer: int,
        attention: Iterable[SupportsIndex] = (),
        ffn: Iterable[SupportsIndex] = (),
        scale: npt.ArrayLike | None = None,
        phase: Literal["both", "decode"] = "both",
    ) -> SkipPlan:
        """Build a plan from lists of layers.

        Args:
            n_layer: number of layers of the model.
            attention: layers whose attention is skipped, counted from 0.
            ffn: layers whose FFN is skipped.
            scale: compensation, one number or ``[n_layer, 2]``; 1.0 if None. Only skipped sublayers' values are used.
            phase: ``"both"``, or ``"decode"`` to run the full model in prefill.

        Raises:
            SublayerRangeError: a layer is not in ``range(n_layer)``.
            CompensationError: a compensation is not finite or not positive.
            PlanError: ``n_layer``, ``phase`` or the shape of ``scale`` is wrong.
        """
        if n_layer < 1:
            raise PlanError(f"n_layer is {n_layer}; pass the model's number of layers, llm.n_layer")
        if phase not in ("both", "decode"):
            raise PlanError(f"unknown phase {phase!r}; use 'both' or 'decode'")
        skip = np.zeros((n_layer, 2), np.bool_)
        mark_layers(skip, 0, attention)
        mark_layers(skip, 1, ffn)
        try:
            values = np.broadcast_to(np.asarray(1.0 if scale is None else scale, np.float64), skip.shape)
        except ValueError as error:
            raise PlanError(
                f"scale does not have the shape [{n_layer}, 2]; give one row per layer, columns attention and FFN"
            ) from error
        chosen = SkipSet(skip, values)
        compensation = "none" if scale is None else "manual"
        prefill = chosen if phase == "both" else SkipSet.none(n_layer)
        return cls(prefill, chosen, compensation=compensation)

    @property
    def n_layer(self) -> int:
        """Number of layers of the model."""
        return self.prefill.n_layer

    @property
    def decode_sets(self) -> tuple[tuple[int, SkipSet], ...]:
        """The schedule, or ``((0, decode),)`` where there is none."""
        return self.schedule or ((0, self.decode),)

    def decode_after(self, n_decoded: int) -> SkipSet:
        """Return the decode set in force after so many tokens of an answer."""
        return next(each for start, each in reversed(self.decode_sets) if start <= n_decoded)

    def skipped(self, phase: Phase) -> SkipSet:
        """Return the set of a phase: of decode the last one, which a schedule ends with."""
        return self.prefill if phase == "prefill" else self.decode_sets[-1][1]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values that describe the plan, without its vectors; a plan is made again from a profile."""
        return {
            "strategy": self.strategy,
            "compensation": self.compensation,
            "mode": self.mode,
            "n_layer": self.n_layer,
            "model": None if self.model is None else asdict(self.model),
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
            "schedule": [{"start": start, **each.to_dict()} for start, each in self.schedule],
            "online": None if self.online is None else self.online.to_dict(),
        }


def mark_layers(skip: npt.NDArray[np.bool_], kind: int, layers: Iterable[SupportsIndex]) -> None:
    """Set the flags of ``layers`` in one column; refuse what is not a layer of the model."""
    n_layer = skip.shape[0]
    for layer in layers:
        try:
            index = operator.index(layer)
        except TypeError as error:
            raise SublayerRangeError(
                f"{layer!r} is not a layer number; use whole numbers from 0 to {n_layer - 1}"
            ) from error
        if not 0 <= index < n_layer:
            raise SublayerRangeError(
                f"the model has no {sublayer_name(index, kind)}; use layers from 0 to {n_layer - 1}"
            )
        skip[index, kind] = True


def ranked(values: npt.NDArray[np.float64]) -> list[int]:
    """Return the sublayers in the order of a figure, the smallest first, as indices into the flattened array.

    Ties as in the paper: attention before FFN, then the lower layer; NaN comes last.

    Args:
        values: float64 ``[n_layer, 2]``.
    """
    layer, kind = np.indices(values.shape)
    return [int(index) for index in np.lexsort((layer.ravel(), kind.ravel(), values.ravel()))]  # last key first
