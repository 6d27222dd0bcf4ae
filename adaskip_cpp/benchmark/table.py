"""Makes the table of a benchmark from its times: medians, and ratios pair by pair. Start at :func:`table`."""

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


@dataclass
class BenchTimes:
    """The times of all runs."""

    contenders: Sequence[str]
    times: dict[tuple[str, int], list[RequestTime]] = field(default_factory=dict)  # by contender and context, in rounds
    settle: Mapping[str, int] = field(default_factory=dict)  # by contender, uncounted first tokens, if not N_SETTLE

    def seconds(self, name: str, context: int, phase: Phase) -> list[float]:
        n_rounds = min(len(self.times.get((each, context), ())) for each in self.contenders)
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
    """

    contender: str
    context: int
    phase: Phase
    n_rounds: int
    median_s: float
    low_s: float
    high_s: float
    against: Mapping[str, Interval]

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
        rows.append(Row(name, context, phase, len(own), median, low, high, against))
    return rows


def verdict(interval: Interval) -> str:
    """Say what a ratio of speeds proves: how many times as fast, or no real difference."""
    if not math.isfinite(interval.low) or not math.isfinite(interval.high):
        return f"{interval.value:.2f} x as fast, measured once"
    digits = 3 if abs(interval.value - 1) < 0.1 else 2
    ends = f"({interval.low:.{digits}f} to {interval.high:.{digits}f})"
    return f"{interval.value:.{digits}f} x as fast {ends}" if interval.excludes() else f"no real difference {ends}"
