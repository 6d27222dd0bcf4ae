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
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import ProfileFormatError, ProfileMissingError, ProfileVersionError
from ..files import json_text, write_atomically, write_pair
from .arrays import from_plain, to_plain
from .maps import LinearMaps
from .plan import PHASES
from .profile import ProfileData
from .statistics import VECTORS
from .stored import VectorsFile, file_beside, read_json

__all__ = ["FORMAT_VERSION", "load", "save", "to_dict", "vectors_path"]

FORMAT_VERSION = 6
_FORMAT = "adaskip-profile"
_MAPS = ("down", "up")
_HEADER = 4096
"""More bytes than what stands around one array in the binary file."""

_Profile = TypeVar("_Profile", bound=ProfileData)
_Arrays = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class _Vectors(VectorsFile):
    """The binary file, and what decides the shapes of its arrays."""

    n_embd: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    rank: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]


def vectors_path(path: str | os.PathLike[str]) -> str:
    """Return the name of the file beside ``path`` that holds the vectors: ``X.npz`` for ``X.json``."""
    return file_beside(path, ".npz")


def to_dict(profile: ProfileData) -> dict[str, Any]:
    """Return plain JSON values: the file format, without the name and hash of the vectors' file."""
    data = {"format": _FORMAT, "version": FORMAT_VERSION, **to_plain(_with_arrays(profile, {}))}
    for part, names in ((data, ("maps",)), *((data[phase], VECTORS) for phase in PHASES)):
        for name in names:
            del part[name]
    n_embd, rank = profile.prefill.n_embd, 0 if profile.maps is None else profile.maps.rank
    return {**data, "vectors": None if n_embd is None else {"n_embd": n_embd, "rank": rank}}


def save(profile: ProfileData, path: str | os.PathLike[str]) -> None:
    """Write a profile; after a failure the old files are still there, and no others.

    Raises:
        OSError: a file cannot be written.
    """
    target, data = os.path.realpath(path), to_dict(profile)
    if data["vectors"] is None:
        write_atomically(target, json_text(data))
        return
    arrays = {f"{phase}_{name}": getattr(getattr(profile, phase), name) for phase in PHASES for name in VECTORS}
    if profile.maps is not None:
        arrays |= {f"maps_{name}": getattr(profile.maps, name) for name in _MAPS}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    binary, content = vectors_path(target), buffer.getvalue()
    data["vectors"] |= to_plain(VectorsFile.of(binary, content))
    write_pair(target, json_text(data), binary, content)


def load(path: str | os.PathLike[str], kind: type[_Profile]) -> _Profile:
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
        profile, vectors = from_plain(data, kind), from_plain(data["vectors"], _Vectors | None)  # type: ignore[arg-type]
        folder = os.path.dirname(os.path.realpath(name))
        return _with_arrays(profile, {} if vectors is None else _read_vectors(vectors, profile.n_layer, folder))
    except FileNotFoundError:
        raise ProfileMissingError(
            f"there is no profile {name!r}; write one with `adaskip-cpp calibrate MODEL -o {name}`"
        ) from None
    except ProfileVersionError:
        raise
    except KeyError as error:
        raise ProfileFormatError(f"{name!r} cannot be used: it lacks {error}; calibrate again") from error
    except ValueError as error:  # among them all of msgspec's and our own
        words = str(error)
        way_out = "" if words.endswith("calibrate again") else "; calibrate again"
        raise ProfileFormatError(f"{name!r} cannot be used: {words}{way_out}") from error


def _with_arrays(profile: _Profile, arrays: _Arrays) -> _Profile:
    """Return the profile with the vectors and maps of its binary file, and with no others."""
    prefill, decode = (
        replace(getattr(profile, phase), **{name: arrays.get(f"{phase}_{name}") for name in VECTORS})
        for phase in PHASES
    )
    maps = LinearMaps(*(arrays[f"maps_{name}"] for name in _MAPS)) if "maps_up" in arrays else None
    return replace(profile, prefill=prefill, decode=decode, maps=maps)


def _read_vectors(vectors: _Vectors, n_layer: int, folder: str) -> _Arrays:
    """Read the binary file: arrays of the names and shapes that the JSON makes of it, and nothing else."""
    n_embd, rank = vectors.n_embd, vectors.rank
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= {f"{phase}_{name}": (n_layer, 2, n_embd) for phase in PHASES for name in VECTORS}
    if rank:
        shapes |= {"maps_down": (n_layer, 2, rank, n_embd), "maps_up": (n_layer, 2, n_embd, rank)}
    content = vectors.read(folder, sum(4 * math.prod(shape) + _HEADER for shape in shapes.values()))
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return {name: _read_array(archive, f"{name}.npy", shape) for name, shape in shapes.items()}
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds for what is damaged or encrypted
        raise ValueError(f"the file of its vectors, {vectors.file!r}, is malformed ({error})") from error


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
