"""What calibration learned about the sublayers of one model, and its file; see :mod:`adaskip_cpp.model.stored`."""

import math
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..errors import ProfileFormatError, ProfileMissingError, ProfileVersionError
from ..files import StrPath
from . import stored
from .arrays import Flags, Floats, LayerArrays, freeze
from .cost_model import CostModel
from .identity import ModelInfo
from .statistics import LinearMaps, PhaseStatistics

FORMAT_VERSION = 11
_FORMAT = "adaskip-profile"

_Self = TypeVar("_Self", bound="ProfileData")


@dataclass(frozen=True)
class Windows:
    """What it costs the tokens behind a prompt that attentions look back at a window in its bulk.

    Attributes:
        layers: those whose attention can, ascending.
        divergence: in nats per token, of the last k of these layers together, k from 0 to all of them.

    Raises:
        ProfileFormatError: the two do not go together.
    """

    layers: tuple[int, ...]
    divergence: tuple[float, ...]

    def __post_init__(self) -> None:
        finite = all(math.isfinite(each) and each >= 0 for each in self.divergence)
        if list(self.layers) != sorted({*self.layers}) or len(self.divergence) != len(self.layers) + 1 or not finite:
            raise ProfileFormatError("'windows' does not tell one divergence per number of layers; calibrate again")


@dataclass(frozen=True, eq=False)
class ProfileData(LayerArrays):
    """Statistics of one model's sublayers, averaged over calibration requests: what plans are made from.

    Attributes:
        prefill: statistics of the prompts.
        decode: statistics of the tokens generated after them.
        n_requests, n_tokens: calibration requests, and their tokens all together.
        corpus: what text it was calibrated on, in words.
        package_version, created: of adaskip-cpp that calibrated it, and when, in UTC, ISO 8601.
        cost: what each sublayer costs on the machine that measured it, or None.
        maps: linear maps that stand in for sublayers, or None.
        divergence, copying: float64 ``[n_layer, 2]``, read-only: what skipping each sublayer alone in the bulk of a
            prompt costs an answer that continues it, and one that copies from it, in nats per token; NaN for sublayers
            that prompts never skip. Both None if they were not measured.
        windows: what it costs that attentions look back at a window there; None if it was not measured.
        bulk_only: layers whose attention only the bulk of a prompt can skip, as other layers read its KV.

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
    divergence: Floats | None = None
    copying: Floats | None = None
    windows: Windows | None = None
    bulk_only: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("divergence", "copying"):
            if (values := getattr(self, name)) is not None:
                lost = np.array(values, np.float64)
                fits = lost.shape == self.similarity.shape and not (~np.isnan(lost) & ~self.in_bulk).any()
                if not fits or (lost < 0).any() or np.isinf(lost).any():
                    raise ProfileFormatError(f"{name!r} is not of this model's sublayers; calibrate again")
                freeze(self, **{name: lost})
        if (self.divergence is None) != (self.copying is None):
            raise ProfileFormatError("one of 'divergence' and 'copying' is missing; calibrate again")
        listed = {"bulk_only": self.bulk_only, "windows": () if self.windows is None else self.windows.layers}
        for name, layers in listed.items():
            if not all(0 <= layer < self.n_layer for layer in layers):
                raise ProfileFormatError(f"{name!r} has a layer that the model has not; calibrate again")
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
        n_embd, of_decode = (phase.mean_u.shape[2] for phase in (self.prefill, self.decode))
        if of_decode != n_embd:
            raise ProfileFormatError(
                f"the vectors' lengths differ, {n_embd} in prefill and {of_decode} in decode; calibrate again"
            )
        if self.maps is not None and self.maps.up.shape[2] != n_embd:
            raise ProfileFormatError("the linear maps are not of this model's shape; calibrate again")

    @classmethod
    def blank(cls: type[_Self], model: ModelInfo) -> _Self:
        """Return the profile of a model of which nothing is known, to make plans of listed layers from."""
        ones, layers = np.ones((model.n_layer, 2)), tuple(range(model.n_layer))
        vectors = np.zeros((model.n_layer, 2, 1), np.float32)
        statistics = PhaseStatistics(ones, ones, ones, ones[:, 0], vectors, vectors, 1)
        return cls(statistics, statistics, 1, 1, model, windows=Windows(layers, (0.0,) * (len(layers) + 1)))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(architecture={self.model.architecture!r}, n_layer={self.n_layer}, n_requests="
            f"{self.n_requests}, n_tokens={self.n_tokens}, fingerprint={self.model.fingerprint[:12]!r})"
        )

    @property
    def n_layer(self) -> int:
        return self.model.n_layer

    @property
    def similarity(self) -> Floats:
        """float64 ``[n_layer, 2]``: mean IO similarity in prefill, what sublayers are ranked by."""
        return self.prefill.similarity

    @property
    def lost(self) -> Floats | None:
        """float64 ``[n_layer, 2]``: the worse of ``divergence`` and ``copying``; None if they were not measured."""
        return None if self.divergence is None or self.copying is None else np.maximum(self.divergence, self.copying)

    @property
    def in_bulk(self) -> Flags:
        """bool ``[n_layer, 2]``: the sublayers that were observed and so can be skipped in the bulk of a prompt."""
        return ~np.isnan(self.similarity)

    @property
    def skippable(self) -> Flags:
        """bool ``[n_layer, 2]``: those of them that can be skipped in every phase."""
        may = self.in_bulk
        may[list(self.bulk_only), 0] = False
        return may

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as the file has them, without the vectors and maps."""
        return stored.plain({"format": _FORMAT, "version": FORMAT_VERSION, **vars(self)})[0]

    def save(self, path: StrPath) -> None:
        """Write the profile as JSON, its vectors to a file ``.bin`` beside it.

        Raises:
            OSError: a file cannot be written; what was there before is still there.
        """
        stored.save(path, _FORMAT, FORMAT_VERSION, self)

    @classmethod
    def load(cls: type[_Self], path: StrPath) -> _Self:
        """Read a profile file.

        Raises:
            ProfileMissingError: there is no such file; also a ``FileNotFoundError``.
            ProfileFormatError: the file or its vectors are missing, truncated, malformed, or do not belong together.
            ProfileVersionError: written in a format version that this release does not read.
            OSError: the file cannot be read.
        """
        name = os.fspath(path)
        try:
            return stored.load(name, cls, _FORMAT, FORMAT_VERSION)
        except FileNotFoundError:
            raise ProfileMissingError(
                f"there is no profile {name!r}; write one with `adaskip-cpp calibrate MODEL -o {name}`"
            ) from None
        except stored.ModelGivenError as error:
            raise ProfileFormatError(
                f"{name!r} is a model; name its profile, which `adaskip-cpp calibrate {name} -o PROFILE` writes"
            ) from error
        except stored.VersionError as error:
            way_out = "calibrate again or install the release that wrote it"
            raise ProfileVersionError(f"{name!r} cannot be used: {error}; {way_out}") from error
        except ValueError as error:  # among them all of msgspec's and our own
            words = str(error).removesuffix("; calibrate again")
            raise ProfileFormatError(f"{name!r} cannot be used: {words}; calibrate again") from error
