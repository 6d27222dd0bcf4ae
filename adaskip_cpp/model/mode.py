"""The modes: in which phases a plan skips the sublayers that were chosen."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal, TypeAlias

ModeName: TypeAlias = Literal["prompt", "prefill", "decode", "e2e"]


@dataclass(frozen=True)
class Mode:
    """One of :data:`MODES`.

    Attributes:
        in_bulk: whether only the bulk of a prompt skips the chosen sublayers, and keeps their K and V.
        in_prefill, in_decode: whether all of a prompt, and whether an answer skips them.
        adapts: whether an answer may skip more as it goes on, by an online stage or a schedule.
    """

    name: ModeName
    _: KW_ONLY
    in_bulk: bool = False
    in_prefill: bool = False
    in_decode: bool = False
    adapts: bool = True

    @property
    def in_prompt(self) -> bool:
        return self.in_bulk or self.in_prefill


_MODES = (
    Mode("prompt", in_bulk=True),
    Mode("prefill", in_prefill=True, in_decode=True, adapts=False),
    Mode("decode", in_decode=True),
    Mode("e2e", in_prefill=True, in_decode=True),
)
MODES: dict[ModeName, Mode] = {mode.name: mode for mode in _MODES}
"""The prompt mode and the paper's three."""
