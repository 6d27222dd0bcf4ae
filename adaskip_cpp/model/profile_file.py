"""Profile files: JSON for what people read, null for NaN, and the vectors in one binary file beside it.

``X.bin`` (see :mod:`adaskip_cpp.model.stored`) holds ``mean_u`` and ``mean_v`` of prefill, then of decode, each
``[n_layer, 2, n_embd]``, and where the JSON's ``rank`` is not 0 the linear maps, first ``down``
``[n_layer, 2, rank, n_embd]``, then ``up`` ``[n_layer, 2, n_embd, rank]``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import msgspec

from ..errors import ProfileFormatError, ProfileMissingError, ProfileVersionError
from . import stored
from .arrays import from_plain, to_plain
from .maps import LinearMaps
from .plan import PHASES
from .profile import ProfileData
from .statistics import VECTORS

FORMAT_VERSION = 7
_FORMAT = "adaskip-profile"
_MAPS = ("down", "up")

_Profile = TypeVar("_Profile", bound=ProfileData)


@dataclass(frozen=True)
class _Vectors(stored.VectorsFile):
    """The binary file, and what decides the shapes of its arrays."""

    n_embd: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    rank: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]


@dataclass(frozen=True)
class _Beside:
    vectors: _Vectors | None


def to_dict(profile: ProfileData) -> dict[str, Any]:
    """Return plain JSON values: the file format, without the name and hash of the vectors' file."""
    data = {"format": _FORMAT, "version": FORMAT_VERSION, **to_plain(_with_arrays(profile, ()))}
    for part, names in ((data, ("maps",)), *((data[phase], VECTORS) for phase in PHASES)):
        for name in names:
            del part[name]
    n_embd, rank = profile.prefill.n_embd, 0 if profile.maps is None else profile.maps.rank
    return {**data, "vectors": None if n_embd is None else {"n_embd": n_embd, "rank": rank}}


def save(profile: ProfileData, path: str | os.PathLike[str]) -> None:
    """Write a profile; see :meth:`adaskip_cpp.Profile.save`."""
    arrays = [getattr(getattr(profile, phase), name) for phase in PHASES for name in VECTORS]
    arrays += [getattr(profile.maps, name, None) for name in _MAPS]
    stored.save(path, to_dict(profile), [array for array in arrays if array is not None])


def load(path: str | os.PathLike[str], kind: type[_Profile]) -> _Profile:
    """Read a profile as one of a class; see :meth:`adaskip_cpp.Profile.load`."""
    name = os.fspath(path)
    try:
        data = stored.load(name, _FORMAT, "profile", FORMAT_VERSION)
        profile, vectors = from_plain(data, kind), from_plain(data, _Beside).vectors
        if vectors is None:
            return _with_arrays(profile, ())
        n_layer, n_embd, rank = profile.n_layer, vectors.n_embd, vectors.rank
        shapes: list[tuple[int, ...]] = [(n_layer, 2, n_embd) for _ in PHASES for _ in VECTORS]
        if rank:
            shapes += [(n_layer, 2, rank, n_embd), (n_layer, 2, n_embd, rank)]
        return _with_arrays(profile, vectors.read(name, shapes))
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


def _with_arrays(profile: _Profile, arrays: stored.Arrays) -> _Profile:
    """Return the profile with the vectors and maps of its binary file, and with no others."""
    rest = iter(arrays)
    parts: dict[str, Any] = {
        phase: replace(getattr(profile, phase), **{name: next(rest, None) for name in VECTORS}) for phase in PHASES
    }
    maps = tuple(rest)
    return replace(profile, **parts, maps=LinearMaps(*maps) if maps else None)
