"""Types of options that take a list with commas: :func:`numbers`, :func:`names`, :data:`LAYERS_OF_BOTH`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

_MOST_LAYERS = 9999  # more than any model has; without it, a typing error such as 1-999999999 would fill the memory


class _List(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """Turns text with commas into a tuple without duplicates."""

    name = "list"

    def __init__(self, read: Callable[[str], Iterable[Any]], says: str, metavar: str) -> None:
        self.read, self.says, self.metavar = read, says, metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        try:
            return value if isinstance(value, tuple) else self.parse(str(value))
        except ValueError:
            self.fail(f"{value!r} is not {self.says}", param, ctx)

    def parse(self, text: str) -> tuple[Any, ...]:
        found = tuple(dict.fromkeys(each for part in text.split(",") for each in self.read(part.strip())))
        if not found:
            raise ValueError(text)
        return found


class _Two(_List):
    def parse(self, text: str) -> tuple[Any, ...]:
        first, second = (super(_Two, self).parse(part) if part else () for part in text.split("/"))
        if not (first or second):
            raise ValueError(text)
        return first, second


def numbers(kind: type[int] | type[float], example: str, *, least: float = 1) -> _List:
    """Return an option type for finite numbers of at least ``least``, such as ``6,12``."""

    def read(part: str) -> tuple[float]:
        number = kind(part)
        if not least <= number < float("inf"):
            raise ValueError(part)
        return (number,)

    return _List(read, f"a list such as {example}", "N,..." if kind is int else "X,...")


def names(allowed: Sequence[str]) -> _List:
    return _List(lambda part: (allowed[allowed.index(part)],), f"a list of: {', '.join(allowed)}", "NAME,...")


def _layers(part: str) -> range:
    first, _, last = part.partition("-")
    if int(last or first) > _MOST_LAYERS:
        raise ValueError(part)
    return range(int(first), int(last or first) + 1)


LAYERS_OF_BOTH = _Two(_layers, "two lists of layers such as 1,5-7/8,9", "LAYERS/LAYERS")
"""Layers of attentions, then layers of FFNs."""
