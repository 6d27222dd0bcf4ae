"""The sublayers of a model: their kinds, their order, and a set of them that is skipped."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import CompensationError, PlanError, SublayerRangeError
from .arrays import ByContent, freeze

__all__ = ["KINDS", "KIND_NAMES", "Kind", "SkipSet", "mark_layers", "ranked", "sublayer_name"]

Kind: TypeAlias = Literal["attention", "ffn"]
KINDS: tuple[Kind, Kind] = ("attention", "ffn")
"""The kinds of sublayer, in the order of the columns of every ``[n_layer, 2]`` array."""

KIND_NAMES = ("attention", "FFN")
"""What people call them, in that order."""


def sublayer_name(layer: int, kind: int) -> str:
    """Name a sublayer for a message: ``attention of layer 3``."""
    return f"{KIND_NAMES[kind]} of layer {layer}"


@dataclass(frozen=True, eq=False)
class SkipSet(ByContent):
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
        for array in (bias, down, up):
            if array is not None:
                array[~skip] = 0.0
        freeze(self, skip=skip, scale=scale, bias=bias, down=down, up=up)

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

    def __hash__(self) -> int:  # type: ignore[override]
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
