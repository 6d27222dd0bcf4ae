"""Prompts that are edited: what both have is moved to its new place, and the rest is read before it.

Against a forward pass in NumPy, which keeps K as it is before the rotary embedding, so that positions can move. The
tolerances are those of test_bulk.py, and for flash attention that of test_sequences.py: F16 on the CPU.
"""

import pickle
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from oracles.edited_prompts import EDITS, OPTIONS, SETTINGS, Oracle, counting, logits_of, read_both
from oracles.fixtures import Open
from oracles.frontiers import edit_points, frontier, point
from oracles.reference import ReferenceModel, ReferenceRun, relative_error
from oracles.sequence_oracle import common_prefix
from oracles.tiny_families import FAMILIES, N_LAYER, N_VOCAB, Family, tokens
from oracles.tiny_models import write_model

from adaskip_cpp import Frontier, SkipPlan
from adaskip_cpp.engine.runs import Run, find_runs, n_common
from adaskip_cpp.errors import NativeError, RequestError, StateError
from adaskip_cpp.model.edits import WIDE, Edits


def runs_of(cached: Sequence[int], prompt: Sequence[int], least: int = 3) -> list[Run]:
    both = np.array(cached, np.int32), np.array(prompt, np.int32)
    return find_runs(*both, first=common_prefix(cached, prompt), end=len(prompt), least=least)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=60), st.integers(1, 5))
def test_runs_are_equal_tokens_and_no_token_is_used_twice(cached: list[int], prompt: list[int], least: int) -> None:
    taken: set[int] = set()
    end = 0
    for run in runs_of(cached, prompt, least):
        places = set(range(run.start, run.start + run.n))
        assert run.n >= least and run.to >= end and not places & taken
        assert cached[run.start : run.start + run.n] == prompt[run.to : run.to + run.n]
        end, taken = run.to + run.n, taken | places


@pytest.mark.parametrize(
    "prompt, expected",
    [
        (range(100), []),
        ([*range(20), 500, *range(20, 50), 501, *range(51, 100)], [(20, 21, 30, 1), (51, 52, 49, 1)]),
        ([500, *range(1, 6), 501, *range(7, 100)], [(1, 1, 5, WIDE), (7, 7, 93, 1)]),
        (range(30, 100), [(30, 0, 70, WIDE)]),  # of 65 tokens before the middle of the run 35 are left
        ([*range(90), *range(95, 100), *range(90, 95)], [(95, 90, 5, 1), (90, 95, 5, 1)]),
        ([*range(50, 100), *range(50)], [(50, 0, 50, WIDE), (0, 50, 50, WIDE)]),
        ([*range(200, 300), *range(100)], [(0, 100, 100, WIDE)]),
    ],
)
def test_an_edit_leaves_one_run_for_each_piece_and_counts_more_where_much_of_the_text_before_changed(
    prompt: Sequence[int], expected: list[Run]
) -> None:
    assert runs_of(range(100), list(prompt)) == expected


@pytest.fixture
def opened(open_tiny: Open) -> Open:
    return lambda family="llama", reuse=EDITS, **options: open_tiny(family, **{**OPTIONS, "reuse": reuse, **options})


def edited() -> dict[str, tuple[list[int], list[int]]]:
    """A prompt, and what became of it."""
    a, b, c, new = (tokens(n, seed=seed) for seed, n in enumerate((60, 45, 70, 9)))
    return {
        "changed": (a + b + c, a[:20] + new[:5] + a[25:] + b + c),
        "inserted": (a + b + c, a[:20] + new + a[20:] + b + c),
        "twice": (a + b + c, a[:20] + new + a[20:] + b[:10] + b[12:] + c),
        "another order": (a + b + c, c + a + b),
        "the oldest dropped": (a + b + c, b + c),
        "turned round": (a + b + c, [token for at in range(150, -1, -15) for token in (a + b + c)[at : at + 15]]),
    }


def test_a_saved_prompt_is_put_back_or_the_memory_says_so(opened: Open) -> None:
    llm, text, more = opened(), tokens(40), tokens(9, seed=5)
    llm.eval(text)
    saved = llm.save_prompt()
    expected = llm.logits_after(more)
    llm.reset()
    llm.eval(tokens(60, seed=7))
    llm.load_prompt(saved)
    assert llm.input_ids[: llm.n_tokens].tolist() == text
    np.testing.assert_allclose(llm.logits_after(more), expected, rtol=1e-5, atol=1e-5)
    other = saved._replace(model=replace(saved.model, fingerprint="ab" * 32))
    with pytest.raises(StateError, match="a saved prompt is of another model"):
        llm.load_prompt(other)
    with pytest.raises(StateError, match="has KV of other layers"):
        llm.load_prompt(saved._replace(elided_kv=(1,)))
    assert llm.n_tokens == 49, "nothing has changed"
    for gone in (saved._replace(take=lambda: None), saved._replace(take=lambda: bytearray(8))):
        with pytest.raises(StateError, match="could not load the saved prompt"):
            llm.load_prompt(gone)


