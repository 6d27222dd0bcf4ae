"""Data from calibration, in profiles: ``PhaseStatistics`` of sublayers, and ``LinearMaps`` that compensate them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ProfileError
from .arrays import Count, Flags, Floats, LayerArrays, Vectors, checked, freeze

WHOLE = 2  # the column of a whole layer; attention and FFN are columns 0 and 1
_SHAPES = {
    **dict.fromkeys(("similarity", "norm_ratio", "median_ratio"), (np.float64, "n_layer 2")),
    "layer_similarity": (np.float64, "n_layer"),
    **dict.fromkeys(("mean_u", "mean_v"), (np.float32, "n_layer 2 n_embd")),
}


@dataclass(frozen=True, eq=False)
class PhaseStatistics(LayerArrays):
    """Statistics of one phase, of one request or averaged over requests.

    ``u`` and ``v`` are a sublayer's input and output, both with the residual. Arrays are read-only, with columns
    attention and FFN. Values are NaN for sublayers that were not observed. Impossible ones raise a ProfileError.

    Attributes:
        similarity: float64 ``[n_layer, 2]``: the IO similarity, the mean over the tokens of the cosine of u and v.
        norm_ratio: float64 ``[n_layer, 2]``: ``||V||_F / ||U||_F`` over all tokens, the paper's compensation.
        median_ratio: float64 ``[n_layer, 2]``: median over the tokens of ``|v| / |u|``.
        layer_similarity: float64 ``[n_layer]``: mean over the tokens of the cosine of a whole layer's input and output.
        mean_u: float32 ``[n_layer, 2, n_embd]``: mean of u over the tokens.
        mean_v: float32 ``[n_layer, 2, n_embd]``: mean of v over the tokens.
        n_tokens: tokens of all requests together.
    """

    similarity: Floats
    norm_ratio: Floats
    median_ratio: Floats
    layer_similarity: Floats
    mean_u: Vectors
    mean_v: Vectors
    n_tokens: Count

    def __post_init__(self) -> None:
        arrays = checked(self, ProfileError, "calibrate again", _SHAPES)
        observed = ~np.isnan(arrays["similarity"])
        for name, array in arrays.items():
            if array.ndim == 3:
                possible = np.isfinite(array[observed]).all()
            else:
                possible = not np.isinf(array).any() and (array.ndim == 1 or (np.isnan(array) != observed).all())
            if not possible:
                raise ProfileError(f"{name!r} has values that calibration cannot give; calibrate again")
        freeze(self, **arrays)

    @classmethod
    def mean(cls, requests: "Sequence[PhaseStatistics]") -> "PhaseStatistics":
        """Return the average over requests of equal weight, as in the paper. Numbers of tokens are summed."""
        means: dict[str, Any] = {
            name: np.mean([getattr(each, name) for each in requests], axis=0, dtype=np.float64) for name in _SHAPES
        }
        return cls(**means, n_tokens=sum(request.n_tokens for request in requests))


@dataclass(frozen=True, eq=False)
class LinearMaps(LayerArrays):
    """Linear maps: from its input u, a sublayer's output is estimated as ``s u + up (down u)``.

    Each layer has three: for its attention, for its FFN, and for both together. Arrays are read-only and rounded to
    BF16. Values are NaN if no map was fitted; others that are not finite, and other shapes, raise a ProfileError.

    Attributes:
        down: float32 ``[n_layer, 3, rank, n_embd]``: the first matrices.
        up: float32 ``[n_layer, 3, n_embd, rank]``: the second matrices.
    """

    down: Vectors
    up: Vectors

    def __post_init__(self) -> None:
        shapes = {"up": (np.float32, "n_layer 3 n_embd rank"), "down": (np.float32, "n_layer 3 rank n_embd")}
        arrays = checked(self, ProfileError, "these are no linear maps; calibrate again", shapes, copy=False)
        freeze(self, **{name: _as_bf16(array) for name, array in arrays.items()})
        if not all(np.isfinite(array[self.fitted]).all() for array in (self.down, self.up)):
            raise ProfileError("the linear maps have values that calibration cannot give; calibrate again")

    @property
    def fitted(self) -> Flags:
        """Whether there is a map, bool ``[n_layer, 3]``."""
        return np.asarray(~np.isnan(self.up).any(axis=(2, 3)))


def _as_bf16(values: Vectors) -> Vectors:
    """Round to the nearest BF16, which is the upper half of a float32; of two to the one with even bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return np.where(np.isnan(values), np.float32(np.nan), nearest.view(np.float32))


def map_scale(median_ratio: Floats) -> Floats:
    """Return the scale s of sublayers with maps, from their median ratio of norms, of any shape.

    With few sublayers skipped, the median ratio loses less than s = 1; with many, more. Its square root is near the
    better of both. SmolLM2 on Python sources adds 0.214, 0.218 and 0.239 nats per token with the ratio, its root and 1
    at 6 of 60 sublayers, and 0.973, 0.885 and 0.897 at 15. Within 2% of 1, s is 1, which saves a pass over the stream.
    """
    root = np.sqrt(median_ratio)
    return np.where(np.abs(root - 1) <= 0.02, 1.0, root)
