"""Frontiers made by hand, for tests: what each plan loses and how fast it is, is said and not measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from adaskip_cpp import Frontier, SkipPlan
from adaskip_cpp.intervals import Interval
from adaskip_cpp.model.edits import Edits
from adaskip_cpp.model.frontier import EditPoint, Point
from adaskip_cpp.model.quality import Passkeys, Quality


def quality(loss: float) -> Quality:
    """Of answers that lose so many nats per token, known exactly."""
    exact, agreement = Interval(loss, loss, loss, 4), Interval(1 - loss, 1 - loss, 1 - loss, 4)
    return Quality(exact, 0.0, exact, 0.0, agreement, (loss, loss), 4, 400)


def point(plan: SkipPlan, loss: float, speedups: Mapping[int, float], *, judged_at: int = 2048) -> Point:
    """A plan that loses so much in each kind of answers, so many times as fast by length."""
    return Point(judged_at, *[quality(loss)] * 3, Passkeys(2, 2, 2), tuple(speedups.items()), plan)


def edit_points(losses: Sequence[float], moves: Sequence[Edits]) -> tuple[EditPoint, ...]:
    """Edited prompts of 1,024 tokens, moved in these ways, that lose so many nats in answers of each kind."""
    both = zip(losses, moves[: len(losses)], strict=True)
    return tuple(EditPoint(1024, *[quality(loss)] * 3, Passkeys(2, 2, 2), (), each) for loss, each in both)


def frontier(points: Sequence[Point], **more: Any) -> Frontier:
    return Frontier(tuple(points), **more)
