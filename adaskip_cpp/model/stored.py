"""What profile files and plan files share: JSON that is checked as it is read, and one file of vectors beside it.

Both may come from elsewhere: nothing is taken on trust, nothing is read beyond what a file may be long, and nothing is
unpickled. All that is wrong is a ``ValueError``, which the readers turn into errors of their own.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from typing import Any

import msgspec

__all__ = ["MOST_JSON", "VectorsFile", "file_beside", "read_bounded", "read_json"]

MOST_JSON = 64 << 20
"""More bytes than the JSON of any profile or plan has."""


@dataclass(frozen=True)
class VectorsFile:
    """The file beside a JSON file, as that names it.

    Attributes:
        file: its name, in the same folder.
        sha256: of its content, in hexadecimal.
    """

    file: str
    sha256: str

    @classmethod
    def of(cls, path: str, content: bytes) -> VectorsFile:
        """Return what the JSON says of a file that is to be written."""
        return cls(os.path.basename(path), hashlib.sha256(content).hexdigest())

    def read(self, folder: str, most: int) -> bytes:
        """Read the file, which shall have at most so many bytes.

        Raises:
            ValueError: it is missing, longer, or not the one that the JSON was written with.
            OSError: it cannot be read.
        """
        name = self.file
        if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
            raise ValueError(f"{name!r} is not the name of a file beside it")
        path = os.path.join(folder, name)
        try:
            content = read_bounded(path, most)
        except FileNotFoundError:
            raise ValueError(f"the file of its vectors, {path!r}, is missing; put it back beside it") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ValueError(
                f"the file of its vectors, {path!r}, is truncated or of another one; put the one that was written with "
                "it beside it"
            )
        return content


def file_beside(path: str | os.PathLike[str], suffix: str) -> str:
    """Return the name of the file beside ``X.json`` that holds its vectors, as ``X.npz``, be it there or not."""
    name = os.fspath(path)
    return (name[: -len(".json")] if name.lower().endswith(".json") else name) + suffix


def read_bounded(path: str | os.PathLike[str], most: int) -> bytes:
    """Read a file.

    Raises:
        ValueError: it has more than ``most`` bytes, or is a device.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError(f"{os.fspath(path)!r} is not a regular file")
        if facts.st_size > most:
            raise ValueError(f"{os.fspath(path)!r} has more than {most:,} bytes")
        return file.read(facts.st_size)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is not JSON, or longer than any.
        OSError: it cannot be read.
    """
    try:
        return msgspec.json.decode(read_bounded(path, MOST_JSON))
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"it is truncated or is not JSON ({error})") from error
