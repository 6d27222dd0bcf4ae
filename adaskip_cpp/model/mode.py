"""The modes of plans: the phases that skip the chosen sublayers. For ``planning``; start with ``MODES``."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

ModeName: TypeAlias = Literal["prompt", "prefill", "decode", "e2e"]


@dataclass(frozen=True)
class Mode:
    """One of :data:`MODES`.

    Attributes:
        in_bulk: whether the bulk of a prompt alone skips the chosen sublayers, and keeps their K and V.
        in_prefill, in_decode: whether whole prompts skip them, and whether answers skip them.
        adapts: whether an answer may skip more as it goes on, by an online stage or a schedule.
    """

    in_bulk: bool = False
    in_prefill: bool = False
    in_decode: bool = False
    adapts: bool = True

    @property
    def in_prompt(self) -> bool:
        return self.in_bulk or self.in_prefill


MODES: dict[ModeName, Mode] = {  # the prompt mode and the paper's three
    "prompt": Mode(in_bulk=True),
    "prefill": Mode(in_prefill=True, in_decode=True, adapts=False),
    "decode": Mode(in_decode=True),
    "e2e": Mode(in_prefill=True, in_decode=True),
}
