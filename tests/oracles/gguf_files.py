"""GGUF files by what is changed in the header of a tiny model: for fuzzing."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType

__all__ = ["changed_model"]

_STRING, _ARRAY = GGUFValueType.STRING, GGUFValueType.ARRAY
_FORMATS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True))
_ALIGNMENT, _MOST_DATA = 32, 1 << 24


def changed_model(source: Path, changes: dict[str, Any]) -> bytes:
    """Return a model whose weights are zeros, with other values in its header.

    ``changes`` has ``kv``, by key ``[type, value]``, for an array ``[9, type, values]``, null to leave it out;
    ``tensors``, by name ``[dimensions, type]``, likewise; and ``first``, bytes by their offset. A value of another kind
    than its type, or a change of another form, is made to fit.
    """
    kv, tensors = map(dict[str, Any], _header(source))
    for whole, name in ((kv, "kv"), (tensors, "tensors")):
        part = changes.get(name)
        whole.update(part if isinstance(part, dict) else {})
    listed = {name: each for name, each in kv.items() if isinstance(each, list) and len(each) > 1}
    content = b"".join(_text(key) + _typed(each) for key, each in listed.items())
    offset, infos = 0, b""
    shapes = [(name, each) for name, each in tensors.items() if isinstance(each, list) and len(each) == 2]
    for name, (dimensions, kind) in shapes:
        ne = [_number("q", each) for each in dimensions] if isinstance(dimensions, list) else []
        infos += _text(name) + struct.pack("<I", len(ne)) + b"".join(struct.pack("<q", each) for each in ne)
        infos += struct.pack("<IQ", _number("I", kind), offset % (1 << 64))
        per_block, n_bytes = GGML_QUANT_SIZES.get(kind, (1, 4)) if _is_known(kind) else (1, 4)
        offset += -(-abs(math.prod(ne)) // per_block * n_bytes // _ALIGNMENT) * _ALIGNMENT
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(listed)) + content + infos)
    first = changes.get("first")
    for at, value in first.items() if isinstance(first, dict) else ():
        if at.isdecimal() and int(at) < len(head):
            head[int(at)] = _number("B", value)
    return bytes(head) + bytes(-len(head) % _ALIGNMENT) + bytes(min(offset, _MOST_DATA))


@functools.cache
def _header(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = GGUFReader(source)
    kv = {
        key: [*map(int, field.types[:2]), field.contents()]
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    return kv, {each.name: [each.shape.tolist(), int(each.tensor_type)] for each in reader.tensors}


def _is_known(kind: Any) -> bool:
    return isinstance(kind, int) and kind in {int(each) for each in GGMLQuantizationType}


def _number(form: str, value: Any) -> Any:
    if form in "fd":
        try:
            return struct.unpack(f"<{form}", struct.pack(f"<{form}", float(value)))[0]
        except (TypeError, ValueError, OverflowError):
            return math.nan
    number = int(value) if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else 0
    bits = 8 * struct.calcsize(form)
    number %= 1 << bits
    return number - (1 << bits) if form.islower() and number >> bits - 1 else number


def _text(value: Any) -> bytes:
    content = str(value).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content)) + content


def _typed(each: list[Any]) -> bytes:
    kind, value = _number("I", each[0]), each[-1]
    if kind != _ARRAY:
        return struct.pack("<I", kind) + _plain(kind, value)
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    of = _number("I", each[1])
    parts = [_plain(of, part) for part in values]
    return struct.pack("<IIQ", kind, of, len(parts)) + b"".join(parts)


def _plain(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _text(value)
    form = _FORMATS.get(kind, "I")
    return struct.pack(f"<{form}", _number(form, value))
