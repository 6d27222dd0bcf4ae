"""After 10,000 changes of plan a context computes, counts and holds what it did after the first few.

Figures of later rounds are compared with those of an earlier one of the same plans. benchmarks/decay.py measures time.
"""

import sys

import pytest
from oracles.every_plan import every_plan
from oracles.fixtures import Open
from oracles.process_memory import CAN_MEASURE, malloc_bytes
from oracles.tiny_families import N_EMBD, N_LAYER

from adaskip_cpp import AdaSkipLlama, SkipPlan

PLANS = every_plan(N_LAYER, N_EMBD)
N_CHANGES, N_DECODED = 10_000, 4


def change(llm: AdaSkipLlama, plan: SkipPlan | None) -> tuple[list[tuple[int, ...]], bytes]:
    """Change the plan and answer a prompt under it; return the counters of each step, and the last logits."""
    llm.set_plan(plan)
    llm.reset()
    steps, figures, before = llm.generate([1, 5, 6, 7, 8, 9], temp=0.0), [], llm.counters
    for _ in range(1 + N_DECODED):
        next(steps)
        now = llm.counters
        built, reused = now.graphs_built - before.graphs_built, now.graphs_reused - before.graphs_reused
        read = now.statistics_bytes - before.statistics_bytes
        figures.append((now.nodes, now.splits, built, reused, read, now.kv_bytes))
        before = now
    steps.close()
    return figures, llm.scores[llm.n_tokens - 1].tobytes()


@pytest.mark.slow
@pytest.mark.skipif(not CAN_MEASURE, reason="psutil does not measure the heap here")
def test_after_ten_thousand_changes_of_plan_everything_is_as_after_the_first(open_tiny: Open) -> None:
    """What malloc gave out wavers by 6,000 bytes. The smallest leak per change, 24 bytes, would be 240,000."""
    llm = open_tiny(n_batch=3)
    for _ in range(2):
        first = {name: change(llm, plan) for name, plan in PLANS.items()}
    assert len({logits for _, logits in first.values()}) == len(PLANS), "each computes something else"
    held, objects = malloc_bytes(), sys.getallocatedblocks()
    for _ in range(N_CHANGES // len(PLANS)):
        for name, plan in PLANS.items():
            assert change(llm, plan) == first[name], name
    assert malloc_bytes() - held < 2**16
    assert sys.getallocatedblocks() - objects < 100
