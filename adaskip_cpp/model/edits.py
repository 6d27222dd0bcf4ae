"""``Edits``: how much of the K and V in memory an edited prompt may use again, for ``AdaSkipLlama`` and `tune`."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from ..errors import RequestError

WIDE = 32  # a move counts as so many moves if less than SAME of the text before the run stays the same
SAME = 0.8
FEW = 16  # moves for small edits: changed lines, dropped messages
MANY = FEW + 4 * WIDE  # moves for 4 orders of documents
APART = 160  # of such a move from a saved prompt: documents that were read alone lose more than their new orders
TOGETHER = APART + WIDE + FEW  # moves for documents that were read alone, put together, then in another order
_MOST_MOVES = 255 - WIDE  # a cell counts to 255


@dataclass(frozen=True)
class Edits:
    """How runs of tokens are moved to their places in an edited prompt. Impossible numbers raise a RequestError.

    A moved token keeps the K and V of its old place, where other text stood before it. llama.cpp turns K to the new
    position.

    Attributes:
        mend: tokens at the beginning of each run that are read again, from 1 on. They depend most on the text before
            the run (EPIC, arXiv 2410.15332). With 16, small edits lost SmolLM2 a clear key.
        least: tokens of the shortest run that is moved, apart from ``mend``.
        tail: tokens at the end of the prompt that are always read again, from 1 on.
        most_moves: a token with more moves than this is read again; from 1 to 223. A move counts as 32 if less than
            four fifths of the text before the run stay, else as 1. Such a move from a saved prompt counts as 160.
            `tune` measures up to 208.

    Examples:
        >>> llm = AdaSkipLlama("model.gguf", reuse=Edits(mend=64))
    """

    mend: int = 32
    least: int = 64
    tail: int = 64
    most_moves: int = _MOST_MOVES

    def __post_init__(self) -> None:
        # mend is 1 or more: llama.cpp turns K when it reads on. A state saved before that has old K at new positions.
        for name, value in vars(self).items():
            most = _MOST_MOVES if name == "most_moves" else 2**31 - 1
            if type(value) is not int or not 1 <= value <= most:
                raise RequestError(f"{name} is {value!r}; give a whole number from 1 to {most}.")


ReuseName: TypeAlias = Literal["auto", "prefix", "edits"]
REUSES: tuple[ReuseName, ...] = get_args(ReuseName)
Reuse: TypeAlias = ReuseName | Edits  # what a prompt reuses: the prefix; runs too; "auto": runs if `tune` allows them


def edits_of(reuse: Reuse) -> Edits | None:
    """Return how runs are moved; None if none are, or if a frontier decides."""
    if isinstance(reuse, Edits):
        return reuse
    if reuse not in REUSES:
        raise RequestError(f"reuse is {reuse!r}; give {', '.join(map(repr, REUSES))} or an Edits.")
    return Edits() if reuse == "edits" else None
