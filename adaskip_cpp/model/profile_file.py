"""Profile files: JSON for what people read, and the vectors in one binary file beside it.

``X.json`` holds the statistics, with null for NaN. ``X.npz`` (NumPy's format, float32) holds the mean vectors of both
phases and the linear maps; its name and SHA-256 are in the JSON. Move or copy the two together. A profile without
vectors is JSON alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import ProfileFormatError, ProfileMissingError, ProfileVersionError
from ..files import write_atomically
from .identity import ModelInfo
from .maps import LinearMaps
from .statistics import FIGURES, VECTORS, PhaseStatistics

if TYPE_CHECKING:
    from ..planning.profile import Profile
    from .cost_model import CostModel

__all__ = ["FORMAT_VERSION", "load", "save", "sidecar_name", "to_dict"]

FORMAT_VERSION = 5
_FORMAT = "adaskip-profile"
_PHASES = ("prefill", "decode")
_MAPS = ("down", "up")
_WORDS = ("corpus", "package_version", "created")

_Vectors = Mapping[str, npt.NDArray[np.float32]]


def sidecar_name(path: str | os.PathLike[str]) -> str:
    """Return the name of the file beside ``path`` that holds the vectors: ``X.npz`` for ``X.json``."""
    name = os.path.basename(os.fspath(path))
    return (name[: -len(".json")] if name.lower().endswith(".json") else name) + ".npz"


def to_dict(profile: Profile) -> dict[str, Any]:
    """Return plain JSON values: the file format, without the name and hash of the vectors' file."""
    return {
        "format": _FORMAT,
        "version": FORMAT_VERSION,
        "model": asdict(profile.model),
        "calibration": {
            "n_requests": profile.n_requests,
            "n_tokens": profile.n_tokens,
            **{name: getattr(profile, name) for name in _WORDS},
        },
        **{phase: _statistics_to_dict(getattr(profile, phase)) for phase in _PHASES},
        "cost": None if profile.cost is None else profile.cost.to_dict(),
        "vectors": None
        if profile.prefill.n_embd is None
        else {"n_embd": profile.prefill.n_embd, "rank": 0 if profile.maps is None else profile.maps.rank},
    }


