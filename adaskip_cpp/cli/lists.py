"""Types of options that take a list with commas: :func:`numbers` and :func:`names`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click


class _List(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """Turns text with commas into a tuple without duplicates."""

    name = "list"

    def __init__(self, read: Callable[[str], Iterable[Any]], says: str, metavar: str) -> None:
        self.read, self.says, self.metavar = read, says, metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        try:
            if isinstance(value, tuple):
                return value
            return tuple(dict.fromkeys(each for part in str(value).split(",") for each in self.read(part.strip())))
        except ValueError:
            self.fail(f"{value!r} is not {self.says}", param, ctx)


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
