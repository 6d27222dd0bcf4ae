"""GGUF files: written whole, and by what is changed in the header of a tiny model, for fuzzing."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

_STRING, _ARRAY = GGUFValueType.STRING, GGUFValueType.ARRAY
_U8, _U32, _I64, _U64 = ctypes.c_uint8, ctypes.c_uint32, ctypes.c_int64, ctypes.c_uint64
_FLOATS = ctypes.c_float, ctypes.c_double
_TYPES: list[Any] = [_U8, ctypes.c_int8, ctypes.c_uint16, ctypes.c_int16, _U32, ctypes.c_int32, ctypes.c_float, _U8]
_TYPES += [_U32, _U32, _U64, _I64, ctypes.c_double]  # 8 and 9 are text and arrays
_ALIGNMENT, _MOST_DATA = 32, 1 << 24


def write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
        ne = [_fit(_I64, each) for each in dimensions] if isinstance(dimensions, list) else []
        infos += _text(name) + bytes(_U32(len(ne))) + b"".join(map(bytes, ne))
        infos += bytes(_fit(_U32, kind)) + bytes(_U64(offset))
        per_block, n_bytes = GGML_QUANT_SIZES[kind] if kind in [*GGMLQuantizationType] else (1, 4)
        size = abs(math.prod(each.value for each in ne))
        offset += -(-size // per_block * n_bytes // _ALIGNMENT) * _ALIGNMENT
    head = bytearray(b"GGUF" + bytes(_U32(3)) + bytes(_U64(len(shapes))) + bytes(_U64(len(listed))) + content + infos)
    first = changes.get("first")
    for at, value in first.items() if isinstance(first, dict) else ():
        if at.isdecimal() and int(at) < len(head):
            head[int(at)] = _fit(_U8, value).value
    return bytes(head) + bytes(-len(head) % _ALIGNMENT) + bytes(min(offset, _MOST_DATA))


@functools.cache
def _header(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = GGUFReader(source)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    kv = {key: [*map(int, field.types[:2]), field.contents()] for key, field in fields.items()}
    return kv, {each.name: [each.shape.tolist(), int(each.tensor_type)] for each in reader.tensors}


def _fit(type_: Any, value: Any) -> Any:
    """A number of this type; of integers the lowest bits."""
    try:
        return type_(float(value) if type_ in _FLOATS else int(value))
    except (TypeError, ValueError, OverflowError):
        return type_(math.nan if type_ in _FLOATS else 0)


def _text(value: Any) -> bytes:
    content = str(value).encode("utf-8", "surrogatepass")
    return bytes(_U64(len(content))) + content


def _typed(each: list[Any]) -> bytes:
    kind, value = _fit(_U32, each[0]), each[-1]
    if kind.value != _ARRAY:
        return bytes(kind) + _plain(kind.value, value)
    of, values = _fit(_U32, each[1]), value if isinstance(value, list) else [value]
    return bytes(kind) + bytes(of) + bytes(_U64(len(values))) + b"".join(_plain(of.value, part) for part in values)


def _plain(kind: int, value: Any) -> bytes:
    return _text(value) if kind == _STRING else bytes(_fit(_TYPES[kind] if kind < len(_TYPES) else _U32, value))
