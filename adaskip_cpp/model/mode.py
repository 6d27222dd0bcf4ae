"""The modes of plans: the phases that skip the chosen sublayers. For ``planning``; start with ``MODES``."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

ModeName: TypeAlias = Literal["prompt", "prefill", "decode", "e2e"]


@dataclass(frozen=True)
class Mode:
    """The phases that skip the chosen sublayers."""

    in_bulk: bool = False  # the bulk of a prompt alone, which keeps their K and V
    in_prefill: bool = False  # whole prompts
    in_decode: bool = False  # answers
    adapts: bool = True  # whether an answer may skip more as it goes on, by an online stage or a schedule

    @property
    def in_prompt(self) -> bool:
        return self.in_bulk or self.in_prefill


MODES: dict[ModeName, Mode] = {  # the prompt mode and the paper's three
    "prompt": Mode(in_bulk=True),
    "prefill": Mode(in_prefill=True, in_decode=True, adapts=False),
    "decode": Mode(in_decode=True),
    "e2e": Mode(in_prefill=True, in_decode=True),
}
