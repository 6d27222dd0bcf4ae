"""What calibration measures of a model's sublayers in one phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ProfileFormatError
from .arrays import ByContent, freeze

__all__ = ["FIGURES", "VECTORS", "PhaseStatistics"]

FIGURES = ("similarity", "norm_ratio", "median_ratio", "layer_similarity")
VECTORS = ("mean_u", "mean_v")


@dataclass(frozen=True, eq=False)
class PhaseStatistics(ByContent):
    """Statistics of one phase, of one request or averaged over requests.

    ``u`` and ``v`` are a sublayer's input and output, both with the residual. Columns are attention and FFN. Arrays are
    read-only, and NaN where a sublayer was not observed.

    Attributes:
        similarity: float64 ``[n_layer, 2]``, mean over the tokens of the cosine of u and v.
        norm_ratio: float64 ``[n_layer, 2]``, ``||V||_F / ||U||_F`` over all tokens, the paper's compensation.
        median_ratio: float64 ``[n_layer, 2]``, median over the tokens of ``|v| / |u|``.
        layer_similarity: float64 ``[n_layer]``, mean over the tokens of the cosine of a whole layer's input and output.
        mean_u: float32 ``[n_layer, 2, n_embd]``, mean of u over the tokens, or None.
        mean_v: float32 ``[n_layer, 2, n_embd]``, mean of v over the tokens, or None.
        n_tokens: tokens seen, all requests together.

    Raises:
        ProfileFormatError: the arrays' shapes or values are impossible.
    """

    similarity: npt.NDArray[np.float64]
    norm_ratio: npt.NDArray[np.float64]
    median_ratio: npt.NDArray[np.float64]
    layer_similarity: npt.NDArray[np.float64]
    mean_u: npt.NDArray[np.float32] | None = None
    mean_v: npt.NDArray[np.float32] | None = None
    n_tokens: int = 0

    def __post_init__(self) -> None:
        shape = np.shape(self.similarity)
        if len(shape) != 2 or shape[0] < 1 or shape[1] != 2:
            raise ProfileFormatError(f"'similarity' has the shape {shape}, not [n_layer, 2]; calibrate again")
        observed = ~np.isnan(np.asarray(self.similarity, np.float64))
        for name in FIGURES:
            array = np.array(getattr(self, name), dtype=np.float64)
            expected = shape if name != "layer_similarity" else shape[:1]
            if array.shape != expected:
                raise ProfileFormatError(f"{name!r} has the shape {array.shape}, not {list(expected)}; calibrate again")
            inconsistent = name != "layer_similarity" and (np.isnan(array) == observed).any()
            if np.isinf(array).any() or inconsistent:
                raise ProfileFormatError(f"{name!r} has values that calibration cannot give; calibrate again")
            freeze(self, **{name: array})
        if (self.mean_u is None) != (self.mean_v is None):
            raise ProfileFormatError("one of 'mean_u' and 'mean_v' is missing; calibrate again")
        n_embd = None if self.mean_u is None else np.shape(self.mean_u)[-1]
        for name in VECTORS if self.mean_u is not None else ():
            vectors = np.array(getattr(self, name), dtype=np.float32)
            if vectors.shape != (*shape, n_embd):
                raise ProfileFormatError(
                    f"{name!r} has the shape {vectors.shape}, not [{shape[0]}, 2, n_embd]; calibrate again"
                )
            if not np.isfinite(vectors[observed]).all():
                raise ProfileFormatError(f"{name!r} has values that calibration cannot give; calibrate again")
            freeze(self, **{name: vectors})

    @property
    def n_layer(self) -> int:
        """Number of layers of the model."""
        return int(self.similarity.shape[0])

    @property
    def n_embd(self) -> int | None:
        """Length of the vectors; None without vectors."""
        return None if self.mean_u is None else int(self.mean_u.shape[2])

    @classmethod
    def mean(cls, requests: Sequence[PhaseStatistics]) -> PhaseStatistics:
        """Average over requests, each with the same weight whatever its length, as the paper does.

        Vectors are kept where every request has them; tokens are summed.
        """

        def average(name: str) -> npt.NDArray[np.float64] | None:
            arrays = [getattr(request, name) for request in requests]
            return None if any(array is None for array in arrays) else np.mean(arrays, axis=0, dtype=np.float64)

        return cls(
            **{name: average(name) for name in (*FIGURES, *VECTORS)},  # type: ignore[arg-type]
            n_tokens=sum(request.n_tokens for request in requests),
        )
