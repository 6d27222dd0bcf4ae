"""Prompts that are put together from several earlier ones, each of which was saved.

Against the forward pass in NumPy of test_edits.py, with its tolerances: every token has the K and V of the prompt that
it is taken from.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.edited_prompts import EDITS as MOVED
from oracles.edited_prompts import OPTIONS, SETTINGS, Oracle, counting, logits_of, read_both
from oracles.fixtures import Open, Tiny
from oracles.reference import ReferenceModel, ReferenceRun, relative_error
from oracles.tiny_families import tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.engine.edits import Run, Saved, beside
from adaskip_cpp.errors import NativeError, StateError
from adaskip_cpp.model.edits import APART, WIDE

EDITS = replace(MOVED, most_moves=APART + WIDE)


def runs() -> Any:
    return st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), max_size=4)


@settings(deadline=None)
@given(runs(), runs(), st.integers(1, 4), st.integers(1, 3))
def test_parts_of_runs_take_no_place_twice(
    found: list[tuple[int, int]], taken: list[tuple[int, int]], least: int, mend: int
) -> None:
    def placed(gaps: list[tuple[int, int]]) -> Iterator[Run]:
        at = 0
        for gap, n in gaps:
            yield Run(start=7 + at + gap, to=at + gap, n=n)
            at += gap + n

    theirs, ours = list(placed(found)), list(placed(taken))
    places = {place for run in ours for place in range(run.to, run.to + run.n)}
    parts = beside(theirs, ours, least=least, mend=mend)
    for part in parts:
        mine = set(range(part.to, part.to + part.n))
        assert part.n >= least and part.start == part.to + 7 and not mine & places
        [run] = [run for run in theirs if run.to <= part.to < run.to + run.n]
        assert part.to + part.n <= run.to + run.n
        # What stands before a part in its run is taken, or mended.
        assert part.to == run.to or part.to - mend - 1 in places or {*range(part.to - mend, part.to)} & places
        places |= mine
    free = [
        run
        for run in theirs
        if not {*range(run.to, run.to + run.n)} & {p for r in ours for p in range(r.to, r.to + r.n)}
    ]
    assert all(run in parts for run in free if run.n >= least)


def documents() -> tuple[list[int], list[list[int]], list[int]]:
    """What all prompts begin with, three documents, and a question."""
    return tokens(20), [tokens(50 + 5 * i, seed=1 + i)[1:] for i in range(3)], tokens(12, seed=9)[1:]


def read_alone(llm: Any, oracle: Oracle, prompts: list[list[int]]) -> None:
    """Have both read prompts, save them, and forget them."""
    llm.saved_prompts, oracle.history.saved = [], []
    saved = []
    for prompt in prompts:
        llm.reset()
        other = Oracle(oracle.history.reference.model, oracle.history.plan, EDITS)
        logits_of(llm, prompt), other.read(prompt)
        llm.truncate(len(prompt))
        saved.append(llm.save_prompt())
        oracle.history.saved = [*oracle.history.saved, other.history]
    llm.reset()
    llm.saved_prompts = saved


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("held", ["nothing", "a document", "another text"])
def test_documents_that_were_read_alone_are_put_together(
    how: str, held: str, open_tiny: Open, numpy_model: Open
) -> None:
    family, options, plan, tolerance = SETTINGS[how]
    llm = open_tiny(family, under=plan, **OPTIONS, **options, reuse=EDITS)
    oracle = Oracle(numpy_model(family), plan, edits=EDITS)
    head, (a, b, c), question = documents()
    read_alone(llm, oracle, [head + each + question for each in (a, b, c)])
    if held != "nothing":
        first = head + b + question if held == "a document" else tokens(90, seed=20)
        read_both(llm, oracle, first, tolerance)
    for prompt in (head + c + a + b + question, head + b + c + question + a):
        assert read_both(llm, oracle, prompt, tolerance) < 0.5 * len(prompt)
        assert llm.n_moved > 0.2 * len(prompt)


def test_a_saved_prompt_is_read_where_its_moves_or_its_plan_forbid_it(
    open_tiny: Open, reference: ReferenceModel, whole: Open
) -> None:
    head, (a, b, c), question = documents()
    prompt = head + a + c + b + question
    small = replace(EDITS, most_moves=APART - 1)
    skipping = SkipPlan.manual(3, attention=[1])
    for reuse, plan in ((small, None), ("prefix", None), (EDITS, skipping)):
        llm = open_tiny(under=plan, **OPTIONS, reuse=EDITS)
        read_alone(llm, Oracle(reference, plan, edits=EDITS), [head + each for each in (b, c)])
        llm.set_plan(None)
        llm.set_reuse(reuse)
        with counting(llm) as counts:
            assert relative_error(logits_of(llm, prompt), whole(prompt)) < 1e-5
        assert llm.n_moved == 0 and sum(counts) == len(prompt) - (len(head) if reuse is small else 0)


def test_what_begins_a_prompt_is_not_moved(open_tiny: Open, reference: ReferenceModel, whole: Open) -> None:
    """So the whole model may read it, also where it is longer than what the memory and the prompt begin with."""
    llm, oracle = open_tiny(**OPTIONS, reuse=EDITS), Oracle(reference, edits=EDITS)
    head, (a, b, c), question = documents()
    read_alone(llm, oracle, [head + a + b, head + c])
    first, prompt = head + question + c, head + a + b + tokens(9, seed=40)[1:] + c + question
    for each in (first, prompt):
        read_both(llm, oracle, each)
    assert llm._adaskip.kv_valid("prefill", 900) == 900
    llm.set_reuse("prefix")
    assert llm._adaskip.kv_valid("prefill", 900) > len(head + a + b)
    with counting(llm) as counts:
        assert relative_error(logits_of(llm, prompt), whole(prompt)) < 1e-5
    assert sum(counts) == len(prompt) - len(head + a + b + tokens(9, seed=40)[1:]) - EDITS.mend


@pytest.mark.parametrize("way", ["it is gone", "there is no room", "it is damaged", "a window has left it"])
def test_a_saved_prompt_that_cannot_be_loaded_is_read(way: str, open_tiny: Open, numpy_model: Open) -> None:
    family, options = ("gemma3", {"swa_full": False}) if way == "a window has left it" else ("llama", {})
    n_ctx = 256 if way == "there is no room" else 512
    llm = open_tiny(family, **{**OPTIONS, "n_ctx": n_ctx}, **options, reuse=EDITS)
    head, (a, b, c), question = documents()
    more = tokens(120, seed=30)[1:]
    oracle = Oracle(numpy_model(family), edits=EDITS)
    read_alone(llm, oracle, [head + more + each for each in (a, b)])
    [first, second] = llm.saved_prompts
    if way == "it is gone":
        llm.saved_prompts = [first._replace(take=lambda: None), second]
    if way == "it is damaged":
        llm.saved_prompts = [first._replace(take=lambda: bytearray(first.take() or b"")[:-9]), second]
    prompt = head + c + b + a + question + tokens(20, seed=31)[1:]
    logits = logits_of(llm, prompt)
    if way == "a window has left it":
        expected = ReferenceRun(numpy_model(family)).eval(prompt).logits[-1]
        assert relative_error(logits, expected) < 1e-3 and llm.n_moved == 0
        return
    oracle.history.saved = oracle.history.saved[1:]
    expected = oracle.read(prompt)
    if way == "there is no room":  # for the second beside what was taken of the first
        assert llm.n_moved > 0
    else:
        assert relative_error(logits, expected) < 1e-5
    with counting(llm) as counts:
        logits_of(llm, prompt + question)
    assert sum(counts) == len(question), "the memory holds what was read"


@pytest.mark.parametrize("n_batches", range(6))
@pytest.mark.parametrize("is_saved", [True, False], ids=["saved", "in memory alone"])
def test_a_reading_that_is_cut_short_leaves_nothing_half_moved(
    is_saved: bool, n_batches: int, open_tiny: Open, reference: ReferenceModel, whole: Open
) -> None:
    llm = open_tiny(**OPTIONS, reuse=EDITS)
    head, (a, b, c), question = documents()
    if is_saved:
        read_alone(llm, Oracle(reference, edits=EDITS), [head + each for each in (a, b, c)])
    logits_of(llm, head + b if is_saved else head + a + b)
    prompt = head + c + a + question + b + question

    def stop(n_tokens: int) -> None:
        nonlocal n_batches
        if n_batches == 0:
            raise KeyboardInterrupt
        n_batches -= 1

    llm.on_batch = stop
    with pytest.raises(KeyboardInterrupt):
        logits_of(llm, prompt)
    llm.on_batch = lambda n_tokens: None
    state = llm.save_state()
    expected = logits_of(llm, prompt)
    logits_of(llm, head + question + prompt[len(head) :])  # nothing that was set aside is in its way
    assert llm.n_moved > 0
    llm.load_state(state)
    assert relative_error(logits_of(llm, prompt), expected) < 1e-5
    llm.set_reuse("prefix")
    assert relative_error(logits_of(llm, prompt), whole(prompt)) < 1e-5


def test_places_that_are_taken_are_refused(open_tiny: Open) -> None:
    """Two cells of one position would both be seen."""
    llm = open_tiny(**OPTIONS)
    llm.eval(tokens(40))
    llm._adaskip.set_aside(20, [(30, 50, 5, 1)])
    for run in ((5, 50, 5, 1), (5, 46, 5, 1), (5, 54, 5, 1), (5, 6, 5, 0)):
        with pytest.raises(NativeError):
            llm._adaskip.set_aside(0, [run])
    llm._adaskip.set_aside(0, [(5, 55, 5, 1), (0, 0, 5, 0)])
    llm._adaskip.take_back(5)
    assert llm._adaskip.kv_valid("prefill", 5) == 5, "what stays in its place was not moved"


def test_without_states_nothing_is_saved(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = open_tiny(**OPTIONS)
    llm.eval(tokens(9))
    with monkeypatch.context() as patched:
        patched.setattr(llm, "_save_sequence", lambda: None)
        with pytest.raises(StateError, match="could not save"):
            llm.save_prompt()
    assert isinstance(llm.save_prompt(), Saved) and llm.save_prompt().tokens.tolist() == tokens(9)


def test_a_prompt_of_another_model_or_with_an_image_is_refused(open_tiny: Open, open_model: Open, tiny: Tiny) -> None:
    """Another model of the same shape would take the state, and answer from K and V that are not its own."""
    llm, other = open_tiny(**OPTIONS, reuse=EDITS), open_model(tiny(seed=7), **OPTIONS)
    head, (a, *_), question = documents()
    other.eval(head + a)
    llm.saved_prompts = [other.save_prompt()]
    with pytest.raises(StateError, match="of another model"):
        logits_of(llm, head + question + a + question)
    llm.saved_prompts = []
    llm.eval(head + a)
    llm.input_ids[5] = -1
    with pytest.raises(StateError, match="holds an image"):
        llm.save_prompt()