LLAMA = FAMILIES["llama"]


@pytest.mark.parametrize(
    ("family", "options", "can_move"),
    [
        (LLAMA, {}, True),
        (
            replace(LLAMA, head_dim=64),
            {"type_k": 8, "flash_attn": True},
            True,
        ),  # Q8_0: Q is multiplied by another rotation
        (FAMILIES["gemma3"], {}, True),
        (FAMILIES["phi3"], {}, True),
        (FAMILIES["gptneox-parallel"], {}, True),
        (FAMILIES["gpt2"], {}, False),
        (replace(LLAMA, architecture="smollm3", n_layer=4), {}, False),
        (replace(LLAMA, architecture="smollm3", n_layer=3), {}, True),  # the fourth would have no rotation
        (replace(LLAMA, metadata={"rope.scaling.attn_factor": 1.2}), {}, False),
    ],
    ids=lambda value: value.architecture if isinstance(value, Family) else str(value),
)
def test_what_llama_cpp_shifts_wrong_is_not_moved(
    family: Family, options: Any, can_move: bool, tmp_path: Path, open_model: Open
) -> None:
    """It rotates K of layers without a rotary embedding too, and one that scales K would scale all of it again."""
    path = write_model(tmp_path / "model.gguf", family)
    llm = open_model(path, **{**OPTIONS, "reuse": EDITS, **options})
    assert llm.can_move == can_move
    text = tokens(100)
    for prompt in (text, [*text[:20], *tokens(9, seed=1), *text[20:]]):
        next(llm.generate(prompt, temp=0))
    assert (llm.n_moved > 0) == can_move


