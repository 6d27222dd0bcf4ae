"""adaskip_cpp.planning.speedup: predictions and refusals, on cost models written by hand."""

import numpy as np
import pytest
from oracles.costs import cost_model
from oracles.profiles import profile

from adaskip_cpp.errors import BudgetError
from adaskip_cpp.planning.request import PlanRequest
from adaskip_cpp.planning.speedup import seconds_saved

# Seconds for a decoded token, a hundredth of a ubatch: 1 for the rest, then attention (1, 2, 4), FFN (2, 2, 2).
COST = cost_model(fixed=100.0, attention=[100, 200, 400], ffn=[200, 200, 200], size=256)
TIMES = np.array([[1, 2], [2, 2], [4, 2]])


def test_what_each_sublayer_saves() -> None:
    np.testing.assert_allclose(seconds_saved(COST, 256, "decode"), TIMES)


def test_a_speed_up_out_of_reach_is_refused_with_what_can_be_reached() -> None:
    similarity = np.full((3, 2), 0.9)
    similarity[2, 0] = np.nan  # the rest and this attention remain: 5 of 14 s, 2.8 times faster
    known = profile(similarity, cost=COST)
    with pytest.raises(BudgetError, match=r"5 sublayers.* 5 s instead of 14 s; ask for a speed-up of at most 2\.80"):
        known.plan(speedup=2.9, context=256, mode="decode")
    assert known.plan(speedup=2.8, context=256, mode="decode").decode.n_skip == 5


@pytest.mark.parametrize("speedup", [0.99, 0, -1, float("nan"), float("inf"), True, "2"])
def test_a_speed_up_that_is_none_is_refused(speedup: float) -> None:
    with pytest.raises(BudgetError, match="from 1 on"):
        PlanRequest(speedup=speedup)
