"""adaskip_cpp.tuning.planned: predicted times, against a cost model that is asked for the same bulk."""

import numpy as np
import pytest
from oracles.costs import cost_model
from oracles.profiles import profile

from adaskip_cpp.model.plan import DEFAULT_REFIT, Bulk
from adaskip_cpp.model.skip_set import SkipSet
from adaskip_cpp.tuning.losses import Candidate
from adaskip_cpp.tuning.planned import Planned


@pytest.mark.parametrize(("context", "size", "tail"), [(1024, 252, 64), (2048, 508, 64), (8192, 2044, 256)])
def test_the_time_of_a_long_prompt_counts_its_longer_windows_and_tail(context: int, size: int, tail: int) -> None:
    cost = cost_model(0.1, [1.0] * 3, [2.0] * 3, growth=[0.001] * 3)
    candidate = Candidate(ffn=(1,), windowed=(1,), share=4)
    around = Bulk(SkipSet.none(3), windowed=(1,), window_size=size, tail=tail, refit=DEFAULT_REFIT)
    expected = cost.seconds(candidate.skip(3), context, "bulk", around=around)
    assert Planned(profile(np.full((3, 2), 0.9), cost=cost), 2048).seconds(candidate, context) == expected
