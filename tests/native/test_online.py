"""Sets that change in decode, the online stage and schedules, against ``OnlineReference`` and the NumPy float64 pass.

Tolerances are those of test_skip.py (logits) and test_statistics.py (figures): float32 rounding.
"""

import itertools
from typing import Any

import numpy as np
import pytest
from oracles.expected import error, generated, history_of
from oracles.fixtures import Open
from oracles.reference import OnlineReference, ReferenceModel, relative_error
from oracles.sequence_oracle import History
from oracles.skip_sets import skip_set
from oracles.tiny_families import N_EMBD, N_LAYER, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.plan import OnlineStage
from adaskip_cpp.model.skip_set import SkipSet

WINDOW = 6
N_TOKENS = 16  # generated per request, more than twice the window
TOLERANCE = 5e-6

FIXED = skip_set((1,), (2,), 0.9)  # the FFNs of layers 0 and 1 are observed
NONE = SkipSet.none(N_LAYER)
Schedule = tuple[tuple[int, SkipSet], ...]

PREFILL = skip_set(attention=(2,))
A, B, C = (
    skip_set(attention=(2,), ffn=(0,)),
    skip_set(attention=(2,), ffn=(1, 2), scale=0.8),
    skip_set(attention=(0, 2), ffn=(1,), scale=1.2),
)
D, E = skip_set(attention=(2,), ffn=(0, 1), seed=1), skip_set(attention=(0, 2), ffn=(1,), scale=1.1, seed=2)
SCHEDULES: dict[str, Schedule] = {
    "at the first token": ((0, A), (1, B)),
    "on consecutive tokens": ((0, A), (4, B), (5, C)),
    "from nothing extra": ((0, PREFILL), (6, C)),
    "after the last token": ((0, A), (1000, C)),
    "vectors and maps": ((0, A), (3, D), (6, E)),
}


def scheduled(*steps: tuple[int, SkipSet]) -> SkipPlan:
    return SkipPlan(PREFILL, steps[0][1], schedule=steps)


def online_plan(
    threshold: float, scale: Any = "paper", *, window: int = WINDOW, fixed: SkipSet = FIXED, prefill: SkipSet = FIXED
) -> SkipPlan:
    return SkipPlan(prefill, fixed, online=OnlineStage(window=window, threshold=threshold, scale=scale))


def generate(llm: Any, prompt: list[int], n: int = N_TOKENS) -> list[int]:
    return list(itertools.islice(llm.generate(prompt, temp=0.0), n))


def assert_learned(llm: Any, stage: OnlineReference) -> None:
    """``llm.online`` is what the oracle learned. Figures: 1e-7 is measured."""
    result = llm.online
    assert (result.n_tokens, result.ffn) == (stage.n_tokens, stage.ffn)
    np.testing.assert_allclose(result.similarity, stage.similarity, rtol=0, atol=2e-6, equal_nan=True)
    np.testing.assert_allclose(result.scale, stage.ratio, rtol=0, atol=2e-5, equal_nan=True)


def check(llm: Any, history: History, prompt: list[int], n: int = N_TOKENS) -> list[int]:
    """The answer to a prompt: its tokens, the logits of every position, and the online stage are the reference's."""
    answer = generated(llm, history, prompt, n)
    assert answer == [int(history.trace(len(prompt) + i).logits.argmax()) for i in range(-1, n - 1)]
    assert_learned(llm, history.stage)
    assert error(llm, history) < TOLERANCE
    return answer


@pytest.fixture(scope="module")
def threshold(reference: ReferenceModel) -> float:
    """Between the similarities of the two FFNs outside the fixed set."""
    history = history_of(reference, online_plan(2.0))
    history.prompt(tokens(20))
    for _ in range(WINDOW):
        history.decode([int(history.trace().logits.argmax())])
    low, high = sorted(history.stage.similarity[[0, 1]])
    assert high - low > 1e-3
    return float(low + high) / 2


