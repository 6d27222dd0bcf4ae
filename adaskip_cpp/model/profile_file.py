"""Profile files: JSON for what people read, and the vectors in one binary file beside it.

``X.json`` holds the statistics, with null for NaN. ``X.npz`` (NumPy's format, float32) holds the mean vectors of both
phases and the linear maps; its name and SHA-256 are in the JSON. Move or copy the two together. A profile without
vectors is JSON alone.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import ProfileFormatError, ProfileMissingError, ProfileVersionError
from ..files import json_text, write_atomically, write_pair
from .arrays import from_plain, to_plain
from .cost_model import CostModel
from .identity import ModelInfo
from .maps import LinearMaps
from .plan import PHASES
from .profile import ProfileData
from .statistics import FIGURES, VECTORS, PhaseStatistics
from .stored import VectorsFile, file_beside, read_json

__all__ = ["FORMAT_VERSION", "load", "save", "to_dict", "vectors_path"]

FORMAT_VERSION = 5
_FORMAT = "adaskip-profile"
_MAPS = ("down", "up")
_HEADER = 4096
"""More bytes than what stands around one array in the binary file."""

_Profile = TypeVar("_Profile", bound=ProfileData)
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 60)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
_Rank = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
_Arrays = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class _Calibration:
    n_requests: _Count
    n_tokens: _Count
    corpus: str
    package_version: str
    created: str


@dataclass(frozen=True)
class _Statistics:
    """Of one phase, without its vectors; see :class:`PhaseStatistics`."""

    n_tokens: _Count
    similarity: npt.NDArray[np.float64]
    norm_ratio: npt.NDArray[np.float64]
    median_ratio: npt.NDArray[np.float64]
    layer_similarity: npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Vectors(VectorsFile):
    """The binary file, and what decides the shapes of its arrays."""

    n_embd: _Size
    rank: _Rank


@dataclass(frozen=True)
class _File:
    format: str
    version: int
    model: ModelInfo
    calibration: _Calibration
    prefill: _Statistics
    decode: _Statistics
    cost: CostModel | None
    vectors: _Vectors | None


def vectors_path(path: str | os.PathLike[str]) -> str:
    """Return the name of the file beside ``path`` that holds the vectors: ``X.npz`` for ``X.json``."""
    return file_beside(path, ".npz")


def to_dict(profile: ProfileData) -> dict[str, Any]:
    """Return plain JSON values: the file format, without the name and hash of the vectors' file."""
    data = to_plain(_file(profile, VectorsFile("", "")))
    if data["vectors"] is not None:
        del data["vectors"]["file"], data["vectors"]["sha256"]
    return data  # type: ignore[no-any-return]


def _file(profile: ProfileData, file: VectorsFile) -> _File:
    n_embd, rank = profile.prefill.n_embd, 0 if profile.maps is None else profile.maps.rank
    prefill, decode = (
        _Statistics(each.n_tokens, *(getattr(each, name) for name in FIGURES))
        for each in (profile.prefill, profile.decode)
    )
    return _File(
        _FORMAT,
        FORMAT_VERSION,
        profile.model,
        _Calibration(profile.n_requests, profile.n_tokens, profile.corpus, profile.package_version, profile.created),
        prefill,
        decode,
        profile.cost,
        None if n_embd is None else _Vectors(file.file, file.sha256, n_embd, rank),
    )


def save(profile: ProfileData, path: str | os.PathLike[str]) -> None:
    """Write a profile; after a failure the old files are still there, and no others.

    Raises:
        OSError: a file cannot be written.
    """
    target = os.path.realpath(path)
    if profile.prefill.n_embd is None:
        write_atomically(target, json_text(to_dict(profile)))
        return
    buffer = io.BytesIO()
    arrays = {f"{phase}_{name}": getattr(getattr(profile, phase), name) for phase in PHASES for name in VECTORS}
    if profile.maps is not None:
        arrays |= {f"maps_{name}": getattr(profile.maps, name) for name in _MAPS}
    np.savez(buffer, **arrays)
    binary, content = vectors_path(target), buffer.getvalue()
    write_pair(target, json_text(to_plain(_file(profile, VectorsFile.of(binary, content)))), binary, content)