def test_repeated_text_that_is_used_up_is_not_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that memory has ten times and the prompt a hundred times."""
    line, compared = tokens(40, seed=3), Mock(wraps=n_common)
    monkeypatch.setattr("adaskip_cpp.engine.runs.n_common", compared)
    runs = runs_of(tokens(100, seed=1) + line * 10, tokens(100, seed=2) + line * 100, least=20)
    assert sum(run.n for run in runs) == 400
    assert compared.call_count <= 8 * len(runs)


@pytest.mark.parametrize("kind", edited())
@pytest.mark.parametrize("how", SETTINGS)
def test_logits_are_those_of_the_moved_k_and_v(opened: Open, how: str, kind: str, numpy_model: Open) -> None:
    family, options, plan, tolerance = SETTINGS[how]
    llm, oracle = opened(family, under=plan, **options), Oracle(numpy_model(family), plan)
    for prompt in edited()[kind]:
        read_both(llm, oracle, prompt, tolerance)
    assert oracle.n_read < 0.6 * len(prompt)


def test_tokens_are_moved_as_often_as_cells_can_count(opened: Open) -> None:
    edits = Edits(mend=1, least=2, tail=2, most_moves=255 - WIDE)
    llm, text = opened(reuse=edits), tokens(20)
    n_moved = []
    for round in range(1 + edits.most_moves + 2):
        logits_of(llm, [5 + round % 2, *text])
        n_moved.append(llm.n_moved)
    n = len(text) - edits.mend - edits.tail
    assert n_moved == [0] + [n] * edits.most_moves + [0, n]


def test_a_prompt_shorter_than_the_tail_is_read(opened: Open, whole: Open) -> None:
    edits = Edits(mend=1, least=2, tail=40)
    llm, text = opened(reuse=edits), tokens(60)
    logits_of(llm, text)
    assert relative_error(logits_of(llm, text[20:50]), whole(text[20:50])) < 1e-5


def test_a_context_that_is_full_loses_no_room(opened: Open, reference: ReferenceModel) -> None:
    llm, oracle = opened(), Oracle(reference)
    prompt = tokens(OPTIONS["n_ctx"] - 1)
    for at in (0, 100, 7, 300, 450):
        prompt = prompt[at:] + prompt[:at]
        assert relative_error(logits_of(llm, prompt), oracle.read(prompt)) < 3e-5  # rounding of angles, at 511
        llm.eval_decode([9])
        oracle.history.decode([9])
        assert llm.n_tokens == OPTIONS["n_ctx"]


def test_a_pickled_model_moves_runs_too(opened: Open, reference: ReferenceModel) -> None:
    with closing(pickle.loads(pickle.dumps(opened()))) as llm:
        oracle = Oracle(reference)
        for prompt in edited()["another order"]:
            read_both(llm, oracle, prompt)
        assert llm.n_moved > 0


def test_a_full_size_window_cache_loses_nothing_to_edits(numpy_model: Open, opened: Open) -> None:
    """llama.cpp writes over what a window has left, even where there is room. Then the next edit would move nothing."""
    llm, oracle = opened("gemma3", swa_full=True), Oracle(numpy_model("gemma3"))
    prompt = tokens(300)
    for round in range(EDITS.most_moves // WIDE + 1):
        assert relative_error(logits_of(llm, prompt), oracle.read(prompt)) < 1e-3
        assert (llm.n_moved > 250) == (round > 0)
        prompt = prompt[:1] + prompt[150:] + prompt[1:150]


NOT_MOVED: dict[str, tuple[str, dict[str, Any]]] = {
    "it is not asked for": ("llama", {}),
    "the logits of all tokens are kept": ("llama", {"reuse": EDITS, "logits_all": True}),
    # Llama keeps the logits of all tokens then; without logits_all it has no room for those of a second batch.
    "a draft model": ("llama", {"reuse": EDITS, "logits_all": True, "draft_model": LlamaPromptLookupDecoding(2, 4)}),
    "small sliding windows": ("gemma3", {"reuse": EDITS, "swa_full": False}),
    "a recurrent state": ("mamba", {"reuse": EDITS}),
}


@pytest.mark.parametrize("why", NOT_MOVED)
def test_where_nothing_is_moved_the_prefix_alone_counts(why: str, open_tiny: Open) -> None:
    family, options = NOT_MOVED[why]
    first, second = edited()["inserted"]
    llm, fresh = (open_tiny(family, **{**OPTIONS, **options, **more}) for more in ({}, {"reuse": "prefix"}))
    logits_of(llm, first)
    with counting(llm) as counts:
        assert relative_error(logits_of(llm, second), logits_of(fresh, second)) < 1e-5
    assert llm.n_moved == 0 and (family != "llama" or sum(counts) == len(second) - 20)


PROMISED = Edits(mend=3, least=8, tail=6, most_moves=8)


def tuned(*losses: float) -> Frontier:
    """A frontier without plans, of which few moves lose the first number of nats and many the second."""
    moves = [PROMISED, replace(PROMISED, most_moves=8 + 2 * WIDE)]
    return frontier([], edits=edit_points(losses, moves))


@pytest.mark.parametrize(
    "found, line, order",
    [
        (tuned(), False, False),
        (tuned(0.026), False, False),
        (tuned(0.02, 0.026), True, False),
        (tuned(0.02, 0.025), True, True),
    ],
    ids=["not measured", "too much", "many moves lose too much", "many moves"],
)
def test_with_a_frontier_runs_are_moved_as_far_as_the_promise_is_kept(
    open_tiny: Open, found: Frontier, line: bool, order: bool, reference: ReferenceModel, whole: Open
) -> None:
    """Half of 0.05 nats. Against NumPy, with what is moved where it is."""
    a, b, new = tokens(300), tokens(290, seed=1)[1:], tokens(9, seed=2)[1:]
    for second, is_moved in ((a[:250] + new + a[250:] + b, line), (a[:1] + b + a[1:], order)):
        llm = open_tiny(**{**OPTIONS, "n_ctx": 1024}, plan=found)
        logits_of(llm, a + b)
        logits = logits_of(llm, second)
        assert (llm.n_moved > 200) == is_moved
        most_moves = 8 + 2 * WIDE if order else 8
        oracle = Oracle(reference, edits=replace(PROMISED, most_moves=most_moves))
        expected = [oracle.read(each) for each in (a + b, second)][1]
        if not is_moved:
            expected = whole(second)
        assert relative_error(logits, expected) < 1e-4


def test_plans_leave_edits_their_share_once_a_prompt_has_more_to_move_than_it_begins_with(open_tiny: Open) -> None:
    """Of 0.05 nats edits may lose 0.02, so the faster plan, which loses 0.04, is for the prompts before."""
    mild, fast = (SkipPlan.manual(N_LAYER, ffn=ffn, phase="bulk") for ffn in ([1], [0, 1]))
    points = [point(mild, 0.02, {1024: 1.2}), point(fast, 0.04, {1024: 1.5})]
    found = replace(tuned(0.02), points=tuple(points))
    llm, cold = (open_tiny(**{**OPTIONS, "n_ctx": 1024}, plan=each) for each in (found, mild))
    a, new = tokens(600), tokens(9, seed=2)[1:]
    at_the_top = a[:20] + new + a[20:]
    turns = [
        (a, fast, len(a), 0),
        (a + new, fast, len(new), 0),  # grown
        (a[:550] + new + a[550:], fast, len(new) + 50, 0),  # the prefix alone saves most
        (at_the_top, mild, len(at_the_top) - 4, 0),  # the head alone was not read under the faster plan
        (a[:9] + new + at_the_top[9:], mild, len(new) + 64 + PROMISED.mend, 400),
        (tokens(600, seed=3), mild, 599, 0),
    ]
    for prompt, plan, most_read, least_moved in turns:
        with counting(llm) as counts:
            logits = logits_of(llm, prompt)
        assert llm.plan == plan and sum(counts) <= most_read and llm.n_moved >= least_moved
        if prompt is at_the_top:
            assert relative_error(logits, logits_of(cold, prompt)) < 1e-4


@pytest.mark.parametrize("way", ["no plan", "a tighter promise", "a short prompt"])
def test_what_a_promise_let_be_moved_is_read_again_without_it(open_tiny: Open, way: str, whole: Open) -> None:
    """A promise that lets few tokens be moved does not read what another one moved to a new order."""
    a, b = tokens(300), tokens(290, seed=1)[1:]
    llm = open_tiny(**{**OPTIONS, "n_ctx": 1024}, plan=tuned(0.001, 0.025))
    second = a[:1] + b + a[1:]
    for prompt in (a + b, second):
        logits_of(llm, prompt)
    assert llm.n_moved > 200
    if way == "no plan":
        llm.set_plan(None)
    elif way == "a tighter promise":
        llm.set_plan("auto", max_loss=0.01)
    else:
        second = second[:500]
    with counting(llm) as counts:
        logits = logits_of(llm, second)
    assert sum(counts) == len(second) - 1 - PROMISED.mend
    assert relative_error(logits, whole(second)) < 1e-4


@pytest.mark.parametrize("n_same", [0, 5])
def test_where_a_sliding_window_has_lost_what_stands_before_the_edit_the_prefix_alone_counts(
    open_tiny: Open, n_same: int, numpy_model: Open
) -> None:
    """Behind a loaded state llama.cpp looks for room from the cache's start, where the window has left positions."""
    text, more, new = tokens(60), tokens(21, seed=1)[1:], tokens(10, seed=2)[1:]
    llm = open_tiny("gemma3", **OPTIONS, swa_full=True)
    logits_of(llm, text)
    llm.load_state(llm.save_state())
    logits_of(llm, text + more)
    llm.set_reuse(EDITS)
    prompt = text[:n_same] + new + text[8 * n_same :] + more
    expected = ReferenceRun(numpy_model("gemma3")).eval(prompt).logits[-1]
    assert relative_error(logits_of(llm, prompt), expected) < 1e-3


