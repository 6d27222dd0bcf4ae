"""Ways to compensate a skipped sublayer, ``v := s * u``: where the scalar ``s`` comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import CompensationError

if TYPE_CHECKING:
    from .profile import Profile

__all__ = ["COMPENSATIONS", "get_compensation"]

COMPENSATIONS: dict[str, Callable[[Profile], npt.NDArray[np.float64]]] = {
    # The paper's: the ratio of Frobenius norms. One token of huge norm, as the first one of many models, dominates it.
    "paper": lambda profile: profile.norm_ratio,
    "none": lambda profile: np.ones_like(profile.norm_ratio),
    "median": lambda profile: profile.median_ratio,
}
"""From a profile to ``s`` per sublayer, float64 ``[n_layer, 2]``."""


def get_compensation(name: str) -> Callable[[Profile], npt.NDArray[np.float64]]:
    """Look a compensation up.

    Raises:
        CompensationError: there is none of this name.
    """
    try:
        return COMPENSATIONS[name]
    except (KeyError, TypeError):
        raise CompensationError(f"unknown compensation {name!r}; use one of: {', '.join(COMPENSATIONS)}") from None
