"""What calibration learned about the sublayers of one model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ProfileFormatError
from .cost_model import CostModel
from .identity import ModelInfo
from .maps import LinearMaps
from .statistics import PhaseStatistics


@dataclass(frozen=True)
class ProfileData:
    """Statistics of one model's sublayers, averaged over calibration requests: what plans are made from.

    Attributes:
        prefill: statistics of the prompts.
        decode: statistics of the tokens generated after them.
        n_requests, n_tokens: calibration requests, and their tokens all together.
        corpus: what text it was calibrated on, in words.
        package_version, created: of adaskip-cpp that calibrated it, and when, in UTC, ISO 8601.
        cost: what each sublayer costs on the machine that measured it, or None.
        maps: linear maps that stand in for sublayers, or None.

    Raises:
        ProfileFormatError: a part is not of this model's number of layers, or of another one's length of vectors.
    """

    prefill: PhaseStatistics
    decode: PhaseStatistics
    n_requests: int
    n_tokens: int
    model: ModelInfo
    corpus: str = ""
    package_version: str = ""
    created: str = ""
    cost: CostModel | None = None
    maps: LinearMaps | None = None

    def __post_init__(self) -> None:
        parts = {
            "'similarity'": self.prefill,
            "'similarity' of decode": self.decode,
            "the cost model": self.cost,
            "linear maps": self.maps,
        }
        for name, part in parts.items():
            if part is not None and part.n_layer != self.n_layer:
                raise ProfileFormatError(
                    f"{name} is of {part.n_layer} layers, the model has {self.n_layer}; calibrate again"
                )
        counts = (self.n_requests, self.n_tokens, self.prefill.n_tokens, self.decode.n_tokens)
        if min(counts) < 1:
            raise ProfileFormatError(f"it has counts of requests or tokens below 1, {counts}; calibrate again")
        n_embd = self.prefill.n_embd
        if self.decode.n_embd != n_embd:
            raise ProfileFormatError(
                f"the vectors' lengths differ, {n_embd} in prefill and {self.decode.n_embd} in decode; calibrate again"
            )
        if self.maps is not None and self.maps.n_embd != n_embd:
            raise ProfileFormatError("the linear maps are not of this model's shape; calibrate again")

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(architecture={self.model.architecture!r}, n_layer={self.n_layer}, n_requests="
            f"{self.n_requests}, n_tokens={self.n_tokens}, fingerprint={self.model.fingerprint[:12]!r})"
        )

    @property
    def n_layer(self) -> int:
        """Number of layers of the model."""
        return self.model.n_layer

    @property
    def similarity(self) -> npt.NDArray[np.float64]:
        """float64 ``[n_layer, 2]``: mean IO similarity in prefill, what sublayers are ranked by."""
        return self.prefill.similarity

    @property
    def norm_ratio(self) -> npt.NDArray[np.float64]:
        """float64 ``[n_layer, 2]``: mean of ``||V||_F / ||U||_F`` in prefill, the paper's compensation."""
        return self.prefill.norm_ratio

    @property
    def median_ratio(self) -> npt.NDArray[np.float64]:
        """float64 ``[n_layer, 2]``: mean of the median per-token ``|v| / |u|`` in prefill."""
        return self.prefill.median_ratio

    @property
    def skippable(self) -> npt.NDArray[np.bool_]:
        """bool ``[n_layer, 2]``: the sublayers that were observed and so can be skipped."""
        return ~np.isnan(self.similarity)
