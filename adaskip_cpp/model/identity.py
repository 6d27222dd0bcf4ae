"""Identifies the model of a profile or plan, and names their files beside it: start with ``ModelInfo``."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from ..errors import ModelFileError, ProfileMismatchError
from ..files import StrPath
from .arrays import Count

PLAN_SUFFIX = ".adaskip-plan.json"  # of the plan file beside a model

_MIB = 1 << 20
_BLOCK = 64 << 10
_N_BLOCKS = 64
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL | re.ASCII)  # as in ``llama_split_path``
_LOAD_ALIKE = "calibrate the model as it is loaded here, or load it as it was calibrated"


@dataclass(frozen=True)
class ModelInfo:
    """The identity of an opened model.

    Attributes:
        fingerprint: SHA-256 of parts of the file, in hexadecimal.
        architecture: the GGUF's ``general.architecture``, for example ``"llama"``.
        n_layer: number of layers.
        lora: fingerprint of its LoRA adapter; "" for none.
        lora_scale: scale of its LoRA adapter; 0 for none.
        overrides: its ``kv_overrides``, sorted, as one text such as ``a=1, b='x'``.
    """

    fingerprint: str
    architecture: str
    n_layer: Count
    lora: str = ""
    lora_scale: float = 0.0
    overrides: str = ""

    def check(self, loaded: "ModelInfo", what: str, name: StrPath, way_out: str = _LOAD_ALIKE) -> None:
        """Raise a ProfileMismatchError if ``what``, such as ``"the plan"``, is not of ``loaded`` from ``name``."""
        if differences := self.differences(loaded):
            raise ProfileMismatchError(
                f"{what} was made for another model than {os.fspath(name)!r}: {'; '.join(differences)}; {way_out}"
            )

    def differences(self, loaded: "ModelInfo") -> list[str]:
        """Return the differences from the opened model, in words."""
        pairs = zip(self._parts(), loaded._parts(), strict=True)
        return [f"its {mine[0]} is {mine[1]}, here it is {other[1]}" for mine, other in pairs if mine != other]

    def _parts(self) -> tuple[tuple[str, str, str], ...]:
        """Return each part's name, its description, and a further text that must be equal."""
        adapter = f"{self.lora[:12]} at scale {self.lora_scale!r}" if self.lora else "none"
        file = f"{self.architecture} of {self.n_layer} layers, fingerprint {self.fingerprint[:12]}"
        overrides = self.overrides or "none"
        return ("file", file, self.fingerprint), ("LoRA adapter", adapter, self.lora), ("kv_overrides", overrides, "")


def model_files(path: StrPath) -> tuple[str, ...]:
    """Return all files of a model: of ``X-00001-of-00003.gguf`` all three, else the one."""
    split = _SPLIT.fullmatch(os.fspath(path))
    if split is None or not 1 <= int(split[2]) <= int(split[3]):
        return (os.fspath(path),)
    return tuple(f"{split[1]}-{i + 1:05}-of-{split[3]}.gguf" for i in range(int(split[3])))


def fingerprint(path: StrPath) -> str:
    """Hash a model in milliseconds: size, first and last MiB, 64 blocks of 64 KiB spread evenly; up to 6 MiB, all."""
    digests = [_digest(file) for file in model_files(path)]
    return (digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()).hex()


@contextlib.contextmanager
def _reading(path: str) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise ModelFileError(f"cannot read the model {path!r}: {error.strerror or error}; check the path") from error


def _digest(path: str) -> bytes:
    with _reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        blocks = [((size - _BLOCK) * (i + 1) // (_N_BLOCKS + 1), _BLOCK) for i in range(_N_BLOCKS)]
        parts = [(0, _MIB), *blocks, (size - _MIB, _MIB)]
        for start, length in parts if size > 2 * _MIB + _N_BLOCKS * _BLOCK else [(0, size)]:
            file.seek(start)
            digest.update(file.read(length))
    return digest.digest()


def check_gguf(path: StrPath) -> None:
    """Raise a ModelFileError if a file of the model cannot be read or is no GGUF file, before llama.cpp loads it."""
    for name in model_files(path):
        if not os.path.exists(name):
            raise ModelFileError(f"there is no model file {name!r}; check the path")
        if os.path.isdir(name):
            raise ModelFileError(f"{name!r} is a folder; name the .gguf file in it")
        if not os.path.isfile(name):  # a pipe would be waited for
            raise ModelFileError(f"{name!r} is not a regular file; name a .gguf file")
        with _reading(name) as file:
            if file.read(4) != b"GGUF":
                raise ModelFileError(f"{name!r} is not a GGUF file; download a .gguf or convert the model to GGUF")


def plan_path(model: StrPath) -> str:
    """Return the name of a model's plan file, whether it exists or not: ``X.adaskip-plan.json`` for ``X.gguf``."""
    path = os.fspath(model)
    return (path[: -len(".gguf")] if path.lower().endswith(".gguf") else path) + PLAN_SUFFIX
