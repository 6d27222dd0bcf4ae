"""The modes of plans, which say what phases skip the chosen sublayers: ``MODES``. docs/dev/method.md explains them."""

from dataclasses import dataclass

from ..model.plan import ModeName


@dataclass(frozen=True)
class Mode:
    """The phases that skip the chosen sublayers."""

    in_bulk: bool = False  # the bulk of a prompt alone, which keeps their K and V
    in_prefill: bool = False  # whole prompts
    in_decode: bool = False  # answers
    adapts: bool = False  # whether an answer may skip more as it goes on, by an online stage or a schedule


MODES: dict[ModeName, Mode] = {  # the prompt mode and the paper's three
    "prompt": Mode(in_bulk=True),
    "prefill": Mode(in_prefill=True, in_decode=True),
    "decode": Mode(in_decode=True, adapts=True),
    "e2e": Mode(in_prefill=True, in_decode=True, adapts=True),
}
