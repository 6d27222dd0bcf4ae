"""Makes the table of a benchmark from its times: medians, ratios pair by pair, and ideals. Start at :func:`table`."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec import to_builtins

from ..intervals import Interval, ratio_interval
from ..measuring.timing import N_SETTLE, RequestTime
from ..model.plan import TIMED, Phase

STOCK, NO_PLAN = "stock", "no plan"  # contenders to compare with: stock llama-cpp-python, and ours with no plan
REST, KEPT = "nothing that can be skipped", "nothing but K and V of what can be skipped"  # runs for the ideals


@dataclass
class BenchTimes:
    """The times of all runs.

    A plan's skipped sublayers take the time of a run with them alone, minus that of :data:`REST`, or for a bulk of
    :data:`KEPT`. ``parts`` names these two runs by contender and phase. A few sublayers alone may fit into a cache that
    the whole model does not fit into. Then they take less time than among the others, so skipping them can bring more
    than 100% of this ideal.
    """

    contenders: Sequence[str]
    times: dict[tuple[str, int], list[RequestTime]] = field(default_factory=dict)  # by run and context, in rounds
    parts: Mapping[str, Mapping[Phase, tuple[str, str]]] = field(default_factory=dict)
    settle: Mapping[str, int] = field(default_factory=dict)  # by contender, uncounted first tokens, if not N_SETTLE

    def seconds(self, name: str, context: int, phase: Phase) -> list[float]:
        parts = {each for parts in self.parts.values() for pair in parts.values() for each in pair}
        n_rounds = min(len(self.times.get((each, context), ())) for each in {*self.contenders, *parts})
        runs = self.times.get((name, context), [])[:n_rounds]
        if phase == "prefill":
            return [run.first_token_s for run in runs]
        return [run.per_token_s(self.settle.get(name, N_SETTLE)) for run in runs]


@dataclass(frozen=True)
class Row:
    """The speed of one contender at one context in one phase.

    Attributes:
        contender: ``"stock"``, ``"no plan"`` or the name of a plan.
        context: tokens of the prompt.
        phase: ``"prefill"``, the time to the first token, or ``"decode"``, the time per token of the answer.
        n_rounds: number of complete rounds.
        median_s: median time, in seconds.
        low_s: lower quartile, in seconds.
        high_s: upper quartile, in seconds.
        against: how many times as fast as ``"stock"`` and as ``"no plan"``, if these were measured.
        ideal: how many times as fast as ``"no plan"`` it would be without the time of the skipped sublayers, which are
            timed separately; None if they were not.
        of_ideal: the measured ratio to ``"no plan"``, divided by the ideal.
    """

    contender: str
    context: int
    phase: Phase
    n_rounds: int
    median_s: float
    low_s: float
    high_s: float
    against: Mapping[str, Interval]
    ideal: Interval | None = None
    of_ideal: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        data: dict[str, Any] = to_builtins(self)
        against = data.pop("against")
        for name, each in self.against.items():
            against[name] |= {"real": each.excludes(), "verdict": verdict(each)}
        return {**data, "speed_against": against}


def table(measured: BenchTimes) -> list[Row]:
    contexts = sorted({context for _, context in measured.times})
    rows = []
    for phase, context, name in itertools.product(TIMED, contexts, measured.contenders):
        own = measured.seconds(name, context, phase)
        if not own or not all(map(math.isfinite, own)):
            continue
        low, median, high = np.quantile(own, (0.25, 0.5, 0.75)).tolist()
        others = {other: measured.seconds(other, context, phase) for other in (STOCK, NO_PLAN) if other != name}
        against = {other: ratio_interval(theirs, own) for other, theirs in others.items() if theirs}
        ideal = _ideal(measured, name, context, phase, own)
        rows.append(Row(name, context, phase, len(own), median, low, high, against, *ideal))
    return rows


def verdict(interval: Interval) -> str:
    """Say what a ratio of speeds proves: how many times as fast, or no real difference."""
    if not math.isfinite(interval.low) or not math.isfinite(interval.high):
        return f"{interval.value:.2f} x as fast, measured once"
    digits = 3 if abs(interval.value - 1) < 0.1 else 2
    ends = f"({interval.low:.{digits}f} to {interval.high:.{digits}f})"
    return f"{interval.value:.{digits}f} x as fast {ends}" if interval.excludes() else f"no real difference {ends}"


def _ideal(measured: BenchTimes, name: str, context: int, phase: Phase, own: list[float]) -> tuple[Interval, ...]:
    """Return the ideal and the share of it that was reached; () if there is none, or noise hides it."""
    pair = measured.parts.get(name, {}).get(phase)
    if pair is None:
        return ()
    full, only, rest = (np.array(measured.seconds(each, context, phase)) for each in (NO_PLAN, *pair))
    least = full - (only - rest)
    return (ratio_interval(full, least), ratio_interval(least, own)) if len(least) and (least > 0).all() else ()
