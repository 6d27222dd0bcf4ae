"""Online importance learning in decode, against ``OnlineReference`` on the NumPy float64 pass.

The oracle of a request takes nothing from the code under test but the tokens, which must be those that it finds most
likely: similarities, ratios, chosen FFNs and logits are its own. Tolerances are those of test_skip.py (logits) and
test_statistics.py (figures): float32 rounding.
"""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from oracles.expected import error, generated, history_of
from oracles.fixtures import Open
from oracles.reference import OnlineReference, ReferenceModel, relative_error
from oracles.sequence_oracle import History
from oracles.skip_sets import same, skip_set
from oracles.tiny_families import N_EMBD, N_LAYER, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.plan import OnlineStage
from adaskip_cpp.model.skip_set import SkipSet

WINDOW = 6
N_TOKENS = 16  # generated per request, more than twice the window
TOLERANCE = 5e-6

FIXED = skip_set((1,), (2,), 0.9)  # the FFNs of layers 0 and 1 are observed
NONE = SkipSet.none(N_LAYER)
MORE, MOST = skip_set((1,), (1, 2), 0.8), skip_set((0, 1), (0, 2), 1.3)
SCHEDULE = same(FIXED, schedule=((0, FIXED), (2, MORE), (5, MOST)))


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


# -- what is learned, and what follows from it -----------------------------------------------------------------------


@pytest.mark.parametrize("n_decoded", range(WINDOW))
def test_until_the_window_is_full_the_ffns_outside_the_fixed_set_are_observed_and_none_is_added(
    n_decoded: int, both: Open
) -> None:
    # The first generated token is the first decoded one, but only the next step evaluates it.
    llm, history = both(online_plan(-1.0))
    check(llm, history, tokens(20), n_decoded + 1)
    assert llm.online.n_tokens == n_decoded and llm.online.ffn == ()
    assert np.isnan(llm.online.similarity).tolist() == [n_decoded == 0, n_decoded == 0, True]


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
def test_then_the_ffns_that_reach_the_threshold_are_skipped_with_their_own_ratio_and_each_request_begins_anew(
    case: str, threshold: float, both: Open
) -> None:
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


