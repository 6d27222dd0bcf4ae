"""What was computed in the bulk of a prompt is read by other plans too, where they name the plan that it was under.

Oracles: the NumPy pass, which evaluates the history of each position; the bytes that llama.cpp saves; a fresh model.
"""

import pickle
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracles.expected import history_of
from oracles.fixtures import Open
from oracles.readable import ATTENTION, FFN, MAPS, NOTHING, TOLERANCE, evaluated, logits
from oracles.reference import ReferenceModel, ReferenceRun, relative_error
from oracles.skip_sets import arguments, same, skip_set
from oracles.tiny_families import N_LAYER, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import NotSkippableError, PlanError, ProfileMismatchError, StateError
from adaskip_cpp.model.identity import ModelInfo
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.skip_set import SkipSet

HEAD, TAIL = 2, 3
N = 20


def prompt_plan(chosen: SkipSet, **around: Any) -> SkipPlan:
    return SkipPlan(NOTHING, NOTHING, bulk=Bulk(chosen, **{"head": HEAD, "tail": TAIL, **around}))


BULKS = {
    "an FFN": prompt_plan(FFN),
    "an attention": prompt_plan(ATTENTION),
    "vectors and maps": prompt_plan(MAPS),
    "windows": prompt_plan(NOTHING, windowed=(0, 2), window_size=4),
    "windows beside a skipped attention": prompt_plan(ATTENTION, windowed=(0,), window_size=4),
}
READERS: dict[str, SkipPlan | None] = {
    "the whole model": None,
    "another bulk": prompt_plan(skip_set(ffn=(0,), scale=0.9)),
    "a bulk of the same set and other windows": prompt_plan(ATTENTION, windowed=(2,), window_size=3),
    "a plan that skips everywhere": same(ATTENTION),
}


class Both:
    """A model and what it must hold, through the same calls."""

    def __init__(self, llm: Any, reference: ReferenceModel) -> None:
        self.llm, self.history = llm, history_of(reference)

    def set_plan(self, plan: SkipPlan | None, readable: Sequence[SkipPlan] = ()) -> None:
        self.llm.set_plan(plan, readable=readable)
        self.history.set_plan(plan or same(NOTHING), readable)

    def eval(self, tokens: list[int]) -> list[int]:
        """Returns the positions that are evaluated, of the last of which the logits are right."""
        positions = evaluated(self.llm, lambda: self.llm.eval(tokens))
        self.history.eval(tokens)
        assert relative_error(logits(self.llm)[None], self.history.trace().logits) < TOLERANCE
        return positions


@pytest.fixture
def both(open_tiny: Open, reference: ReferenceModel) -> Both:
    return Both(open_tiny(), reference)


# -- which positions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", READERS)
@pytest.mark.parametrize("before", BULKS)
def test_a_bulk_is_read_by_the_plans_that_name_it_and_by_no_other(before: str, after: str, both: Both) -> None:
    both.set_plan(BULKS[before])
    both.eval(tokens(N))
    both.set_plan(READERS[after], [BULKS[before]])
    assert both.eval([7]) == [N]
    both.set_plan(READERS[after])
    # The positions in front of the bulk are of the whole model, and any plan reads them.
    assert both.eval([8]) == list(range(HEAD, N + 2))


def test_a_plan_may_name_several(both: Both) -> None:
    named = list(BULKS.values())
    for i, plan in enumerate(named):
        both.set_plan(plan, named)
        start = len(both.history.cells)
        assert both.eval(tokens(N, seed=i)) == list(range(start, start + N))
    both.set_plan(None, named)
    assert both.eval([7]) == [len(named) * N]
    both.set_plan(None, named[1:])
    assert both.eval([7])[0] == HEAD
    assert len(both.history.cells) == len(named) * N + 2


