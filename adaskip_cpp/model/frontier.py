"""The result of `adaskip-cpp tune` for one model: start with :meth:`Frontier.choose`, which picks a prompt's plan."""

import itertools
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec

from ..errors import PlanError
from ..intervals import Interval
from .arrays import Count
from .cost_model import CostSettings
from .edits import FEW, Edits
from .identity import ModelInfo
from .plan import SkipPlan
from .quality import Passkeys, Quality
from .settings import Settings, Tried

DEFAULT_LOSS = 0.05  # the default promise, in nats per token: the perplexity grows by 5% at most
LEAST_CONTEXT = 512  # tokens: shorter prompts run whole, because they have little bulk and take little time
GROWTH = 1.3  # the assumed factor of a plan's loss if a prompt is twice as long: measured in docs/dev/method.md
_ORDERS_GROWTH = 1.5  # that of runs in a new order
EDITS_SHARE = 0.5  # the share of a promise that edited prompts may lose; plans may lose the rest


@dataclass(frozen=True)
class SpeedUp:
    """A measured speed-up of the first token.

    Attributes:
        of: the compared sides. ``"settings"``: the chosen settings against stock llama-cpp-python with its own.
            ``"plan"``: a plan against the whole model, both with the chosen settings. ``"both"``: plan and settings
            against stock.
        context: tokens of the prompt.
        ratio: how many times as fast, with its interval, from times that were measured in turn.
        seconds: median times to the first token, in seconds: of the second side in ``of``, and of the first.
    """

    of: Literal["settings", "plan", "both"]
    context: int
    ratio: Interval
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Figures:
    """The measured quality and predicted speed of a plan, or of edited prompts.

    Attributes:
        judged_at: tokens of the prompts of the measurement.
        continuation: quality of answers that continue the prompt.
        copying: quality of answers that repeat a part of the prompt from far back.
        retrieval: quality of answers that give a pass key.
        passkeys: pass keys in the prompts.
        speedups: pairs of a prompt's length in tokens and the predicted speed-up of its first token.
    """

    judged_at: Count
    continuation: Quality
    copying: Quality
    retrieval: Quality
    passkeys: Passkeys
    speedups: tuple[tuple[Count, float], ...]

    def harm(self, context: int) -> float:
        """Return the expected loss in the worst promised kind of answers to prompts of ``context`` tokens.

        For prompts twice as long as the judged ones, that of a plan is ``growth`` times as large, and that of runs in a
        new order 1.5 times. That of small edits does not grow.
        """
        return max(each.harm for each in self._promised) * self._growth(context)

    def needs(self, context: int) -> float:
        """Return the smallest promise that is kept, in nats per token, as ``harm``; infinite if a clear key is lost."""
        if self.passkeys.plan < self.passkeys.whole:
            return math.inf
        return max(each.needs for each in self._promised) * self._growth(context)

    @property
    def needs_by_divergence(self) -> tuple[float, ...]:
        """What each kind of answers needs after ``judged_at`` tokens, without mean added losses and lost keys."""
        return tuple(each.needs_by_divergence for each in self._promised)

    @property
    def _promised(self) -> tuple[Quality, ...]:
        return self.continuation, self.copying, self.retrieval

    def _growth(self, context: int) -> float:
        raise NotImplementedError

    def speedup(self, context: int) -> float:
        """Return the predicted speed-up of the first token at the length in ``speedups`` nearest to ``context``."""
        return min(self.speedups, key=lambda each: abs(math.log(each[0] / context)), default=(context, 1.0))[1]


@dataclass(frozen=True)
class Point(Figures):
    """A plan of a frontier, with its figures.

    Attributes:
        plan: a plan of mode ``prompt``. Its windows and its tail are for prompts of ``judged_at`` tokens.
        growth: the assumed factor of its loss if a prompt is twice as long, from 1 to 4. It is less than 1.3 if windows
            lose a part of it, or if some attentions of the model see only the last tokens.
    """

    plan: SkipPlan
    growth: Annotated[float, msgspec.Meta(ge=1, le=4)] = GROWTH

    def _growth(self, context: int) -> float:
        return growth(context / self.judged_at, self.growth)

    def beats(self, other: "Point") -> bool:
        """Whether this plan keeps every promise that the other one keeps, is nowhere slower, and somewhere faster."""
        is_faster = self.speedups != other.speedups and all(self.speedup(n) >= speed for n, speed in other.speedups)
        return is_faster and self.needs(self.judged_at) <= other.needs(other.judged_at)

    def plan_for(self, context: int) -> SkipPlan:
        """Return the plan scaled to prompts of ``context`` tokens (``Bulk.scaled``): one object for equal plans."""
        if self.plan.bulk is None:
            return self.plan
        bulk = self.plan.bulk.scaled(context, self.judged_at)
        return self._plans.setdefault((bulk.window_size, bulk.tail), replace(self.plan, bulk=bulk))

    @cached_property
    def _plans(self) -> dict[tuple[int, int], SkipPlan]:
        """Plans by their windows and tails, because comparing plans compares all their maps."""
        bulk = self.plan.bulk
        return {} if bulk is None else {(bulk.window_size, bulk.tail): self.plan}


@dataclass(frozen=True)
class EditPoint(Figures):
    """The figures of edited prompts, in which the whole model reads only the new tokens.

    Its pass keys must be found, but promises leave their divergence out: an edit changed a third of them, and others
    lie where runs were cut. In longer prompts, small edits lose no more, because they change a smaller part
    (docs/dev/method.md).

    Attributes:
        edits: how runs were moved; its ``most_moves`` are the moves that were measured.
    """

    edits: Edits

    @property
    def _promised(self) -> tuple[Quality, ...]:
        return self.continuation, self.copying

    def _growth(self, context: int) -> float:
        return 1.0 if self.edits.most_moves <= FEW else growth(context / self.judged_at, _ORDERS_GROWTH)