@pytest.mark.parametrize("name", ["gemma3", "qwen3moe", "falcon", "phi3", "gptneox-parallel"])
def test_the_stage_works_on_every_architecture(name: str, open_tiny: Open) -> None:
    # Figures per token from collect_statistics of a second model (test_statistics.py compares those with NumPy), put
    # together here; afterwards the logits are those of a third model, which is given the chosen set by hand.
    llm, watched, by_hand = (open_tiny(name) for _ in range(3))
    nothing = SkipSet.none(llm.n_layer)
    llm.set_plan(SkipPlan(nothing, nothing, online=OnlineStage(window=WINDOW, threshold=-1.0, scale="median")))
    generated, seen = generate(llm, tokens(20)), []
    with watched.collect_statistics(seen.append, keep_logits=True):
        assert generate(watched, tokens(20), WINDOW + 1) == generated[: WINDOW + 1]
    dot, u_sq, v_sq = (
        np.concatenate([getattr(batch, part)[:, 1] for batch in seen[1:]], axis=-1, dtype=np.float64)
        for part in ("dot", "u_sq", "v_sq")
    )
    np.testing.assert_allclose(llm.online.similarity, (dot / np.sqrt(u_sq * v_sq)).mean(axis=-1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(llm.online.scale, np.median(np.sqrt(v_sq / u_sq), axis=-1), rtol=1e-6)

    by_hand.eval(tokens(20))
    chosen = SkipPlan.manual(llm.n_layer, ffn=range(llm.n_layer), scale=np.stack([llm.online.scale] * 2, axis=1))
    for token in generated[:WINDOW]:
        by_hand.eval([token])
    by_hand.set_plan(chosen)
    for token in generated[WINDOW:-1]:
        by_hand.eval([token])
    np.testing.assert_allclose(llm.scores[: llm.n_tokens], by_hand.scores[: by_hand.n_tokens], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["falcon", "gptneox-parallel"])
def test_an_ffn_beside_a_skipped_attention_is_observed(name: str, open_tiny: Open) -> None:
    # Parallel blocks share a junction. The oracle is the model whose attention 1 adds nothing, with nothing skipped.
    llm, zeroed = open_tiny(name), open_tiny(name, zero=[(1, "attention")])
    nothing, fixed = SkipSet.none(llm.n_layer), SkipPlan.manual(llm.n_layer, attention=[1]).decode
    stage = OnlineStage(window=WINDOW, threshold=2.0, scale="paper")
    llm.set_plan(SkipPlan(fixed, fixed, online=stage))
    zeroed.set_plan(SkipPlan(nothing, nothing, online=stage))
    assert generate(llm, tokens(20)) == generate(zeroed, tokens(20))
    np.testing.assert_allclose(llm.online.similarity, zeroed.online.similarity, rtol=1e-6)
    np.testing.assert_allclose(llm.online.norm_ratio, zeroed.online.norm_ratio, rtol=1e-6)
    assert not np.isnan(llm.online.similarity).any()


# -- graphs and cost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [-1.0, 2.0], ids=["all added", "none added"])
def test_one_graph_is_built_at_the_switch_and_only_before_it_observed_values_leave_the_device(
    limit: float, open_tiny: Open
) -> None:
    llm = open_tiny(under=online_plan(limit))
    steps, built, reused, copied = llm.generate(tokens(20), temp=0.0), [], [], []
    for _ in range(N_TOKENS):
        before = llm.counters
        next(steps)
        built.append(llm.counters.graphs_built - before.graphs_built)
        reused.append(llm.counters.graphs_reused - before.graphs_reused)
        copied.append(llm.counters.statistics_bytes - before.statistics_bytes)
    # The prompt, the first token of the window, and the first token after it.
    assert [step for step, n in enumerate(built) if n] == [0, 1, 1 + WINDOW]
    assert sum(built) == 3 and sum(reused) == N_TOKENS - 3
    # Inputs and outputs of two FFNs.
    assert copied == [0] + [2 * 2 * 4 * N_EMBD] * WINDOW + [0] * (N_TOKENS - 1 - WINDOW)


def test_after_the_window_no_statistics_are_left_in_the_graph(open_tiny: Open) -> None:
    # The graph has as many nodes as that of a plan made by hand with the same set.
    added = SkipSet(FIXED.skip | [False, True], np.where(FIXED.skip, FIXED.scale, 1.25))
    llm, by_hand = open_tiny(under=online_plan(-1.0)), open_tiny(under=SkipPlan(FIXED, added))
    generate(llm, tokens(20), WINDOW + 1)
    observing = llm.counters
    for each in (llm, by_hand):
        generate(each, tokens(20))
    assert llm.online.ffn == (0, 1)
    assert llm.counters.nodes == by_hand.counters.nodes < observing.nodes


def test_prompts_are_not_observed_nor_is_anything_without_an_online_stage(open_tiny: Open) -> None:
    llm = open_tiny(under=online_plan(-1.0, fixed=NONE, prefill=NONE))
    llm.eval(tokens(20))
    llm.eval([7])
    assert llm.online.n_tokens == llm.counters.statistics_bytes == 0
    generate(llm, tokens(20))
    observed = llm.counters.statistics_bytes
    for plan in (same(FIXED), None):
        llm.set_plan(plan)
        generate(llm, tokens(20))
        assert llm.online is None
    assert llm.counters.statistics_bytes == observed and llm.counters.nodes == llm.counters.nodes_full


# -- requests --------------------------------------------------------------------------------------------------------


def test_a_chats_next_turn_and_the_same_prompt_again_are_new_requests(threshold: float, both: Open) -> None:
    # They keep the K and V of the first turn, whose last token was not evaluated yet.
    llm, history = both(online_plan(threshold))
    turn = [*tokens(20), *check(llm, history, tokens(20)), *tokens(8, seed=7)[1:]]
    for prompt in (turn, turn, tokens(20)):
        check(llm, history, prompt)


class ConsumerError(Exception):
    pass


def end(llm: Any, prompt: list[int], n: int, how: str) -> None:
    """End a request after its n-th token."""
    calls = itertools.count(1)

    def criterion(ids: npt.NDArray[np.intc], scores: npt.NDArray[np.single]) -> bool:
        if how == "a criterion" and next(calls) == n:
            raise ConsumerError
        return False

    steps = llm.generate(prompt, temp=0.0, stopping_criteria=criterion)
    match how:
        case "max_tokens":
            llm.create_completion(prompt, max_tokens=n, temperature=0.0)
        case "a criterion":
            with pytest.raises(ConsumerError):
                list(steps)
        case _:
            list(itertools.islice(steps, n))
            if how == "close":
                steps.close()
            elif how == "throw":
                with pytest.raises(ConsumerError):
                    steps.throw(ConsumerError())


@pytest.mark.parametrize("n", [1, 3, WINDOW + 1, WINDOW + 4], ids=["prompt only", "inside", "at its end", "after"])
@pytest.mark.parametrize("how", ["close", "dropping", "throw", "a criterion", "max_tokens"])
def test_however_a_request_ends_the_next_one_is_as_on_a_fresh_model(
    how: str, n: int, threshold: float, both: Open
) -> None:
    llm, fresh = both(online_plan(threshold))
    end(llm, tokens(20, seed=2), n, how)
    check(llm, fresh, tokens(20))


def test_what_was_learned_can_be_read_until_the_next_request(threshold: float, both: Open) -> None:
    llm, history = both(online_plan(threshold))
    check(llm, history, tokens(20))
    llm.reset()
    assert_learned(llm, history.stage)
    steps = llm.generate(tokens(20), temp=0.0)
    assert_learned(llm, history.stage)  # a generator does nothing before its first step
    next(steps)
    assert llm.online.n_tokens == 0


# -- schedules too, which count the same tokens ----------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, WINDOW + 4], ids=["inside the window", "after it"])
@pytest.mark.parametrize("kind", ["online stage", "schedule"])
def test_a_plan_set_during_a_request_counts_its_tokens_from_there(
    kind: str, n: int, threshold: float, both: Open
) -> None:
    """What the first plan made is evaluated again, as prompt."""
    first, second = online_plan(threshold), online_plan(threshold - 0.05, "median", window=4)
    if kind == "schedule":
        first, second = SCHEDULE, same(FIXED, schedule=((0, FIXED), (3, MOST)))
    llm, history = both(first)
    steps = llm.generate(tokens(20), temp=0.0)
    history.prompt(tokens(20))
    answer = [next(steps)]
    for i in range(1, n + 8):
        if i == n:
            for each in (llm, history):
                each.set_plan(second)
            assert llm.online is None or llm.online.n_tokens == 0
        answer.append(next(steps))
        history.decode(answer[-2:-1])
    if kind == "online stage":
        assert_learned(llm, history.stage)
    assert error(llm, history) < TOLERANCE


@pytest.mark.parametrize("window", [4, 6, 9, None], ids=str)
@pytest.mark.parametrize("n_right", [0, 1, 3], ids=["wrong", "partly right", "right"])
def test_a_draft_runs_under_the_set_of_its_first_token_and_counts_all_of_them(
    n_right: int, window: int | None, threshold: float, both: Open
) -> None:
    # Drafts of three tokens make calls of four: windows of 6 and 9 end inside one. The first tokens of a draft are
    # those that follow under the fixed set alone, as in the window.
    truth = generated(*both(same(FIXED)), tokens(20), 40)

    def draft(ids: list[int]) -> list[int]:
        done = len(ids) - 20
        wrong = [(token + 1) % 200 + 3 for token in truth[done : done + 3]]
        return [*truth[done : done + n_right], *wrong[n_right:]]

    llm, history = both(
        SCHEDULE if window is None else online_plan(threshold, window=window),
        draft_model=lambda ids, **_: np.array(draft(ids.tolist()), dtype=np.intc),
    )
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