@pytest.mark.parametrize(
    "n_kept, runs",
    [
        (0, [(5, 5, 0)]),
        (0, [(0, 3, 5), (4, 10, 5)]),
        (0, [(0, 3, 5), (8, 6, 5)]),
        (4, [(2, 8, 3)]),
        (4, [(8, 2, 3)]),
        (-1, []),
        (0, [(35, 2, 9)]),
        (0, [(0, 2**31 - 3, 5)]),
    ],
)
def test_wrong_runs_are_refused_and_change_nothing(
    open_tiny: Open, n_kept: int, runs: list[tuple[int, int, int]], whole: Open
) -> None:
    llm = open_tiny(**OPTIONS)
    llm.eval(tokens(40))
    with pytest.raises(NativeError):
        llm._adaskip.set_aside(n_kept, [(*run, 1) for run in runs])
    llm.eval(tokens(9, seed=1))
    expected = whole(tokens(40) + tokens(9, seed=1))
    assert relative_error(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (N_VOCAB,)), expected) < 1e-5


def test_edits_are_checked() -> None:
    for name, value in (("mend", 0), ("least", 0), ("tail", 0), ("most_moves", 0), ("most_moves", 224), ("mend", 1.5)):
        with pytest.raises(RequestError, match=name):
            Edits(**{name: value})  # type: ignore[arg-type]
