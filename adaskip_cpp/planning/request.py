"""``PlanRequest``: the one description of a wanted plan, for Python, the command line, evaluate and tune."""

import math
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np

from ..errors import BudgetError, PlanError
from ..model.plan import DEFAULT_HEAD, DEFAULT_TAIL, ModeName, Phase, whole_number, window_size_for
from .compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from .modes import MODES

DEFAULT_N_SKIP = 12  # sublayers skipped unless a budget is given


@dataclass(frozen=True)
class PlanRequest:
    """A description of a wanted plan. ``Profile.plan`` and ``evaluate`` make plans of it.

    Impossible values, and values that exclude each other, raise a PlanError; for budgets it is a BudgetError.

    Attributes:
        n_skip: number of sublayers to skip; None for 12, or if there is a speed-up or a list of layers.
        speedup: instead of ``n_skip``: how many times as early as with the whole model the first token shall come, in
            mode ``"decode"`` each token of the answer; from 1 on, as predicted for the machine of the calibration.
        context: for ``speedup``: tokens of the prompt, or tokens before the decoded one.
        mode: ``"prompt"`` skips in the bulk of a prompt; ``"prefill"``, ``"decode"`` and ``"e2e"`` are the paper's.
        head: for mode ``"prompt"``: tokens at the beginning that are no bulk.
        tail: for mode ``"prompt"``: tokens at the end that are no bulk.
        windowed: for mode ``"prompt"``: number of the model's last attentions that see only a window in the bulk.
        window_size: tokens that such an attention sees; None for an eighth of the context.
        strategy: ``"adaskip"``, ``"early_exit"``, ``"skip_decode"``, ``"unified_skipping"``, or ``"manual"`` for
            ``attention`` and ``ffn``.
        compensation: ``"linear"``, ``"affine"``, ``"median"``, ``"paper"`` or ``"none"``. The baselines have none,
            whatever is asked for.
        online: whether the plan has an online stage. Strategy ``"adaskip"`` alone has one, in ``"decode"`` and
            ``"e2e"``. Its threshold is the n-th largest similarity of the profile, for n skipped sublayers.
        attention: for strategy ``"manual"``: layers whose attention is skipped.
        ffn: for strategy ``"manual"``: layers whose FFN is skipped.

    Examples:
        >>> profile.plan(PlanRequest(speedup=1.25, context=4096))
        >>> profile.plan(PlanRequest(12, mode="e2e"))
    """

    n_skip: int | None = None
    _: KW_ONLY
    speedup: float | None = None
    context: int | None = None
    mode: ModeName = "prompt"
    head: int = DEFAULT_HEAD
    tail: int = DEFAULT_TAIL
    windowed: int = 0
    window_size: int | None = None
    strategy: str = "adaskip"
    compensation: str = DEFAULT_COMPENSATION
    online: bool = True
    attention: tuple[int, ...] = ()
    ffn: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", tuple(self.attention))
        object.__setattr__(self, "ffn", tuple(self.ffn))
        if self.mode not in [*MODES]:
            raise PlanError(f"unknown mode {self.mode!r}; use one of: {', '.join(MODES)}")
        of_bulk = {"head": 0, "tail": 1, "windowed": 0, "window_size": 1}
        for name, least in of_bulk.items():
            if (value := getattr(self, name)) is not None or name != "window_size":
                whole_number(name, value, least)
        given = [name for name in of_bulk if getattr(self, name) != getattr(PlanRequest, name)]  # others than defaults
        if given and not MODES[self.mode].in_bulk:
            raise PlanError(f"mode {self.mode!r} takes no {' and no '.join(given)}; leave it out, or use mode 'prompt'")
        if self.compensation not in [*COMPENSATIONS]:  # a list takes names that cannot be hashed
            raise PlanError(f"unknown compensation {self.compensation!r}; use one of: {', '.join(COMPENSATIONS)}")
        if (self.attention or self.ffn) and self.strategy != "manual":
            raise PlanError(f"strategy {self.strategy!r} chooses layers itself; use strategy='manual' to list them")
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

    @property
    def faster_phase(self) -> Phase:
        """The phase that a speed-up is about; ``"bulk"`` in mode ``"prompt"``."""
        mode = MODES[self.mode]
        return "bulk" if mode.in_bulk else "prefill" if mode.in_prefill else "decode"

    def at(self, context: int) -> "PlanRequest":
        """Return the same request for prompts of ``context`` tokens, unless it has a context."""
        if self.context is not None:
            return self
        size = window_size_for(context) if self.windowed and self.window_size is None else self.window_size
        return replace(self, window_size=size, context=None if self.speedup is None else context)