OWN = SkipPlan(FFN, FFN, bulk=Bulk(ATTENTION, head=HEAD, tail=TAIL))
HOLES = [prompt_plan(ATTENTION)]
OTHERS: dict[str, tuple[tuple[SkipPlan, Any], list[tuple[SkipPlan, Any, int]]]] = {
    # Its own prefill set, too, is read by plans that have it; the positions in front of that bulk are of no bulk.
    "sets of the plan": ((OWN, [BULKS["vectors and maps"]]), [(same(FFN), [OWN], N), (same(NOTHING), [OWN], 0)]),
    "an attention without K and V": ((same(ATTENTION), HOLES), [(None, HOLES, 0)]),
    "no bulk": ((same(FFN), ()), [(None, [same(FFN), prompt_plan(NOTHING)], 0)]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_in_no_bulk_that_is_named_is_read_as_ever(case: str, both: Both) -> None:
    before, after = OTHERS[case]
    both.set_plan(*before)
    both.eval(tokens(N))
    for i, (plan, named, first) in enumerate(after):
        both.set_plan(plan, named)
        assert both.eval([7]) == list(range(first, N + 1 + i))
        assert case != "no bulk" or (both.llm.readable == () and both.llm._adaskip.plan_tag() == 0)


# -- setting it ------------------------------------------------------------------------------------------------------


def test_an_equal_plan_and_equal_readable_plans_change_nothing_and_others_take_effect(both: Both) -> None:
    first, second = BULKS["an FFN"], BULKS["vectors and maps"]
    both.set_plan(first, [second, first])
    for each in (both.llm, both.history):
        each.eval(tokens(N))
    tag = both.llm._adaskip.plan_tag()
    copies = [pickle.loads(pickle.dumps(plan)) for plan in (first, first, second)]
    both.llm.set_plan(copies[0], readable=copies)
    assert both.llm._adaskip.plan_tag() == tag
    assert evaluated(both.llm, lambda: next(both.llm.generate(tokens(N), temp=0))) == []
    both.set_plan(None, [first])
    assert (both.llm.plan, both.llm.readable) == (None, (first,))
    assert both.eval([7]) == [N]
    both.set_plan(None)
    assert (both.llm.plan, both.llm.readable) == (None, ())
    assert both.eval([8]) == list(range(HEAD, N + 2))


def test_what_cannot_be_read_is_refused_and_the_plan_in_force_stays(open_tiny: Open) -> None:
    llm, plan = open_tiny("jamba"), SkipPlan.manual(3, ffn=[1], phase="bulk")  # no attention in layers 0 and 2
    llm.set_plan(plan, readable=[plan])
    bad: dict[type[Exception], Any] = {
        NotSkippableError: SkipPlan.manual(3, attention=[0], phase="bulk"),
        ProfileMismatchError: replace(plan, model=ModelInfo("sha256:0", "jamba", 3)),
        PlanError: SkipPlan.manual(4, ffn=[1], phase="bulk"),
    }
    for error, each in bad.items():
        with pytest.raises(error):
            llm.set_plan(None, readable=[plan, each])
    with pytest.raises(PlanError, match="expected a SkipPlan"):
        llm.set_plan(None, readable=[None])  # type: ignore[list-item]
    assert (llm.plan, llm.readable) == (plan, (plan,))


def test_a_pickled_model_reads_what_it_read(open_tiny: Open) -> None:
    llm = open_tiny()
    llm.set_plan(None, readable=[BULKS["vectors and maps"]])
    other = pickle.loads(pickle.dumps(llm))
    assert (other.plan, other.readable) == (None, (BULKS["vectors and maps"],))
    other.close()


# -- ids -------------------------------------------------------------------------------------------------------------


def test_the_id_of_a_bulk_is_what_its_cells_are_saved_with(open_tiny: Open) -> None:
    ids = set()
    for plan in BULKS.values():
        llm, other = open_tiny(), open_tiny()
        found = other._adaskip.bulk_set_id(pickle.loads(pickle.dumps(plan)))
        llm.set_plan(plan)
        llm.eval(tokens(N))
        assert struct.pack("=Q", found) in bytes(llm.save_state().llama_state)
        assert other._adaskip.plan_tag() == 0, "nothing was set"
        ids.add(found)
    assert len(ids) == len(BULKS)


def test_the_id_tells_what_a_position_of_the_bulk_was_computed_with(open_tiny: Open) -> None:
    # The head counts where windows begin with it; the tail never does, nor the window of what is skipped.
    id_of = open_tiny()._adaskip.bulk_set_id
    windows, ffn = BULKS["windows"], BULKS["an FFN"]
    assert id_of(prompt_plan(FFN, head=7, tail=9)) == id_of(ffn)
    assert id_of(replace(windows, bulk=replace(windows.bulk, head=7))) != id_of(windows)
    assert id_of(replace(windows, bulk=replace(windows.bulk, tail=9))) == id_of(windows)
    assert id_of(prompt_plan(ATTENTION, windowed=(1,))) == id_of(BULKS["an attention"]) != 0
    assert id_of(prompt_plan(NOTHING)) == id_of(same(FFN)) == 0, "the whole model"


# -- saved states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["both", "bulk"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "jamba"])
def test_a_saved_state_is_read_under_its_plan_or_where_that_is_named_and_evaluated_again_elsewhere(
    family: str, phase: Any, open_tiny: Open
) -> None:
    plan, other = (SkipPlan.manual(N_LAYER, ffn=[1], scale=s, phase=phase) for s in (1.0, 0.9))
    reader, named = (other, [plan]) if phase == "bulk" else (plan, [])
    saver, loader, without = (open_tiny(family) for _ in range(3))
    saver.set_plan(plan)
    saver.eval_bulk(tokens(9))
    state = pickle.loads(pickle.dumps(saver.save_state()))
    for llm in (loader, without):
        llm.load_state(state)
    for llm in (saver, loader):
        llm.set_plan(reader, readable=named)
    without.set_plan(other)
    assert evaluated(loader, lambda: loader.eval([7])) == [9]
    assert evaluated(without, lambda: without.eval([7])) == list(range(10))
    saver.eval([7])
    np.testing.assert_allclose(logits(loader), logits(saver), rtol=1e-4, atol=1e-4)  # gemma3's cells lie elsewhere


# -- the bare context ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unified", [True, False])
def test_what_is_not_named_is_refused(unified: bool, bare: Open, reference: ReferenceModel) -> None:
    context, run, plan = bare(unified=unified), ReferenceRun(reference), BULKS["vectors and maps"]
    context.set_plan(plan)
    context.native.set_phase("bulk")
    context.decode(s1=(0, tokens(7)))
    context.native.set_phase("prefill")
    for reader in (None, BULKS["an FFN"]):
        context.set_plan(reader)
        with pytest.raises(StateError, match="position 0 of sequence 1"):
            context.decode(s1=(7, [7]))
        context.native.set_plan(reader, 99, [context.native.bulk_set_id(BULKS["an attention"])])
        with pytest.raises(StateError, match="position 0 of sequence 1"):
            context.decode(s1=(7, [7]))
    context.native.set_plan(None, 100, [0, context.native.bulk_set_id(plan)])
    assert context.native.plan_tag() == 100
    run.eval(tokens(7), *arguments(MAPS), keeps_kv=True)
    assert relative_error(context.decode(s1=(7, [7]))["s1"], run.eval([7]).logits) < TOLERANCE
