"""Decode sets by the number of tokens decoded in the request, against the NumPy float64 pass."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from oracles.bare_plan import bare_plan
from oracles.reference import ReferenceModel, ReferenceRun, relative_error
from oracles.tiny_families import N_LAYER

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import CompensationError, NativeError
from adaskip_cpp.model.skip_set import SkipSet

TOLERANCE = 5e-6
N_TOKENS = 14
Tiny = Callable[..., Path]
Tokens = Callable[..., list[int]]
Open = Callable[..., Any]
Schedule = tuple[tuple[int, SkipSet], ...]


def skip_set(attention: tuple[int, ...] = (), ffn: tuple[int, ...] = (), scale: float = 1.0) -> SkipSet:
    return SkipPlan.manual(N_LAYER, attention, ffn, scale).prefill


PREFILL = skip_set(attention=(2,))
SETS = (
    skip_set(attention=(2,), ffn=(0,)),
    skip_set(attention=(2,), ffn=(1, 2), scale=0.8),
    skip_set(attention=(0, 2), ffn=(1,), scale=1.2),
)
SCHEDULES: dict[str, Schedule] = {
    "one set": ((0, SETS[0]),),
    "at the first token": ((0, SETS[0]), (1, SETS[1])),
    "thrice": ((0, SETS[0]), (3, SETS[1]), (7, SETS[2])),
    "on consecutive tokens": ((0, SETS[0]), (4, SETS[1]), (5, SETS[2])),
    "from nothing extra": ((0, PREFILL), (6, SETS[2])),
    "after the last token": ((0, SETS[0]), (1000, SETS[2])),
}
THRICE = SCHEDULES["thrice"]


@pytest.fixture(scope="module")
def reference(tiny: Tiny) -> ReferenceModel:
    return ReferenceModel(tiny())


def plan_of(schedule: Schedule) -> SkipPlan:
    return SkipPlan(PREFILL, schedule[0][1], schedule=schedule)


def set_at(schedule: Schedule, n_decoded: int) -> SkipSet:
    """The set of the decoded token with this number, counted from 0."""
    return next(each for start, each in reversed(schedule) if start <= n_decoded)


def expected_logits(
    model: ReferenceModel, schedule: Schedule, prompt: list[int], generated: list[int], run: ReferenceRun | None = None
) -> np.ndarray:
    """Logits of the prompt and of all generated tokens but the last, which is not evaluated."""
    run = run or ReferenceRun(model)
    rows = [run.eval(prompt, PREFILL.skip, PREFILL.scale).logits]
    for i, token in enumerate(generated[:-1]):
        chosen = set_at(schedule, i)
        rows.append(run.eval([token], chosen.skip, chosen.scale).logits)
    return np.concatenate(rows)


def generate(llm: Any, prompt: list[int], n: int = N_TOKENS) -> list[int]:
    return list(itertools.islice(llm.generate(prompt, temp=0.0), n))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_each_decoded_token_runs_under_the_set_of_its_number(
    schedule: Schedule, tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    llm = open_model(tiny())
    llm.set_plan(plan_of(schedule))
    generated = generate(llm, tokens(20))
    expected = expected_logits(reference, schedule, tokens(20), generated)
    assert relative_error(llm.scores[: llm.n_tokens], expected) < TOLERANCE
    assert generated == expected[19:].argmax(axis=1).tolist()


def test_a_graph_is_built_only_where_the_set_changes(tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    # The set at 5 is that at 3 again; those at 8 and 9 follow each other.
    schedule = ((0, SETS[0]), (3, SETS[1]), (5, SETS[1]), (8, SETS[1]), (9, SETS[2]))
    llm = open_model(tiny())
    llm.set_plan(plan_of(schedule))
    steps, built, reused = llm.generate(tokens(20), temp=0.0), [], 0
    for i in range(N_TOKENS):
        before = llm.counters
        next(steps)
        built += [i] * (llm.counters.graphs_built - before.graphs_built)
        reused += llm.counters.graphs_reused - before.graphs_reused
    # Step 0 is the prompt, step 1 decodes token 0.
    assert built == [0, 1, 1 + 3, 1 + 9]
    assert reused == N_TOKENS - 4


def test_a_schedule_costs_no_statistics(tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    llm = open_model(tiny())
    llm.set_plan(plan_of(THRICE))
    generate(llm, tokens(20))
    assert llm.counters.statistics_bytes == 0 and llm.online is None


def test_a_new_request_starts_at_the_first_set_and_reads_no_holes_of_the_last(
    tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    # A chat's next turn: tokens from number 7 on lack the attention of layer 0, which its prompt runs.
    llm = open_model(tiny())
    llm.set_plan(plan_of(THRICE))
    first = generate(llm, tokens(20))
    run = ReferenceRun(reference)
    expected_logits(reference, THRICE, tokens(20), first[:8], run)
    turn = [*tokens(20), *first, *tokens(6, seed=3)[1:]]
    second = generate(llm, turn)
    expected = expected_logits(reference, THRICE, turn[run.n_past :], second, run)
    assert relative_error(llm.scores[len(turn) - 1 : llm.n_tokens], expected[-N_TOKENS:]) < TOLERANCE


@pytest.mark.parametrize("n", [2, 5, 10])
def test_a_plan_set_during_a_request_counts_its_tokens_from_there(
    n: int, tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    ffn_only = ((0, skip_set()), (2, skip_set(ffn=(1,))), (4, skip_set(ffn=(0, 1), scale=1.3)))
    plan, llm, run = SkipPlan(skip_set(), skip_set(), schedule=ffn_only), open_model(tiny()), ReferenceRun(reference)
    llm.set_plan(plan)
    steps, numbers = llm.generate(tokens(20), temp=0.0), [*range(n - 1), *range(6)]
    generated = [next(steps) for _ in range(n)]
    llm.set_plan(None)
    llm.set_plan(plan)
    generated += [next(steps) for _ in range(6)]
    rows = [run.eval(tokens(20)).logits]
    for number, token in zip(numbers, generated, strict=False):
        chosen = set_at(ffn_only, number)
        rows.append(run.eval([token], chosen.skip, chosen.scale).logits)
    assert relative_error(llm.scores[: llm.n_tokens], np.concatenate(rows)) < TOLERANCE


@pytest.mark.parametrize("end", ["close", "drop", "throw"])
def test_a_request_that_ends_early_leaves_no_count(
    end: str, tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    llm = open_model(tiny())
    llm.set_plan(plan_of(THRICE))
    steps = llm.generate(tokens(20, seed=4), temp=0.0)
    for _ in range(10):
        next(steps)
    if end == "close":
        steps.close()
    elif end == "throw":
        with pytest.raises(KeyError):
            steps.throw(KeyError())
    del steps
    generated = generate(llm, tokens(20))
    expected = expected_logits(reference, THRICE, tokens(20), generated)
    assert relative_error(llm.scores[: llm.n_tokens], expected) < TOLERANCE


def test_a_draft_runs_under_the_set_of_its_first_token_and_counts_all_of_them(
    tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    # Drafts of three wrong tokens: each call decodes four and keeps one. Calls begin at 0, 4, 8 ...
    llm = open_model(tiny(), draft_model=lambda ids, **_: np.array([2, 2, 2], dtype=np.intc))
    llm.set_plan(plan_of(THRICE))
    generated, run = generate(llm, tokens(20), 6), ReferenceRun(reference)
    rows = [run.eval(tokens(20), PREFILL.skip, PREFILL.scale).logits]
    for call, token in enumerate(generated[:-1]):
        chosen = set_at(THRICE, 4 * call)
        rows.append(run.eval([token], chosen.skip, chosen.scale).logits)
    assert relative_error(llm.scores[:25], np.concatenate(rows)) < TOLERANCE


A, B = SETS[0], SETS[2]
BAD: dict[str, tuple[tuple[int, Any], ...]] = {
    "none from token 0 on": ((1, A),),
    "a negative start": ((-1, A),),
    "descending": ((0, A), (5, A), (3, A)),
    "two at once": ((0, A), (4, A), (4, B)),
    "an attention that runs again": ((0, B), (4, A)),
    "an attention that runs again later": ((0, A), (2, B), (4, A)),
    "another number of layers": ((0, A), (2, SkipSet.none(4))),
    "a scale of nothing": ((0, A), (2, SimpleNamespace(skip=B.skip, scale=B.scale * 0, bias=None, down=None, up=None))),
}


@pytest.mark.parametrize("schedule", BAD.values(), ids=BAD)
def test_a_wrong_schedule_is_refused_and_the_one_in_force_stays(
    schedule: tuple[tuple[int, Any], ...], tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    llm = open_model(tiny())
    llm.set_plan(plan_of(THRICE))
    with pytest.raises((NativeError, CompensationError)):
        llm._adaskip.set_plan(bare_plan(A, *schedule), 2)
    generated = generate(llm, tokens(20))
    expected = expected_logits(reference, THRICE, tokens(20), generated)
    assert relative_error(llm.scores[: llm.n_tokens], expected) < TOLERANCE
