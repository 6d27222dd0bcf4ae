"""What calibration learned about the sublayers of one model, and its file: JSON, and the vectors in one beside it.

``X.json`` is what people read, with null for NaN. ``X.bin`` (see :mod:`adaskip_cpp.model.stored`) holds ``mean_u`` and
``mean_v`` of prefill, then of decode, each ``[n_layer, 2, n_embd]``, and the linear maps of what the JSON's
``mapped`` lists by layer and column, first ``down`` ``[n, rank, n_embd]``, then ``up`` ``[n, n_embd, rank]``.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import ProfileFormatError, ProfileMissingError, ProfileVersionError
from . import stored
from .arrays import LayerArrays, freeze, from_plain, to_plain
from .cost_model import CostModel
from .identity import ModelInfo
from .plan import TIMED
from .statistics import VECTORS, LinearMaps, PhaseStatistics

FORMAT_VERSION = 10
_FORMAT = "adaskip-profile"
_MAPS = ("down", "up")


@dataclass(frozen=True)
class Windows:
    """What it costs the tokens behind a prompt that attentions look back at a window in its bulk.

    Attributes:
        layers: those whose attention can, ascending.
        divergence: in nats per token, of the last k of these layers together, k from 0 to all of them; see
            :func:`adaskip_cpp.calibration.divergence.measure_windows`.

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
        divergence, copying: float64 ``[n_layer, 2]``: what skipping each sublayer alone in the bulk of a prompt costs
            an answer that continues it, and one that copies from it, see :mod:`adaskip_cpp.calibration.divergence`. NaN
            for sublayers that prompts never skip; both None if they were not measured. Read-only.
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
    divergence: npt.NDArray[np.float64] | None = None
    copying: npt.NDArray[np.float64] | None = None
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
    def lost(self) -> npt.NDArray[np.float64] | None:
        """float64 ``[n_layer, 2]``: the worse of ``divergence`` and ``copying``; None if they were not measured."""
        return None if self.divergence is None or self.copying is None else np.maximum(self.divergence, self.copying)

    @property
    def in_bulk(self) -> npt.NDArray[np.bool_]:
        """bool ``[n_layer, 2]``: the sublayers that were observed and so can be skipped in the bulk of a prompt."""
        return ~np.isnan(self.similarity)

    @property
    def skippable(self) -> npt.NDArray[np.bool_]:
        """bool ``[n_layer, 2]``: those of them that can be skipped in every phase."""
        may = self.in_bulk
        may[list(self.bulk_only), 0] = False
        return may


_Profile = TypeVar("_Profile", bound=ProfileData)


@dataclass(frozen=True)
class _Vectors(stored.VectorsFile):
    """The binary file, and what decides the shapes of its arrays."""

    n_embd: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    rank: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
    mapped: tuple[tuple[int, Literal[0, 1, 2]], ...]


@dataclass(frozen=True)
class _Beside:
    vectors: _Vectors | None


def to_dict(profile: ProfileData) -> dict[str, Any]:
    data = {"format": _FORMAT, "version": FORMAT_VERSION, **to_plain(_with_arrays(profile, ()))}
    for part, names in ((data, ("maps",)), *((data[phase], VECTORS) for phase in TIMED)):
        for name in names:
            del part[name]
    n_embd, maps = profile.prefill.n_embd, profile.maps
    mapped = [] if maps is None else np.argwhere(maps.fitted).tolist()
    rank = 0 if maps is None else maps.rank
    return {**data, "vectors": None if n_embd is None else {"n_embd": n_embd, "rank": rank, "mapped": mapped}}


def save(profile: ProfileData, path: str | os.PathLike[str]) -> None:
    arrays = [getattr(getattr(profile, phase), name) for phase in TIMED for name in VECTORS]
    maps = [] if profile.maps is None else [getattr(profile.maps, name)[profile.maps.fitted] for name in _MAPS]
    stored.save(path, to_dict(profile), [array for array in arrays if array is not None], maps)


def load(path: str | os.PathLike[str], kind: type[_Profile]) -> _Profile:
    name = os.fspath(path)
    try:
        data = stored.load(name, _FORMAT, "profile", FORMAT_VERSION)
        profile, vectors = from_plain(data, kind), from_plain(data, _Beside).vectors
        if vectors is None:
            return _with_arrays(profile, ())
        n_layer, n_embd, rank, n = profile.n_layer, vectors.n_embd, vectors.rank, len(vectors.mapped)
        if 24 * n_layer * n_embd * rank > stored.MOST_MEMORY:
            raise ValueError("it is of a larger model than any")
        shapes = [(n_layer, 2, n_embd) for _ in TIMED for _ in VECTORS]
        *means, down, up = vectors.read(name, shapes, [(n, rank, n_embd), (n, n_embd, rank)])
        if (
            bool(rank) != bool(n)
            or len({*vectors.mapped}) < n
            or not all(0 <= at < n_layer for at, _ in vectors.mapped)
        ):
            raise ValueError("it does not say what has a map")
        return _with_arrays(
            profile, [*means, *(_everywhere(each, n_layer, vectors.mapped) for each in (down, up) if n)]
        )
    except FileNotFoundError:
        raise ProfileMissingError(
            f"there is no profile {name!r}; write one with `adaskip-cpp calibrate MODEL -o {name}`"
        ) from None
    except stored.VersionError as error:
        way_out = "calibrate again or install the release that wrote it"
        raise ProfileVersionError(f"{name!r} cannot be used: {error}; {way_out}") from error
    except ValueError as error:  # among them all of msgspec's and our own
        words = str(error).removesuffix("; calibrate again")
        raise ProfileFormatError(f"{name!r} cannot be used: {words}; calibrate again") from error


def _everywhere(
    rows: npt.NDArray[np.float32], n_layer: int, which: Sequence[tuple[int, int]]
) -> npt.NDArray[np.float32]:
    """Return the array of all maps with these rows in it, NaN elsewhere."""
    values = np.full((n_layer, 3, *rows.shape[1:]), np.nan, np.float32)
    values[tuple(np.transpose(which))] = rows
    return values


def _with_arrays(profile: _Profile, arrays: stored.Arrays) -> _Profile:
    rest = iter(arrays)
    parts: dict[str, Any] = {
        phase: replace(getattr(profile, phase), **{name: next(rest, None) for name in VECTORS}) for phase in TIMED
    }
    maps = tuple(rest)
    return replace(profile, **parts, maps=LinearMaps(*maps) if maps else None)
