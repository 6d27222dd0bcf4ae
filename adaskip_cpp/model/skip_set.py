"""The kinds and the order of a model's sublayers, and ``SkipSet``, those that one phase skips, for plans."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np

from ..errors import PlanError
from .arrays import Flags, Floats, LayerArrays, Vectors, checked, freeze

Kind: TypeAlias = Literal["attention", "ffn"]
KINDS: tuple[Kind, Kind] = ("attention", "ffn")  # the order of the columns of every [n_layer, 2] array
KIND_NAMES = ("attention", "FFN")  # for people, in that order
_SHAPES: dict[str, tuple[Any, str]] = {
    "skip": (np.bool_, "n_layer 2"),
    "scale": (np.float64, "n_layer 2"),
    "bias": (np.float32, "n_layer 2 n_embd"),
    "down": (np.float32, "n_layer 2 rank n_embd"),
    "up": (np.float32, "n_layer 2 n_embd rank"),
}


def sublayer_name(layer: int, kind: int) -> str:
    return f"{KIND_NAMES[kind]} of layer {layer}"


@dataclass(frozen=True, eq=False)
class SkipSet(LayerArrays):
    """The sublayers that one phase skips, with their compensation.

    From its input u, a skipped sublayer's output is estimated as ``s * u + b + up (down u)``, both with the residual.
    Arrays are read-only, with columns attention and FFN. Other shapes, and impossible values in use, raise a PlanError.

    Attributes:
        skip: bool ``[n_layer, 2]``: whether a sublayer is skipped.
        scale: float64 ``[n_layer, 2]``: s; 1.0 for sublayers that run.
        bias: float32 ``[n_layer, 2, n_embd]``: b; 0 for sublayers that run. None if no sublayer has one.
        down: float32 ``[n_layer, 2, rank, n_embd]``: first matrix of the map; 0 without a map. None if there is no map.
        up: float32 ``[n_layer, 2, n_embd, rank]``: second matrix of the map, likewise.
    """

    skip: Flags
    scale: Floats
    bias: Vectors | None = None
    down: Vectors | None = None
    up: Vectors | None = None

    def __post_init__(self) -> None:
        way_out = "give one row per layer, columns attention and FFN, of a number, a vector or a map per sublayer"
        arrays = checked(self, PlanError, way_out, _SHAPES, copy=False)
        skip, scale = arrays["skip"].copy(), arrays["scale"]
        if (self.down is None) != (self.up is None):
            raise PlanError("a linear map lacks 'down' or 'up'; give both")
        mapped, up = np.zeros_like(skip), arrays["up"]
        for layer, kind in np.argwhere(skip):
            mapped[layer, kind] = up is not None and up[layer, kind].any()
            name, s = sublayer_name(layer, kind), scale[layer, kind]
            if not (np.isfinite(s) and s > 0):
                raise PlanError(f'the scale of {name} is {s}; give one above 0, or use compensation="none"')
            for part, what, other in _PARTS:
                if arrays[part] is not None and not np.isfinite(arrays[part][layer, kind]).all():
                    way_out = f'calibrate again, or use compensation="{other}"'
                    raise PlanError(f"the {what} of {name} is not finite; {way_out}")
        parts = {name: _rows(arrays[name], mapped if name in ("down", "up") else skip) for name, _, _ in _PARTS}
        freeze(self, skip=skip, scale=np.where(skip, scale, 1.0), **parts)

    @classmethod
    def none(cls, n_layer: int) -> "SkipSet":
        """Return a set of a model with ``n_layer`` layers that skips nothing."""
        return cls(np.zeros((n_layer, 2), np.bool_), np.ones((n_layer, 2)))

    @property
    def n_skip(self) -> int:
        """Number of skipped sublayers."""
        return int(self.skip.sum())

    @property
    def attention(self) -> tuple[int, ...]:
        """Layers whose attention is skipped, ascending."""
        return tuple(np.flatnonzero(self.skip[:, 0]).tolist())

    @property
    def ffn(self) -> tuple[int, ...]:
        """Layers whose FFN is skipped, ascending."""
        return tuple(np.flatnonzero(self.skip[:, 1]).tolist())

    @property
    def n_embd(self) -> int | None:
        """Length of the vectors; None if there are none."""
        return next((int(each.shape[-1]) for each in (self.bias, self.down) if each is not None), None)

    def __hash__(self) -> int:
        return hash((self.skip.shape, self.skip.tobytes(), self.scale.tobytes()))

    def __repr__(self) -> str:
        return f"SkipSet(n_layer={self.n_layer}, attention={self.attention}, ffn={self.ffn})"


# Fields besides the scale, their names in errors, and a compensation without them.
_PARTS = (("bias", "bias", "median"), ("down", "linear map", "affine"), ("up", "linear map", "affine"))


def _rows(array: Vectors | None, which: Flags) -> Vectors | None:
    """Copy the rows of some sublayers into zeros, which take memory only where written; None if there are no rows."""
    if array is None or not which.any():
        return None
    rows = np.zeros(array.shape, array.dtype)
    rows[which] = array[which]
    return rows


def marked(n_layer: int, attention: Iterable[SupportsIndex], ffn: Iterable[SupportsIndex]) -> Flags:
    """Return the flags of listed sublayers, bool ``[n_layer, 2]``."""
    skip, layers = np.zeros((n_layer, 2), np.bool_), f"from 0 to {n_layer - 1}"
    for kind, listed in enumerate((attention, ffn)):
        for layer in listed:
            try:
                index = operator.index(layer)
            except TypeError as error:
                raise PlanError(f"{layer!r} is not a layer number; use whole numbers {layers}") from error
            if not 0 <= index < n_layer:
                raise PlanError(f"the model has no {sublayer_name(index, kind)}; use layers {layers}")
            skip[index, kind] = True
    return skip


def late_layers(n_layer: int) -> range:
    """Return the layers that prompts may skip: all but the first third, on which too many later layers depend."""
    return range(n_layer // 3, n_layer)


def ranked(values: Floats) -> list[int]:
    """Return flat indices of ``[n_layer, 2]`` values, smallest first, NaN last; ties: attention, then lower layer."""
    layer, kind = np.indices(values.shape)
    return [int(index) for index in np.lexsort((layer.ravel(), kind.ravel(), values.ravel()))]  # last key first
