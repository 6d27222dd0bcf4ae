"""Decode sets by the number of tokens decoded in the request, against the NumPy float64 pass."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from oracles.bare_plan import bare_plan
from oracles.expected import error, generated, history_of
from oracles.fixtures import Open
from oracles.reference import ReferenceModel
from oracles.skip_sets import skip_set
from oracles.tiny_families import tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import CompensationError, NativeError
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
SCHEDULES: dict[str, Schedule] = {
    "one set": ((0, A),),
    "at the first token": ((0, A), (1, B)),
    "thrice": ((0, A), (3, B), (7, C)),
    "on consecutive tokens": ((0, A), (4, B), (5, C)),
    "from nothing extra": ((0, PREFILL), (6, C)),
    "after the last token": ((0, A), (1000, C)),
}


def plan_of(schedule: Schedule) -> SkipPlan:
    return SkipPlan(PREFILL, schedule[0][1], schedule=schedule)


THRICE = plan_of(SCHEDULES["thrice"])


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


def test_a_graph_is_built_only_where_the_set_changes(open_tiny: Open) -> None:
    # The set at 5 is that at 3 again; those at 8 and 9 follow each other.
    llm = open_tiny(under=plan_of(((0, A), (3, B), (5, B), (8, B), (9, C))))
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
    llm, history = open_tiny(under=THRICE), history_of(reference, THRICE)
    turn = [*tokens(20), *generated(llm, history, tokens(20), N_TOKENS), *tokens(6, seed=3)[1:]]
    generated(llm, history, turn, N_TOKENS)
    assert error(llm, history, len(turn) - 1) < TOLERANCE


@pytest.mark.parametrize("n", [2, 5, 10])
def test_a_plan_set_during_a_request_counts_its_tokens_from_there(
    n: int, open_tiny: Open, reference: ReferenceModel
) -> None:
    ffn_only = ((0, skip_set()), (2, skip_set(ffn=(1,))), (4, skip_set(ffn=(0, 1), scale=1.3)))
    plan, llm = SkipPlan(skip_set(), skip_set(), schedule=ffn_only), open_tiny()
    history = history_of(reference, plan)
    llm.set_plan(plan)
    steps = llm.generate(tokens(20), temp=0.0)
    answer = [next(steps) for _ in range(n)]
    llm.set_plan(None)
    llm.set_plan(plan)
    answer += [next(steps) for _ in range(6)]
    history.prompt(tokens(20))
    for i, token in enumerate(answer[:-1]):
        if i == n - 1:
            history.begin_request()
        history.decode([token])
    assert error(llm, history) < TOLERANCE


def test_a_draft_runs_under_the_set_of_its_first_token_and_counts_all_of_them(
    open_tiny: Open, reference: ReferenceModel
) -> None:
    # Drafts of three wrong tokens: each call decodes four and keeps one. Calls begin at 0, 4, 8 ...
    llm = open_tiny(draft_model=lambda ids, **_: np.array([2, 2, 2], dtype=np.intc), under=THRICE)
    answer, history = list(itertools.islice(llm.generate(tokens(20), temp=0.0), 6)), history_of(reference, THRICE)
    history.prompt(tokens(20))
    for call, token in enumerate(answer[:-1]):
        history.n_decoded = 4 * call
        history.decode([token])
    assert error(llm, history, 0, 25) < TOLERANCE


BAD: dict[str, tuple[tuple[int, Any], ...]] = {
    "none from token 0 on": ((1, A),),
    "a negative start": ((-1, A),),
    "descending": ((0, A), (5, A), (3, A)),
    "two at once": ((0, A), (4, A), (4, C)),
    "an attention that runs again": ((0, C), (4, A)),
    "an attention that runs again later": ((0, A), (2, C), (4, A)),
    "another number of layers": ((0, A), (2, SkipSet.none(4))),
    "a scale of nothing": ((0, A), (2, SimpleNamespace(skip=C.skip, scale=C.scale * 0, bias=None, down=None, up=None))),
}


@pytest.mark.parametrize("schedule", BAD.values(), ids=BAD)
def test_a_wrong_schedule_is_refused_and_the_one_in_force_stays(
    schedule: tuple[tuple[int, Any], ...], open_tiny: Open, reference: ReferenceModel
) -> None:
    llm, history = open_tiny(under=THRICE), history_of(reference, THRICE)
    with pytest.raises((NativeError, CompensationError)):
        llm._adaskip.set_plan(bare_plan(A, *schedule), 2)
    generated(llm, history, tokens(20), N_TOKENS)
    assert error(llm, history) < TOLERANCE
