"""The result of `adaskip-cpp tune` for one model: start with :meth:`Frontier.choose`, which picks a prompt's plan."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from ..errors import PlanError
from ..intervals import Interval
from .cost_model import CostSettings
from .edits import Edits
from .plan import DEFAULT_WINDOW, SkipPlan, window_size_for
from .settings import Settings, Tried

DEFAULT_LOSS = 0.05  # the default promise, in nats per token: the perplexity grows by 5% at most
LEAST_CONTEXT = 512  # tokens: shorter prompts run whole, because they have little bulk and take little time
GROWTH = 1.3  # the assumed factor of a plan's loss if a prompt is twice as long: measured in docs/dev/method.md
ERRORS = 1.6  # standard errors that are added to a mean loss before it is compared with a promise
EDITS_SHARE = 0.5  # the share of a promise that edited prompts may lose; plans may lose the rest


@dataclass(frozen=True)
class SpeedUp:
    """How many times as fast the first token of a prompt was measured to come.

    Attributes:
        of: what makes it faster: ``"settings"`` the settings found, against stock llama-cpp-python with its own;
            ``"plan"`` a plan, against the whole model with these settings; ``"both"`` both, against stock.
        context: tokens of the prompt.
        ratio: of times, pair by pair.
        seconds: medians, without and with it.
    """

    of: Literal["settings", "plan", "both"]
    context: int
    ratio: Interval
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Passkeys:
    """Pass keys hidden in ``n`` prompts: how many the whole model finds with a margin, and how many of these a plan."""

    n: int
    whole: int
    plan: int


@dataclass(frozen=True)
class Quality:
    """What a plan changes in answers of one kind, against the whole model: means over texts, with 95% intervals.

    Attributes:
        divergence: KL(whole model || plan), in nats per token.
        error: standard error of that mean.
        loss: loss that the plan adds, in nats per token.
        excess: by how much that is greater than the divergence beyond chance: the lower end of the 95% interval of
            their difference, 0 where that is below 0.
        agreement: share of tokens for which both find the same token likeliest.
        tails: 99% and 99.9% quantile of the divergence over all tokens.
        n_texts, n_tokens: what was judged.
    """

    divergence: Interval
    error: float
    loss: Interval
    excess: float
    agreement: Interval
    tails: tuple[float, float]
    n_texts: int
    n_tokens: int

    @property
    def harm(self) -> float:
        """What a promise is held to, in nats per token: the loss to be expected.

        The mean added loss of a few texts is mostly chance. Its expectation where the whole model is right is the
        divergence, which varies much less.
        """
        return self.divergence.value + self.excess

    @property
    def needs(self) -> float:
        """The least promise that it keeps, in nats per token: the harm and :data:`ERRORS` standard errors.

        Infinite where there is one text, of which no error is known.

        On four texts the mean alone would break a promise in 4 of 20 choices, and with one standard error 1.5 of 20.
        With 1.6 it is fewer than 1 of 20, as tests/test_frontier.py simulates.
        """
        return math.inf if math.isnan(self.error) else self.harm + ERRORS * self.error


@dataclass(frozen=True)
class Figures:
    """What was measured of a plan, or of edited prompts.

    Attributes:
        judged_at: tokens of the prompts that it was judged on.
        continuation: of answers that go on where the prompt ends.
        copying: of answers that repeat a part of the prompt from far back.
        passkeys: keys hidden in the prompts.
        speedups: how many times as fast the first token is, as predicted: pairs of a prompt's tokens and that.

    Raises:
        PlanError: one of the prompts has no number of tokens that a prompt can have.
    """

    judged_at: int
    continuation: Quality
    copying: Quality
    passkeys: Passkeys
    speedups: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not all(1 <= n < 1 << 31 for n in (self.judged_at, *(length for length, _ in self.speedups))):
            raise PlanError("a point of a frontier has an impossible number of prompt tokens; tune again")

    def harm(self, context: int) -> float:
        """Nats per token that are lost after prompts of so many tokens, in the worse kind of answer."""
        return max(self.continuation.harm, self.copying.harm) * self._growth(context)

    def needs(self, context: int) -> float:
        """Return the least promise that is kept there, infinite where a pass key is lost."""
        if self.passkeys.plan < self.passkeys.whole:
            return math.inf
        return max(self.continuation.needs, self.copying.needs) * self._growth(context)

    def _growth(self, context: int) -> float:
        return float(GROWTH ** max(math.log2(context / self.judged_at), 0.0))

    def speedup(self, context: int) -> float:
        """Predicted times as fast at the nearest length that was predicted, by ratio."""
        return min(self.speedups, key=lambda each: abs(math.log(each[0] / context)), default=(context, 1.0))[1]


@dataclass(frozen=True)
class Point(Figures):
    """A plan of a frontier, of mode ``prompt``. Its window, if it has any, is for prompts of ``judged_at`` tokens."""

    plan: SkipPlan

    def plan_for(self, context: int) -> SkipPlan:
        """Return the plan with windows of the same share of prompts of so many tokens."""
        size, bulk = self.window_size(context), self.plan.bulk
        if bulk is None or size == bulk.window_size:
            return self.plan
        return replace(self.plan, bulk=replace(bulk, window_size=size))

    def window_size(self, context: int) -> int:
        """Return the tokens that windows look back at there; where there are none, a number that is always the same."""
        bulk = self.plan.bulk
        if bulk is None or not bulk.narrowed:
            return 0 if bulk is None else bulk.window_size
        share = round(self.judged_at / (bulk.window_size + 256 - DEFAULT_WINDOW))
        return window_size_for(context, max(share, 1))


@dataclass(frozen=True)
class EditPoint(Figures):
    """What edited prompts lose where the whole model reads what is new in them, after as many moves as ``edits`` has.

    The pass keys are those of which an edit changed the number.
    """

    edits: Edits


@dataclass(frozen=True)
class Frontier:
    """What tuning found for one model on one machine.

    Attributes:
        points: plans of growing speed. None where nothing can be skipped.
        settings: with which the whole model is fastest.
        machine: where times were measured.
        tried: the settings that were timed.
        speeds: as measured at the end, with a plan that keeps the default promise.
        n_read: tokens that calibration and tuning read through the model.
        about: on which texts, when, by which release; for people to read.
        edits: what edited prompts lose, by growing numbers of moves. None where tokens cannot be moved.

    Raises:
        PlanError: a point is no plan of mode ``prompt``.
    """

    points: tuple[Point, ...]
    settings: Settings = field(default_factory=Settings)
    machine: CostSettings | None = None
    tried: tuple[Tried, ...] = ()
    speeds: tuple[SpeedUp, ...] = ()
    n_read: int = 0
    about: dict[str, str | int | float | None] = field(default_factory=dict)
    edits: tuple[EditPoint, ...] = ()

    def __post_init__(self) -> None:
        for each in self.points:
            if each.plan.bulk is None:
                raise PlanError("a point of a frontier skips in the bulk of prompts alone; tune again")

    def choose(self, n_tokens: int, max_loss: float = DEFAULT_LOSS, *, edited: bool = False) -> SkipPlan | None:
        """Return the fastest plan that keeps a promise for a prompt of ``n_tokens``; None for the whole model.

        Plans change at powers of two, so that a chat that grows keeps its plan for long.

        Args:
            edited: whether runs of an earlier prompt may be moved: the plan has what :meth:`edit_point` leaves of the
                promise.

        Raises:
            PlanError: the promise is no number from 0 on.
        """
        check_max_loss(max_loss)
        point = self.point(n_tokens, max_loss, edited=edited)
        return None if point is None else self._plan(point, context_for(n_tokens))

    def point(self, n_tokens: int, max_loss: float, *, edited: bool = False) -> Point | None:
        """Return the point whose plan :meth:`choose` returns."""
        if n_tokens < LEAST_CONTEXT:
            return None
        context, left = context_for(n_tokens), self._left(n_tokens, max_loss, edited=edited)
        kept = [each for each in self.points if each.needs(context) <= left and each.speedup(context) > 1.0]
        return max(kept, key=lambda each: each.speedup(context), default=None)

    def edit_point(self, n_tokens: int, max_loss: float) -> EditPoint | None:
        """Return the most moves that keep their share of a promise, in a prompt of so many tokens.

        What edits and a plan lose adds up: see docs/dev/method.md for what was measured.
        """
        context, found = context_for(n_tokens), None
        for each in self.edits if n_tokens >= LEAST_CONTEXT else ():
            if each.needs(context) > EDITS_SHARE * max_loss:
                break
            found = each
        return found

    def _left(self, n_tokens: int, max_loss: float, *, edited: bool) -> float:
        """Return the part of a promise that is left for a plan, in nats per token."""
        point = self.edit_point(n_tokens, max_loss) if edited else None
        return max_loss if point is None else max_loss - point.needs(context_for(n_tokens))

    def readable(self, max_loss: float, most_tokens: int, *, edited: bool = False) -> tuple[SkipPlan, ...]:
        """Return the plans whose cells keep a promise, in contexts of up to so many tokens.

        A cell of the cache that was computed under one of them may be read under any other.
        """
        lengths = [2**i for i in range(LEAST_CONTEXT.bit_length() - 1, context_for(most_tokens).bit_length())]
        left = {n: self._left(n, max_loss, edited=edited) for n in lengths}
        kept = [(each, n) for each in self.points for n in lengths if each.needs(n) <= left[n]]
        return tuple({id(plan): plan for plan in (self._plan(*each) for each in kept)}.values())

    def _plan(self, point: Point, context: int) -> SkipPlan:
        """Return one and the same object for equal plans, because comparing plans compares all their maps."""
        key = id(point), point.window_size(context)
        if key not in self._plans:
            self._plans[key] = point.plan_for(context)
        return self._plans[key]

    @cached_property
    def _plans(self) -> dict[tuple[int, int], SkipPlan]:
        return {}


def context_for(n_tokens: int) -> int:
    """Return the length that a prompt is planned for: the next power of two."""
    return 1 << max(n_tokens - 1, 0).bit_length()


def check_max_loss(max_loss: Any) -> None:
    """Raise a PlanError unless ``max_loss`` is a finite number from 0 on."""
    is_number = isinstance(max_loss, int | float) and not isinstance(max_loss, bool)
    if not (is_number and math.isfinite(max_loss) and max_loss >= 0):
        raise PlanError(f"the promised loss is {max_loss!r}; use nats per token, a number from 0 on, such as 0.05")
