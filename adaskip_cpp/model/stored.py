"""Stores profiles and plans as JSON, and their large arrays in a binary file beside it: see ``save`` and ``load``.

``X.bin`` beside ``X.json`` has little-endian numbers alone, array after array: as BF16 if that is exact, else as
float32, without rows that are all 0 or all NaN. The JSON has the place of each array, and the name and SHA-256 of that
file. Without arrays there is JSON alone. Files may come from strangers: all is checked, and no file is read beyond a
maximum size. Every fault is a ``ValueError``, which the callers turn into errors of their own.
"""

import contextlib
import hashlib
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import DataError, FileError
from ..files import StrPath, json_text, write_atomically, write_pair
from .skip_set import KINDS, marked

MOST_JSON = 64 << 20  # more bytes than the JSON of any profile or plan has
MOST_MEMORY = 4 << 30  # more bytes than the arrays of any profile or plan take
_MOST_NAME = 230  # bytes of a file's name: file systems take 255, and names are longer while files are written

_T = TypeVar("_T")
_Index = Annotated[int, msgspec.Meta(ge=0, le=MOST_MEMORY)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class VersionError(ValueError):
    """A file is of a format version that this release does not read."""


class ModelGivenError(ValueError):
    """A model is named where a file of ours is wanted."""


@dataclass(frozen=True)
class _Beside:
    """The file beside a JSON file: its name in the same folder, and its SHA-256 in hexadecimal."""

    file: str
    sha256: str

    def read(self, path: StrPath) -> bytes:
        name = self.file
        is_too_long = len(os.fsencode(name)) > _MOST_NAME
        if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name or is_too_long:
            raise ValueError(f"{name!r} is not the name of a file beside it")
        beside = os.path.join(os.path.dirname(os.path.realpath(path)), name)
        problem = "is missing; put it back beside it"
        for each in (_waiting_path(beside, self.sha256), beside):
            with contextlib.suppress(FileNotFoundError):
                content = _read_bounded(each, MOST_MEMORY)
                if hashlib.sha256(content).hexdigest() == self.sha256:
                    return content
                problem = "is truncated or of another one; put the one that was written with it beside it"
        raise ValueError(f"the file of its vectors, {beside!r}, {problem}")


@dataclass(frozen=True)
class _Array:
    """Where an array is in that file."""

    shape: Annotated[tuple[_Size, ...], msgspec.Meta(min_length=3, max_length=4)]
    rows: tuple[_Index, ...]  # those in the file, counted over the first two axes
    nan: bool  # whether all other rows are NaN, else they are 0
    bf16: bool
    start: _Index  # byte


@dataclass(frozen=True)
class _Flags:
    """A bool array ``[n_layer, 2]`` in JSON: the layers that are true in each column."""

    attention: tuple[int, ...]
    ffn: tuple[int, ...]
    n_layer: Annotated[int, msgspec.Meta(ge=1, le=9999)]


def plain(value: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Return fields as JSON values, None for numbers that are not finite, and float32 arrays for the file beside."""
    parts: dict[bytes, int] = {}

    def encode(array: Any) -> Any:
        if not isinstance(array, np.ndarray):
            raise NotImplementedError(f"{type(array).__name__} has no plain form")
        if array.dtype == np.bool_:
            layers = (np.flatnonzero(column).tolist() for column in array.T)
            return dict(zip(KINDS, layers, strict=True)) | {"n_layer": len(array)}
        if array.dtype != np.float32:
            return np.where(np.isfinite(array), array, np.array(None, object)).tolist()
        each = array.reshape(array.shape[0] * array.shape[1], -1)
        unknown = np.isnan(each).all(axis=1)
        blank = unknown if unknown.any() else ~each.any(axis=1)
        bits = np.ascontiguousarray(each[~blank]).view(np.uint32)
        bf16 = not (bits & 0xFFFF).any()
        part = ((bits >> 16).astype("<u2") if bf16 else bits.astype("<u4")).tobytes()
        return {
            "shape": [*array.shape],
            "rows": np.flatnonzero(~blank).tolist(),
            "nan": bool(unknown.any()),
            "bf16": bf16,
            "start": parts.setdefault(part, sum(map(len, parts))),
        }

    return msgspec.to_builtins(value, enc_hook=encode), b"".join(parts)


def check_output(path: str, *inputs: str) -> None:
    """Raise a DataError if :func:`save` could not write there, or would replace an input, before minutes of work."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise DataError(f"there is no folder {folder!r}; create it or choose another place with -o FILE")
    if not path or os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise DataError(f"cannot write {path!r}; choose another place with -o FILE")
    written, read = ({os.path.realpath(f(x)) for x in of for f in (str, vectors_path)} for of in ([path], inputs))
    if both := written & read:
        raise DataError(f"{min(both)!r} is an input, which would be replaced; choose another name with -o FILE")
    _check_replaced(os.path.realpath(path))


def _check_replaced(target: str) -> None:
    """Raise a FileError if a file that :func:`save` would replace is a model, or a ``.bin`` of something else."""
    beside = vectors_path(target)
    for name in filter(os.path.isfile, (target, beside)):
        with open(name, "rb") as file:
            if file.read(4) == b"GGUF":
                raise FileError(f"{name!r} is a model, which would be replaced; choose another name")
    if os.path.exists(beside) and not os.path.exists(target):
        raise FileError(f"{beside!r} would be replaced; choose another name, or delete it")


def save(path: StrPath, form: str, version: int, value: Any) -> None:
    """Write the fields of a dataclass as a JSON file of a format, and its arrays of float32 to the file beside it."""
    target = os.path.realpath(path)
    _check_replaced(target)
    data, content = plain({"format": form, "version": version, **vars(value)})
    if not content:
        write_atomically(target, json_text({**data, "vectors": None}))
        return
    beside = vectors_path(target)
    names = _Beside(os.path.basename(beside), hashlib.sha256(content).hexdigest())
    write_pair(target, json_text({**data, "vectors": names}), beside, content, _waiting_path(beside, names.sha256))


def load(path: StrPath, kind: type[_T], form: str, version: int) -> _T:
    """Read what :func:`save` wrote."""
    data = load_json(path, form, version)
    beside = msgspec.convert(data.get("vectors"), _Beside | None)
    return from_plain(data, kind, b"" if beside is None else beside.read(path))


def from_plain(data: Any, kind: type[_T], content: bytes = b"") -> _T:
    """Return a dataclass from what :func:`plain` returned; a ``ValueError`` says which field is impossible."""
    n_read = n_bytes = 0

    def decode(_: Any, value: Any) -> npt.NDArray[Any]:
        nonlocal n_read, n_bytes
        if not isinstance(value, dict):  # lists of numbers, or of such lists, with null for NaN
            try:
                return np.array(msgspec.convert(value, list[list[float | None] | float | None]), np.float64)
            except (msgspec.ValidationError, OverflowError) as error:  # msgspec adds the field's name to a ValueError
                raise ValueError(str(error)) from error
        if "rows" not in value:
            flags = msgspec.convert(value, _Flags)
            return marked(flags.n_layer, flags.attention, flags.ffn)
        at = msgspec.convert(value, _Array)
        n, size = at.shape[0] * at.shape[1], math.prod(at.shape[2:])
        n_bytes += 4 * n * size
        if n_bytes > MOST_MEMORY:
            raise ValueError("it is of a larger model than any")
        if [*at.rows] != sorted({*at.rows}) or (at.rows and at.rows[-1] >= n):
            raise ValueError("it lists impossible rows of an array")
        n_numbers = len(at.rows) * size
        end = at.start + n_numbers * (2 if at.bf16 else 4)
        if end > len(content):
            raise ValueError("an array is beyond the end of the file of its vectors")
        n_read = max(n_read, end)
        array = np.zeros((n, size), np.float32)  # takes memory only where it is written
        if at.nan:
            array[:] = np.nan
        stored = np.frombuffer(content, "<u2" if at.bf16 else "<f4", n_numbers, at.start)
        floats = (stored.astype(np.uint32) << 16).view(np.float32) if at.bf16 else stored  # BF16 is the upper half
        array[list(at.rows)] = floats.reshape(-1, size)
        return array.reshape(at.shape)

    found = msgspec.convert(data, kind, dec_hook=decode)
    if n_read != len(content):
        raise ValueError("the file of its vectors is longer than its arrays")
    return found


def vectors_path(path: StrPath) -> str:
    """Return ``X.bin``, the name of the file of arrays beside ``X.json``, whether it exists or not."""
    name = os.fspath(path)
    return (name[: -len(".json")] if name.lower().endswith(".json") else name) + ".bin"


def _waiting_path(beside: str, sha256: str) -> str:
    """Return where vectors wait until the JSON file names them; they stay there if the process is killed meanwhile."""
    folder, name = os.path.split(beside)
    return os.path.join(folder, f".{name}.{re.sub('[^0-9a-f]', '', sha256)[:12]}.new")


def load_json(path: StrPath, form: str, version: int) -> dict[str, Any]:
    """Read the JSON file alone; raise a ValueError if it has another format or version."""
    try:
        data = numbers_for_nulls(msgspec.json.decode(_read_bounded(path, MOST_JSON)))
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"it is truncated or is not JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != form:
        raise ValueError(f"its format is not {form}")
    if data.get("version") != version:
        raise VersionError(f"it has format version {data.get('version')!r}, this release reads {version}")
    return data


def _read_bounded(path: StrPath, most: int) -> bytes:
    if not stat.S_ISREG((facts := os.stat(path)).st_mode):  # a pipe would be waited for
        raise ValueError(f"{os.fspath(path)!r} is not a regular file")
    with open(path, "rb") as file:
        if file.read(4) == b"GGUF":
            raise ModelGivenError("it is a model")
        file.seek(0)
        if facts.st_size > most:
            raise ValueError(f"{os.fspath(path)!r} has more than {most:,} bytes")
        return file.read(facts.st_size)


def numbers_for_nulls(data: Any) -> Any:
    """Replace null in JSON data: by NaN for unknown ends of intervals, by infinity for times of settings that fail."""
    if isinstance(data, dict):
        return {name: _NULLS.get(name) if value is None else numbers_for_nulls(value) for name, value in data.items()}
    return [numbers_for_nulls(value) for value in data] if isinstance(data, list) else data


_NULLS = {
    **dict.fromkeys(("low", "high"), math.nan),
    **dict.fromkeys(("prompt_short_s", "prompt_long_s", "token_s", "request_s"), math.inf),
}