def load(path: str | os.PathLike[str], kind: Callable[..., _Profile]) -> _Profile:
    """Read a profile; see :meth:`adaskip_cpp.Profile.load`.

    Args:
        path: the JSON file.
        kind: the class of the profile.

    Raises:
        ProfileMissingError: there is no such file.
        ProfileFormatError: the file or its vectors are missing, truncated, malformed, or do not belong together.
        ProfileVersionError: written in a format version that this release does not read.
        OSError: the file cannot be read.
    """
    name = os.fspath(path)
    try:
        data = read_json(name)
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError("this is not an adaskip profile")
        if data.get("version") != FORMAT_VERSION:
            raise ProfileVersionError(
                f"{name!r} has format version {data.get('version')!r}, this release reads {FORMAT_VERSION}; calibrate "
                "again or install the release that wrote it"
            )
        file = from_plain(data, _File)
        arrays = _read_vectors(file, os.path.dirname(os.path.realpath(name)))
        prefill, decode = (
            PhaseStatistics(**vars(each), mean_u=arrays.get(f"{phase}_mean_u"), mean_v=arrays.get(f"{phase}_mean_v"))
            for phase, each in zip(PHASES, (file.prefill, file.decode), strict=True)
        )
        maps = LinearMaps(arrays["maps_down"], arrays["maps_up"]) if "maps_up" in arrays else None
        return kind(prefill, decode, **vars(file.calibration), model=file.model, cost=file.cost, maps=maps)
    except FileNotFoundError:
        raise ProfileMissingError(
            f"there is no profile {name!r}; write one with `adaskip-cpp calibrate MODEL -o {name}`"
        ) from None
    except ProfileVersionError:
        raise
    except ValueError as error:  # among them all of msgspec's and our own
        words = str(error)
        way_out = "" if words.endswith("calibrate again") else "; calibrate again"
        raise ProfileFormatError(f"{name!r} cannot be used: {words}{way_out}") from error


def _read_vectors(file: _File, folder: str) -> _Arrays:
    """Read the binary file: arrays of the names and shapes that the JSON makes of it, and nothing else."""
    if file.vectors is None:
        return {}
    n_layer, n_embd, rank = file.model.n_layer, file.vectors.n_embd, file.vectors.rank
    shapes: dict[str, tuple[int, ...]] = {
        f"{phase}_{name}": (n_layer, 2, n_embd) for phase in PHASES for name in VECTORS
    }
    if rank:
        shapes |= {"maps_down": (n_layer, 2, rank, n_embd), "maps_up": (n_layer, 2, n_embd, rank)}
    most = sum(4 * math.prod(shape) + _HEADER for shape in shapes.values())
    content = file.vectors.read(folder, most)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return {name: _read_array(archive, f"{name}.npy", shape) for name, shape in shapes.items()}
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds for what is damaged or encrypted
        raise ValueError(f"the file of its vectors, {file.vectors.file!r}, is malformed ({error})") from error


def _read_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Read one array of a known shape. Its header is looked at before memory is taken, and it is never unpickled."""
    n_bytes = 4 * math.prod(shape)
    entry = archive.getinfo(name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in an unknown way")
    if not n_bytes < entry.file_size <= n_bytes + _HEADER:
        raise ValueError(f"{name} has {entry.file_size:,} bytes, not {n_bytes:,} and a header")
    with archive.open(entry) as stream:
        content = io.BytesIO(stream.read(entry.file_size))
    if np.lib.format.read_magic(content) != (1, 0):
        raise ValueError(f"{name} is of another version of NumPy's format")
    found, columns_first, dtype = np.lib.format.read_array_header_1_0(content)
    if found != shape or columns_first or dtype.kind != "f" or dtype.itemsize != 4:
        raise ValueError(f"{name} is {dtype} of shape {found}, not float32 of shape {shape}")
    return np.frombuffer(content.read(), dtype, math.prod(shape)).reshape(shape).astype(np.float32)
