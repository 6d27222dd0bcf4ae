"""Which model a profile or a plan belongs to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelFileError

__all__ = ["ModelInfo", "check_gguf", "fingerprint"]

_MIB = 1 << 20
_BLOCK = 64 << 10
_N_BLOCKS = 64

_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class ModelInfo:
    """Identity of a model file.

    Attributes:
        fingerprint: SHA-256 in hexadecimal, see :func:`fingerprint`.
        architecture: the GGUF's ``general.architecture``, for example ``"llama"``.
        n_layer: number of transformer layers; a model has twice as many sublayers.
    """

    fingerprint: str
    architecture: str
    n_layer: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"fingerprint": self.fingerprint, "architecture": self.architecture, "n_layer": self.n_layer}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelInfo:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: a field is missing or of the wrong type.
        """
        if not isinstance(data, Mapping):
            raise ValueError("'model' is not an object")
        for name, kind in (("fingerprint", str), ("architecture", str), ("n_layer", int)):
            if not isinstance(data.get(name), kind) or isinstance(data.get(name), bool):
                raise ValueError(f"'model' lacks a valid '{name}'")
        if data["n_layer"] < 1:
            raise ValueError("'model' has an 'n_layer' below 1")
        return cls(data["fingerprint"], data["architecture"], data["n_layer"])


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Hash enough of a model file to tell it from any other, in milliseconds for any size.

    The hash covers the file's size, its first and last MiB and 64 blocks of 64 KiB spread evenly over it: header and
    vocabulary, some of nearly every tensor, and the end. A file of up to 6 MiB is hashed whole.

    Raises:
        ModelFileError: the file is missing or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(size.to_bytes(8, "little"))
            if size <= 2 * _MIB + _N_BLOCKS * _BLOCK:
                digest.update(file.read())
            else:
                digest.update(file.read(_MIB))
                for i in range(_N_BLOCKS):
                    file.seek((size - _BLOCK) * (i + 1) // (_N_BLOCKS + 1))
                    digest.update(file.read(_BLOCK))
                file.seek(size - _MIB)
                digest.update(file.read(_MIB))
    except OSError as error:
        raise ModelFileError(
            f"cannot read the model {os.fspath(path)!r}: {error.strerror or error}; check the path"
        ) from error
    return digest.hexdigest()


def check_gguf(path: str | os.PathLike[str]) -> None:
    """Refuse what is certainly not a GGUF file, before llama.cpp tries to load it.

    Raises:
        ModelFileError: missing, unreadable, a folder, empty, or without the GGUF magic number.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise ModelFileError(f"there is no model file {name!r}; check the path")
    if Path(name).is_dir():
        raise ModelFileError(f"{name!r} is a folder; name the .gguf file in it")
    try:
        with open(name, "rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise ModelFileError(f"cannot read the model {name!r}: {error.strerror or error}; check the path") from error
    if magic != _GGUF_MAGIC:
        raise ModelFileError(f"{name!r} is not a GGUF file; download a .gguf or convert the model to GGUF")
