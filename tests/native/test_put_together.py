"""Prompts that are put together from several saved ones: each token has K and V of its prompt, as in test_edits.py."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import llama_cpp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.edited_prompts import EDITS as MOVED
from oracles.edited_prompts import OPTIONS, SETTINGS, Oracle, counting, logits_of, read_both
from oracles.fixtures import Open, Tiny
from oracles.reference import ReferenceModel, ReferenceRun, relative_error
from oracles.tiny_families import tokens

from adaskip_cpp.engine.runs import Run, beside
from adaskip_cpp.errors import NativeError, StateError
from adaskip_cpp.model.edits import APART, WIDE

EDITS = replace(MOVED, most_moves=APART + WIDE)


gaps_and_lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), max_size=4)


@settings(deadline=None)
@given(gaps_and_lengths, gaps_and_lengths, st.integers(1, 4), st.integers(1, 3))
def test_no_place_is_taken_twice(
    found: list[tuple[int, int]], taken: list[tuple[int, int]], least: int, mend: int
) -> None:
    def placed(gaps: list[tuple[int, int]]) -> Iterator[Run]:
        at = 0
        for gap, n in gaps:
            yield Run(start=7 + at + gap, to=at + gap, n=n)
            at += gap + n

    def places_of(run: Run) -> set[int]:
        return {*range(run.to, run.to + run.n)}

    theirs, ours = list(placed(found)), list(placed(taken))
    taken_places = set().union(*map(places_of, ours))
    parts, places = beside(theirs, ours, least=least, mend=mend), set(taken_places)
    for part in parts:
        assert part.n >= least and part.start == part.to + 7 and not places_of(part) & places
        [run] = [run for run in theirs if run.to <= part.to < run.to + run.n]
        assert part.to + part.n <= run.to + run.n
        # What stands before a part in its run is taken, or mended.
        assert part.to == run.to or part.to - mend - 1 in places or {*range(part.to - mend, part.to)} & places
        places |= places_of(part)
    assert all(run in parts for run in theirs if run.n >= least and not places_of(run) & taken_places)


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
def test_documents_that_were_read_alone_are_joined(how: str, held: str, open_tiny: Open, numpy_model: Open) -> None:
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


def test_what_begins_a_prompt_is_not_moved(open_tiny: Open, reference: ReferenceModel) -> None:
    """So the whole model may read it, also where it is longer than what the memory and the prompt begin with."""
    llm, (head, (a, _, c), question) = open_tiny(**OPTIONS, reuse=EDITS), documents()
    read_alone(llm, Oracle(reference, edits=EDITS), [head + c])
    for prompt in (head + question + a, head + c + a + question):
        logits_of(llm, prompt)
    assert llm.n_moved > 0
    llm.set_reuse("prefix")
    assert llm._adaskip.kv_valid("prefill", 900) == len(head + c) + EDITS.mend


@pytest.mark.parametrize("way", ["it is gone", "there is no room", "it is damaged"])
def test_a_saved_prompt_that_cannot_be_loaded_is_read(way: str, open_tiny: Open, reference: ReferenceModel) -> None:
    llm = open_tiny(**{**OPTIONS, "n_ctx": 256 if way == "there is no room" else 512}, reuse=EDITS)
    oracle = Oracle(reference, edits=EDITS)
    head, (a, b, c), question = documents()
    more = tokens(120, seed=30)[1:]
    read_alone(llm, oracle, [head + more + each for each in (a, b)])
    [first, second] = llm.saved_prompts
    if way == "it is gone":
        llm.saved_prompts = [first._replace(take=lambda: None), second]
    if way == "it is damaged":
        llm.saved_prompts = [first._replace(take=lambda: bytearray(first.take() or b"")[:-9]), second]
    prompt = head + c + b + a + question + tokens(20, seed=31)[1:]
    logits = logits_of(llm, prompt)
    oracle.history.saved = oracle.history.saved[1:]
    expected = oracle.read(prompt)
    if way == "there is no room":  # for the second beside what was taken of the first
        assert llm.n_moved > 0
    else:
        assert relative_error(logits, expected) < 1e-5
    with counting(llm) as counts:
        logits_of(llm, prompt + question)
    assert sum(counts) == len(question), "the memory holds what was read"


def test_a_saved_prompt_that_a_window_has_left_is_read(open_tiny: Open, numpy_model: Open) -> None:
    llm = open_tiny("gemma3", **OPTIONS, swa_full=False, reuse=EDITS)
    (head, (a, b, c), question), more = documents(), tokens(120, seed=30)[1:]
    read_alone(llm, Oracle(numpy_model("gemma3"), edits=EDITS), [head + more + each for each in (a, b)])
    prompt = head + c + b + a + question
    expected = ReferenceRun(numpy_model("gemma3")).eval(prompt).logits[-1]
    assert relative_error(logits_of(llm, prompt), expected) < 1e-3 and llm.n_moved == 0


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


def test_ctrl_c_right_after_runs_were_set_aside_leaves_no_cells_there(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal during a native call is seen when it returns."""
    llm, text = open_tiny(**OPTIONS, reuse=EDITS), tokens(120)
    prompt = [*text[:20], *tokens(9, seed=1), *text[20:]]
    logits_of(llm, text)
    set_aside = llm._adaskip.set_aside

    def interrupted(*args: Any) -> None:
        set_aside(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(llm._adaskip, "set_aside", interrupted)
        logits_of(llm, prompt)
    memory = llama_cpp.llama_get_memory(llm.ctx)
    assert [llama_cpp.llama_memory_seq_pos_max(memory, sequence) for sequence in (254, 255)] == [-1, -1]
    logits_of(llm, text)
    logits_of(llm, prompt)
    assert llm.n_moved > 0


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


def test_a_prompt_of_another_model_or_with_an_image_is_refused(open_tiny: Open, open_model: Open, tiny: Tiny) -> None:
    """Another model of the same shape would take the state, and answer from K and V that are not its own."""
    llm, other = open_tiny(**OPTIONS, reuse=EDITS), open_model(tiny(seed=7), **OPTIONS)
    head, (a, *_), question = documents()
    other.eval(head + a)
    llm.saved_prompts = [other.save_prompt()]
    with pytest.raises(StateError, match="of another model"):
        logits_of(llm, head + question + a + question)
    other.input_ids[5] = -1
    with pytest.raises(StateError, match="holds an image"):
        other.save_prompt()
