"""``ProfileData``: what calibration learned about one model's sublayers, for planning, and its file."""

import os
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..errors import ProfileError
from ..files import StrPath
from . import stored
from .arrays import Count, Flags, Floats, LayerArrays
from .cost_model import CostModel
from .identity import ModelInfo
from .statistics import LinearMaps, PhaseStatistics

FORMAT_VERSION = 12
_FORMAT = "adaskip-profile"

_Self = TypeVar("_Self", bound="ProfileData")


@dataclass(frozen=True, eq=False)
class ProfileData(LayerArrays):
    """The parts of a profile: statistics of one model's sublayers, averaged over calibration requests.

    Arrays are read-only. Impossible values, and parts that cannot be of one model, raise a ProfileError.

    Attributes:
        prefill: statistics of the prompts.
        decode: statistics of the tokens that were generated after them.
        n_requests: number of calibration requests.
        n_tokens: tokens of all these requests together.
        model: the model that was calibrated.
        corpus: the text of the calibration, in words.
        package_version: version of adaskip-cpp.
        created: time of the calibration, UTC, ISO 8601.
        cost: times of the sublayers, on the machine of the calibration; None if they were not measured.
        maps: linear maps, for compensation; None if they were not fitted.
        windowable: layers whose attention sees all tokens, and can look back at a window in the bulk of a prompt,
            ascending.
        sliding: layers whose attention has a sliding window, which can be smaller in the bulk of a prompt, ascending.
        bulk_only: layers whose attention only the bulk of a prompt can skip, because other layers read its K and V.
    """

    prefill: PhaseStatistics
    decode: PhaseStatistics
    n_requests: Count
    n_tokens: Count
    model: ModelInfo
    corpus: str = ""
    package_version: str = ""
    created: str = ""
    cost: CostModel | None = None
    maps: LinearMaps | None = None
    windowable: tuple[int, ...] = ()
    sliding: tuple[int, ...] = ()
    bulk_only: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("windowable", "sliding", "bulk_only"):
            layers = getattr(self, name)
            if list(layers) != sorted({*layers}) or not all(0 <= layer < self.n_layer for layer in layers):
                raise ProfileError(f"{name!r} does not list layers of the model; calibrate again")
        names = ("'similarity'", "'similarity' of decode", "the cost model", "linear maps")
        for name, part in zip(names, (self.prefill, self.decode, self.cost, self.maps), strict=True):
            if part is not None and part.n_layer != self.n_layer:
                raise ProfileError(f"{name} is of {part.n_layer} layers, the model has {self.n_layer}; calibrate again")
        n_embd, of_decode = (phase.mean_u.shape[2] for phase in (self.prefill, self.decode))
        if of_decode != n_embd:
            raise ProfileError(f"vectors have {n_embd} values in prefill, {of_decode} in decode; calibrate again")
        if self.maps is not None and self.maps.up.shape[2] != n_embd:
            raise ProfileError("the linear maps are not of this model's shape; calibrate again")

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
    def similarity(self) -> Floats:
        """Mean IO similarity in prefill, float64 ``[n_layer, 2]``; the paper ranks sublayers by it."""
        return self.prefill.similarity

    @property
    def in_bulk(self) -> Flags:
        """The sublayers that the bulk of a prompt can skip, bool ``[n_layer, 2]``: those that were observed."""
        return ~np.isnan(self.similarity)

    @property
    def skippable(self) -> Flags:
        """The sublayers that every phase can skip, bool ``[n_layer, 2]``."""
        may = self.in_bulk
        may[list(self.bulk_only), 0] = False
        return may

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as the file has them, without vectors and maps."""
        return stored.plain({"format": _FORMAT, "version": FORMAT_VERSION, **vars(self)})[0]

    def save(self, path: StrPath) -> None:
        """Write the profile into a JSON file, and its vectors and maps beside it: ``X.bin`` for ``X.json``.

        Raises:
            OSError: a file cannot be written; what was there before is still there.
        """
        stored.save(path, _FORMAT, FORMAT_VERSION, self)

    @classmethod
    def load(cls: type[_Self], path: StrPath) -> _Self:
        """Read a profile that ``save`` or ``adaskip-cpp calibrate`` wrote, and the file beside it.

        Raises:
            ProfileError: a file is missing, malformed or of another version, or the two are not of one profile.
            OSError: a file cannot be read.
        """
        name = os.fspath(path)
        try:
            return stored.load(name, cls, _FORMAT, FORMAT_VERSION)
        except FileNotFoundError:
            way_out = f"write one with `adaskip-cpp calibrate MODEL -o {name}`"
            raise ProfileError(f"there is no profile {name!r}; {way_out}") from None
        except stored.ModelGivenError as error:
            way_out = f"name its profile, which `adaskip-cpp calibrate {name} -o PROFILE` writes"
            raise ProfileError(f"{name!r} is a model; {way_out}") from error
        except ValueError as error:  # this includes all errors of msgspec and our own
            words = str(error).removesuffix("; calibrate again")
            or_else = " or install the release that wrote it" if isinstance(error, stored.VersionError) else ""
            raise ProfileError(f"{name!r} cannot be used: {words}; calibrate again{or_else}") from error