@dataclass(frozen=True)
class Frontier:
    """The result of ``tune`` for one model on one machine: plans of growing speed, with their losses.

    Attributes:
        points: plans of growing speed, of mode ``prompt`` (else a PlanError); () if no sublayer can be skipped.
        settings: the settings with which the whole model is fastest.
        machine: the machine of the measurements.
        tried: all settings that were timed.
        speeds: measured speed-ups, with the plan that keeps the default promise.
        n_read: tokens that calibration and tuning read, except to time sublayers and the result.
        about: texts and release, for people to read.
        edits: figures of edited prompts, by growing numbers of moves; () if tokens cannot be moved.
        model: the model that was tuned; None for that of the plans.

    Examples:
        >>> frontier = load_plan("model.adaskip-plan.json").frontier
        >>> for point in frontier.points:
        ...     print(point.plan.skipped("bulk").n_skip, point.speedup(8192), point.needs(8192))
        >>> llm = AdaSkipLlama("model.gguf", plan=frontier, max_loss=0.02)
    """

    points: tuple[Point, ...]
    settings: Settings = field(default_factory=Settings)
    machine: CostSettings | None = None
    tried: tuple[Tried, ...] = ()
    speeds: tuple[SpeedUp, ...] = ()
    n_read: int = 0
    about: dict[str, str | int | float | None] = field(default_factory=dict)
    edits: tuple[EditPoint, ...] = ()
    model: ModelInfo | None = None

    def __post_init__(self) -> None:
        if any(each.plan.bulk is None for each in self.points):
            raise PlanError("a point of a frontier skips in the bulk of prompts alone; tune again")

    @property
    def made_for(self) -> ModelInfo | None:
        """The model of all figures, also of those of edited prompts, which have no plan; None for any model."""
        return self.points[0].plan.model if self.model is None and self.points else self.model

    def choose(self, n_tokens: int, max_loss: float = DEFAULT_LOSS, *, edited: bool = False) -> SkipPlan | None:
        """Return the fastest plan that keeps a promise for a prompt; None for the whole model.

        Args:
            n_tokens: tokens of the prompt. Below 512 the whole model runs.
            max_loss: the promise, in nats per token; a PlanError if it is not a number from 0 on.
            edited: whether runs of an earlier prompt may be moved. The plan then has the rest of the promise.
        """
        check_max_loss(max_loss)
        point = self.point(n_tokens, max_loss, edited=edited)
        return None if point is None else point.plan_for(context_for(n_tokens))

    def point(self, n_tokens: int, max_loss: float, *, edited: bool = False) -> Point | None:
        """Return the point whose plan ``choose`` returns for the same arguments; None for the whole model."""
        if n_tokens < LEAST_CONTEXT:
            return None
        context, left = context_for(n_tokens), self.left(n_tokens, max_loss, edited=edited)
        kept = [each for each in self.points if each.needs(context) <= left and each.speedup(context) > 1.0]
        return max(kept, key=lambda each: each.speedup(context), default=None)

    def edit_point(self, n_tokens: int, max_loss: float) -> EditPoint | None:
        """Return the point with the most moves that keep half of a promise, ``EDITS_SHARE``; None if none does."""
        context, most = context_for(n_tokens), EDITS_SHARE * max_loss
        kept = [*itertools.takewhile(lambda each: each.needs(context) <= most, self.edits)]
        return kept[-1] if kept and n_tokens >= LEAST_CONTEXT else None

    def left(self, n_tokens: int, max_loss: float, *, edited: bool) -> float:
        """Return the part of a promise that is left for a plan, in nats per token. See ``choose`` for the arguments."""
        point = self.edit_point(n_tokens, max_loss) if edited else None
        return max_loss if point is None else max_loss - point.needs(context_for(n_tokens))

    def readable(self, max_loss: float, most_tokens: int, *, edited: bool = False) -> tuple[SkipPlan, ...]:
        """Return all plans that keep a promise up to ``most_tokens``. Each may read the cached tokens of the others."""
        left = {n: self.left(n, max_loss, edited=edited) for n in contexts(context_for(most_tokens))}
        kept = [(each, n) for each in self.points for n in left if each.needs(n) <= left[n]]
        return tuple({id(plan): plan for plan in (each.plan_for(n) for each, n in kept)}.values())


def growth(ratio: float, doubled: float) -> float:
    """Return the assumed factor of a loss if a prompt is ``ratio`` times as long; ``doubled`` is that for twice."""
    return float(doubled ** max(math.log2(ratio), 0.0))


def context_for(n_tokens: int) -> int:
    """Return the length that a prompt is planned for, 2^n or 3/4 of it: a growing chat keeps its plan for long."""
    power = 1 << max(n_tokens - 1, 0).bit_length()
    return 3 * power // 4 if n_tokens <= 3 * power // 4 and power >= 4 else power


def contexts(most: int) -> list[int]:
    """Return all lengths from 512 to ``most`` tokens that prompts are planned for."""
    found = [context_for(LEAST_CONTEXT)]
    while found[-1] < most:
        found.append(context_for(found[-1] + 1))
    return [n for n in found if n <= most]


def check_max_loss(max_loss: Any) -> None:
    """Raise a PlanError unless ``max_loss`` is a finite number from 0 on."""
    is_number = isinstance(max_loss, int | float) and not isinstance(max_loss, bool)
    if not (is_number and math.isfinite(max_loss) and max_loss >= 0):
        raise PlanError(f"the promised loss is {max_loss!r}; use nats per token, a number from 0 on, such as 0.05")
