"""What dataclasses of arrays share: read-only copies, equality by content, and plain JSON values and back."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["ByContent", "freeze", "from_plain", "to_plain"]

_T = TypeVar("_T")


class ByContent:
    """Makes dataclasses of one class equal whose fields are: arrays by shape and values, NaN being equal to NaN."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]  # every one of these is a dataclass
        return all(_same(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b, equal_nan=True)
    return a is b if a is None or b is None else bool(a == b)


def freeze(instance: object, **arrays: npt.NDArray[Any] | None) -> None:
    """Put arrays into a frozen dataclass, read-only from now on."""
    for name, array in arrays.items():
        if array is not None:
            array.flags.writeable = False
        object.__setattr__(instance, name, array)


def to_plain(value: Any) -> Any:
    """Return plain JSON values of dataclasses and arrays; None for a number of an array that is not finite."""
    return msgspec.to_builtins(value, enc_hook=_lists)


def from_plain(value: Any, kind: type[_T]) -> _T:
    """Return a dataclass from plain values.

    Raises:
        ValueError: a field is missing, of another type or impossible; the message says which.
    """
    return msgspec.convert(value, kind, dec_hook=_array)


def _lists(array: Any) -> Any:
    if not isinstance(array, np.ndarray):
        raise NotImplementedError(f"{type(array).__name__} has no plain form")
    return np.where(np.isfinite(array), array, np.array(None, object)).tolist()


def _array(kind: Any, value: Any) -> npt.NDArray[np.float64]:
    """Read lists of numbers, or lists of such lists, with null for NaN."""

    def number(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{value!r} is not a number")
        return np.nan if value is None else float(value)

    if not isinstance(value, list):
        raise ValueError("a list of numbers is missing")
    try:
        return np.array([[number(each) for each in row] if isinstance(row, list) else number(row) for row in value])
    except OverflowError as error:
        raise ValueError(str(error)) from error
