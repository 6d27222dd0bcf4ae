"""Types of options that take a list with commas: :func:`numbers` and :func:`names`."""

from collections.abc import Callable, Sequence
from typing import Any

import click


class _List(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """Turns text with commas into a tuple without duplicates."""

    name = "list"

    def __init__(self, read: Callable[[str], Any], says: str, metavar: str) -> None:
        self.read, self.says, self.metavar = read, says, metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(self.read(part.strip()) for part in str(value).split(",")))
        except ValueError:
            self.fail(f"{value!r} is not {self.says}", param, ctx)


def numbers(kind: type[int] | type[float], example: str, *, least: float = 1) -> _List:
    """Return an option type for a list of finite numbers of at least ``least``, such as ``6,12``."""

    def read(part: str) -> float:
        if not least <= (number := kind(part)) < float("inf"):
            raise ValueError(part)
        return number

    return _List(read, f"a list such as {example}", "N,..." if kind is int else "X,...")


def names(allowed: Sequence[str]) -> _List:
    return _List(lambda part: allowed[allowed.index(part)], f"a list of: {', '.join(allowed)}", "NAME,...")