def save(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write a profile; after a failure the old files are still there, and no others.

    Raises:
        OSError: a file cannot be written.
    """
    target = os.path.realpath(path)
    data = to_dict(profile)
    sidecar = os.path.join(os.path.dirname(target), sidecar_name(target))
    content = None if data["vectors"] is None else _pack(profile)
    if content is not None:
        digest = hashlib.sha256(content).hexdigest()
        data["vectors"].update(file=os.path.basename(sidecar), sha256=digest)
    text = json.dumps(data, allow_nan=False, indent=1) + "\n"
    # One layer a line: a list of plain values has no brackets inside, and JSON has no line breaks in strings.
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda row: "[" + re.sub(r",\s+", ", ", row[1]) + "]", text)
    if content is None:
        write_atomically(target, text)
        return
    old = _read(sidecar) if os.path.isfile(sidecar) else None
    write_atomically(sidecar, content)
    try:
        write_atomically(target, text)
    except BaseException:
        with contextlib.suppress(OSError):
            if old is None:
                os.unlink(sidecar)
            else:
                write_atomically(sidecar, old)
        raise


def load(path: str | os.PathLike[str]) -> Profile:
    """Read a profile; see :meth:`adaskip_cpp.Profile.load`.

    Raises:
        ProfileMissingError: there is no such file.
        ProfileFormatError: the file or its vectors are missing, truncated, malformed, or do not belong together.
        ProfileVersionError: written in a format version that this release does not read.
        OSError: the file cannot be read.
    """
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except FileNotFoundError:
        raise ProfileMissingError(
            f"there is no profile {name!r}; write one with `adaskip-cpp calibrate MODEL -o {name}`"
        ) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of absurd length
        raise ProfileFormatError(
            f"{name!r} is truncated or is not JSON ({error}); write it again with `adaskip-cpp calibrate`"
        ) from error
    try:
        return _from_dict(data, os.path.dirname(os.path.realpath(path)))
    except (ProfileFormatError, ProfileVersionError) as error:
        raise type(error)(f"{name!r}: {error}") from error


def _from_dict(data: Any, folder: str) -> Profile:
    from ..planning.profile import Profile

    if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
        raise ProfileFormatError("this is not an adaskip profile; write one with `adaskip-cpp calibrate`")
    if data.get("version") != FORMAT_VERSION:
        raise ProfileVersionError(
            f"the profile has format version {data.get('version')!r}, this release reads {FORMAT_VERSION}; "
            "calibrate again or install the release that wrote it"
        )
    try:
        model = msgspec.convert(data["model"], ModelInfo)
        vectors = None if data["vectors"] is None else _read_vectors(data["vectors"], folder)
        calibration = data["calibration"]
        return Profile(
            **{phase: _statistics_from_dict(data[phase], phase, vectors) for phase in _PHASES},  # type: ignore[arg-type]
            n_requests=_count(calibration, "n_requests"),
            n_tokens=_count(calibration, "n_tokens"),
            model=model,
            cost=None if data["cost"] is None else _cost_model(data["cost"]),
            maps=_maps(data["vectors"], vectors),
            **{name: str(calibration.get(name, "")) for name in _WORDS},  # type: ignore[arg-type]
        )
    except ProfileFormatError:
        raise
    except KeyError as error:
        raise ProfileFormatError(f"the profile lacks {error}; calibrate again") from error
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ProfileFormatError(f"the profile is malformed ({error}); calibrate again") from error


def _cost_model(data: Mapping[str, Any]) -> CostModel:
    from .cost_model import CostModel

    return CostModel.from_dict(data)


def _statistics_to_dict(statistics: PhaseStatistics) -> dict[str, Any]:
    def plain(values: Any) -> Any:
        return [plain(value) for value in values] if isinstance(values, list) else None if values != values else values

    return {"n_tokens": statistics.n_tokens, **{name: plain(getattr(statistics, name).tolist()) for name in FIGURES}}


def _statistics_from_dict(data: Mapping[str, Any], phase: str, vectors: _Vectors | None) -> PhaseStatistics:
    def number(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{value!r} is not a number")
        return np.nan if value is None else float(value)

    def array(rows: Any) -> npt.NDArray[np.float64]:
        return np.array([[number(value) for value in row] if isinstance(row, list) else number(row) for row in rows])

    return PhaseStatistics(
        **{name: array(data[name]) for name in FIGURES},  # type: ignore[arg-type]
        **{name: None if vectors is None else vectors[f"{phase}_{name}"] for name in VECTORS},  # type: ignore[arg-type]
        n_tokens=_count(data, "n_tokens"),
    )


def _pack(profile: Profile) -> bytes:
    buffer = io.BytesIO()
    arrays = {f"{phase}_{name}": getattr(getattr(profile, phase), name) for phase in _PHASES for name in VECTORS}
    if profile.maps is not None:
        arrays |= {f"maps_{name}": getattr(profile.maps, name) for name in _MAPS}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _maps(entry: Any, vectors: _Vectors | None) -> LinearMaps | None:
    """Return the linear maps; their shapes are checked by the class."""
    if vectors is None or entry["rank"] == 0:
        return None
    missing = [name for name in _MAPS if f"maps_{name}" not in vectors]
    if missing:
        raise ProfileFormatError(f"the file of its vectors lacks the linear maps' {missing[0]!r}; calibrate again")
    maps = LinearMaps(**{name: vectors[f"maps_{name}"] for name in _MAPS})
    if maps.rank != entry["rank"]:
        raise ProfileFormatError(
            f"the linear maps have rank {maps.rank}, the profile says {entry['rank']!r}; calibrate again"
        )
    return maps


def _read_vectors(entry: Mapping[str, Any], folder: str) -> _Vectors:
    """Read the file of the vectors; nothing but what the JSON names and hashes is accepted."""
    name, digest, n_embd = entry["file"], entry["sha256"], _count(entry, "n_embd")
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a file beside the profile")
    path = os.path.join(folder, name)
    try:
        content = _read(path)
    except FileNotFoundError:
        raise ProfileFormatError(
            f"the file of its vectors, {path!r}, is missing; put it back beside the profile, or calibrate again"
        ) from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise ProfileFormatError(
            f"the file of its vectors, {path!r}, is truncated or of another profile; put the one that was written with "
            "this profile beside it, or calibrate again"
        )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            vectors = {key: np.asarray(file[key]) for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ProfileFormatError(f"the file of its vectors, {path!r}, is malformed; calibrate again") from error
    for phase in _PHASES:
        for key in (f"{phase}_{name}" for name in VECTORS):
            if key not in vectors or vectors[key].dtype != np.float32 or vectors[key].shape[2:] != (n_embd,):
                raise ProfileFormatError(
                    f"the file of its vectors, {path!r}, lacks {key!r} of length {n_embd}; calibrate again"
                )
    return vectors


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _count(data: Mapping[str, Any], name: str) -> int:
    value = data[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"'{name}' is not a positive whole number")
    return value
