"""A profile: what calibration learned about the sublayers of one model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ProfileFormatError
from ..model import profile_file
from ..model.identity import ModelInfo
from ..model.maps import LinearMaps
from ..model.plan import SkipPlan
from ..model.statistics import PhaseStatistics
from .request import PlanRequest
from .strategies import make_plan

if TYPE_CHECKING:
    from ..model.cost_model import CostModel

__all__ = ["Profile"]


@dataclass(frozen=True)
class Profile:
    """Statistics of one model's sublayers, averaged over calibration requests.

    Attributes:
        prefill: statistics of the prompts.
        decode: statistics of the tokens generated after them.
        n_requests: calibration requests.
        n_tokens: their tokens, all together.
        model: the model that was calibrated.
        corpus: what text it was calibrated on, in words.
        package_version: version of adaskip-cpp that calibrated it.
        created: UTC time of calibration, ISO 8601.
        cost: what each sublayer costs on the machine that calibrated, or None.
        maps: linear maps that stand in for sublayers, or None.

    Raises:
        ProfileFormatError: the statistics are not of this model's number of layers.
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
        for phase in (self.prefill, self.decode):
            if phase.n_layer != self.model.n_layer:
                raise ProfileFormatError(
                    f"'similarity' is of {phase.n_layer} layers, the model has {self.model.n_layer}; calibrate again"
                )
        if self.prefill.n_embd != self.decode.n_embd:
            raise ProfileFormatError(
                f"the vectors' lengths differ, {self.prefill.n_embd} in prefill and {self.decode.n_embd} in decode; "
                "calibrate again"
            )
        if self.maps is not None and (self.maps.n_layer, self.maps.n_embd) != (self.n_layer, self.prefill.n_embd):
            raise ProfileFormatError("the linear maps are not of this model's shape; calibrate again")

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"Profile(architecture={self.model.architecture!r}, n_layer={self.n_layer}, "
            f"n_requests={self.n_requests}, n_tokens={self.n_tokens}, fingerprint={self.model.fingerprint[:12]!r})"
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

    def plan(self, n_skip: int | PlanRequest | None = None, **request: Any) -> SkipPlan:
        """Choose sublayers to skip.

        Args:
            n_skip: number of sublayers to skip; 12 if neither this nor ``speedup`` is given. Or a whole request.
            **request: what else is wanted, by the names of :class:`adaskip_cpp.planning.request.PlanRequest`: for
                example ``speedup=1.25, context=4096``, ``mode="decode"`` or ``strategy="early_exit"``.

        Raises:
            BudgetError: ``n_skip`` is negative or more than can be skipped, or ``speedup`` is out of reach.
            CompensationError: ``compensation`` is unknown, or the profile lacks what it needs.
            PlanError: another argument is unknown or impossible, or does not go with the others.
        """
        return make_plan(self, PlanRequest.of(n_skip, **request))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: what :meth:`save` writes, without the vectors."""
        return profile_file.to_dict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON, its vectors to a file ``.npz`` beside it.

        Raises:
            OSError: a file cannot be written; what was there before is still there.
        """
        profile_file.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile file.

        Raises:
            ProfileMissingError: there is no such file; also a ``FileNotFoundError``.
            ProfileFormatError: the file or its vectors are missing, truncated, malformed, or do not belong together.
            ProfileVersionError: written in a format version that this release does not read.
            OSError: the file cannot be read.
        """
        return profile_file.load(path)
