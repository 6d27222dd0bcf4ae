"""How K and V are used again in a prompt that is an edited form of one in memory."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..errors import RequestError


@dataclass(frozen=True)
class Edits:
    """How runs of tokens are moved to their places in another prompt.

    The K and V of a moved token are those of its old place, where other text stood before it. llama.cpp turns K to the
    new position.

    Attributes:
        mend: tokens at the beginning of each run that are read again. They take most from the text before the run
            (EPIC, arXiv 2410.15332). At least 1: llama.cpp turns K when it reads on, and a state that is saved before
            that would have old K at new positions.
        least: tokens of the shortest run that is moved.
        tail: tokens at the end of the prompt that are read again, whatever is known of them.
        most_moves: a token that was moved more often is read again; at most 254, as a cell counts to 255.
    """

    mend: int = 16
    least: int = 64
    tail: int = 64
    most_moves: int = 4

    def __post_init__(self) -> None:
        for name, least in (("mend", 1), ("least", 1), ("tail", 1), ("most_moves", 1)):
            value, most = getattr(self, name), 254 if name == "most_moves" else 2**31 - 1
            if type(value) is not int or not least <= value <= most:
                raise RequestError(f"{name} is {value!r}; give a whole number from {least} to {most}.")


Reuse: TypeAlias = Literal["prefix", "edits"] | Edits
"""What a prompt uses of the one in memory: what both begin with, or every run of tokens that both have."""


def edits_of(reuse: Reuse) -> Edits | None:
    """Return how runs are moved; None for ``"prefix"``, which moves none."""
    if isinstance(reuse, Edits):
        return reuse
    if reuse not in ("prefix", "edits"):
        raise RequestError(f'reuse is {reuse!r}; give "prefix", "edits" or an Edits.')
    return Edits() if reuse == "edits" else None
