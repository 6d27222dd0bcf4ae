"""``PlanRequest``: the one description of a wanted plan, for Python, the command line, bench, evaluate and tune."""

import math
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, Literal, TypeAlias, get_args

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
    """What plan is wanted; the defaults are those of no option at all. A strategy makes the plan of it.

    Attributes:
        n_skip: number of sublayers to skip; None for :data:`DEFAULT_N_SKIP`, or with a speed-up or listed layers.
        speedup: instead of ``n_skip``: how many times faster than the full model ``phase`` shall be, as predicted for
            the machine that calibrated.
        context: for ``speedup``: tokens of the prompt, or before the token that is decoded; :meth:`at` sets it later.
        phase: for ``speedup``: the phase to speed up. None: decode in mode ``"decode"``, else prefill: a prompt, up to
            the first token of its answer.
        ranking: for ``speedup``: ``"efficiency"`` chooses by similarity lost per second saved, ``"similarity"`` by the
            paper's ranking. Strategies other than ``"adaskip"`` have their own order.
        mode: one of :data:`adaskip_cpp.model.mode.MODES`.
        decode: for mode ``"prompt"``: number of sublayers to skip in decode, by the paper's ranking.
        head, tail: for mode ``"prompt"``: as in :class:`adaskip_cpp.model.plan.Bulk`.
        windowed: for mode ``"prompt"``: of how many of the model's last layers the attention, where the bulk runs it,
            looks back at a window alone. None: as many as reach a speed-up with the least loss, none without one.
        window_size: tokens to look back at; None for :func:`adaskip_cpp.model.plan.window_size_for` the context, which
            is a short one where none is given.
        strategy: how to choose, one of :mod:`adaskip_cpp.planning.strategies`.
        compensation: what stands in for a skipped sublayer, one of :mod:`adaskip_cpp.planning.compensation`. None: that
            of the strategy, which is ``"none"`` for ``"suffix"``. The other baselines have none whatever it is.
        online: whether requests add FFNs in decode, see :class:`adaskip_cpp.model.plan.OnlineStage`. Strategy
            ``"adaskip"`` in the modes ``"decode"`` and ``"e2e"`` only, and where mode ``"prompt"`` skips in decode. The
            threshold is the n-th largest similarity of the profile, n being the number of sublayers skipped.
        attention, ffn: for strategy ``"manual"``: layers whose attention, whose FFN is skipped.

    Raises:
        BudgetError: there are two budgets, or the speed-up is no number from 1 on.
        CompensationError: the compensation is unknown.
        PlanError: another value is unknown or impossible, or does not go with the others.
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
            raise PlanError("mode 'decode' runs the full model in prefill; use phase='decode' or another mode")
        if mode.in_bulk and self.phase == "decode":
            raise PlanError("mode 'prompt' makes prompts faster; leave phase out, or use mode='decode'")

    @classmethod
    def of(cls, request: "PlanRequest | int | None", **values: Any) -> "PlanRequest":
        """Return a request from a number of sublayers to skip, or from another request, and values by name."""
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in values if name not in names]:
            raise PlanError(f"a plan has no {unknown[0]!r}; use some of: {', '.join(names)}")
        return replace(request, **values) if isinstance(request, cls) else cls(request, **values)  # type: ignore[arg-type]

    @property
    def faster_phase(self) -> Phase:
        """The phase that a speed-up is about: in mode ``"prompt"`` the bulk, which stands for a prompt that has one."""
        mode = MODES[self.mode]
        return "bulk" if mode.in_bulk else self.phase or ("prefill" if mode.in_prefill else "decode")

    @property
    def name(self) -> str:
        """What tables call it: ``adaskip 12``, ``early_exit 1.2 x``, ``3 attention, 2 FFN``."""
        if self.strategy == "manual":
            listed = zip((self.attention, self.ffn), KIND_NAMES, strict=True)
            return ", ".join(f"{len(set(layers))} {kind}" for layers, kind in listed if layers) or "nothing"
        if self.speedup is not None:
            return f"{self.strategy} {self.speedup:g} x"
        return f"{self.strategy} {DEFAULT_N_SKIP if self.n_skip is None else self.n_skip}"

    @property
    def look_back(self) -> int:
        """Tokens that windowed attentions look back at."""
        return window_size_for(self.context or 1) if self.window_size is None else self.window_size

    def at(self, context: int) -> "PlanRequest":
        """Return the request for a context of so many tokens: for a speed-up and windows that have none yet."""
        if self.context is not None:
            return self
        size = window_size_for(context) if self.windowed and self.window_size is None else self.window_size
        return replace(self, window_size=size, context=None if self.speedup is None else context)
