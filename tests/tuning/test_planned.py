"""adaskip_cpp.tuning.planned: predicted times, against a cost model that is asked for the same bulk."""

import numpy as np
import pytest
from oracles.costs import cost_model
from oracles.profiles import profile

from adaskip_cpp.model.plan import DEFAULT_REFIT, Bulk
from adaskip_cpp.model.skip_set import SkipSet
from adaskip_cpp.tuning.losses import Candidate
from adaskip_cpp.tuning.planned import Planned


@pytest.mark.parametrize(
    ("share", "context", "size", "tail"),
    [(4, 1024, 252, 64), (4, 2048, 508, 64), (4, 8192, 2044, 256), (16, 2048, 252, 64), (16, 8192, 508, 256)],
)
def test_the_time_of_a_long_prompt_counts_its_longer_windows_and_tail(
    share: int, context: int, size: int, tail: int
) -> None:
    cost = cost_model(0.1, [1.0] * 3, [2.0] * 3, growth=[0.001] * 3)
    candidate = Candidate(ffn=(1,), windowed=(1,), share=share)
    around = Bulk(SkipSet.none(3), windowed=(1,), window_size=size, tail=tail, refit=DEFAULT_REFIT)
    expected = cost.seconds(candidate.skip(3), context, "bulk", around=around)
    assert Planned(profile(np.full((3, 2), 0.9), cost=cost), 2048, 8192).seconds(candidate, context) == expected


@pytest.mark.parametrize(("share", "size"), [(4, 508), (8, 252), (16, 124)])
def test_a_judged_window_is_its_share_of_the_prompt_even_where_a_wider_one_takes_no_longer(
    share: int, size: int
) -> None:
    planned = Planned(profile(np.full((3, 2), 0.9), cost=cost_model(0.1, [1.0] * 3, [2.0] * 3)), 2048, 8192)
    bulk = planned.plan(Candidate(windowed=(1, 2), share=share)).bulk
    assert bulk and bulk.window_size == size
    assert bulk.scaled(2048, 2048).window_size == max(size, 252), "prompts of this length then lose less"
    assert bulk.scaled(8192, 2048).window_size == 8192 // share - 4


def test_sublayers_that_save_no_time_are_never_left_out() -> None:
    """Of the last layer a bulk computes only K and V. Layer 2's attention sees 256 tokens, fewer than any window.

    Layer 3's sees 1,024: an eighth of 2,048 tokens is less.
    """
    limit = np.array([np.inf, np.inf, 256, 1024, np.inf])
    cost = cost_model(0.1, [1.0] * 5, [2.0] * 5, growth=[0.01] * 5, kept=[0.5] * 5, limit=limit)
    known = profile(np.full((5, 2), 0.9), cost=cost, windowable=(0, 1, 4), sliding=(2, 3))
    layers = Planned(known, 2048, 8192).layers
    assert layers == {"attention": (3, 2, 1), "ffn": (3, 2, 1), "windowed": (1, 0), "sliding": (3,)}
