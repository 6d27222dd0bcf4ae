"""What profile files and plan files share: checked JSON, and the numbers of the vectors in one binary file beside it.

``X.bin`` beside ``X.json`` is nothing but numbers of little endian, array after array: vectors as float32, and behind
them linear maps as BF16, as streams differ by more orders of magnitude than F16 has. Their shapes follow from the JSON,
which also has its name and SHA-256. Move or copy the two together; without vectors there is JSON alone.

Both may come from elsewhere: nothing is taken on trust, and nothing is read beyond what a file may be long. All that is
wrong is a ``ValueError``, which the readers turn into errors of their own.
"""

import contextlib
import hashlib
import itertools
import math
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..files import json_text, write_atomically, write_pair
from .arrays import from_bf16, to_bf16

MOST_JSON = 64 << 20
"""More bytes than the JSON of any profile or plan has."""

MOST_MEMORY = 4 << 30
"""More bytes than the arrays of any profile or plan take once they have a row for every sublayer."""

_MOST_NAME = 230
"""Bytes of the name of a file: file systems take 255, and files have longer names while they are written."""

Arrays = Sequence[npt.NDArray[np.float32]]


class VersionError(ValueError):
    """A file is of a format version that this release does not read."""


@dataclass(frozen=True)
class VectorsFile:
    """The file beside a JSON file, as that names it: its name in the same folder, and its SHA-256 in hexadecimal."""

    file: str
    sha256: str

    def read(
        self, path: str | os.PathLike[str], shapes: Sequence[tuple[int, ...]], maps: Sequence[tuple[int, ...]] = ()
    ) -> Arrays:
        """Read vectors and then maps of these shapes, as they were saved, from the file beside ``path``.

        They shall be all of it.
        """
        name = self.file
        is_too_long = len(os.fsencode(name)) > _MOST_NAME
        if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name or is_too_long:
            raise ValueError(f"{name!r} is not the name of a file beside it")
        beside = os.path.join(os.path.dirname(os.path.realpath(path)), name)
        n_numbers, n_halves = (sum(map(math.prod, each)) for each in (shapes, maps))
        size = 4 * n_numbers + 2 * n_halves
        content = None
        with contextlib.suppress(FileNotFoundError, ValueError):
            content = _read_bounded(_waiting_path(beside, self.sha256), size)
        if content is None or not self._is_of(content):
            try:
                content = _read_bounded(beside, size)
            except FileNotFoundError:
                raise ValueError(f"the file of its vectors, {beside!r}, is missing; put it back beside it") from None
        if not self._is_of(content) or len(content) != size:
            raise ValueError(
                f"the file of its vectors, {beside!r}, is truncated or of another one; put the one that was written "
                "with it beside it"
            )
        numbers = np.frombuffer(content, "<f4", n_numbers).astype(np.float32)
        halves = from_bf16(np.frombuffer(content, "<u2", n_halves, 4 * n_numbers))
        return [*_parts(numbers, shapes), *_parts(halves, maps)]

    def _is_of(self, content: bytes) -> bool:
        return hashlib.sha256(content).hexdigest() == self.sha256


def _parts(numbers: npt.NDArray[np.float32], shapes: Sequence[tuple[int, ...]]) -> Arrays:
    ends = itertools.accumulate(map(math.prod, shapes), initial=0)
    parts = zip(itertools.pairwise(ends), shapes, strict=True)
    return [numbers[start:end].reshape(shape) for (start, end), shape in parts]


def vectors_path(path: str | os.PathLike[str]) -> str:
    """Return the name of the file beside ``X.json`` that holds its vectors, ``X.bin``, be it there or not."""
    name = os.fspath(path)
    return (name[: -len(".json")] if name.lower().endswith(".json") else name) + ".bin"


def _waiting_path(beside: str, sha256: str) -> str:
    """Where vectors wait until the JSON file names them; there they stay where a process is killed in between."""
    folder, name = os.path.split(beside)
    return os.path.join(folder, f".{name}.{re.sub('[^0-9a-f]', '', sha256)[:12]}.new")


def save(path: str | os.PathLike[str], data: dict[str, Any], arrays: Arrays, maps: Arrays = ()) -> None:
    """Write a JSON file, its vectors and maps, the name and hash of whose file join ``data["vectors"]``."""
    target = os.path.realpath(path)
    if not arrays and not maps:
        write_atomically(target, json_text(data))
        return
    parts = [*(array.astype("<f4") for array in arrays), *(to_bf16(array).astype("<u2") for array in maps)]
    content = b"".join(part.tobytes() for part in parts)
    beside = vectors_path(target)
    names = {"file": os.path.basename(beside), "sha256": hashlib.sha256(content).hexdigest()}
    text = json_text({**data, "vectors": {**(data["vectors"] or {}), **names}})
    write_pair(target, text, beside, content, _waiting_path(beside, names["sha256"]))


def load(path: str | os.PathLike[str], form: str, what: str, version: int) -> dict[str, Any]:
    """Read a JSON file of a format, in words ``what``, and version."""
    try:
        data = msgspec.json.decode(_read_bounded(path, MOST_JSON))
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"it is truncated or is not JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != form:
        raise ValueError(f"this is no {what}")
    if data.get("version") != version:
        raise VersionError(f"it has format version {data.get('version')!r}, this release reads {version}")
    return data


def _read_bounded(path: str | os.PathLike[str], most: int) -> bytes:
    with open(path, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError(f"{os.fspath(path)!r} is not a regular file")
        if facts.st_size > most:
            raise ValueError(f"{os.fspath(path)!r} has more than {most:,} bytes")
        return file.read(facts.st_size)


def numbers_for_nulls(data: Any) -> Any:
    """Return data of a JSON file with the numbers that JSON has not, for which null stands there.

    The ends of an interval of one measurement are NaN, the times of settings that a model cannot run with infinite.
    """
    if isinstance(data, dict):
        return {name: _NULLS.get(name) if value is None else numbers_for_nulls(value) for name, value in data.items()}
    return [numbers_for_nulls(value) for value in data] if isinstance(data, list) else data


_NULLS = {
    **dict.fromkeys(("low", "high"), math.nan),
    **dict.fromkeys(("prompt_short_s", "prompt_long_s", "token_s", "request_s"), math.inf),
}
