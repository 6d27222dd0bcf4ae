"""Which sublayers have the same shape, and so take the same time."""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from typing import TYPE_CHECKING, BinaryIO

from ..errors import ModelFileError
from ..model.plan import KINDS

if TYPE_CHECKING:
    from ..engine.llama import AdaSkipLlama

__all__ = ["same_shape", "tensor_shapes"]

_WIDTH = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a metadata value, by ``gguf.GGUFValueType``; a string and an array tell their own."""
_STRING, _ARRAY = 8, 9

Shape = tuple[str, tuple[int, ...], int]
"""A tensor's name without its layer, its dimensions, and its ggml type."""


def same_shape(llm: AdaSkipLlama) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Group the sublayers that can be skipped by their tensors.

    Graph nodes tell nothing more (the last layer has one that selects the output tokens), and a group of one sublayer
    is hard to time; they are all there is for layers whose tensors are in another file.

    Returns:
        Per group its column (0 attention, 1 FFN) and its layers, ascending; attention first.

    Raises:
        ModelFileError: the model's file cannot be read any more.
    """
    tensors = tensor_shapes(llm.model_path)
    groups: defaultdict[tuple[int, int, tuple[Shape, ...]], list[int]] = defaultdict(list)
    for sublayer in llm.sublayers:
        if sublayer.skippable:
            kind = KINDS.index(sublayer.kind)
            known = sublayer.layer in tensors
            is_ffn = sublayer.kind == "ffn"
            own = (shape for shape in tensors.get(sublayer.layer, ()) if ("ffn" in shape[0]) == is_ffn)
            groups[kind, 0 if known else sublayer.nodes, tuple(sorted(own))].append(sublayer.layer)
    return tuple(sorted((kind, tuple(layers)) for (kind, _, _), layers in groups.items()))


def tensor_shapes(path: str) -> dict[int, list[Shape]]:
    """Read the shapes of each layer's tensors, ``blk.<layer>.*``, from the header of a GGUF file.

    ``gguf.GGUFReader`` makes an object of every word of the vocabulary, which takes seconds; this skips over them. Of
    a model in several files it sees the first one's tensors, so that layers in others differ by their nodes alone.

    Raises:
        ModelFileError: the file cannot be read, or its header is malformed.
    """
    try:
        with open(path, "rb") as file:
            _magic, _version, n_tensors, n_values = struct.unpack("<4sIQQ", file.read(24))
            for _ in range(n_values):
                _string(file)
                _skip(file, _number(file, "<I"))
            layers: defaultdict[int, list[Shape]] = defaultdict(list)
            for _ in range(n_tensors):
                name = _string(file).decode("utf-8", "replace")
                dimensions = tuple(_number(file, "<Q") for _ in range(_number(file, "<I")))
                kind, _offset = _number(file, "<I"), _number(file, "<Q")
                if found := re.match(r"blk\.(\d+)\.(.*)", name):
                    layers[int(found[1])].append((found[2], dimensions, kind))
    except (OSError, struct.error, KeyError, OverflowError, MemoryError) as error:
        raise ModelFileError(f"cannot read the header of {path!r} ({error}); check that it is still there") from error
    return dict(layers)


def _number(file: BinaryIO, form: str) -> int:
    return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])


def _string(file: BinaryIO) -> bytes:
    return file.read(_number(file, "<Q"))


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        file.seek(_number(file, "<Q"), 1)
    elif kind == _ARRAY:
        kind, n = _number(file, "<I"), _number(file, "<Q")
        if kind in _WIDTH:
            file.seek(n * _WIDTH[kind], 1)
        else:
            for _ in range(n):
                _skip(file, kind)
    else:
        file.seek(_WIDTH[kind], 1)
