"""Decode sets by the number of tokens decoded in the request, against the NumPy float64 pass.

test_online.py has changes of plan during a request, and drafts.
"""

import pytest
from oracles.expected import error, generated, history_of
from oracles.fixtures import Open
from oracles.reference import ReferenceModel
from oracles.skip_sets import skip_set
from oracles.tiny_families import tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.skip_set import SkipSet

TOLERANCE = 5e-6
N_TOKENS = 14
Schedule = tuple[tuple[int, SkipSet], ...]

PREFILL = skip_set(attention=(2,))
A, B, C = (
    skip_set(attention=(2,), ffn=(0,)),
    skip_set(attention=(2,), ffn=(1, 2), scale=0.8),
    skip_set(attention=(0, 2), ffn=(1,), scale=1.2),
)
D, E = skip_set(attention=(2,), ffn=(0, 1), seed=1), skip_set(attention=(0, 2), ffn=(1,), scale=1.1, seed=2)
SCHEDULES: dict[str, Schedule] = {
    "one set": ((0, A),),
    "at the first token": ((0, A), (1, B)),
    "thrice": ((0, A), (3, B), (7, C)),
    "on consecutive tokens": ((0, A), (4, B), (5, C)),
    "from nothing extra": ((0, PREFILL), (6, C)),
    "after the last token": ((0, A), (1000, C)),
    "vectors and maps": ((0, A), (3, D), (6, E)),
}


def plan_of(schedule: Schedule) -> SkipPlan:
    return SkipPlan(PREFILL, schedule[0][1], schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_each_decoded_token_runs_under_the_set_of_its_number(
    schedule: Schedule, open_tiny: Open, reference: ReferenceModel
) -> None:
    llm, history = open_tiny(under=plan_of(schedule)), history_of(reference, plan_of(schedule))
    answer = generated(llm, history, tokens(20), N_TOKENS)
    assert error(llm, history) < TOLERANCE
    sets = [next(each for start, each in reversed(schedule) if start <= i) for i in range(N_TOKENS - 1)]
    assert [cell.skip_set for cell in history.cells] == [PREFILL] * 20 + sets
    assert answer == [int(history.trace(index).logits.argmax()) for index in range(19, 19 + N_TOKENS)]


@pytest.mark.parametrize("last", [C, E], ids=["scales", "vectors and maps"])
def test_a_graph_is_built_only_where_the_set_changes(last: SkipSet, open_tiny: Open) -> None:
    # The set at 5 is that at 3 again; those at 8 and 9 follow each other.
    llm = open_tiny(under=plan_of(((0, A), (3, B), (5, B), (8, B), (9, last))))
    steps, built, reused = llm.generate(tokens(20), temp=0.0), [], 0
    for i in range(N_TOKENS):
        before = llm.counters
        next(steps)
        built += [i] * (llm.counters.graphs_built - before.graphs_built)
        reused += llm.counters.graphs_reused - before.graphs_reused
    # Step 0 is the prompt, step 1 decodes token 0.
    assert built == [0, 1, 1 + 3, 1 + 9]
    assert reused == N_TOKENS - 4
    assert llm.counters.statistics_bytes == 0 and llm.online is None


def test_a_new_request_starts_at_the_first_set_and_reads_no_holes_of_the_last(
    open_tiny: Open, reference: ReferenceModel
) -> None:
    # A chat's next turn: tokens from number 7 on lack the attention of layer 0, which its prompt runs.
    plan = plan_of(SCHEDULES["thrice"])
    llm, history = open_tiny(under=plan), history_of(reference, plan)
    turn = [*tokens(20), *generated(llm, history, tokens(20), N_TOKENS), *tokens(6, seed=3)[1:]]
    generated(llm, history, turn, N_TOKENS)
    assert error(llm, history, len(turn) - 1) < TOLERANCE