CASES: dict[str, dict[str, Any]] = {
    **{f"scale {scale}": {"scale": scale} for scale in ("none", "paper", "median")},
    # 16 generated tokens are 15 decoded ones: the window of 16 stays open, that of 15 is full with the last.
    **{f"a window of {n}": {"window": n} for n in (1, 2, 15, 16)},
    "the whole model reads the prompt": {"prefill": NONE},
    "nothing is fixed": {"fixed": NONE, "prefill": NONE},
    "every FFN is added and no attention": {"threshold": -1.0},
    "every FFN is added to vectors and maps": {"threshold": -1.0, "fixed": skip_set((1,), (2,), 0.9, seed=1)},
}


@pytest.mark.parametrize("case", CASES)
def test_after_the_window_ffns_are_added_and_each_request_begins_anew(case: str, threshold: float, both: Open) -> None:
    llm, history = both(online_plan(**{"threshold": threshold, **CASES[case]}))
    added = []
    for seed in (0, 1, 2, 3, 0) if "scale" in case else (0,):
        check(llm, history, tokens(20, seed))
        added.append(llm.online.ffn)
    assert "scale" not in case or len(added[0]) == 1, "one is added, the other is not"
    assert "every" not in case or added == [(0, 1)]


def test_an_ffn_exactly_at_the_threshold_is_skipped(open_tiny: Open) -> None:
    # The same tokens give the same bits, so a similarity of the first run is the threshold of the next two.
    llm = open_tiny(under=online_plan(2.0))
    generate(llm, tokens(20))
    similarity = llm.online.similarity
    highest = int(np.nanargmax(similarity))
    for limit, added in ((similarity[highest], (highest,)), (np.nextafter(similarity[highest], 2.0), ())):
        llm.reset()
        llm.set_plan(online_plan(float(limit)))
        generate(llm, tokens(20))
        assert llm.online.similarity[highest] == similarity[highest]
        assert llm.online.ffn == added


