"""Strategies: each chooses, from a profile and a budget, which sublayers to skip.

A strategy is a function registered under its name; :meth:`adaskip_cpp.Profile.plan` and the command line read
:data:`STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import PlanError

if TYPE_CHECKING:
    from .profile import Profile

__all__ = ["STRATEGIES", "Strategy", "adaskip", "get_strategy", "strategy"]

Strategy: TypeAlias = "Callable[[Profile, int], npt.NDArray[np.bool_]]"
"""From a profile and a number of sublayers to skip flags, bool ``[n_layer, 2]``. The budget has been checked."""

STRATEGIES: dict[str, Strategy] = {}


def strategy(function: Strategy) -> Strategy:
    """Register a strategy under its function's name."""
    STRATEGIES[function.__name__] = function
    return function


def get_strategy(name: str) -> Strategy:
    """Look a strategy up.

    Raises:
        PlanError: there is none of this name.
    """
    try:
        return STRATEGIES[name]
    except KeyError:
        raise PlanError(f"unknown strategy {name!r}; use one of: {', '.join(sorted(STRATEGIES))}") from None


@strategy
def adaskip(profile: Profile, n_skip: int) -> npt.NDArray[np.bool_]:
    """The paper's offline rule: all sublayers ranked together by mean IO similarity, the ``n_skip`` highest skipped.

    Ties: attention before FFN, then the lower layer first. Sublayers without a similarity are never chosen.
    """
    similarity = profile.similarity
    layer, kind = np.indices(similarity.shape)
    # lexsort's last key is the first criterion; NaN sorts behind every number.
    order = np.lexsort((layer.ravel(), kind.ravel(), -similarity.ravel()))
    skip = np.zeros(similarity.size, np.bool_)
    skip[order[:n_skip]] = True
    return skip.reshape(similarity.shape)
