"""Types, and checks of dataclasses of arrays, for all data of a model: start with ``LayerArrays``."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Flags: TypeAlias = npt.NDArray[np.bool_]
Vectors: TypeAlias = npt.NDArray[np.float32]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]  # other numbers in a file are refused


class LayerArrays:
    """A frozen dataclass whose first array has a row per layer. Arrays are equal by shape and values, NaN included."""

    @property
    def n_layer(self) -> int:
        return next(len(value) for value in vars(self).values() if isinstance(value, np.ndarray))

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(value, getattr(other, name)) for name, value in vars(self).items())


def _same(a: Any, b: Any) -> bool:
    has_array = isinstance(a, np.ndarray) or isinstance(b, np.ndarray)
    return np.array_equal(a, b, equal_nan=True) if has_array else bool(a == b)


def checked(
    instance: object, error: type[Exception], way_out: str, shapes: Mapping[str, tuple[Any, str]], *, copy: bool = True
) -> dict[str, Any]:
    """Return a dataclass's arrays with their shapes checked, as copies unless ``copy`` is False. None stays None.

    ``shapes`` has each field's dtype and shape, such as ``"n_layer 2 n_embd"``: a name means one size in all fields.
    Another shape raises ``error``, and its message ends with ``way_out``.
    """
    sizes, arrays = {"2": 2, "3": 3}, dict[str, Any]()
    for name, (dtype, words) in shapes.items():
        value, names = getattr(instance, name), words.split()
        array = arrays[name] = None if value is None else (np.array if copy else np.asarray)(value, dtype)
        if array is None:
            continue
        expected = ", ".join(str(sizes.get(each, each)) for each in names)
        differ = (sizes.setdefault(each, size) != size for each, size in zip(names, array.shape, strict=False))
        if array.ndim != len(names) or 0 in array.shape or any(differ):
            raise error(f"{name!r} has the shape {array.shape}, not [{expected}]; {way_out}")
    return arrays


def freeze(instance: object, **arrays: npt.NDArray[Any] | None) -> None:
    for name, array in arrays.items():
        if array is not None:
            array.flags.writeable = False
        object.__setattr__(instance, name, array)