@pytest.mark.parametrize("name", ["gemma3", "qwen3moe", "phi3", "falcon", "gptneox-parallel"])
def test_on_every_architecture_ffns_are_observed_beside_a_skipped_attention(name: str, open_tiny: Open) -> None:
    # Parallel blocks share a junction. The oracle is the model whose attention 1 adds nothing, with nothing skipped.
    llm, zeroed = open_tiny(name), open_tiny(name, zero=[(1, "attention")])
    fixed = SkipPlan.manual(llm.n_layer, attention=[1]).decode
    stage, seen = OnlineStage(window=WINDOW, threshold=2.0, scale="median"), []
    llm.set_plan(SkipPlan(fixed, fixed, online=stage))
    generated = generate(llm, tokens(20))
    with zeroed.collect_statistics(seen.append, keep_logits=True):
        assert generate(zeroed, tokens(20), WINDOW + 1) == generated[: WINDOW + 1]
    dot, u_sq, v_sq = (
        np.concatenate([getattr(batch, part)[:, 1] for batch in seen[1:]], axis=-1, dtype=np.float64)
        for part in ("dot", "u_sq", "v_sq")
    )
    np.testing.assert_allclose(llm.online.similarity, (dot / np.sqrt(u_sq * v_sq)).mean(axis=-1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(llm.online.scale, np.median(np.sqrt(v_sq / u_sq), axis=-1), rtol=1e-6)


def counted(llm: Any) -> tuple[list[int], int, list[int]]:
    """The steps of a request that built a graph, how many used the one before, and the bytes that each step copied."""
    steps, built, reused, copied = llm.generate(tokens(20), temp=0.0), [], 0, []
    for i in range(N_TOKENS):
        before = llm.counters
        next(steps)
        built += [i] * (llm.counters.graphs_built - before.graphs_built)
        reused += llm.counters.graphs_reused - before.graphs_reused
        copied.append(llm.counters.statistics_bytes - before.statistics_bytes)
    return built, reused, copied


@pytest.mark.parametrize("limit", [-1.0, 2.0], ids=["all added", "none added"])
def test_one_graph_is_built_at_the_switch_and_then_nothing_is_copied(limit: float, open_tiny: Open) -> None:
    llm, by_hand = open_tiny(under=online_plan(limit)), open_tiny()
    built, reused, copied = counted(llm)
    # The prompt, the first token of the window, and the first token after it.
    assert built == [0, 1, 1 + WINDOW] and reused == N_TOKENS - 3
    # Inputs and outputs of two FFNs.
    assert copied == [0] + [2 * 2 * 4 * N_EMBD] * WINDOW + [0] * (N_TOKENS - 1 - WINDOW)
    # No statistics are left in the graph: it has as many nodes as that of a plan made by hand with the same set.
    added = [False, limit < 0]
    by_hand.set_plan(SkipPlan(FIXED, SkipSet(FIXED.skip | added, np.where(FIXED.skip, FIXED.scale, 1.25))))
    generate(by_hand, tokens(20))
    assert llm.counters.nodes == by_hand.counters.nodes


@pytest.mark.parametrize("last", [C, E], ids=["scales", "vectors and maps"])
def test_a_graph_is_built_only_where_a_schedule_changes_the_set(last: SkipSet, open_tiny: Open) -> None:
    # The set at 5 is that at 3 again; those at 8 and 9 follow each other. Step 0 is the prompt, step 1 decodes token 0.
    llm = open_tiny(under=scheduled((0, A), (3, B), (5, B), (8, B), (9, last)))
    assert counted(llm) == ([0, 1, 1 + 3, 1 + 9], N_TOKENS - 4, [0] * N_TOKENS)
    assert llm.online is None


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_each_decoded_token_runs_under_the_set_of_its_number(schedule: Schedule, both: Open) -> None:
    llm, history = both(scheduled(*schedule))
    answer = generated(llm, history, tokens(20), N_TOKENS)
    assert error(llm, history) < TOLERANCE
    sets = [next(each for start, each in reversed(schedule) if start <= i) for i in range(N_TOKENS - 1)]
    assert [cell.skip_set for cell in history.cells] == [PREFILL] * 20 + sets
    assert answer == [int(history.trace(index).logits.argmax()) for index in range(19, 19 + N_TOKENS)]


@pytest.mark.parametrize("window", [4, 6, 9, None], ids=str)
@pytest.mark.parametrize("n_right", [0, 1, 3], ids=["wrong", "partly right", "right"])
def test_a_draft_runs_under_the_set_of_its_first_token_and_counts_all_of_them(
    n_right: int, window: int | None, threshold: float, both: Open
) -> None:
    # Drafts of three tokens make calls of four: windows of 6 and 9 end inside one. The first tokens of a draft are
    # those that follow under the fixed set alone, as in the window.
    plan = scheduled((0, A), (2, B), (5, C)) if window is None else online_plan(threshold, window=window)
    truth = generated(*both(SkipPlan(plan.prefill, plan.decode)), tokens(20), 40)

    def draft(ids: list[int]) -> list[int]:
        done = len(ids) - 20
        wrong = [(token + 1) % 200 + 3 for token in truth[done : done + 3]]
        return [*truth[done : done + n_right], *wrong[n_right:]]

    llm, history = both(plan, draft_model=lambda ids, **_: np.array(draft(ids.tolist()), dtype=np.intc))
    history.draft = draft
    expected = history.generate(tokens(20))
    index = next(expected)
    for token in itertools.islice(llm.generate(tokens(20), temp=0.0), N_TOKENS):
        logits = history.trace(index).logits
        assert token == logits.argmax() and relative_error(llm.scores[index : index + 1], logits) < TOLERANCE
        if window is not None:
            assert_learned(llm, history.stage)
        index = expected.send(token)
    assert window is None or llm.online.n_tokens == window


def test_what_was_learned_can_be_read_until_the_next_request(threshold: float, both: Open) -> None:
    llm, history = both(online_plan(threshold))
    check(llm, history, tokens(20))
    llm.reset()
    assert_learned(llm, history.stage)
    steps = llm.generate(tokens(20), temp=0.0)
    assert_learned(llm, history.stage)  # a generator does nothing before its first step
    next(steps)
    assert llm.online.n_tokens == 0
