"""What a tuned plan was asked to keep, and what was measured of it."""

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from ..errors import PlanError
from ..intervals import Interval

PromiseKind: TypeAlias = Literal["max_loss", "min_agreement", "speedup"]


@dataclass(frozen=True)
class Promise:
    """What a plan was asked to keep.

    Attributes:
        kind: ``"max_loss"``: at most ``value`` nats per token more than the full model loses; in mode ``"prompt"`` the
            search holds the divergence to it, and what the loss is greater than that beyond chance.
            ``"min_agreement"``: at least this share of the tokens is predicted as the full model predicts it.
            ``"speedup"``: a request is answered at least ``value`` times as fast, in mode ``"prompt"`` up to the first
            token.
        value: 0 or more; from 0 to 1; 1 or more.

    Raises:
        PlanError: the kind is unknown or the value impossible.
    """

    kind: PromiseKind
    value: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(PromiseKind):
            raise PlanError(f"unknown promise {self.kind!r}; use one of: {', '.join(get_args(PromiseKind))}")
        low, high = {"max_loss": (0, math.inf), "min_agreement": (0, 1), "speedup": (1, math.inf)}[self.kind]
        if not (math.isfinite(self.value) and low <= self.value <= high):
            top = f"to {high}" if math.isfinite(high) else "on"
            raise PlanError(f"cannot promise {self.kind} {self.value!r}; use a number from {low} {top}")

    def __str__(self) -> str:
        if self.kind == "max_loss":
            return f"an added loss of at most {self.value:g} nats per token"
        if self.kind == "min_agreement":
            return f"the full model's choice for at least {100 * self.value:g}% of the tokens"
        return f"at least {self.value:g} times the speed"


@dataclass(frozen=True)
class SpeedUp:
    """How many times as fast as the full model a plan was measured to be: ``ratio``, of times pair by pair.

    The prompt has ``context`` tokens, the answer ``n_decode`` behind its first one. ``"decode"`` is of one such token,
    ``"request"`` of all together. ``seconds`` are medians, of the full model and of the plan.
    """

    of: Literal["first token", "decode", "request"]
    context: int
    n_decode: int
    ratio: Interval
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Passkeys:
    """Pass keys hidden in ``n`` prompts: how many the full model finds, and how many of these the plan does."""

    n: int
    full: int
    plan: int


@dataclass(frozen=True)
class Tuning:
    """How a plan was found by `adaskip-cpp tune`: what was promised, and what was measured.

    Attributes:
        loss: nats per token that the plan adds, mean over the texts.
        agreement: share of tokens for which it finds the same token most likely as the full model, likewise.
        unbiased: whether none of that text had a part in choosing the plan. False where there was too little of it:
            sublayers were put back until this very text kept the promise, so other text will do worse.
        settings: for people to read.
        divergence: mean over the texts of KL(full model || plan), in nats per token; None if it was not measured.
        passkeys: what is found in long prompts; None if none was asked for.
    """

    promise: Promise
    loss: Interval
    agreement: Interval
    n_texts: int
    n_tokens: int
    unbiased: bool
    speedups: tuple[SpeedUp, ...] = ()
    settings: dict[str, str | int | float | None] = field(default_factory=dict)
    divergence: Interval | None = None
    passkeys: Passkeys | None = None

    @property
    def kept(self) -> Literal["yes", "on average", "no"]:
        """Whether what was measured keeps the promise: with its whole interval, by its value only, or not at all."""
        wanted = self.promise.value
        if self.promise.kind == "max_loss":
            by_value, by_interval = self.loss.value <= wanted, self.loss.high <= wanted
        else:
            speed = self.speedups[-1].ratio if self.speedups else Interval(1.0, 1.0, 1.0, 0)  # nothing was skipped
            figure = self.agreement if self.promise.kind == "min_agreement" else speed
            by_value, by_interval = figure.value >= wanted, figure.low >= wanted
        return "no" if not by_value else "yes" if by_interval else "on average"
