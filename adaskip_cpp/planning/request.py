"""``PlanRequest``: the one description of a wanted plan, for Python, the command line, bench, evaluate and tune."""

import math
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Literal, TypeAlias, get_args

import numpy as np

from ..errors import BudgetError, PlanError
from ..model.mode import MODES, ModeName
from ..model.plan import DEFAULT_HEAD, DEFAULT_TAIL, TIMED, Phase, whole_number, window_size_for
from ..model.skip_set import KIND_NAMES
from .compensation import DEFAULT_COMPENSATION, get_compensation

Ranking: TypeAlias = Literal["efficiency", "similarity"]

DEFAULT_N_SKIP = 12  # sublayers skipped unless a budget is given


@dataclass(frozen=True)
class PlanRequest:
    """A description of a wanted plan. ``Profile.plan``, ``bench`` and ``evaluate`` make plans of it.

    Attributes:
        n_skip: number of sublayers to skip; None for 12, or if there is a speed-up or a list of layers.
        speedup: instead of ``n_skip``: how many times as fast as the whole model ``phase`` shall be, from 1 on, as
            predicted for the machine of the calibration.
        context: for ``speedup``: tokens of the prompt, or tokens before the decoded one.
        phase: for ``speedup``: ``"prefill"``, the time to the first token, or ``"decode"``, the time per token of the
            answer. None for decode in mode ``"decode"``, else prefill.
        ranking: for ``speedup`` and strategy ``"adaskip"``: ``"efficiency"`` ranks by loss per second saved,
            ``"similarity"`` as the paper does.
        mode: ``"prompt"`` skips in the bulk of a prompt; ``"prefill"``, ``"decode"`` and ``"e2e"`` are the paper's.
        decode: for mode ``"prompt"``: number of sublayers to skip in decode too, ranked as in the paper.
        head: for mode ``"prompt"``: tokens at the beginning that are no bulk.
        tail: for mode ``"prompt"``: tokens at the end that are no bulk.
        windowed: for mode ``"prompt"``: number of the model's last attentions that see only a window in the bulk. None
            for the number that reaches the speed-up with the least loss, or 0 without a speed-up.
        window_size: tokens that such an attention sees; None for an eighth of the context.
        strategy: ``"adaskip"``, ``"early_exit"``, ``"suffix"``, ``"skip_decode"``, ``"unified_skipping"``, or
            ``"manual"`` for ``attention`` and ``ffn``.
        compensation: ``"linear"``, ``"affine"``, ``"median"``, ``"paper"`` or ``"none"``. None for that of the
            strategy: ``"none"`` for ``"suffix"``, else ``"linear"``. The other three baselines never have one.
        online: whether the plan has an online stage. Strategy ``"adaskip"`` alone has one, if it skips in decode and
            not in mode ``"prefill"``. Its threshold is the n-th largest similarity of the profile, for n skipped
            sublayers.
        attention: for strategy ``"manual"``: layers whose attention is skipped.
        ffn: for strategy ``"manual"``: layers whose FFN is skipped.

    Raises:
        BudgetError: there are two budgets, or the speed-up is not a number from 1 on.
        CompensationError: the compensation is unknown.
        PlanError: another value is unknown or impossible, or does not go with the others.

    Examples:
        >>> profile.plan(PlanRequest(speedup=1.25, context=4096))
        >>> bench("model.gguf", {"12 skipped": PlanRequest(12), "e2e": PlanRequest(12, mode="e2e")}, profile=profile)
    """

    n_skip: int | None = None
    _: KW_ONLY
    speedup: float | None = None
    context: int | None = None
    phase: Phase | None = None
    ranking: Ranking = "efficiency"
    mode: ModeName = "prompt"
    decode: int = 0
    head: int = DEFAULT_HEAD
    tail: int = DEFAULT_TAIL
    windowed: int | None = None
    window_size: int | None = None
    strategy: str = "adaskip"
    compensation: str | None = None
    online: bool = True
    attention: tuple[int, ...] = ()
    ffn: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", tuple(self.attention))
        object.__setattr__(self, "ffn", tuple(self.ffn))
        if self.mode not in [*MODES]:
            raise PlanError(f"unknown mode {self.mode!r}; use one of: {', '.join(MODES)}")
        mode = MODES[self.mode]
        of_bulk = {"decode": 0, "head": 0, "tail": 1, "windowed": 0, "window_size": 1}
        for name, least in of_bulk.items():
            if (value := getattr(self, name)) is not None or not name.startswith("window"):
                whole_number(name, value, least)
        given = [each.name for each in fields(self) if each.name in of_bulk and vars(self)[each.name] != each.default]
        if given and not mode.in_bulk:
            raise PlanError(f"mode {self.mode!r} takes no {' and no '.join(given)}; leave it out, or use mode 'prompt'")
        get_compensation(DEFAULT_COMPENSATION if self.compensation is None else self.compensation)
        if (self.attention or self.ffn) and self.strategy != "manual":
            raise PlanError(f"strategy {self.strategy!r} chooses layers itself; use strategy='manual' to list them")
        if self.phase not in (*TIMED, None):
            raise PlanError(f"unknown phase {self.phase!r}; use 'prefill' or 'decode'")
        if self.ranking not in get_args(Ranking):
            raise PlanError(f"unknown ranking {self.ranking!r}; use 'efficiency' or 'similarity'")
        if self.context is not None and not (isinstance(self.context, int | np.integer) and self.context >= 1):
            raise PlanError(f"a speed-up depends on the prompt; give context, in tokens, not {self.context!r}")
        if self.speedup is None:
            return
        number = isinstance(self.speedup, int | float) and not isinstance(self.speedup, bool)
        if not (number and 1 <= self.speedup < math.inf):
            raise BudgetError(f"the speed-up is {self.speedup!r}; use a number from 1 on, such as 1.25")
        if self.n_skip is not None:
            raise BudgetError("n_skip and speedup are two budgets; give one of them")
        if self.strategy == "manual":
            raise PlanError("strategy 'manual' skips what is listed, whatever the speed-up; leave speedup out")
        if not mode.in_prompt and self.phase == "prefill":
            raise PlanError("mode 'decode' runs the whole model in prompts; use phase='decode' or another mode")
        if mode.in_bulk and self.phase == "decode":
            raise PlanError("mode 'prompt' makes prompts faster; leave phase out, or use mode='decode'")

    @property
    def faster_phase(self) -> Phase:
        """The phase that a speed-up is about; ``"bulk"`` in mode ``"prompt"``."""
        mode = MODES[self.mode]
        return "bulk" if mode.in_bulk else self.phase or ("prefill" if mode.in_prefill else "decode")

    @property
    def name(self) -> str:
        """Its name in tables: ``adaskip 12``, ``early_exit 1.2 x``, ``3 attention, 2 FFN``."""
        if self.strategy == "manual":
            listed = zip((self.attention, self.ffn), KIND_NAMES, strict=True)
            return ", ".join(f"{len(set(layers))} {kind}" for layers, kind in listed if layers) or "nothing"
        if self.speedup is not None:
            return f"{self.strategy} {self.speedup:g} x"
        return f"{self.strategy} {DEFAULT_N_SKIP if self.n_skip is None else self.n_skip}"

    def at(self, context: int) -> "PlanRequest":
        """Return the same request for prompts of ``context`` tokens, unless it has a context."""
        if self.context is not None:
            return self
        size = window_size_for(context) if self.windowed and self.window_size is None else self.window_size
        return replace(self, window_size=size, context=None if self.speedup is None else context)
