"""The contenders of an evaluation: the full model, and a plan for each strategy, budget, mode and compensation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BudgetError, CompensationError, DataError, NotSkippableError
from ..model.plan import MODES, Mode, SkipPlan
from ..planning.compensation import DEFAULT_COMPENSATION
from ..planning.request import PlanRequest
from ..planning.strategies import STRATEGIES, make_plan

if TYPE_CHECKING:
    from ..planning.profile import Profile

__all__ = ["FULL", "Contender", "contenders", "content_hash", "default_budgets", "default_strategies"]

_COMPENSATED = "adaskip"
"""The strategy that has a compensation; the baselines have none."""

_SHARES = (1 / 10, 1 / 5, 1 / 4)


@dataclass(frozen=True)
class Contender:
    """One way to run the model.

    Attributes:
        name: tells it from the others, ``"adaskip-12-e2e-affine"``.
        strategy: name of the strategy, ``"full"`` for the whole model.
        budget: what was asked for: ``"12"`` sublayers, or a speed-up of ``"1.2x"``.
        mode: one of :data:`adaskip_cpp.model.plan.MODES`; None for the whole model.
        compensation: its name, ``"none"`` for strategies that compensate nothing.
        plan: None for the whole model.
    """

    name: str
    strategy: str
    budget: str
    mode: Mode | None
    compensation: str
    plan: SkipPlan | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: what was asked for, and how many sublayers are skipped in each phase."""
        plan = self.plan
        return {
            "name": self.name,
            "strategy": self.strategy,
            "budget": self.budget,
            "mode": self.mode,
            "compensation": self.compensation,
            "n_skip_prefill": 0 if plan is None else plan.prefill.n_skip,
            "n_skip_decode": 0 if plan is None else plan.skipped("decode").n_skip,
            "online": plan is not None and plan.online is not None,
        }


FULL = Contender("full", "full", "0", None, "none", None)
"""The whole model, which all others are measured against."""


def default_strategies() -> tuple[str, ...]:
    """Return the names of all strategies that choose for themselves."""
    return tuple(name for name in STRATEGIES if name != "manual")


def default_budgets(n_layer: int) -> tuple[int, ...]:
    """Return a tenth, a fifth and a quarter of the sublayers of a model, at least 1."""
    return tuple(sorted({max(int(share * 2 * n_layer), 1) for share in _SHARES}))


def contenders(
    profile: Profile,
    *,
    strategies: Sequence[str] = (),
    n_skip: Sequence[int] = (),
    speedups: Sequence[float] = (),
    modes: Sequence[Mode] = MODES,
    compensations: Sequence[str] = (DEFAULT_COMPENSATION,),
    context: int = 1024,
) -> tuple[list[Contender], list[str]]:
    """Return the full model and every plan that the profile gives, and a note on each that it does not.

    A plan that skips the same as another one of its strategy, or nothing, is left out too. The order is that of the
    arguments: strategy, then compensation, then budget, then mode. A tuned plan that the profile holds comes last.

    Args:
        profile: of the model.
        strategies: names; () for all that choose for themselves.
        n_skip: numbers of sublayers; () for :func:`default_budgets`, unless there are speed-ups.
        speedups: predicted speed-ups.
        modes: the paper's modes.
        compensations: names, for the strategy that has one.
        context: tokens of the prompt that speed-ups are predicted for.

    Raises:
        DataError: there is no plan but the full model.
        PlanError: an argument is unknown, or the profile has no cost model to predict speed-ups.
    """
    if not n_skip and not speedups:
        n_skip = default_budgets(profile.n_layer)
    budgets = [(str(n), PlanRequest(n)) for n in n_skip]
    budgets += [(f"{speedup:g}x", PlanRequest(speedup=speedup, context=context)) for speedup in speedups]
    found, notes = [FULL], []
    for strategy in strategies or default_strategies():
        named: Iterable[str] = compensations if strategy == _COMPENSATED else ("none",)
        for compensation in named:
            for budget, request in budgets:
                for mode in modes:
                    parts = (strategy, budget, mode, *((compensation,) if strategy == _COMPENSATED else ()))
                    name = "-".join(parts)
                    try:
                        plan = make_plan(
                            profile, replace(request, compensation=compensation, mode=mode, strategy=strategy)
                        )
                    except (BudgetError, NotSkippableError, CompensationError) as error:
                        notes.append(f"{name} is left out: {error}")
                        continue
                    rivals = (each for each in found if each is FULL or each.strategy == strategy)
                    twin = next((each.name for each in rivals if _alike(each.plan, plan)), None)
                    if twin is not None:
                        notes.append(f"{name} is left out: it skips the same as {twin}")
                    else:
                        found.append(Contender(name, strategy, budget, mode, compensation, plan))
    tuned = profile.tuned_plan() if profile.tuned is not None else None
    if (
        tuned is not None
        and tuned.mode != "manual"
        and tuned.mode in modes
        and not any(_alike(each.plan, tuned) for each in found)
    ):
        found.append(Contender("tuned", "tuned", "tuned", tuned.mode, tuned.compensation, tuned))
    if len(found) == 1:
        raise DataError(
            f"there is nothing to compare with the full model ({'; '.join(notes)}); choose other budgets (--skip)"
        )
    return found, notes


def _alike(a: SkipPlan | None, b: SkipPlan) -> bool:
    if a is None:
        return b.prefill.n_skip == b.decode.n_skip == 0 and not b.schedule and b.online is None
    return (a.mode, a.prefill, a.decode, a.schedule, a.online) == (b.mode, b.prefill, b.decode, b.schedule, b.online)


def content_hash(value: Any) -> str:
    """Return the SHA-256 of a plan or a profile, in hexadecimal: of all that it holds, arrays included.

    Args:
        value: dataclasses, arrays, tuples, lists, dictionaries and plain values, nested as they like.
    """
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        digest.update(type(part).__name__.encode())
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        elif is_dataclass(part):
            add({field.name: getattr(part, field.name) for field in fields(part)})
        elif isinstance(part, Mapping):
            add(sorted(part.items()))
        elif isinstance(part, tuple | list):
            digest.update(str(len(part)).encode())
            for each in part:
                add(each)
        else:
            digest.update(f"{part!r};".encode())

    add(value)
    return digest.hexdigest()
